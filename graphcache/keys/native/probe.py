"""Prepares a compiled guard for this torch and this Python, and compares what it sees with what Python sees."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

_DTYPES = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.complex64: 9,
    torch.complex128: 10,
    torch.bool: 11,
    torch.bfloat16: 15,
}
"""torch's numbers of its dtypes, which are also those of its files and of its stable C functions."""

_PERMITTED = (
    DispatchKey.CPU,
    DispatchKey.CUDA,
    DispatchKey.ADInplaceOrView,
    DispatchKey.AutogradFunctionality,
    DispatchKey.AutocastCPU,
    DispatchKey.AutocastCUDA,
    DispatchKey.Conjugate,
    DispatchKey.Negative,
)
"""The dispatch keys of dense tensors in the memory of a CPU or GPU; sparse ones, wrappers and others have more."""


class Disagreement(Exception):
    """What a guard and Python say differently; never reaches the user."""


def prepare(library: Any) -> None:
    """Tell a library where the fields of tensors lie, and whether writes to dictionaries are reported.

    Call it in a thread of its own: modes of torch, which belong to the caller's thread, would change the samples.

    Raises:
        RuntimeError: If a field was not found.
        Disagreement: If it then reads something other than Python.
    """
    permitted = 0
    for key in _PERMITTED:
        permitted |= DispatchKeySet(key).raw_repr()
    dense: int = DispatchKeySet(DispatchKey.Dense).raw_repr()
    samples = tuple(map(_described, _samples(3)))
    library.probe(samples, (Tensor, torch.nn.Parameter), dense, permitted)
    for x in _samples(4):
        _, _, _, data, offset, keys, dtype, _, sizes, strides = _described(x)
        if library.read(x) != (data, offset, keys, dtype, sizes, strides):
            raise Disagreement(f"the fields of a {x.dtype} tensor of strides {x.stride()}")
    library.use_shortcuts(True)
    if _missed_write(library) is not None:
        library.use_shortcuts(False)
        if (missed := _missed_write(library)) is not None:
            raise Disagreement(f"a write to a dictionary: {missed}")


def _described(x: Tensor) -> tuple[Any, ...]:
    """A tensor and what Python tells of it, in the order of ``Sample`` in ``probe.h``."""
    storage = x.untyped_storage()
    keys: int = torch._C._dispatch_keys(x).raw_repr()
    addresses = (x._cdata, storage._cdata, storage.data_ptr())
    return (x, *addresses, x.storage_offset(), keys, _DTYPES[x.dtype], x.dim(), tuple(x.shape), x.stride())


def _samples(size: int) -> Iterator[Tensor]:
    """Tensors of every number of dimensions up to seven, at several offsets and of all dtypes."""
    numbers = torch.zeros(8 * size**7, dtype=torch.float32, device="cpu")
    for rank in range(8):
        yield numbers.as_strided((size,) * rank, [size**i for i in reversed(range(rank))], 11 * rank + size)
    for at, dtype in enumerate(_DTYPES):
        whole = torch.zeros(size + at, 2 * size, dtype=dtype, device="cpu")
        yield whole[1:, ::2]
        yield torch.nn.Parameter(whole.T, requires_grad=False)
    yield torch._neg_view(numbers[size:])
    yield torch.zeros(size, dtype=torch.complex64, device="cpu").conj()
    yield torch.zeros(size, device="cpu", requires_grad=True)
    # Memory of another owner: its address is not also that of what frees it.
    yield torch.frombuffer(bytearray(16 * size), dtype=torch.uint8)
    with torch.inference_mode():
        yield torch.zeros(size, 1, device="cpu")


class _Plain:
    """An object whose attributes are in a dictionary that CPython may keep in the object."""

    def __init__(self) -> None:
        self.one: object = object()
        self.two: object = object()


def _store(owner: Any, times: int = 50) -> None:
    """Set an attribute often enough for CPython to specialise the instruction."""
    for _ in range(times):
        owner.one = object()


def _delete(owner: Any) -> None:
    del owner.one


def _exchange(owner: Any) -> None:
    owner.__dict__["two"] = owner.__dict__.pop("one")


def _through_module(owner: torch.nn.Module) -> None:
    owner.train(not owner.training)


def _register(owner: torch.nn.Module) -> None:
    owner.register_forward_hook(print)


def _missed_write(library: Any) -> str | None:
    """A kind of write that a guard does not notice; ``None`` if it notices all."""
    for _ in range(2):
        _store(_Plain())
    writes: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
        *((_Plain, write) for write in (_store, lambda owner: _store(owner, 1), _delete, _exchange)),
        (_Plain, lambda owner: setattr(owner, "three", 3)),
        (_Plain, lambda owner: owner.__dict__.update(one=1)),
        (_Plain, lambda owner: owner.__dict__.clear()),
        (torch.nn.Module, _through_module),
        (torch.nn.Module, _register),
        (torch.nn.Module, lambda owner: owner.register_buffer("buffer", None)),
    ]
    for at, (make, write) in enumerate(writes):
        owner = make()
        if not _noticed(library, [owner.__dict__, *_within(owner)], partial(write, owner)):
            return f"{make.__name__}, kind {at}"
    for container in ({1: 2, 3: 4}, OrderedDict({1: 2, 3: 4})):
        if not _noticed(library, [container], container.popitem):
            return f"{type(container).__name__}.popitem"
    kind = type("_Class", (), {"one": 1})
    if not _noticed(library, gc.get_referents(vars(kind)), partial(setattr, kind, "two", 2)):
        return "an attribute of a class"
    ordered = OrderedDict({1: 2, 3: 4})
    return None if _noticed(library, [ordered], partial(ordered.move_to_end, 1)) else "OrderedDict.move_to_end"


def _within(owner: object) -> list[dict[Any, Any]]:
    return [value for value in vars(owner).values() if isinstance(value, dict)]


def _noticed(library: Any, containers: list[dict[Any, Any]], write: Callable[[], object]) -> bool:
    guard = library.Guard()
    for each in containers:
        guard.add_dict(each, tuple(each), tuple(each.values()))
    before = guard.holds() and guard.holds()
    write()
    return bool(before and not guard.holds())
