"""The inputs and outputs of a captured graph, each pointed at the caller's tensor or copied."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphcache.graphs.buffers import extent_of, hollow_like, put
from graphcache.graphs.param_patching import Pointer

ALIGNMENT = 256
"""In bytes: what TensorRT documents for bindings, so that a kernel may rely on it. Torch allocates at 512."""


class IoSlot:
    """One input or output of a graph.

    Args:
        buffer: The static tensor that the graph was captured with.
        pointers: Where its address stands; empty if the tensor has to be copied by an operation of its own.
        alignment: What the caller's address must be divisible by to be used as it is; 1 where a node copies from it.
    """

    __slots__ = ("buffer", "mask", "nbytes", "pointers")

    def __init__(self, buffer: Tensor, pointers: Sequence[Pointer], alignment: int) -> None:
        self.buffer = buffer
        self.pointers = tuple(pointers)
        self.mask = alignment - 1
        self.nbytes = extent_of(buffer)

    def fits(self, address: int) -> bool:
        """Whether the graph can be pointed there."""
        return bool(self.pointers and address and not address & self.mask)

    def take(self, tensor: Tensor) -> int:
        """The address of an input for the next launch: the tensor's, or the static buffer's after a copy."""
        address = tensor.data_ptr()
        if self.fits(address):
            return address
        put(self.buffer, tensor)
        return self.address

    def let_go(self) -> None:
        """Give up the buffer's memory and keep its layout, where nothing reads it but the graph that writes it."""
        self.buffer = hollow_like(self.buffer)

    @property
    def address(self) -> int:
        """Of the static buffer; 0 if the graph cannot be pointed anywhere."""
        return self.buffer.data_ptr() if self.pointers else 0

    @property
    def raw(self) -> tuple[int, int, tuple[tuple[bool, int, int, int, int, int], ...]]:
        """For native code: ``mask``, the size of the buffer in bytes, and the pointers."""
        return self.mask, self.nbytes, tuple([pointer.raw for pointer in self.pointers])

    def fresh(self) -> Tensor:
        """A new tensor of the same shape, strides and dtype."""
        return torch.empty_like(self.buffer)
