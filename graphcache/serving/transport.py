"""Tensors and errors on their way between Ray's processes.

Ray moves NumPy arrays without copying them into a pickle, and a view takes no more than it shows; a tensor would take
all the memory it is a view of. What NumPy has no type for (bfloat16, the float8 types) travels as
integers of its width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphcache.errors import GraphCacheError, ServingError

Packed = dict[str, tuple[str, Any]]
"""Name -> dtype as PyTorch calls it, and an array."""

_BITS = {1: torch.uint8, 2: torch.int16}
_NUMPY = {
    getattr(torch, name): name
    for name in (
        *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
}


def pack(tensors: Mapping[str, Tensor]) -> Packed:
    """Arrays for tensors in host memory; they share it where they can."""
    packed = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().contiguous()
        bits = plain if plain.dtype in _NUMPY else plain.view(_BITS[plain.dtype.itemsize])
        packed[name] = (str(plain.dtype).removeprefix("torch."), bits.numpy())
    return packed


def unpack(packed: Packed) -> dict[str, Tensor]:
    """Tensors from arrays, in memory of their own: what Ray hands out cannot be written to."""
    tensors = {}
    for name, (dtype, array) in packed.items():
        real = getattr(torch, dtype)
        tensor = torch.from_numpy(array.copy(order="C"))
        tensors[name] = tensor if tensor.dtype is real else tensor.view(real)
    return tensors


def told(error: BaseException) -> GraphCacheError:
    """What a replica raised, as it was before Ray wrapped it."""
    cause: BaseException = error
    while isinstance(inner := getattr(cause, "cause", None), BaseException) and inner is not cause:
        cause = inner
    if isinstance(cause, GraphCacheError):
        return cause
    return ServingError(f"the model raised {type(cause).__name__}: {' '.join(str(cause).split())[:500]}")
