"""Arguments as a JSON tree, tensors without their values, and back.

::

    None, True, 5, "a"         as in JSON
    [1, 2]                     [1, 2]
    (1, 2)                     {"tuple": [1, 2]}
    {"a": 1}                   {"dict": [["a", 1]]}
    -0.0                       {"float": "-0x0.0p+0"}
    1j                         {"complex": ["0x0.0p+0", "0x1.0000000000000p+0"]}
    b"a"                       {"bytes": "61"}
    slice(2), range(2)         {"slice": [null, 2, null]}, {"range": [0, 2, 1]}
    torch.Size([2])            {"size": [2]}
    torch.float16              {"dtype": "float16"}; likewise "device", "layout", "memory_format"
    torch.zeros(2, 3)          {"tensor": {"dtype": "float32", "shape": [2, 3]}}, with "stride" where it is not
                               contiguous, and "host" where it lies on the CPU beside others on a device
    the same tensor again      {"again": 0}, by its place among the tensors

Nothing here names code: a tree that was tampered with gives other arguments, or a :class:`TreeError`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from graphcache.errors import shown

DEEPEST = 32
"""Containers in one another."""
MOST_BITS = 1024
MOST_BYTES = 2**42
"""Of one tensor, 4 TiB: a shape beyond that is damage."""
MOST_AXES = 64


def _named(kind: type) -> dict[str, Any]:
    return {str(each).removeprefix("torch."): each for each in vars(torch).values() if type(each) is kind}


DTYPES = _named(torch.dtype)
OF_TENSORS = {name: each for name, each in DTYPES.items() if not re.match(r"q|bits|u?int[1-7]$", name)}
"""Dtypes that have zeros: neither quantised ones nor parts of a byte."""
NAMED = {"dtype": DTYPES, "layout": _named(torch.layout), "memory_format": _named(torch.memory_format)}
TAGS: dict[type, str] = {torch.dtype: "dtype", torch.layout: "layout", torch.memory_format: "memory_format"}
DEVICE = re.compile(r"(cpu|cuda|meta|mps|xpu)(:[0-9]{1,3})?")


class TreeError(ValueError):
    """A tree that holds no arguments: where, what was seen, and what was expected."""

    def __init__(self, where: str, seen: object, expected: str) -> None:
        self.where, self.seen, self.expected = where, seen, expected
        super().__init__(f"{where} is {shown(seen)}; expected {expected}")


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a fresh tensor.

    Example:
        >>> contiguous((2, 0, 3))
        (3, 3, 1)
    """
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from a tensor's first to its last in memory.

    Example:
        >>> extent((3, 2), (1, 10)), extent((3, 0), (1, 1)), extent((), ())
        (13, 0, 1)
    """
    return 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
