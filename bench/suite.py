"""Goes through engines, numbers of shapes and systems, and keeps what it has found so far on disk."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any

from bench import calls as calls_of
from bench import measure, peers
from bench.lost import LostDevice
from bench.row import Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch

    from bench import store


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

    def left(self) -> float | None:
        """Seconds until then, negative if it is over; ``None`` for never."""
        return None if self.seconds is None else self.seconds - self.elapsed()

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
        write: Called with the results so far after each system.
        floors: What makes the floor of a kind.
        lost: Who measures what is left when a system has cost this process its device; ``None`` for nobody.
    """

    def __init__(
        self,
        plan: Plan,
        deadline: Deadline,
        write: Callable[[list[dict[str, Any]]], object],
        floors: Mapping[str, Callable[[], peers.Peer]] | None = None,
        lost: LostDevice | None = None,
    ) -> None:
        self.plan = plan
        self.deadline = deadline
        self.results: list[dict[str, Any]] = []
        self._write = write
        self._floors = floors or {kind: peers.SYSTEMS[name] for kind, name in peers.FLOORS.items()}
        self._lost = lost or LostDevice(lambda: measure.device_lost(plan.device))

    def run(self) -> list[dict[str, Any]]:
        """Measure everything, engines before torch networks, and return the results."""
        kinds = {name: make().kind for name, make in self.plan.systems.items()}
        for kind in ("engine", "torch"):
            names = [name for name, of in kinds.items() if of == kind]
            for bundle, sizes in self._rows() if names else ():
                result, floor = self._result(bundle, sizes), self._floors[kind]
                noted = partial(self._write, self.results)
                Row(self.plan, self.deadline, self._lost, floor, bundle, sizes, result, noted).measure(names)
                # The floor's figures, which are complete only now.
                noted()
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


def failures(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What went wrong with graphcache or a floor: wrong answers, exceptions, and anything but hits while timed.

    A peer that fails is no failure of a run, and what a system that failed could not give back is no second one.
    """
    found = []
    for result in results:
        for name, figures in result["systems"].items():
            where = f"{result['engine']}, {len(result['sizes'])} shapes, {name}"
            if not figures["exact"]:
                continue
            if figures.get("failed"):
                found.append(f"{where}: {figures['reason']}")
                continue
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
