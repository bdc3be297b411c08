"""One line that says whether graphs help: are the calls bound by launching, or by computing?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["launch-bound", "compute-bound", "no launches", "no graph"]

LAUNCH_BOUND = 0.8
"""The share of an eager call that the host takes to enqueue it, from which it is bound by launching. trtexec draws the
line at the same share of the device's own time."""

HELPS = 1.2
"""From how many times as fast on a call was bound by launching, whatever the host's share was measured to be: with few
kernels the device waits between them too."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was measured, and what it means.

    Args:
        kind: In a word.
        text: In a sentence.
    """

    kind: Kind
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def verdict(*, eager: float, enqueue: float, graph: float | None, on_cuda: bool) -> Verdict:
    """Judge the medians of one set of inputs, in microseconds."""
    if not on_cuda:
        return Verdict("no launches", "on the CPU a graph has nothing to save; what it saves shows on CUDA")
    share = enqueue / eager if eager > 0 else 0.0
    took = f"the host takes {enqueue:.3g} of {eager:.3g} µs to enqueue a call"
    times = eager / graph if graph else None
    if times is None:
        if share >= LAUNCH_BOUND:
            return Verdict("launch-bound", f"{took}; graphs would help, but there is none of this call")
        return Verdict("no graph", f"{took}, so that graphs would help by {_most(share)} at most")
    if share >= LAUNCH_BOUND or times >= HELPS:
        return Verdict("launch-bound", f"{took}; graphs help by about {times:.1f} times")
    return Verdict("compute-bound", f"{took}, the rest is the device's; graphs do not help ({times:.2f} times)")


def _most(share: float) -> str:
    """By how much graphs could help at the very most, if nothing of the host's share were left."""
    return f"{1 / max(1 - share, 0.05):.1f} times"
