"""The inputs and outputs of an instantiated graph, each pointed at the caller's tensor or copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphcache.graphs import driver
from graphcache.graphs.buffers import nbytes_of
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

    __slots__ = ("_arguments", "_offset", "_setter", "_word", "address", "buffer", "mask", "pointers")

    def __init__(self, buffer: Tensor, pointers: Sequence[Pointer], alignment: int) -> None:
        self.buffer = buffer
        self.pointers = tuple(pointers)
        self.mask = alignment - 1
        self.address = -1
        """Where the graph reads or writes; -1 if that is not known, or if the tensor is copied."""
        # Of a single pointer, the usual case: two calls and a loop less at every hit.
        one = self.pointers[0] if len(self.pointers) == 1 else None
        self._setter: Any = one.setter if one is not None else None
        self._word: Any = one.word if one is not None else None
        self._offset = one.offset if one is not None else 0
        self._arguments: Sequence[Any] = one.arguments if one is not None else ()

    def point(self, executable: Any, address: int) -> bool:
        """Use another address from the next launch on; ``False`` if it cannot be, so that nothing changed.

        Raises:
            CudaError: If the driver refuses. The slot knows then that it does not know where it points.
        """
        if address & self.mask or not address or not self.pointers:
            return False
        # Not what the graph has, until the driver has taken it.
        self.address = -1
        if self._setter is not None:
            self._word.value = address + self._offset
            code = self._setter(executable, *self._arguments)[0]
            if code:
                raise driver.failure(self._setter.__name__, code)
        else:
            for pointer in self.pointers:
                pointer.set(executable, address)
        self.address = address
        return True

    @property
    def place(self) -> tuple[Any, Any, int, Sequence[Any]] | None:
        """Of the only pointer: the driver's function, the word, the offset and the arguments; otherwise ``None``."""
        if self._setter is None:
            return None
        return self._setter, self._word, self._offset, self._arguments

    @property
    def raw(self) -> tuple[Slot, int, int, tuple[tuple[bool, int, int, int, int, int], ...]]:
        """For compiled code: this object, ``mask``, the size of the buffer in bytes, and the pointers."""
        return self, self.mask, nbytes_of([self.buffer]), tuple([pointer.raw for pointer in self.pointers])

    def take(self, executable: Any, tensor: Tensor) -> None:
        """Use an input's values at the next launch, in place or through the static buffer."""
        if not self.point(executable, tensor.data_ptr()):
            self.buffer.copy_(tensor)
            self.point(executable, self.buffer.data_ptr())

    def fresh(self) -> Tensor:
        """A new tensor of the same shape, strides and dtype."""
        return torch.empty_like(self.buffer)
