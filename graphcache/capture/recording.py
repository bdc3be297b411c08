"""What a capture makes of a call: a verified graph that repeats it, and how the graph's outputs become the answer."""

from __future__ import annotations

import enum
from bisect import bisect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphcache.graphs.graph import Graph
from graphcache.keys.call_key import KeyedCall
from graphcache.keys.state_snapshot import StateSnapshot

Build = Callable[[list[Tensor], Sequence[Tensor]], Any]
"""Makes the answer of a graph's outputs and the caller's inputs."""


@dataclass(eq=False)
class Recording:
    """A graph, and how its outputs become the module's answer."""

    graph: Graph
    build: Build
    nbytes: int
    """Memory of the graph, in bytes."""
    whole: bool
    """Whether the answer's leaves are the graph's outputs, all of them and in their order."""
    bare: bool = False
    """Whether the answer is the graph's only output itself."""
    enters_inference: bool = False
    """Whether outputs are inference tensors in whatever mode a call is: it enters inference mode by itself."""
    version: int = 0
    """That of the module's guard when the graph was captured."""
    updates: tuple[int, ...] = ()
    """Where memory begins and ends that a replay updates in place, but for tensors of the call; sorted."""
    in_place: tuple[int, ...] = ()
    """Tensors of the call that the graph uses where they are, by place."""
    written: tuple[int, ...] = ()
    """Tensors of the call that a replay updates: of a PyTorch module's some of those, of an engine's any."""
    held: StateSnapshot | None = None
    """What the objects among the arguments held."""
    ends: Sequence[object] = ()
    """What tells when one of these objects is no more."""

    @property
    def updates_state(self) -> bool:
        """Whether a replay updates what outlives the call, which cannot be taken back."""
        return bool(self.updates or self.written)

    def copies_state(self, tensors: Sequence[Tensor]) -> bool:
        """Whether a tensor that is copied lies in memory that a replay updates, so that the copy would be too early."""
        return any(lies_in(each, self.updates) for place, each in enumerate(tensors) if place not in self.in_place)

    def is_stale(self) -> bool:
        """Whether an object among the arguments is not what it was."""
        return self.held is not None and not self.held.holds()

    def replay(self, inputs: Sequence[Tensor], out: list[Tensor] | None = None) -> list[Tensor]:
        """Run the graph on the tensors of a call."""
        if self.in_place:
            inputs = [tensor for place, tensor in enumerate(inputs) if place not in self.in_place]
        if not self.enters_inference:
            return self.graph.replay(inputs, out)
        with torch.inference_mode():
            return self.graph.replay(inputs, out)

    def close(self, *, wait: bool = True) -> None:
        """Close the graph."""
        self.graph.close(wait=wait)


def lies_in(tensor: Tensor, bounds: Sequence[int]) -> bool:
    """Whether a tensor begins in memory that is given by where each part begins and ends, sorted."""
    return bisect(bounds, tensor.data_ptr()) % 2 == 1


class Sharing(enum.Enum):
    """What memory a graph shares with other graphs of its module."""

    ALL = "all"
    """Scratch memory and the memory of outputs, which other graphs overwrite."""
    SCRATCH = "scratch"
    """Scratch memory only: outputs stay until this graph is launched again."""
    NOTHING = "nothing"
    """No memory, so that nobody waits for the capture nor for a launch."""


@dataclass(frozen=True, slots=True)
class CaptureRequest:
    """A call that is to be captured."""

    call: KeyedCall
    sharing: Sharing = Sharing.ALL
    begin: Callable[[], object] = lambda: None
    """Called when the arguments are known to be right, before anything is allocated for the graph; it may raise a
    :class:`~graphcache.errors.Refusal`."""
    keeps_state: bool = False
    """Whether the graph may update state of the module in place, as the call does; otherwise such a call is refused."""
    running: Callable[[], AbstractContextManager[object]] = nullcontext
    """Makes what is entered around each run of a PyTorch module but the observed one."""
    alone: Callable[[], AbstractContextManager[bool]] = lambda: nullcontext(True)
    """Makes what is entered around a recording that puts state back: whether nobody else uses it, nor will inside."""
