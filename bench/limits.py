"""What the suite is held to with ``--gate``, as data, and what of it a run did not reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

LONG_US = 100.0
"""A raw launch of an engine, fixed shape, from which its relative limits are the narrow ones."""


@dataclass(frozen=True)
class Limit:
    """What a mode of graphcache may cost.

    Args:
        cpu_us: Processor time of a hit, in microseconds, median over bursts.
        over_raw: Median of call + synchronise over that of the raw launch in the same run.
        over_raw_long: The same for engines of :data:`LONG_US` and more.
    """

    cpu_us: float
    over_raw: float
    over_raw_long: float


LIMITS = {
    "graphcache": Limit(8, 1.10, 1.03),
    "graphcache-into": Limit(4, 1.04, 1.04),
    "graphcache-session": Limit(4, 1.04, 1.04),
    "graphcache-isolated": Limit(12, 1.20, 1.06),
}
"""By mode, for a fixed shape and for any number of shapes in turn, against raw launches in the same turn."""

NODE_BYTES = 20 * 1024
"""Device memory that a further shape may take for each node of its graph, beyond its buffers. Recorded next to what it
takes, and not part of the gate: the device hands out memory in pieces larger than a small graph."""

AHEAD = 1.0
"""How many times as long as graphcache every peer must take, at least; exactly as long is not ahead."""

FURTHER_AHEAD = {("torch-tensorrt-cpp", "mlp8"): (1.5, 10.0)}
"""By peer and engine: how many times with a fixed shape, and with shapes in turn."""


def shortfalls(results: Sequence[dict[str, Any]]) -> list[str]:
    """Everything that a run did not reach, or did not show.

    Args:
        results: Of the run, as :mod:`bench.suite` makes them.

    Returns:
        A sentence for each; empty if every limit was met. A peer that cannot run here is none; whatever was left out
        because time was over is one, since nothing was shown of it.
    """
    found = []
    fixed = {
        result["engine"]: figures["raw_total_us"]["p50"]
        for result in sorted(results, key=lambda each: -len(each["sizes"]))
        for figures in result["systems"].values()
        if "raw_total_us" in figures and figures["kind"] == "engine"
    }
    for result in results:
        long = fixed.get(result["engine"], 0.0) >= LONG_US
        for name, figures in result["systems"].items():
            where = f"{result['engine']}, {len(result['sizes'])} shapes, {name}"
            if figures.get("left_out"):
                found.append(f"{where}: {figures['reason']}")
            elif name in LIMITS:
                found += [f"{where}: {text}" for text in _over(LIMITS[name], figures, long)]
            elif "reason" not in figures and figures["rival"] is not None:
                found += [f"{where}: {text}" for text in _behind(name, figures, result)]
    measured = {name for result in results for name in result["systems"]}
    missing = [name for name in LIMITS if name not in measured]
    return found + [f"{name} was not among the systems, so that nothing is known of it" for name in missing]


def _over(limit: Limit, figures: dict[str, Any], long: bool) -> list[str]:
    if "reason" in figures:
        return [f"not measured ({figures['reason']})"]
    found = []
    cpu, ratio = figures["cpu_burst_us"]["p50"], figures["total_over_raw"]
    most = limit.over_raw_long if long else limit.over_raw
    if cpu > limit.cpu_us:
        found.append(f"{cpu} µs of CPU, the limit is {limit.cpu_us:g}")
    if ratio > most:
        found.append(f"{ratio} times raw, the limit is {most:g}")
    return found


def _behind(name: str, figures: dict[str, Any], result: dict[str, Any]) -> list[str]:
    rival = result["systems"].get(figures["rival"], {})
    if "total_us" not in rival:
        return [f"not compared, since {figures['rival']} was not measured"]
    times = figures["total_us"]["p50"] / max(rival["total_us"]["p50"], 1e-3)
    fixed, in_turn = FURTHER_AHEAD.get((name, result["engine"]), (AHEAD, AHEAD))
    least = fixed if len(result["sizes"]) == 1 else in_turn
    if times > least or (times == least and least > AHEAD):
        return []
    return [f"{times:.2f} times as long as {figures['rival']}; it must be {'more than ' * (least == AHEAD)}{least:g}"]
