"""Plots of a result as SVG, for a page that has everything in it."""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections.abc import Sequence
from typing import Any

from graphcache.extras import optional
from graphcache.observe.result import Result

EAGER, GRAPH, CAPTURE = "#b45309", "#0f766e", "#4338ca"
_REFUSED = "#9ca3af"
_MOST_ROWS = 24
_WIDTH = 7.2
_DRAWN = 0.98
"""The share of calls that is drawn: a stall of a few milliseconds would leave no room for the others."""
_LEAST = 1e-3
"""Microseconds; a logarithm has no place for nothing."""

_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#6b7280",
    "axes.labelcolor": "#374151",
    "axes.titlesize": 9,
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "svg.fonttype": "path",
    "text.parse_math": False,
    "svg.hashsalt": "graphcache",
}


def plots(result: Result) -> dict[str, str]:
    """Every plot that the result has something for, by name, each one ``<svg>`` element.

    Args:
        result: What was measured.

    Raises:
        ExtraNotFoundError: If matplotlib is not installed.
    """
    makers = {"latencies": _latencies, "outcomes": _outcomes, "memory": _memory, "cumulative": _cumulative}
    purpose = "a report with plots"
    # Figures alone, without pyplot: no backend is chosen, nothing of the caller's is changed.
    figures = optional("matplotlib.figure", purpose)
    found = {}
    with optional("matplotlib", purpose).rc_context(_STYLE), warnings.catch_warnings():
        # A label in a script that the font lacks is drawn as boxes; the table below has it as it is.
        warnings.filterwarnings("ignore", message=r"Glyph \d+")
        for name, make in makers.items():
            figure = make(figures, result)
            if figure is not None:
                found[name] = _svg(figure, name)
    return found


