"""Modules made of functions, and what "the same answer" means."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import graphcache
from graphcache import CachedModule, Reason, config
from graphcache.cache import graph_cache
from graphcache.cache.graph_cache import GraphCache
from graphcache.capture.recording import Recording
from graphcache.dispatch.dispatcher import Dispatcher
from graphcache.modules import transparent


class Fn(nn.Module):
    """A module whose forward is a function of it and of the arguments; attributes as ``nn.Module`` would take them."""

    def __init__(self, function: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def frozen(module: nn.Module) -> nn.Module:
    """The module for inference: no gradients, eval mode."""
    return module.requires_grad_(False).eval()


def mlp(width: int = 4) -> nn.Module:
    return frozen(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)))


def wrap_recorded(
    module: Any, *, io: str = "bind", edges: str = "captured", contexts: Any = "auto", **options: Any
) -> CachedModule:
    """``graphcache.wrap``, with engines recorded in one way of those between which ``isolation`` chooses."""
    with pytest.MonkeyPatch.context() as patch:
        chosen = config.RecordingOptions(bind=io == "bind", full_edges=edges == "full", contexts=contexts)
        patch.setitem(config.RECORDING, "auto", chosen)
        return graphcache.wrap(module, **options)


def same(left: Any, right: Any) -> bool:
    """Equal structure, types, shapes, dtypes, strides and bits."""
    if type(left) is not type(right):
        return False
    if isinstance(left, Tensor):
        return (
            (left.shape, left.dtype, left.device) == (right.shape, right.dtype, right.device)
            and (left.numel() == 0 or strides(left) == strides(right))
            and torch.equal(bits(left), bits(right))
        )
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[name], right[name]) for name in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(repr(left) == repr(right))


def strides(tensor: Tensor) -> list[int]:
    """Those that say anything: of dimensions with more than one element."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def bits(tensor: Tensor) -> Tensor:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    flat.copy_(tensor.detach().reshape(-1))
    return flat if flat.dtype is torch.bool else flat.view(torch.uint8)


def outcomes(module: CachedModule) -> tuple[int, int, dict[Reason, int]]:
    """Hits, captures, eager calls by reason."""
    info = module.cache_info()
    return info.hits, info.captures, info.eager


def calls(module: CachedModule) -> int:
    """Calls that the account knows of."""
    hits, captures, eager = outcomes(module)
    return hits + captures + sum(eager.values())


def replays(module: CachedModule, *args: Any, **kwargs: Any) -> bool:
    """Whether a call is a hit."""
    before = module.cache_info().hits
    module(*args, **kwargs)
    return module.cache_info().hits == before + 1


def reason(module: CachedModule, *args: Any, **kwargs: Any) -> Reason | None:
    """Why a call runs eagerly; ``None`` if it does not."""
    before = module.cache_info().eager
    module(*args, **kwargs)
    after = module.cache_info().eager
    return next((why for why in after if after[why] != before.get(why, 0)), None)


def in_background() -> bool:
    """Whether a worker is here, read from the stack: to ask for the thread would be an effect of a call."""
    frame, names = sys._getframe(), set()
    while frame.f_back is not None:
        frame = frame.f_back
        names.add(frame.f_code.co_name)
    return {"_bootstrap", "_work"} <= names


def in_threads(work: Callable[[int], Any], count: int = 4) -> None:
    """Run ``work`` in threads that start together; what one of them raises is raised here."""
    failed: list[BaseException] = []
    start = threading.Barrier(count)

    def run(index: int) -> None:
        start.wait()
        try:
            work(index)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def tensors(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Tensor:
    """A tensor of any small shape, contiguous or not; its values follow from a seed."""
    shape, dtype = draw(shapes), draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    layout = draw(st.sampled_from(("dense", "transposed", "strided", "expanded")))
    if layout == "strided":
        whole = torch.randn((*shape, 2), generator=generator) * 3
        return whole.to(dtype)[..., 0]
    tensor = (torch.randn(shape, generator=generator) * 3).to(dtype)
    if layout == "transposed":
        return tensor.permute(tuple(reversed(range(tensor.dim()))))
    return tensor.unsqueeze(0).expand(3, *shape) if layout == "expanded" else tensor


constants = st.sampled_from(
    [True, False, 0, 1, -1, 0.0, -0.0, 1.0, float("nan"), float("inf"), 1j, "", "1", b"1", None, torch.float32, 2**70]
)


def structures(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Nested tuples, lists and dictionaries."""
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        ),
        max_leaves=6,
    )


def settled(fast: Any) -> Any:
    """The module, when nothing is captured beside its calls any more."""
    for pending in list(dispatcher_of(fast).queue._pending.values()):
        assert pending.done.wait(60)
    return fast


def own_budgets(patch: pytest.MonkeyPatch) -> None:
    """No graphs and no budget of another test's count."""
    patch.setattr(graph_cache, "_budgets", {})
    patch.setattr(graph_cache, "_default", [])


def dispatcher_of(fast: nn.Module) -> Dispatcher:
    """What answers the calls of a wrapped module, for tests that have to look inside."""
    return transparent.dispatcher_of(fast)


def graphs_of(fast: nn.Module) -> GraphCache[Recording]:
    """The graphs of a wrapped module as a whole."""
    return dispatcher_of(fast).captures.graphs
