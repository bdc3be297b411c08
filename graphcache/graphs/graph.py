"""The contract of a graph, on the device and on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

Body = Callable[[], Sequence[Tensor]]
"""What is captured: runs the work on the static inputs and returns its output tensors, the same ones every time."""


class Graph(Protocol):
    """One recorded call. It owns its static buffers and everything else the recording refers to.

    A replay runs in the order of the caller's stream. Replays of one graph from several threads and streams follow one
    another; none sees another's inputs or outputs. After :meth:`close`, a replay raises
    :class:`~graphcache.errors.ClosedError`.
    """

    @property
    def nodes(self) -> int:
        """How many operations one launch runs."""

    @property
    def nbytes(self) -> int:
        """Memory that only this graph keeps alive, in bytes."""

    def replay(self, inputs: Sequence[Tensor], out: list[Tensor] | None = None) -> list[Tensor]:
        """Run the graph on inputs of the captured shapes, strides, dtypes and device, which are not changed.

        The outputs are ``out``, tensors of the outputs' layouts, or fresh tensors that belong to the caller.
        """

    def accepts(self, out: Sequence[Tensor]) -> bool:
        """Whether :meth:`replay` could write straight into these tensors if they overlap no input."""

    def pin(self) -> tuple[list[Tensor], list[Tensor]]:
        """The static inputs and outputs, for :meth:`launch`; they stay valid until :meth:`replay` or :meth:`close`."""

    def launch(self) -> None:
        """Run on the static inputs, into the static outputs."""

    def poison(self, out: Sequence[Tensor] = ()) -> None:
        """Overwrite static inputs and outputs, and ``out``: a replay that does not read or write them shows."""

    def close(self, *, wait: bool = True) -> None:
        """Release everything once the last replay has finished; a second time does nothing.

        Without ``wait`` the host does not wait for that replay: what it uses is released at a later call.
        """