def _latencies(figures: Any, result: Result) -> Any:
    """The share of calls that took at most so long, of hits alone: eagerly and through their graphs."""
    hits = [call for call in result.calls if call.outcome == "hit"]
    if not hits:
        return None
    figure = figures.Figure(figsize=(_WIDTH, 2.9), layout="constrained")
    axes = figure.add_subplot()
    for label, color, times in (
        ("eagerly", EAGER, sorted(max(call.eager_us, _LEAST) for call in hits)),
        ("through graphs", GRAPH, sorted(max(call.us, _LEAST) for call in hits)),
    ):
        shares = [(index + 1) / len(times) for index in range(len(times))]
        axes.step([times[0], *times], [0.0, *shares], where="post", color=color, label=label, linewidth=1.6)
        axes.plot([times[len(times) // 2]], [0.5], "o", color=color, markersize=4)
    axes.set_xscale("log")
    slowest = max(
        sorted(way)[int(_DRAWN * (len(hits) - 1))] for way in zip(*((c.us, c.eager_us) for c in hits), strict=True)
    )
    axes.set_xlim(right=max(slowest, _LEAST) * 1.25)
    axes.xaxis.set_major_formatter(lambda value, _: _time(value))
    least, most = axes.get_xlim()
    # Over more than two powers of ten there is no room for more labels.
    between = "25" if most < 100 * least else ""
    axes.xaxis.set_minor_formatter(lambda value, _: _time(value) if f"{value:e}"[0] in between else "")
    axes.tick_params(axis="x", which="both", length=3, pad=4)
    axes.set_ylabel("share of calls")
    axes.set_ylim(0, 1.02)
    axes.grid(True, which="major", color="#e5e7eb", linewidth=0.6)
    axes.legend(frameon=False, loc="lower right")
    return figure


def _time(microseconds: float) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{microseconds / size:g} {unit}"
    return f"{microseconds:g} µs"


def _outcomes(figures: Any, result: Result) -> Any:
    """For each set of inputs, how its calls ended: a bar of shares with counts in it."""
    if not result.calls:
        return None
    counted = result.outcomes()
    rows = sorted(counted, key=lambda index: -counted[index].total())[:_MOST_ROWS]
    kinds = list(dict.fromkeys(["hit", "capture", *(call.outcome for call in result.calls)]))
    figure = figures.Figure(figsize=(_WIDTH, 0.9 + 0.27 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    greys = iter(("#9ca3af", "#d1d5db", "#6b7280", "#e5e7eb", "#4b5563"))
    for kind in kinds:
        counts = [counted[index][kind] for index in rows]
        if not any(counts):
            continue
        color = {"hit": GRAPH, "capture": CAPTURE}.get(kind) or next(greys, _REFUSED)
        left = [
            sum(counted[index][other] for other in kinds[: kinds.index(kind)]) / max(counted[index].total(), 1)
            for index in rows
        ]
        shares = [count / max(counted[index].total(), 1) for count, index in zip(counts, rows, strict=True)]
        axes.barh(range(len(rows)), shares, left=left, color=color, height=0.78, label=kind.replace("_", " "))
        for row, (count, share, start) in enumerate(zip(counts, shares, left, strict=True)):
            if share > 0.06:
                ink = "#111827" if color in ("#d1d5db", "#e5e7eb", "#9ca3af") else "white"
                axes.text(start + share / 2, row, str(count), ha="center", va="center", color=ink, fontsize=7.5)
    _rows(axes, [result.inputs[index].label for index in rows])
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    figure.legend(frameon=False, loc="outside upper left", ncols=5, handlelength=1.0, fontsize=8)
    return figure


def _memory(figures: Any, result: Result) -> Any:
    """What each graph owned at the end, the largest first."""
    held = sorted((each for each in result.inputs if each.nbytes), key=lambda each: -each.nbytes)[:_MOST_ROWS]
    if not held:
        return None
    unit, size = next(
        ((unit, size) for unit, size in (("MiB", 2**20), ("KiB", 2**10)) if held[0].nbytes >= size), ("bytes", 1)
    )
    figure = figures.Figure(figsize=(_WIDTH, 0.75 + 0.27 * len(held)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(range(len(held)), [each.nbytes / size for each in held], color=CAPTURE, height=0.7)
    for row, each in enumerate(held):
        axes.text(each.nbytes / size, row, f" {each.nbytes / size:.3g}", va="center", fontsize=8, color="#374151")
    _rows(axes, [each.label for each in held])
    axes.set_xlabel(unit)
    axes.margins(x=0.1)
    return figure


def _cumulative(figures: Any, result: Result) -> Any:
    """All time so far, eagerly and through graphs, with captures; and where they meet for good."""
    if len(result.calls) < 2:
        return None
    figure = figures.Figure(figsize=(_WIDTH, 2.9), layout="constrained")
    axes = figure.add_subplot()
    unit, size = "ms", 1e3
    if sum(call.eager_us for call in result.calls) > 1e7:
        unit, size = "s", 1e6
    calls = range(len(result.calls) + 1)
    for label, color, times in (
        ("eagerly", EAGER, [call.eager_us for call in result.calls]),
        ("through graphs", GRAPH, [call.us for call in result.calls]),
    ):
        axes.plot(calls, _sums(times, size), color=color, label=label, linewidth=1.6)
    found = result.break_even()
    if found is not None and found < len(result.calls):
        axes.axvline(found, color="#6b7280", linewidth=0.8, linestyle="--")
        high = axes.get_ylim()[1]
        side = "right" if found > len(result.calls) / 2 else "left"
        text = f" ahead for good after {found} calls "
        axes.text(found, high, text, va="top", ha=side, fontsize=8, color="#374151")
    axes.set_xlabel("calls")
    axes.set_ylabel(f"{unit} so far")
    axes.set_xlim(0, len(result.calls))
    axes.set_ylim(bottom=0)
    axes.grid(True, color="#e5e7eb", linewidth=0.6)
    axes.legend(frameon=False, loc="lower right")
    return figure


def _sums(times: Sequence[float], size: float) -> list[float]:
    return [0.0, *(total / size for total in itertools.accumulate(times))]


def _rows(axes: Any, labels: Sequence[str]) -> None:
    shown = ("".join(each if each.isprintable() else " " for each in label) for label in labels)
    axes.set_yticks(range(len(labels)), [label if len(label) <= 40 else f"{label[:39]}…" for label in shown])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.spines["left"].set_visible(False)


def _svg(figure: Any, name: str) -> str:
    """The figure as an element that scales with the page; its identifiers are unlike those of other figures there."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\1{name}-", text)
    return re.sub(r'(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r'\1\2 role="img"', text, count=1)
