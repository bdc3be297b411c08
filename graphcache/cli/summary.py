"""A result in a few lines."""

from __future__ import annotations

import statistics
from typing import Any

from rich.console import Console

from graphcache.cli.output import described, table
from graphcache.observe.result import Result


def summary_of(result: Result) -> list[dict[str, Any]]:
    """For each set of inputs its outcomes, and the medians of its hits in microseconds."""
    found = []
    for index, (inputs, counts) in enumerate(zip(result.inputs, result.outcomes().values(), strict=True)):
        hits = [call for call in result.calls if call.inputs == index and call.outcome == "hit"]
        captures = [call.us for call in result.calls if call.inputs == index and call.outcome == "capture"]
        found.append(
            {
                "inputs": inputs.label,
                "outcomes": dict(counts),
                "eager_us": _median([call.eager_us for call in hits]),
                "graph_us": _median([call.us for call in hits]),
                "capture_us": _median(captures),
                "nbytes": inputs.nbytes,
            }
        )
    return found


def tabulated(result: Result, console: Console) -> None:
    """Print it."""
    if result.environment:
        console.print(described(result.environment), soft_wrap=True)
    console.print(f"{result.target}: {len(result.calls)} calls; medians in µs", soft_wrap=True)
    console.print()
    rows = table("inputs", "hits", "captures", "eager", "| eagerly", "graph", "capture", "bytes")
    for each in summary_of(result):
        outcomes = each["outcomes"]
        hits, captures = outcomes.pop("hit", 0), outcomes.pop("capture", 0)
        times = (_shown(each[name]) for name in ("eager_us", "graph_us", "capture_us"))
        eagerly, graph, capture = times
        rows.add_row(
            each["inputs"] or "(none)",
            *map(str, (hits, captures, sum(outcomes.values()))),
            f"| {eagerly}",
            graph,
            capture,
            str(each["nbytes"]),
        )
    console.print(rows)
    console.print()
    for why in result.reasons.values():
        console.print(f"Ran eagerly, {why}", soft_wrap=True)
    found = result.break_even()
    console.print(
        f"All calls together: {sum(call.us for call in result.calls) / 1e3:.1f} ms, eagerly "
        f"{sum(call.eager_us for call in result.calls) / 1e3:.1f} ms; "
        + ("captures have not paid for themselves" if found is None else f"ahead for good after {found} calls")
        + "."
    )


def _median(values: list[float]) -> float | None:
    return round(statistics.median(values), 1) if values else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
