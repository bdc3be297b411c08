"""Goes through engines, numbers of shapes and systems, and keeps what it has found so far on disk."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from bench import calls as calls_of
from bench import limits, measure, peers, record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch

    from bench import store

POOL = 8
"""Calls of each size, each with tensors of its own."""


class Deadline:
    """A moment after which no new measurement begins.

    Args:
        seconds: From now; ``None`` for never.
        clock: In seconds.
    """

    def __init__(self, seconds: float | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = seconds
        self._clock = clock
        self._begun = clock()

    def passed(self) -> bool:
        """Whether it is over."""
        return self.seconds is not None and self.elapsed() >= self.seconds

    def elapsed(self) -> float:
        """Seconds since it was set."""
        return self._clock() - self._begun


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        bundles: The engines.
        shapes: How many shapes take turns; more than an engine has are as many as it has.
        systems: By name, what makes each; floors for the kinds of system among them need not be named.
        device: Where.
        calls: Timed calls of each system.
        seconds: About how long those of one system may take.
        seed: Of every choice.
    """

    bundles: Sequence[store.Bundle]
    shapes: Sequence[int]
    systems: Mapping[str, Callable[[], peers.Peer]]
    device: torch.device
    calls: int = 1000
    seconds: float = 5.0
    seed: int = 0


class Suite:
    """One run.

    Args:
        plan: What to measure.
        deadline: When to stop.
        write: Called with the results so far after each row of engines, shapes and kind of system.
        floors: What makes the floor of a kind.
    """

    def __init__(
        self,
        plan: Plan,
        deadline: Deadline,
        write: Callable[[list[dict[str, Any]]], object],
        floors: Mapping[str, Callable[[], peers.Peer]] | None = None,
    ) -> None:
        self.plan = plan
        self.deadline = deadline
        self.results: list[dict[str, Any]] = []
        self._write = write
        self._floors = floors or {kind: peers.SYSTEMS[name] for kind, name in peers.FLOORS.items()}

    def run(self) -> list[dict[str, Any]]:
        """Measure everything, engines before torch networks, and return the results."""
        kinds = {name: make().kind for name, make in self.plan.systems.items()}
        for kind in ("engine", "torch"):
            names = [name for name, of in kinds.items() if of == kind]
            for bundle, sizes in self._rows() if names else ():
                result = self._result(bundle, sizes)
                try:
                    self._measure(bundle, sizes, kind, names, result)
                except Exception as error:
                    # After some errors a device serves a process no longer; what was measured before is worth keeping.
                    for name in names:
                        about = {**_about(self.plan.systems[name]()), "reason": measure.first_line(error)}
                        result["systems"].setdefault(name, {**about, "failed": True})
                self._write(self.results)
        return self.results

    def _rows(self) -> Iterator[tuple[store.Bundle, list[int]]]:
        for bundle in self.plan.bundles:
            for count in sorted({min(count, len(bundle.sizes())) for count in self.plan.shapes}):
                yield bundle, calls_of.spread(bundle, count)

    def _result(self, bundle: store.Bundle, sizes: list[int]) -> dict[str, Any]:
        for result in self.results:
            if (result["engine"], result["sizes"]) == (bundle.name, sizes):
                return result
        made: dict[str, Any] = {"engine": bundle.name, "sizes": sizes, "systems": {}}
        self.results.append(made)
        return made

    def _measure(
        self, bundle: store.Bundle, sizes: list[int], kind: str, names: Sequence[str], result: dict[str, Any]
    ) -> None:
        plan, systems = self.plan, result["systems"]
        floor = self._floors[kind]()
        wanted = [name for name in names if name != floor.name]
        if self.deadline.passed():
            for name in (floor.name, *wanted):
                systems[name] = self._left_out(plan.systems.get(name, self._floors[kind])())
                self._say(result, name)
            return
        pool = calls_of.pool(bundle, sizes, POOL, plan.device)
        work = measure.Work(bundle, sizes, pool, plan.device, plan.calls, plan.seconds, plan.seed)
        result.setdefault("buffer_bytes_per_shape", buffer_bytes(work))
        systems[floor.name] = measure.measure(floor, work)
        self._say(result, floor.name)
        if "reason" in systems[floor.name]:
            for name in wanted:
                peer = plan.systems[name]()
                systems[name] = {**_about(peer), "reason": f"there is no {floor.name} to take turns with"}
                self._say(result, name)
            return
        if nodes := getattr(floor, "nodes", None):
            systems[floor.name]["nodes"] = nodes
            allowed = result["buffer_bytes_per_shape"] + limits.NODE_BYTES * sum(nodes) // len(nodes)
            systems[floor.name]["allowed_bytes_per_shape"] = allowed
        try:
            for name in wanted:
                peer = plan.systems[name]()
                if self.deadline.passed():
                    systems[name] = self._left_out(peer)
                else:
                    launches = [floor.timed(call.inputs) for call in pool]
                    systems[name] = measure.measure(peer, work, [launch for launch in launches if launch is not None])
                self._say(result, name)
        finally:
            systems[floor.name] |= measure.close(floor)

    def _left_out(self, peer: peers.Peer) -> dict[str, Any]:
        reason = f"left out, since {self.deadline.seconds:g} s were over"
        return {**_about(peer), "reason": reason, "left_out": True}

    def _say(self, result: dict[str, Any], name: str) -> None:
        figures = result["systems"][name]
        where = f"[{self.deadline.elapsed():6.1f} s] {result['engine']}, {len(result['sizes'])} shapes, {name}"
        print(f"{where}: {summary(figures)}", file=sys.stderr, flush=True)


