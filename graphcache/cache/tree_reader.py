"""From a tree (:mod:`graphcache.cache.tree`) to the arguments of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphcache.cache.tree import (
    DEEPEST,
    DEVICE,
    MOST_AXES,
    MOST_BITS,
    MOST_BYTES,
    NAMED,
    OF_TENSORS,
    TreeError,
    contiguous,
    extent,
)
from graphcache.errors import shown

Make = Callable[[torch.dtype, tuple[int, ...], tuple[int, ...], bool], Any]
"""From dtype, shape, stride, and whether it lies on the CPU beside others on a device, to what stands for a tensor."""


class Reader:
    """Reads the values of one call.

    Args:
        make: Makes what stands for each tensor.

    Example:
        >>> Reader(lambda dtype, shape, stride, host: shape).read([{"tensor": {"dtype": "int8", "shape": [2]}}], "call")
        [(2,)]
    """

    def __init__(self, make: Make) -> None:
        self._make = make
        self._tensors: list[Any] = []
        self._uses = 0

    def read(self, node: Any, where: str, depth: int = 0) -> Any:
        """The value of a tree.

        Raises:
            TreeError: If it has none.
        """
        if depth > DEEPEST:
            raise TreeError(where, "deeper", f"at most {DEEPEST} containers in one another")
        if node is None or type(node) in (bool, str):
            return node
        if type(node) is int:
            if node.bit_length() > MOST_BITS:
                raise TreeError(where, node, f"at most {MOST_BITS} bits")
            return node
        if type(node) is list:
            return self._each(node, where, depth)
        if type(node) is not dict or len(node) != 1:
            raise TreeError(where, node, "a value, a list, or an object with one key")
        [(tag, inner)] = node.items()
        where = f"{where}.{tag}" if tag in _READ else where
        if tag not in _READ:
            raise TreeError(where, node, f"one of the keys {', '.join(_READ)}")
        return _READ[tag](self, inner, where, depth)

    def _each(self, node: Any, where: str, depth: int) -> list[Any]:
        if type(node) is not list:
            raise TreeError(where, node, "a list")
        return [self.read(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(node)]

    def _constant(self, node: Any, where: str, depth: int) -> Any:
        before = self._uses
        value = self.read(node, where, depth + 1)
        if self._uses > before:
            raise TreeError(where, node, "a constant, as no tensor can stand there")
        return value

    def _dict(self, node: Any, where: str, depth: int) -> dict[Any, Any]:
        if type(node) is not list or any(type(pair) is not list or len(pair) != 2 for pair in node):
            raise TreeError(where, node, "a list of pairs")
        found = {}
        for name, item in node:
            key = self._constant(name, f"a key of {where}", depth)
            try:
                known = key in found
            except TypeError as error:
                raise TreeError(f"a key of {where}", name, "a constant that can be a key") from error
            if known:
                raise TreeError(f"a key of {where}", name, "each key once")
            found[key] = self.read(item, f"{where}[{shown(key)}]", depth + 1)
        return found

    def _three(self, node: Any, where: str, depth: int) -> list[Any]:
        if type(node) is not list or len(node) != 3:
            raise TreeError(where, node, "start, stop and step")
        return [self._constant(item, where, depth) for item in node]

    def _range(self, node: Any, where: str, depth: int) -> range:
        three = self._three(node, where, depth)
        if any(type(number) is not int for number in three) or three[2] == 0:
            raise TreeError(where, node, "three whole numbers, the last of them not 0")
        return range(*three)

    def _complex(self, node: Any, where: str, depth: int) -> complex:
        if type(node) is not list or len(node) != 2:
            raise TreeError(where, node, "two numbers")
        return complex(_float(node[0], where), _float(node[1], where))

    def _tensor(self, node: Any, where: str, depth: int) -> Any:
        if type(node) is not dict or not {"dtype", "shape"} <= node.keys() <= {"dtype", "shape", "stride", "host"}:
            raise TreeError(where, node, "'dtype' and 'shape', and maybe 'stride' and 'host'")
        dtype = _one_of(node["dtype"], f"{where}.dtype", OF_TENSORS)
        shape = _sizes(node["shape"], f"{where}.shape")
        stride = _sizes(node["stride"], f"{where}.stride") if "stride" in node else contiguous(shape)
        if len(stride) != len(shape):
            raise TreeError(f"{where}.stride", node["stride"], f"{len(shape)} numbers")
        if extent(shape, stride) * dtype.itemsize > MOST_BYTES:
            raise TreeError(where, node, f"a tensor of at most {MOST_BYTES} bytes")
        if type(node.get("host", True)) is not bool:
            raise TreeError(f"{where}.host", node["host"], "true or false")
        self._uses += 1
        self._tensors.append(self._make(dtype, shape, stride, node.get("host", False)))
        return self._tensors[-1]

    def _again(self, node: Any, where: str, depth: int) -> Any:
        if type(node) is not int or not 0 <= node < len(self._tensors):
            raise TreeError(where, node, f"the place of one of {len(self._tensors)} tensors before it")
        self._uses += 1
        return self._tensors[node]


def _sizes(node: Any, where: str) -> tuple[int, ...]:
    if type(node) is not list or len(node) > MOST_AXES:
        raise TreeError(where, node, f"a list of at most {MOST_AXES} numbers")
    for number in node:
        if type(number) is not int or not 0 <= number < 2**63:
            raise TreeError(where, number, "whole numbers from 0 to 2**63 - 1")
    return tuple(node)


def _float(node: Any, where: str) -> float:
    if type(node) is str and len(node) <= 32:
        try:
            return float.fromhex(node)
        except (ValueError, OverflowError):
            pass
    raise TreeError(where, node, "a number as float.hex writes it")


def _bytes(node: Any, where: str) -> bytes:
    if type(node) is str:
        try:
            return bytes.fromhex(node)
        except ValueError:
            pass
    raise TreeError(where, node, "hexadecimal digits")


def _one_of(node: Any, where: str, known: dict[str, Any]) -> Any:
    if type(node) is not str or node not in known:
        raise TreeError(where, node, f"one of {', '.join(sorted(known))}")
    return known[node]


def _device(node: Any, where: str) -> torch.device:
    if type(node) is not str or not DEVICE.fullmatch(node):
        raise TreeError(where, node, "a device such as cuda:0")
    return torch.device(node)


_READ: dict[str, Callable[[Reader, Any, str, int], Any]] = {
    "tuple": lambda reader, node, where, depth: tuple(reader._each(node, where, depth)),
    "dict": Reader._dict,
    "float": lambda reader, node, where, depth: _float(node, where),
    "complex": Reader._complex,
    "bytes": lambda reader, node, where, depth: _bytes(node, where),
    "slice": lambda reader, node, where, depth: slice(*reader._three(node, where, depth)),
    "range": Reader._range,
    "size": lambda reader, node, where, depth: torch.Size(_sizes(node, where)),
    "dtype": lambda reader, node, where, depth: _one_of(node, where, NAMED["dtype"]),
    "layout": lambda reader, node, where, depth: _one_of(node, where, NAMED["layout"]),
    "memory_format": lambda reader, node, where, depth: _one_of(node, where, NAMED["memory_format"]),
    "device": lambda reader, node, where, depth: _device(node, where),
    "tensor": Reader._tensor,
    "again": Reader._again,
}
