"""Memory that is freed and overwritten while graphs that were captured beside it are still replayed, or still run."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache.graphs.stream_order import own_stream
from tests.helpers import dispatcher_of, graphs_of, wrap_recorded

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
networks = pytest.importorskip("tests.gpu.networks")


class Products(nn.Module):
    """Long and thin, square, and in half precision: products that cuBLAS splits, with a workspace for the parts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.thin = nn.Linear(8192, width)
        self.square = nn.Linear(width, 1024)
        self.narrow = nn.Linear(1024, 1024, dtype=torch.float16)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.square(torch.relu(self.thin(x))))
        return self.narrow(y.half()).float() + y


@pytest.fixture
def queues() -> Iterator[list[torch.cuda.Stream]]:
    """Streams that are kept alive."""
    streams = [torch.cuda.Stream() for _ in range(3)]
    yield streams
    torch.cuda.synchronize()


def overwrite(nbytes: int) -> None:
    """Give freed memory back to the device, take it again, and leave NaN in it."""
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    chunk = 1 << 26
    garbage = [torch.full((chunk // 4,), float("nan"), device="cuda") for _ in range(nbytes // chunk)]
    # Small blocks come from segments of their own.
    garbage += [torch.full((n,), float("nan"), device="cuda") for n in (128, 4096, 65536) for _ in range(64)]
    torch.cuda.synchronize()
    del garbage


def close(got: Tensor, wanted: Tensor, bound: float = 2e-3) -> bool:
    """Half precision is good for 2e-3; what was overwritten is NaN, or of another size altogether."""
    return bool((got.double() - wanted.double()).norm() <= bound * wanted.double().norm())


def test_closing_one_module_leaves_the_others_their_workspaces():
    """As pytorch/pytorch#193402, over modules: each has a memory pool of its own, cuBLAS one workspace per stream."""
    torch.manual_seed(1)
    modules = [Products(width).cuda().requires_grad_(False).eval() for width in (64, 96, 128, 64)]
    wrapped = [graphcache.wrap(module) for module in modules]
    inputs = [torch.randn(rows, 8192, device="cuda") for rows in (16, 64, 32, 8)]
    wanted = [module(x) for module, x in zip(modules, inputs, strict=True)]
    for fast, x in zip(wrapped, inputs, strict=True):
        fast(x)
    assert [fast.cache_info().captures for fast in wrapped] == [1] * 4
    for closed in range(3):
        wrapped[closed].close()
        overwrite(1 << 30)
        for other in range(closed + 1, 4):
            for _ in range(2):
                assert close(wrapped[other](inputs[other]), wanted[other]), (closed, other)
    assert [fast.cache_info().hits for fast in wrapped] == [0, 2, 4, 6]


def test_clearing_one_module_and_capturing_it_anew_leaves_the_others_right(load):
    torch.manual_seed(2)
    first, second = (Products(64).cuda().requires_grad_(False).eval() for _ in range(2))
    engine = graphcache.wrap(load("mlp8"))
    fast, steady = graphcache.wrap(first), graphcache.wrap(second)
    x, y = (torch.randn(32, 8192, device="cuda") for _ in range(2))
    z = torch.randn(6, networks.SIZE, device="cuda")
    for turn in range(4):
        assert close(fast(x), first(x)), turn
        assert close(steady(y), second(y)), turn
        assert close(engine(z), networks.mlp8_reference(z).cuda(), 5e-3), turn
        fast.clear()
        overwrite(1 << 28)
    assert (fast.cache_info().captures, steady.cache_info().hits, engine.cache_info().hits) == (4, 3, 3)


@pytest.mark.parametrize("kind", ["engine, bound", "engine, copied", "torch"])
def test_eviction_while_replays_wait_in_several_queues(kind, load, queues):
    """A graph is evicted, by another thread, while its replay has not begun; what is freed is overwritten at once."""
    torch.manual_seed(3)
    if kind == "torch":
        width, bound, module = 8192, 2e-3, Products(64).cuda().requires_grad_(False).eval()
    else:
        width, bound, module = networks.SIZE, 5e-3, load("mlp8")
    fast = wrap_recorded(module, io="copy" if kind == "engine, copied" else "bind")
    inputs = [torch.randn(rows, width, device="cuda") for rows in (3, 17, 33)]
    wanted = [module(x).clone() for x in inputs]
    for x in inputs:
        fast(x)
    keys = list(graphs_of(fast).entries)
    assert len(keys) == 3
    work = torch.randn(4096, 4096, device="cuda") / 64
    torch.cuda.synchronize()

    for turn in range(3):
        answers: list[Tensor] = []
        waiting: list[torch.cuda.Event] = []
        for stream, x in zip(queues, inputs, strict=True):
            with torch.cuda.stream(stream):
                busy = work
                for _ in range(30):
                    busy = busy @ work
                answers.append(fast(x))
                waiting.append(torch.cuda.Event())
                waiting[-1].record(stream)
        assert not any(event.query() for event in waiting), "the queues were empty too soon for this test to say much"
        evict_all(fast, keys)
        # What was allocated on the capture stream, or in the module's pool, can be had again there without waiting.
        with ExitStack() as there:
            there.enter_context(torch.cuda.stream(own_stream(0, "capture")))
            garbage = [torch.full((x.numel(),), float("nan"), device="cuda") for x in inputs * 32]
            if kind == "torch":
                # Ordered as any capture is: what was free when a capture ended, its own temporaries too,
                # is free for the next one, whose work follows all launches.
                order = dispatcher_of(fast).target.recorder._orders[0]
                order.enter(own_stream(0, "capture").cuda_stream)
                there.enter_context(order.pool().allocating())
            garbage += [torch.full((x.numel(),), float("nan"), device="cuda") for x in inputs * 32]
            garbage += [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(32)]
        torch.cuda.synchronize()
        for answer, right in zip(answers, wanted, strict=True):
            assert close(answer, right, bound), turn
        del garbage
        overwrite(1 << 28)
        for x, right in zip(inputs, wanted, strict=True):
            assert close(fast(x), right, bound), turn
    info = fast.cache_info()
    assert (info.captures, info.hits, info.evictions, info.eager) == (12, 9, 9, {})


def evict_all(fast: Any, keys: list[Any]) -> None:
    """One thread per graph."""
    gone: list[bool] = []
    threads = [threading.Thread(target=lambda key=key: gone.append(graphs_of(fast).evict(key))) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert gone == [True] * len(keys)


@pytest.mark.parametrize("kind", ["engine", "torch"])
def test_what_a_session_shows_survives_replays_of_other_graphs(kind, load):
    """Static outputs are the session's until its next run, whatever memory the module's other graphs work in."""
    torch.manual_seed(4)
    if kind == "torch":
        width, bound, module = 8192, 2e-3, Products(64).cuda().requires_grad_(False).eval()
    else:
        width, bound, module = networks.SIZE, 5e-3, load("mlp8")
    fast = graphcache.wrap(module)
    inputs = [torch.randn(rows, width, device="cuda") for rows in (16, 16, 8, 32)]
    for x in inputs:
        fast(x)
    with fast.session(inputs[0]) as session:
        session.run()
        shown = session.outputs.clone()
        assert close(shown, module(inputs[0]), bound)
        for x in inputs[1:]:
            fast(x)
        torch.cuda.synchronize()
        assert torch.equal(session.outputs, shown)
