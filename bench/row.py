"""One row of the suite: an engine, some of its shapes, and the systems of one kind, in turn with their floor."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from bench import calls as calls_of
from bench import limits, measure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench import store
    from bench.lost import LostDevice
    from bench.peers import Peer
    from bench.suite import Deadline, Plan

POOL = 8
"""Calls of each size, each with tensors of its own."""


class Row:
    """Measures systems, each alone with the floor, and keeps what it found as it goes.

    Args:
        plan: How.
        deadline: When to stop.
        lost: Who goes on if a system costs this process its device.
        floor: Makes the floor.
        bundle: The engine.
        sizes: Of the shapes.
        result: Where figures go, by name, under ``systems``.
        noted: Called whenever something was put there.
    """

    def __init__(
        self,
        plan: Plan,
        deadline: Deadline,
        lost: LostDevice,
        floor: Callable[[], Peer],
        bundle: store.Bundle,
        sizes: Sequence[int],
        result: dict[str, Any],
        noted: Callable[[], object],
    ) -> None:
        self._plan = plan
        self._noted = noted
        self._deadline = deadline
        self._lost = lost
        self._floor = floor()
        self._bundle = bundle
        self._sizes = sizes
        self._result = result
        self._systems: dict[str, Any] = result["systems"]

    def measure(self, names: Sequence[str]) -> None:
        """Measure these systems, and the floor before them; whatever cannot be measured gets a reason."""
        wanted = [name for name in names if name != self._floor.name]
        if self._deadline.passed():
            self._leave_out([self._floor.name, *wanted])
        elif self._lost.known:
            self._elsewhere(names)
        else:
            try:
                self._here(wanted)
            except Exception as error:
                if self._lost.before_this():
                    self._elsewhere([name for name in names if name not in self._systems])
                self._missing(names, {"reason": measure.first_line(error), "failed": True})

    def _here(self, wanted: Sequence[str]) -> None:
        pool = calls_of.pool(self._bundle, self._sizes, POOL, self._plan.device)
        plan = self._plan
        work = measure.Work(self._bundle, self._sizes, pool, plan.device, plan.calls, plan.seconds, plan.seed)
        self._result.setdefault("buffer_bytes_per_shape", buffer_bytes(work))
        figures = measure.measure(self._floor, work)
        if "reason" in figures and self._lost.before_this():
            raise RuntimeError(figures["reason"])
        self._lost.measured += 1
        self._note(self._floor.name, figures)
        if "reason" in figures:
            self._missing(wanted, {"reason": f"there is no {self._floor.name} to take turns with"})
            return
        if nodes := getattr(self._floor, "nodes", None):
            figures["nodes"] = nodes
            allowed = self._result["buffer_bytes_per_shape"] + limits.NODE_BYTES * sum(nodes) // len(nodes)
            figures["allowed_bytes_per_shape"] = allowed
        try:
            self._in_turn(work, wanted)
        finally:
            closed = measure.close(self._floor)
            # Nothing can be given back to a device that is lost, whoever lost it.
            figures |= {} if self._lost.known else closed

    def _in_turn(self, work: measure.Work, wanted: Sequence[str]) -> None:
        for index, name in enumerate(wanted):
            if self._deadline.passed():
                self._leave_out(wanted[index:])
                return
            launches = [self._floor.timed(call.inputs) for call in work.pool]
            floor = [launch for launch in launches if launch is not None]
            self._note(name, measure.measure(self._plan.systems[name](), work, floor))
            self._lost.measured += 1
            if "reason" in self._systems[name] and self._lost.noticed():
                self._elsewhere(wanted[index + 1 :])
                return

    def _elsewhere(self, names: Sequence[str]) -> None:
        if not names:
            return
        left = self._deadline.left()
        if left is not None and left <= 0:
            self._leave_out(names)
            return
        row = self._lost.measure(self._bundle, len(self._sizes), names, left)
        if "buffer_bytes_per_shape" in row:
            self._result.setdefault("buffer_bytes_per_shape", row["buffer_bytes_per_shape"])
        for name, figures in row["systems"].items():
            if "kind" in figures:
                self._systems.setdefault(name, {**figures, "other_process": True})
                self._noted()
            else:
                self._missing([name], figures)

    def _leave_out(self, names: Sequence[str]) -> None:
        self._missing(names, {"reason": f"left out, since {self._deadline.seconds:g} s were over", "left_out": True})

    def _missing(self, names: Sequence[str], why: Mapping[str, Any]) -> None:
        for name in names:
            if name not in self._systems:
                peer = self._floor if name == self._floor.name else self._plan.systems[name]()
                self._note(name, {**measure.about(peer), **why})

    def _note(self, name: str, figures: dict[str, Any]) -> None:
        self._systems[name] = figures
        where = f"[{self._deadline.elapsed():6.1f} s] {self._result['engine']}, {len(self._sizes)} shapes, {name}"
        print(f"{where}: {summary(figures)}", file=sys.stderr, flush=True)
        self._noted()


def buffer_bytes(work: measure.Work) -> int:
    """Bytes that a shape's inputs and outputs take, on average over the shapes."""
    calls = [work.first(size) for size in work.sizes]
    return sum(tensor.nbytes for call in calls for tensor in (*call.inputs, call.answer)) // len(calls)


def summary(figures: Mapping[str, Any]) -> str:
    """What was found of one system, in a line."""
    if "reason" in figures:
        return str(figures["reason"])
    total, cpu = figures["total_us"]["p50"], figures["cpu_burst_us"]["p50"]
    return f"{total} µs, {figures['total_over_raw']} of raw, {cpu} µs of CPU"
