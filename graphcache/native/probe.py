"""Prepares a library for this torch and this Python, and compares what it sees with what Python sees."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode

from graphcache.native.offsets import DTYPES, described, offsets_of, samples

_IGNORED = (
    DispatchKey.ADInplaceOrView,
    DispatchKey.AutogradFunctionality,
    DispatchKey.AutocastCPU,
    DispatchKey.AutocastCUDA,
)
_PERMITTED = (*_IGNORED, DispatchKey.CPU, DispatchKey.CUDA, DispatchKey.Conjugate, DispatchKey.Negative)
"""The dispatch keys of dense tensors in the memory of a CPU or GPU; sparse ones, wrappers and others have more."""


class Disagreement(Exception):
    """What a library and Python say differently; never reaches the user."""


def prepare(library: Any) -> None:
    """Tell a library where the fields of tensors lie, what a context is in which nothing is special, and check it.

    Call it in a thread of its own: modes of torch, which belong to the caller's thread, would change the samples.

    Raises:
        RuntimeError: If a field was not found.
        ImportError: If torch lacks a function.
        Disagreement: If it then sees something other than Python.
    """
    offsets = offsets_of([described(x) for x in samples(3)])
    if offsets_of([described(x) for x in samples(4)]) != offsets:
        raise Disagreement("where the fields of tensors are")
    keys = [_keys(DispatchKey.Dense), _keys(*_PERMITTED), _keys(*_IGNORED), _keys(DispatchKey.CPU)]
    types = (Tensor, torch.nn.Parameter)
    library.configure(torch._C.__file__, offsets, types, (*keys, _keys(DispatchKey.CUDA)))
    for inference in (False, True):
        with torch.inference_mode(inference):
            library.learn_quiet(inference)
    for check in (_layouts, _refusals, _context):
        with torch.no_grad():
            for what in check(library):
                raise Disagreement(what)
    library.use_shortcuts(True)
    if _missed_write(library) is not None:
        library.use_shortcuts(False)
        if (missed := _missed_write(library)) is not None:
            raise Disagreement(f"a write to a dictionary: {missed}")


def _keys(*keys: DispatchKey) -> int:
    found = 0
    for key in keys:
        found |= DispatchKeySet(key).raw_repr()
    return found


# ---- tensors


def _words(*tensors: Tensor) -> tuple[int, ...]:
    """What ``describe`` in ``call.h`` says of tensors of the CPU."""
    words = [len(tensors) << 1 | torch.is_inference_mode_enabled()]
    for x in tensors:
        words += [
            DTYPES[x.dtype] | x.dim() << 32,
            *(number for pair in zip(x.shape, x.stride(), strict=True) for number in pair),
        ]
    return tuple(words)


def _layouts(library: Any) -> Iterator[str]:
    plain = [x for x in (*samples(2), torch.empty(0), torch.empty(3, 0, 2)) if library.layout((x,)) is not None]
    if len(plain) < 25:
        yield f"how many tensors are plain, of which it found {len(plain)}"
    for x in plain:
        for inference in (False, True):
            with torch.inference_mode(inference):
                if library.layout((x,)) != _words(x):
                    yield f"the layout of a {x.dtype} tensor of strides {x.stride()}, or inference mode"
        if library.address(x) != x.data_ptr():
            yield "the address of a tensor"
    if library.layout((plain[1], plain[2])) != _words(plain[1], plain[2]):
        yield "several tensors"


class _Subclass(Tensor):
    pass


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


# ---- the context


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    pass


def _context(library: Any) -> Iterator[str]:
    """Of all that may be special in a context, each is noticed, and nothing when it has gone."""
    around: dict[str, AbstractContextManager[Any]] = {
        "gradients": torch.enable_grad(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "a dispatch mode": _Mode(),  # type: ignore[no-untyped-call]
    }
    for inference in (False, True):
        with torch.inference_mode(inference), torch.no_grad():
            if not library.is_quiet():
                yield "a context in which nothing is special"
            for name, context in around.items():
                with context:
                    if library.is_quiet():
                        yield name
    within: list[bool] = []

    def look(value: Tensor) -> Tensor:
        within.append(library.is_quiet() or library.layout((value,)) is not None)
        return value

    torch.func.vmap(look)(torch.ones(2, 2))
    was = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    within.append(library.is_quiet())
    torch.set_autocast_enabled("cuda", was)
    if any(within) or not library.is_quiet():
        yield "a transform, or autocast of another device"


# ---- dictionaries


class _Plain:
    """An object whose attributes are in a dictionary that CPython may keep in the object."""

    def __init__(self) -> None:
        self.one: object = object()
        self.two: object = object()


def _store(owner: Any, times: int = 50) -> None:
    """Set an attribute often enough for CPython to specialise the instruction."""
    for _ in range(times):
        owner.one = object()


def _missed_write(library: Any) -> str | None:
    """A kind of write that a guard does not notice; ``None`` if it notices all."""
    for _ in range(2):
        _store(_Plain())
    writes: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
        (_Plain, _store),
        (_Plain, lambda owner: _store(owner, 1)),
        (_Plain, lambda owner: delattr(owner, "one")),
        (_Plain, lambda owner: owner.__dict__.__setitem__("two", owner.__dict__.pop("one"))),
        (_Plain, lambda owner: setattr(owner, "three", 3)),
        (_Plain, lambda owner: owner.__dict__.update(one=1)),
        (_Plain, lambda owner: owner.__dict__.clear()),
        (torch.nn.Module, lambda owner: owner.train(False)),
        (torch.nn.Module, lambda owner: owner.register_forward_hook(print)),
        (torch.nn.Module, lambda owner: owner.register_buffer("buffer", None)),
    ]
    for at, (make, write) in enumerate(writes):
        owner = make()
        within = [value for value in vars(owner).values() if isinstance(value, dict)]
        if not _noticed(library, [owner.__dict__, *within], partial(write, owner)):
            return f"{make.__name__}, kind {at}"
    for container in ({1: 2, 3: 4}, OrderedDict({1: 2})):
        if not _noticed(library, [container], container.popitem):
            return f"{type(container).__name__}.popitem"
    kind = type("_Class", (), {"one": 1})
    noticed = _noticed(library, gc.get_referents(vars(kind)), partial(setattr, kind, "two", 2))
    return None if noticed else "an attribute of a class"


def _noticed(library: Any, containers: list[dict[Any, Any]], write: Callable[[], object]) -> bool:
    guard = library.Guard()
    for each in containers:
        guard.add_dict(each, tuple(each), tuple(each.values()))
    before = guard.holds() and guard.holds()
    write()
    return bool(before and not guard.holds())