def summary(figures: Mapping[str, Any]) -> str:
    """What was found of one system, in a line."""
    if "reason" in figures:
        return str(figures["reason"])
    total, cpu = figures["total_us"]["p50"], figures["cpu_burst_us"]["p50"]
    return f"{total} µs, {figures['total_over_raw']} of raw, {cpu} µs of CPU"


def failures(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What went wrong with graphcache or a floor: wrong answers, exceptions, and anything but hits while timed.

    A peer that fails is no failure of a run.
    """
    found = []
    for result in results:
        for name, figures in result["systems"].items():
            where = f"{result['engine']}, {len(result['sizes'])} shapes, {name}"
            if not figures["exact"]:
                continue
            if figures.get("failed"):
                found.append(f"{where}: {figures['reason']}")
            if figures.get("misses_while_timed"):
                found.append(f"{where}: {figures['misses_while_timed']} of the timed calls were no hits")
            if "closing" in figures:
                found.append(f"{where}: closing it: {figures['closing']}")
    return found


def versions() -> dict[str, str]:
    """The versions of the peers that are installed."""
    found = {}
    for name in peers.PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def buffer_bytes(work: measure.Work) -> int:
    """Bytes that a shape's inputs and outputs take, on average over the shapes."""
    calls = [work.first(size) for size in work.sizes]
    return sum(tensor.nbytes for call in calls for tensor in (*call.inputs, call.answer)) // len(calls)


def table(results: Sequence[Mapping[str, Any]]) -> None:
    """Print a row for each system that was measured, then the reasons of those that were not."""
    columns = ["engine", "shapes", "system", "p50 µs", "p90", "p99", "iqr", "over raw", "CPU µs"]
    columns += ["first ms", "steady ms", "KiB per shape"]
    record.table("call + synchronise", columns, [row for result in results for row in rows(result)])
    for line in reasons(results):
        print(line)


def reasons(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why systems were not measured, each reason once with the rows that it is for."""
    where: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for name, figures in result["systems"].items():
            if "reason" in figures:
                row = f"{result['engine']} x {len(result['sizes'])}"
                where.setdefault((name, figures["reason"]), []).append(row)
    return [f"not measured: {name} ({', '.join(rows)}): {reason}" for (name, reason), rows in where.items()]


def rows(result: Mapping[str, Any]) -> list[list[object]]:
    """The rows of one engine and number of shapes; memory per shape is empty where it is not known."""
    made: list[list[object]] = []
    for name, figures in result["systems"].items():
        if "reason" in figures:
            continue
        steady, memory = figures["steady_seconds"], figures["memory_per_shape"]
        made.append(
            [
                result["engine"],
                len(result["sizes"]),
                name,
                *(figures["total_us"][key] for key in ("p50", "p90", "p99", "iqr")),
                figures["total_over_raw"],
                figures["cpu_burst_us"]["p50"],
                figures["first_answer_seconds"] * 1000,
                "never" if steady is None else steady * 1000,
                "" if memory is None else memory["device_bytes"] / 1024,
            ]
        )
    return made


def _about(peer: peers.Peer) -> dict[str, Any]:
    return {"kind": peer.kind, "rival": peer.rival, "exact": peer.exact}
