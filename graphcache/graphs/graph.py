"""The contract of a graph, on the device and on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Graph(Protocol):
    """One recorded call. Replays from any threads and streams follow one another; each follows its caller's stream."""

    @property
    def nodes(self) -> int:
        """How many operations one launch runs."""

    @property
    def nbytes(self) -> int:
        """Memory that only this graph keeps alive, in bytes."""

    def replay(self, inputs: Sequence[Tensor], out: list[Tensor] | None = None) -> list[Tensor]:
        """Answer inputs of the captured layouts, in ``out``, or in fresh tensors that belong to the caller."""

    def accepts(self, out: Sequence[Tensor]) -> bool:
        """Whether :meth:`replay` could write straight into these tensors if they overlap no input."""

    def pin(self) -> tuple[list[Tensor], list[Tensor]]:
        """The static inputs and outputs, for :meth:`launch`; they stay valid until :meth:`replay` or :meth:`close`."""

    def launch(self) -> None:
        """Run on the static inputs, into the static outputs."""

    def poison(self, out: Sequence[Tensor] = ()) -> None:
        """Overwrite static inputs and outputs, and ``out``: a replay that does not read or write them shows."""

    def close(self, *, wait: bool = True) -> None:
        """Release everything once the last replay has finished: now, or later if the host may not ``wait``."""
