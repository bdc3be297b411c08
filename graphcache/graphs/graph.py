"""The contract of a graph, on the device and on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

Body = Callable[[], Sequence[Tensor]]
"""What is captured: runs the work on the static inputs and returns its output tensors, the same ones every time."""


class Graph(Protocol):
    """One recorded call, with its static buffers. It owns them, and everything the recording refers to.

    A replay puts the inputs in, launches, and hands fresh outputs out, all in the order of the caller's stream. Replays
    of one graph from several threads and streams follow one another; none sees another's inputs or outputs.
    """

    @property
    def nodes(self) -> int:
        """How many operations one launch runs."""

    @property
    def nbytes(self) -> int:
        """Memory that only this graph keeps alive, in bytes."""

    def replay(self, inputs: Sequence[Tensor], out: list[Tensor] | None = None) -> list[Tensor]:
        """Run the graph on other inputs.

        Args:
            inputs: As many tensors as were captured, of the same shapes, strides, dtypes and device. They are not
                changed.
            out: Where the outputs go: tensors of the outputs' shapes, strides and dtypes, as torch allocates them.
                ``None`` for fresh ones.

        Returns:
            ``out``, or fresh tensors that belong to the caller.

        Raises:
            ClosedError: After :meth:`close`.
        """

    def accepts(self, out: Sequence[Tensor]) -> bool:
        """Whether :meth:`replay` could write straight into these tensors, were they no part of its inputs."""

    def pin(self) -> tuple[list[Tensor], list[Tensor]]:
        """Use the static buffers from now on, for :meth:`launch`.

        Returns:
            The static inputs and outputs. They stay where they are until :meth:`replay` or :meth:`close`.
        """

    def launch(self) -> None:
        """Run on the static inputs, into the static outputs, in the order of the caller's stream; nothing else.

        Raises:
            ClosedError: After :meth:`close`.
        """

    def poison(self) -> None:
        """Overwrite static inputs and outputs (with NaN, or -1), so that a replay that does not read or write shows."""

    def close(self, *, wait: bool = True) -> None:
        """Release everything, never before the last replay has finished; a second time does nothing.

        Args:
            wait: Wait for that replay. Otherwise what it uses goes when it has finished, and somebody looks.
        """
