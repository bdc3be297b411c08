"""A captured graph that outlives its executables, and can be instantiated again for other static buffers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from graphcache.errors import CudaError
from graphcache.graphs import driver
from graphcache.graphs.buffers import hollow_like
from graphcache.graphs.cuda import CudaGraph
from graphcache.graphs.lane import Lane
from graphcache.graphs.pointers import Pointer
from graphcache.graphs.slots import ALIGNMENT, Slot


class Template:
    """A ``CUgraph`` with every place known where an address of an input or output stands.

    It takes no memory of the device: its nodes are the host's, and its static buffers are made when it is instantiated.
    What its kernels refer to besides (an execution context, scratch memory) it keeps alive. NVIDIA calls the graph that
    executables are made of a template.

    Whoever holds it says so with :meth:`hold` and :meth:`let_go`; after the last one it is destroyed. A graph holds it
    until its own last launch has finished. All of it is for whoever holds the lane's lock.

    Args:
        captured: The ``CUgraph``, which is the template's from now on.
        tensors: What it was captured with: the inputs on the device, then the outputs.
        pointers: For each, all places where its address stands.
        direct: For each, whether the graph may be pointed at the caller's tensor; otherwise that is copied.
        inputs: How many of them are inputs.
        lane: Orders the launches of its graphs.
        keep: What its kernels refer to.
    """

    __slots__ = ("__weakref__", "_captured", "_direct", "_held", "_inputs", "_keep", "_lane", "_looks", "_pointers")

    def __init__(
        self,
        captured: Any,
        tensors: Sequence[Tensor],
        pointers: Sequence[Sequence[Pointer]],
        direct: Sequence[bool],
        *,
        inputs: int,
        lane: Lane,
        keep: object,
    ) -> None:
        self._captured = captured
        self._looks = [hollow_like(tensor) for tensor in tensors]
        self._pointers = [tuple(places) for places in pointers]
        self._direct = list(direct)
        self._inputs = inputs
        self._lane = lane
        self._keep = keep
        self._held = 0

    def graph(self, tensors: Sequence[Tensor], *, upload: bool = True) -> CudaGraph:
        """A graph whose static buffers are the tensors that it was captured with, or last moved to.

        Args:
            tensors: These.
            upload: As for :class:`~graphcache.graphs.cuda.CudaGraph`.

        Raises:
            CudaError: If the driver refuses to instantiate.
            Refusal: If there is nothing to launch.
        """
        slots = [
            Slot(tensor, places if direct else (), ALIGNMENT)
            for tensor, places, direct in zip(tensors, self._pointers, self._direct, strict=True)
        ]
        self.hold()
        return CudaGraph(
            self._captured,
            inputs=slots[: self._inputs],
            outputs=slots[self._inputs :],
            lane=self._lane,
            keep=self._keep,
            release=self.let_go,
            template=self,
            upload=upload,
        )

    def again(self) -> CudaGraph:
        """One more graph, with static buffers of its own; those of the one before are needed no more.

        Its first launch uploads it: nobody waits for a stream here.

        Raises:
            CudaError: If the driver refuses to change a node, or to instantiate.
            torch.cuda.OutOfMemoryError: If there is no memory for the buffers.
        """
        with torch.inference_mode(False):
            tensors = [torch.empty_like(look) for look in self._looks]
        self._move(tensors)
        return self.graph(tensors, upload=False)

    def hold(self) -> None:
        """Keep it until :meth:`let_go`."""
        self._held += 1

    def let_go(self) -> None:
        """Hold it no more; if nobody else does, it is destroyed."""
        self._held -= 1
        if self._held == 0:
            self._destroy()

    def _move(self, tensors: Sequence[Tensor]) -> None:
        """Point the graph itself at other static buffers, as if it had been captured with them."""
        nodes: dict[int, Pointer] = {}
        for tensor, places in zip(tensors, self._pointers, strict=True):
            for pointer in places:
                pointer.word.value = tensor.data_ptr() + pointer.offset
                nodes[int(pointer.arguments[0])] = pointer
        for pointer in nodes.values():
            pointer.point_template()

    def _destroy(self) -> None:
        captured, self._captured = self._captured, None
        self._keep = None
        if captured is not None:
            driver.call("cuGraphDestroy", captured)

    def __del__(self) -> None:
        # Nobody said that it was needed no more. What was launched of it, and is not over, would hold it; but a graph
        # that goes in the same collection may be asked after it.
        if getattr(self, "_captured", None) is not None and not sys.is_finalizing():
            with suppress(CudaError):
                self._destroy()
