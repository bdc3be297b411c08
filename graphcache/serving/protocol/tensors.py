"""One tensor from the bytes or the JSON of a request, and into those of an answer: little-endian, row-major."""

from __future__ import annotations

import ctypes
import math
from array import array
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from graphcache.errors import shown
from graphcache.serving.protocol.problems import RequestError

MOST_DIMENSIONS = 64
_MOST_ELEMENTS = 2**62
_ARRAYS = {
    torch.uint8: "B",
    torch.uint16: "H",
    torch.uint32: "I",
    torch.uint64: "Q",
    torch.int8: "b",
    torch.int16: "h",
    torch.int32: "i",
    torch.int64: "q",
}


def check_shape(shape: object, where: str) -> tuple[int, ...]:
    """The shape that a request gives a tensor.

    Nothing is allocated for it: what is there is held against it later.
    """
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise RequestError(f"{where}: shape {shown(shape)}: expected a list of whole numbers, 0 or more")
    if len(shape) > MOST_DIMENSIONS:
        raise RequestError(f"{where}: shape of {len(shape)} dimensions; expected at most {MOST_DIMENSIONS}")
    # Strides are products of all sizes but the 0 ones, and are 64-bit numbers.
    if math.prod(filter(None, shape)) > _MOST_ELEMENTS:
        raise RequestError(f"{where}: shape {shown(shape)} is of more elements than there is memory for")
    return tuple(shape)


def from_binary(data: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor over some bytes; they are copied only where torch could not read them in place.

    That is where they are read-only, not aligned for the dtype, or of bools, of which torch bears only 0 and 1.
    """
    if not data.nbytes:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(bytearray(data) if data.readonly else data, dtype=torch.uint8)
    if dtype is torch.bool:
        return flat.ne(0).reshape(shape)
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).reshape(shape)


def from_json(data: object, dtype: torch.dtype, shape: tuple[int, ...], where: str) -> Tensor:
    """A tensor from nested lists of its shape, or from one flat list.

    ``NaN`` and ``Infinity`` are taken for floating dtypes, as Python's clients write them.
    """
    flat = _flat(data, shape, where)
    kinds = set(map(type, flat))
    allowed = {bool} if dtype is torch.bool else {int, float} if dtype.is_floating_point else {int}
    if not kinds <= allowed:
        wrong = next(each for each in flat if type(each) not in allowed)
        expected = {bool: "true and false", int: "whole numbers"}.get(next(iter(allowed)), "")
        expected = "numbers" if len(allowed) > 1 else expected
        raise RequestError(f"{where}: data holds {shown(wrong)}; expected {expected}")
    if not flat:
        return torch.empty(shape, dtype=dtype)
    try:
        values = array("B" if dtype is torch.bool else _ARRAYS.get(dtype, "d"), flat)
    except OverflowError as error:
        raise RequestError(f"{where}: data holds a number that {_name(dtype)} cannot: {error}") from error
    if dtype is torch.bool:
        return torch.frombuffer(values, dtype=torch.uint8).ne(0).reshape(shape)
    if not dtype.is_floating_point:
        return torch.frombuffer(values, dtype=dtype).reshape(shape)
    wide = torch.frombuffer(values, dtype=torch.float64)
    found = wide.to(dtype)
    if bool((found.isinf() & ~wide.isinf()).any()):
        raise RequestError(f"{where}: data holds a number that {_name(dtype)} cannot: it would be infinite")
    return found.reshape(shape)


def to_binary(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in host memory, without a copy where it is contiguous; they keep it alive."""
    dense = tensor.detach().resolve_neg().contiguous()
    if not dense.nbytes:
        return memoryview(b"")
    view: Any = (ctypes.c_ubyte * dense.nbytes).from_address(dense.data_ptr())
    view.owner = dense
    return memoryview(view)


def to_json(tensor: Tensor) -> list[Any]:
    """The elements of a tensor in one flat list."""
    found: list[Any] = tensor.detach().resolve_neg().flatten().tolist()
    return found


def _flat(data: object, shape: tuple[int, ...], where: str) -> list[Any]:
    if not isinstance(data, list):
        raise RequestError(f"{where}: data is of type {type(data).__name__}; expected a list")
    count = math.prod(shape)
    if not any(isinstance(each, list) for each in data):
        if len(data) != count:
            raise RequestError(f"{where}: data has {len(data)} elements; expected {count} for shape {list(shape)}")
        return data
    level: list[Any] = [data]
    for axis, size in enumerate(shape):
        if not all(isinstance(each, list) and len(each) == size for each in level):
            raise RequestError(f"{where}: data is not nested as shape {list(shape)} is, at axis {axis}")
        level = list(chain.from_iterable(level))
    return level


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
