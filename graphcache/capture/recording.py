"""What a capture makes of a call: a verified graph that repeats it, and how the graph's outputs become the answer."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from graphcache.errors import Cause
from graphcache.graphs.graph import Graph
from graphcache.keys.call_key import KeyedCall

Build = Callable[[list[Tensor], Sequence[Tensor]], Any]
"""Makes the answer of a graph's outputs and the caller's inputs."""


class Recording:
    """A graph, and how its outputs become the module's answer.

    ``places`` tells for each tensor of the call which input of the graph it is, if not each is an input of its own.
    """

    def __init__(
        self,
        graph: Graph,
        build: Build,
        *,
        whole: bool,
        bare: bool = False,
        places: Sequence[int] | None = None,
        enters_inference: bool = False,
    ) -> None:
        self.graph = graph
        self.build = build
        self.whole = whole
        """Whether the answer's leaves are the graph's outputs, all of them and in their order."""
        self.bare = bare
        """Whether the answer is the graph's only output itself."""
        self._places = places
        self.replay: Callable[..., list[Tensor]] = graph.replay if places is None else self._replay_distinct
        """Run the graph on the tensors of a call."""
        if enters_inference:
            # The call enters inference mode by itself: outputs are inference tensors in whatever mode it is made.
            self.replay = torch.inference_mode()(self.replay)
        self.has_fast_path = not enters_inference
        """Whether native code may replay the graph, past :attr:`replay`."""
        self.nbytes = graph.nbytes
        self.version = 0
        """That of the module's guard when the graph was captured."""

    def spread(self, static: Sequence[Tensor]) -> Sequence[Tensor]:
        """The graph's inputs in the places of the tensors of a call."""
        return static if self._places is None else [static[place] for place in self._places]

    def close(self, *, wait: bool = True) -> None:
        """Close the graph."""
        self.graph.close(wait=wait)

    def _replay_distinct(self, inputs: Sequence[Tensor], out: list[Tensor] | None = None) -> list[Tensor]:
        """Run the graph on the tensors of a call, each given to it once."""
        assert self._places is not None
        return self.graph.replay([inputs[self._places.index(place)] for place in range(max(self._places) + 1)], out)


class Sharing(enum.Enum):
    """What memory a graph shares with other graphs of its module."""

    ALL = "all"
    """Scratch memory and the memory of outputs, which other graphs overwrite."""
    SCRATCH = "scratch"
    """Scratch memory only: outputs stay until this graph is launched again."""
    NOTHING = "nothing"
    """No memory, so that nobody waits for the capture nor for a launch."""


def nothing() -> None:
    """Begins without asking for anything."""


@dataclass(frozen=True, slots=True)
class CaptureRequest:
    """A call that is to be captured."""

    call: KeyedCall
    sharing: Sharing = Sharing.ALL
    begin: Callable[[], object] = nothing
    """Called when the arguments are known to be right, before anything is allocated for the graph; it may raise a
    :class:`~graphcache.errors.Refusal`."""
    running: Callable[[], AbstractContextManager[object]] = nullcontext
    """Makes what is entered around each run of a PyTorch module but the observed one."""


class Recorder(Protocol):
    """Makes graphs of one module's calls."""

    def attempt(self, request: CaptureRequest) -> tuple[Any, Recording | Cause]:
        """Answer a call eagerly, and capture it; the second item is the graph, or says why there is none."""

    def release(self, *, wait: bool = True) -> None:
        """Give back what the graphs shared, which were closed before; wait for the last replays first."""

    broken: list[Graph]
    """Graphs that this recorder has closed, as they were no longer right; emptied by whoever removes them."""

    @property
    def shared_nbytes(self) -> int:
        """Memory in bytes that the graphs use together, so that no eviction gives it back."""

    @property
    def passing_nbytes(self) -> int:
        """What captures took beyond what stayed, in bytes: the most so far."""
