"""The suite's figures as tables: on the terminal, and as Markdown with ``python -m bench --table FILE``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from bench import record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_COLUMNS = ("system", "p50 µs", "p90", "p99", "over raw", "CPU µs", "first ms", "KiB / shape", "over graphcache")


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """Print a table for each engine and number of shapes, and why systems are missing."""
    for result in results:
        rows: list[list[object]] = []
        for name, figures in result["systems"].items():
            if "reason" in figures:
                print(f"not measured: {name} ({result['engine']} x {len(result['sizes'])}): {figures['reason']}")
                continue
            memory = figures["memory_per_shape"]
            rows.append(
                [
                    name,
                    *(figures["total_us"][key] for key in ("p50", "p90", "p99")),
                    figures["total_over_raw"],
                    figures["cpu_burst_us"]["p50"],
                    figures["first_answer_seconds"] * 1000,
                    "" if memory is None else memory["device_bytes"] / 1024,
                    over_graphcache(name, result),
                ]
            )
        if rows:
            record.table(f"{result['engine']}, {shapes(result)}: call + synchronise", _COLUMNS, rows)


def over_graphcache(name: str, result: Mapping[str, Any]) -> str:
    """Median of a system over that of the mode of graphcache that promises as much; empty if one is missing."""
    figures = result["systems"].get(name, {})
    if "were wrong" in figures.get("reason", ""):
        return "wrong"
    rival = result["systems"].get(figures.get("rival"), {})
    if "total_us" not in figures or "total_us" not in rival:
        return ""
    return f"{figures['total_us']['p50'] / max(rival['total_us']['p50'], 1e-3):.2f}"


def shapes(result: Mapping[str, Any]) -> str:
    """``one shape``, ``8 shapes in turn``."""
    count = len(result["sizes"])
    return "one shape" if count == 1 else f"{count} shapes in turn"


def read(file: Path) -> dict[str, Any]:
    """Read what a run of the suite recorded.

    Raises:
        SystemExit: If it is no such file.
    """
    try:
        payload = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{file} cannot be read ({error}); give a JSON that python -m bench wrote") from error
    if not isinstance(payload, dict) or payload.get("benchmark") != "suite":
        raise SystemExit(f"{file} was not written by python -m bench; expected a JSON with benchmark: suite")
    return payload


def markdown(payload: Mapping[str, Any], file: Path, engines: Sequence[str] | None = None) -> list[str]:
    """Two tables with a column for each engine and number of shapes: what calls cost, and peers over graphcache.

    Args:
        payload: What :func:`read` read.
        file: Where from, which the first line links to.
        engines: The columns; all that there are if ``None``.

    Raises:
        SystemExit: If nothing is left.
    """
    results = [result for result in payload["results"] if engines is None or result["engine"] in engines]
    names = list(dict.fromkeys(name for result in results for name in result["systems"]))
    if not names:
        raise SystemExit(f"{file} has no figures of these engines")
    facts = payload["environment"]
    known = (facts.get(key) for key in ("device", "tensorrt", "torch", "commit", "date_utc"))
    where = ", ".join(str(each) for each in known if each)
    titles = [f"{result['engine']}, {shapes(result)}" for result in results]
    what = "Median call + synchronise in µs; in brackets, over that of the raw launch in turn with it, and CPU µs"
    made = [
        f"{what}. {where}: [{file.name}]({file.as_posix()}).",
        "",
        _row("System", titles),
        "|---|" + "---:|" * len(titles),
        *(_row(f"`{name}`", [_figures(result["systems"].get(name)) for result in results]) for name in names),
    ]
    compared = {name: [over_graphcache(name, result) for result in results] for name in names}
    if any(any(cells) for cells in compared.values()):
        made += ["", _row("Times as long as graphcache", titles), "|---|" + "---:|" * len(titles)]
        made += [_row(f"`{name}`", [each or "-" for each in cells]) for name, cells in compared.items() if any(cells)]
    return made


def _figures(figures: Mapping[str, Any] | None) -> str:
    if figures is None or "reason" in figures:
        return "wrong" if figures is not None and "were wrong" in figures["reason"] else "-"
    total, cpu = figures["total_us"]["p50"], figures["cpu_burst_us"]["p50"]
    return f"{total:.1f} ({figures['total_over_raw']:.2f}, {cpu:.1f})"


def _row(first: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join([first, *cells])} |"
