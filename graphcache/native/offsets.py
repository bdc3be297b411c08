"""Where torch keeps the fields of a tensor: the one place at which every sample has what Python says of it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {
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


class Sample(NamedTuple):
    """A tensor, as Python tells it."""

    tensor: Tensor
    impl: int
    storage: int
    data: int
    offset: int
    keys: int
    dtype: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


def described(x: Tensor) -> Sample:
    """What Python tells of a tensor."""
    storage = x.untyped_storage()
    keys: int = torch._C._dispatch_keys(x).raw_repr()
    addresses = (x._cdata, storage._cdata, storage.data_ptr())
    return Sample(x, *addresses, int(x.storage_offset()), keys, DTYPES[x.dtype], tuple(x.shape), x.stride())


def samples(size: int) -> Iterator[Tensor]:
    """Tensors of every number of dimensions up to seven, at several offsets and of all dtypes."""
    numbers = torch.zeros(8 * size**7, dtype=torch.float32, device="cpu")
    for rank in range(8):
        yield numbers.as_strided((size,) * rank, [size**i for i in reversed(range(rank))], 11 * rank + size)
    for at, dtype in enumerate(DTYPES):
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


def offsets_of(told: Sequence[Sample]) -> tuple[int, ...]:
    """The offsets of impl, storage, offset, keys, dtype, rank and data, in this order.

    Raises:
        RuntimeError: If one was not found.
    """
    usable = ctypes.CDLL(None).malloc_usable_size
    usable.argtypes, usable.restype = [ctypes.c_void_p], ctypes.c_size_t
    objects = [ctypes.string_at(id(each.tensor), type(each.tensor).__basicsize__) for each in told]
    impls = [ctypes.string_at(each.impl, usable(each.impl)) for each in told]
    storages = [ctypes.string_at(each.storage, usable(each.storage)) for each in told]
    rank = _locate("rank", impls, [len(each.sizes) for each in told])
    for each, memory in zip(told, impls, strict=True):
        # Up to five sizes and strides are kept there, more of them elsewhere.
        kept = memoryview(memory[rank + 8 : rank + 88]).cast("q").tolist()
        count = len(each.sizes)
        if count <= 5 and (*kept[:count], *kept[5 : 5 + count]) != each.sizes + each.strides:
            raise RuntimeError("the place of the sizes and strides of a tensor is unknown")
    return (
        _locate("impl", objects, [each.impl for each in told]),
        _locate("storage", impls, [each.storage for each in told]),
        _locate("offset", impls, [each.offset for each in told]),
        _locate("keys", impls, [each.keys for each in told]),
        _locate("dtype", impls, [each.dtype for each in told], width=2),
        rank,
        _locate("data", storages, [each.data for each in told]),
    )


def _locate(name: str, memories: Sequence[bytes], values: Sequence[int], width: int = 8) -> int:
    """The only offset at which each memory has its value."""
    wanted = [value.to_bytes(width, "little") for value in values]
    # Past the reference count; a TensorImpl and a StorageImpl begin with a pointer to their methods.
    places = range(8, min(map(len, memories)) - width + 1, width)
    pairs = list(zip(memories, wanted, strict=True))
    found = [at for at in places if all(memory[at : at + width] == value for memory, value in pairs)]
    if len(found) != 1:
        raise RuntimeError(f"the place of the {name} of a tensor is unknown: {len(found)} candidates")
    return found[0]
