"""What the suite prints: a table for each engine and number of shapes, what is not in it, and who is ahead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench import ahead, record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WIDTH = 120

_COLUMNS = ("system", "p50 µs", "p90", "p99", "iqr", "over raw", "CPU µs", "first ms", "steady ms", "KiB / shape")


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """Print all there is to say of a run."""
    for result in results:
        if made := rows(result):
            title = f"{result['engine']}, {shapes(len(result['sizes']))}: call + synchronise"
            record.table(title, _COLUMNS, made, WIDTH)
    for line in reasons(results):
        print(line)
    comparisons = ahead.compare(results)
    named = {"engine": " (/ into: as graphcache-into)", "torch": ""}
    for kind, mode in (("engine", "graphcache"), ("torch", "graphcache-torch")):
        if found := [each for each in comparisons if each.kind == kind]:
            pairs = ahead.pairs(found)
            title = f"ahead of every peer? times as long as {mode}{named[kind]}"
            columns = [f"{kind} x shapes", "ahead", *(_heading(*pair, mode) for pair in pairs)]
            record.table(title, columns, [_row(each, pairs) for each in found], WIDTH)


def shapes(count: int) -> str:
    """``one shape``, ``8 shapes in turn``."""
    return "one shape" if count == 1 else f"{count} shapes in turn"


def rows(result: Mapping[str, Any]) -> list[list[object]]:
    """The rows of one engine and number of shapes; memory per shape is empty where it is not known."""
    made: list[list[object]] = []
    for name, figures in result["systems"].items():
        if "reason" in figures:
            continue
        steady, memory = figures["steady_seconds"], figures["memory_per_shape"]
        made.append(
            [
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


def reasons(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why systems were not measured, each reason once with the rows that it is for."""
    where: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for name, figures in result["systems"].items():
            if "reason" in figures:
                row = f"{result['engine']} x {len(result['sizes'])}"
                where.setdefault((name, figures["reason"]), []).append(row)
    return [f"not measured: {name} ({', '.join(rows)}): {reason}" for (name, reason), rows in where.items()]


def _heading(peer: str, mode: str, usual: str) -> str:
    lines = peer.replace("-", "-\n")
    return lines if mode == usual else f"{lines}\n/ {mode.removeprefix('graphcache-')}"


def _row(comparison: ahead.Comparison, pairs: Sequence[tuple[str, str]]) -> list[object]:
    said = {True: "yes", False: "NO", None: "-"}[comparison.ahead]
    cells = [ahead.cell(comparison, pair) for pair in pairs]
    return [f"{comparison.engine} x {comparison.shapes}", said, *cells]
