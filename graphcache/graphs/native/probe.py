"""Whether a compiled library sees what Python sees: of tensors, of the context, and of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from graphcache.graphs.operations import DispatchMode


class _Subclass(Tensor):
    pass


class _Mode(DispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def disagreement(library: Any) -> str | None:
    """What a library and Python see differently; ``None`` if nothing was found.

    CUDA tensors are compared if CUDA is in use already. It runs in a thread of its own: the caller's autocast or
    dispatch mode would be taken for a fault of the library.
    """
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(_disagreement, library).result()


def _disagreement(library: Any) -> str | None:
    with torch.no_grad():
        for look in (_layouts, _refusals, _memory, _context):
            for what in look(library):
                return what
    return None


def _plain(device: str) -> list[Tensor]:
    x = torch.empty(2, 3, 4, device=device)
    return [
        *(x, x[1:], x.transpose(0, 2), x[..., ::2], x.reshape(6, 4), x[0, 0, 0], x.expand(5, 2, 3, 4), x[:0]),
        *(x.to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)),
        torch.empty(2, 3, 4, dtype=torch.complex64, device=device),
    ]


def _devices() -> list[str]:
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return ["cpu", "cuda"] if in_use else ["cpu"]


def _layouts(library: Any) -> Iterator[str]:
    """As many layouts as Python tells apart, the same for the same."""
    seen: dict[Any, Any] = {}
    for x in [tensor for device in _devices() for tensor in _plain(device)]:
        ours = (x.dtype, tuple(x.shape), x.stride(), x.device)
        theirs = library.layout((x,))
        if theirs is None or theirs != library.layout((x.detach(),)) or seen.setdefault(theirs, ours) != ours:
            yield f"the layout of a {x.dtype} tensor of strides {x.stride()} on {x.device}"
        with torch.inference_mode():
            if library.layout((x,)) == theirs:
                yield "inference mode"
        if library.address(x) != x.data_ptr():
            yield "the address of a tensor"
    x, y = _plain("cpu")[:2]
    if library.layout((x, y)) is None or library.layout((x, y)) in (library.layout((y, x)), library.layout((x,))):
        yield "several tensors"


def _refusals(library: Any) -> Iterator[str]:
    x, named = torch.ones(2, 2), torch.ones(2, 2)
    named.scale = 2.0  # type: ignore[attr-defined]
    odd: list[tuple[Any, ...]] = [
        *((), (None,), (1.0,), ([x],), (named,), (x, x), (x, None), tuple(torch.ones(1) for _ in range(9))),
        *((torch.nn.Parameter(x),), (x.as_subclass(_Subclass),), (x.to_sparse(),), (x.to("meta"),)),
        *((torch._neg_view(x),), (torch.ones(2, dtype=torch.complex64).conj(),)),
    ]
    for args in odd:
        if library.layout(args) is not None:
            yield f"{len(args)} arguments of types {[type(value).__name__ for value in args]}"
    if library.layout([x]) is not None:
        yield "a list of arguments"


def _memory(library: Any) -> Iterator[str]:
    for x in [tensor for device in _devices() for tensor in _plain(device)]:
        for inference in (False, True):
            with torch.inference_mode(inference):
                made = library.empty_like(x)
            wanted = (Tensor, x.shape, x.stride(), x.dtype, x.device, inference, False)
            found = made is not None and (
                *(type(made), made.shape, made.stride(), made.dtype, made.device, made.is_inference()),
                made.requires_grad,
            )
            if found != wanted or (made.numel() and made.data_ptr() in (0, x.data_ptr())):
                yield f"new memory like a {x.dtype} tensor of strides {x.stride()} on {x.device}"


def _context(library: Any) -> Iterator[str]:
    if not library.is_quiet():
        yield "a context in which nothing is special"
    around: dict[str, Callable[[], Any]] = {
        "gradients": torch.enable_grad,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "a dispatch mode": _Mode,
    }
    for name, context in around.items():
        with context():
            if library.is_quiet():
                yield name
    within: list[bool] = []

    def look(value: Tensor) -> Tensor:
        within.append(library.is_quiet() or library.layout((value,)) is not None)
        return value

    torch.func.vmap(look)(torch.ones(2, 2))
    if any(within):
        yield "a transform"
    if not library.is_quiet():
        yield "a context that was left"
