"""The inputs and outputs of an instantiated graph, each pointed at the caller's tensor or copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphcache.graphs.pointers import Pointer

ALIGNMENT = 256
"""In bytes: what TensorRT documents for bindings, so that a kernel may rely on it. Torch allocates at 512."""


class Slot:
    """One input or output of a graph.

    Args:
        buffer: The static tensor that the graph was captured with.
        pointers: Where its address stands; empty if the tensor has to be copied by an operation of its own.
        alignment: What the caller's address must be divisible by to be used as it is; 1 where a node copies from it.
    """

    __slots__ = ("_mask", "_one", "address", "buffer", "pointers")

    def __init__(self, buffer: Tensor, pointers: Sequence[Pointer], alignment: int) -> None:
        self.buffer = buffer
        self.pointers = tuple(pointers)
        self._one = self.pointers[0].set if len(self.pointers) == 1 else None
        self._mask = alignment - 1
        self.address = -1
        """Where the graph reads or writes; -1 if that is not known, or if the tensor is copied."""

    def point(self, executable: Any, tensor: Tensor) -> bool:
        """Use ``tensor`` from the next launch on; ``False`` if it cannot be, so that nothing changed."""
        address = tensor.data_ptr()
        if address == self.address:
            return True
        if address & self._mask or not address or not self.pointers:
            return False
        # Not what the graph has, until the driver has taken it.
        self.address = -1
        if self._one is not None:
            self._one(executable, address)
        else:
            for pointer in self.pointers:
                pointer.set(executable, address)
        self.address = address
        return True

    def take(self, executable: Any, tensor: Tensor) -> None:
        """Use an input's values at the next launch, in place or through the static buffer."""
        if not self.point(executable, tensor):
            self.buffer.copy_(tensor)
            self.point(executable, self.buffer)

    def fresh(self) -> Tensor:
        """A new tensor of the same shape, strides and dtype."""
        return torch.empty_like(self.buffer)
