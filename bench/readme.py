"""The suite's figures as the lines of a Markdown table: ``python -m bench --table FILE``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from bench import ahead
from bench.tables import shapes as shapes_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


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
        raise SystemExit(f"{file} was not written by python -m bench, but by another benchmark or program")
    return payload


def lines(
    payload: Mapping[str, Any],
    file: Path,
    engines: Sequence[str] | None = None,
    counts: Sequence[int] | None = None,
    systems: Sequence[str] | None = None,
) -> list[str]:
    """Two tables with a column for each engine and number of shapes: what calls cost, and how far peers are behind.

    Args:
        payload: What :func:`read` read.
        file: Where from, which the first line links to.
        engines: Of which; all that there are if ``None``.
        counts: With how many shapes.
        systems: Which rows.

    Returns:
        Lines of Markdown: where the figures are from, then the tables. A system that was not measured has ``-``.

    Raises:
        SystemExit: If nothing is left.
    """
    results = [
        result
        for result in payload["results"]
        if (engines is None or result["engine"] in engines) and (counts is None or len(result["sizes"]) in counts)
    ]
    names = list(dict.fromkeys(name for result in results for name in result["systems"]))
    rows = [name for name in names if systems is None or name in systems]
    if not rows:
        raise SystemExit(f"{file} has no figures of these engines, numbers of shapes and systems")
    made = [_source(payload, file), "", *_head("System", results)]
    made += [_row(f"`{name}`", [_figures(result["systems"].get(name)) for result in results]) for name in rows]
    comparisons = ahead.compare(results)
    if pairs := [pair for pair in ahead.pairs(comparisons) if pair[0] in rows]:
        made += ["", *_head("Times as long", results)]
        for pair in pairs:
            by_row = {(each.engine, each.shapes): ahead.cell(each, pair) for each in comparisons if pair in each.times}
            cells = [by_row.get((result["engine"], len(result["sizes"])), "-") for result in results]
            made.append(_row(f"`{pair[0]}` / `{pair[1]}`", cells))
    return made


def _source(payload: Mapping[str, Any], file: Path) -> str:
    facts = payload["environment"]
    known = [facts.get("device"), facts.get("tensorrt"), f"torch {facts.get('torch')}"]
    where = ", ".join(str(each) for each in known if each)
    return (
        f"Median call + synchronise in µs; in brackets, over that of the raw launch in turn with it, "
        f"and the CPU time of the call in µs. {where}, commit {str(facts.get('commit'))[:12]}, "
        f"{str(facts.get('date_utc'))[:10]}: [{file.name}]({file.as_posix()})."
    )


def _head(first: str, results: Sequence[Mapping[str, Any]]) -> list[str]:
    titles = []
    for result in results:
        nodes = result["systems"].get("raw", {}).get("nodes")
        kernels = f" ({nodes[0]} nodes)" if nodes and len(set(nodes)) == 1 else ""
        titles.append(f"{result['engine']}{kernels}, {shapes_of(len(result['sizes']))}")
    return [_row(first, titles), "|---|" + "---:|" * len(titles)]


def _figures(figures: Mapping[str, Any] | None) -> str:
    if figures is None or "reason" in figures:
        return "wrong" if figures is not None and "were wrong" in figures["reason"] else "-"
    ratio, cpu = figures["total_over_raw"], _short(figures["cpu_burst_us"]["p50"])
    return f"{_short(figures['total_us']['p50'])} ({ratio:.2f}, {cpu})"


def _short(value: float) -> str:
    return f"{value:.{0 if value >= 99.95 else 1}f}"


def _row(first: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join([first, *cells])} |"
