"""Plots of a result as SVG elements of a page."""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections.abc import Sequence
from typing import Any

from graphcache.extras import optional
from graphcache.observe.result import Measured, Result

EAGER, GRAPH, CAPTURE = "#c2410c", "#0f766e", "#4338ca"
_GREYS = ("#9ca3af", "#d1d5db", "#6b7280", "#e5e7eb", "#4b5563")
_MAX_ROWS = 24
_WIDTH = 7.2
_SHOWN_SHARE = 0.98
"""The share of calls that the latency plot shows: one stall of milliseconds would leave no room for the others."""
_MIN_US = 1e-3
"""Microseconds; a logarithmic axis has no place for 0."""

_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": "#374151",
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "svg.fonttype": "path",
    "text.parse_math": False,
    "svg.hashsalt": "graphcache",
}


def plots(result: Result) -> dict[str, str]:
    """The plots that a result has data for, by name; each is an ``<svg>`` element."""
    makers = {"latencies": _latencies, "cumulative": _cumulative, "outcomes": _outcomes, "memory": _memory}
    # Figures alone, without pyplot: no backend is chosen, and nothing of the caller's is changed.
    figures = optional("matplotlib.figure", "a report with plots")
    with optional("matplotlib", "a report with plots").rc_context(_STYLE), warnings.catch_warnings():
        # A label in a script that the font lacks is drawn as boxes; the table below the plots has it as it is.
        warnings.filterwarnings("ignore", message=r"Glyph \d+")
        made = {name: make(figures, result) for name, make in makers.items()}
        return {name: _svg(figure, name) for name, figure in made.items() if figure is not None}


def _latencies(figures: Any, result: Result) -> Any:
    """The distribution of the latency of hits, eagerly and through graphs."""
    hits = [call for call in result.calls if call.outcome == "hit"]
    if not hits:
        return None
    figure, axes = _figure(figures, 2.9)
    slowest = _MIN_US
    for label, color, times in _both(hits):
        ordered = sorted(max(time, _MIN_US) for time in times)
        axes.ecdf(ordered, color=color, label=label)
        axes.plot(ordered[len(ordered) // 2], 0.5, "o", color=color, markersize=5)
        slowest = max(slowest, ordered[int(_SHOWN_SHARE * (len(ordered) - 1))])
    axes.set_xscale("log")
    axes.set_xlim(right=slowest * 1.25)
    low, high = axes.get_xlim()
    # Between the powers of ten, where there is room for more labels.
    between = "25" if high < 100 * low else ""
    axes.xaxis.set_major_formatter(lambda value, _: _time(value))
    axes.xaxis.set_minor_formatter(lambda value, _: _time(value) if f"{value:e}"[0] in between else "")
    axes.tick_params(axis="x", which="both", length=3)
    axes.set(ylabel="share of calls", ylim=(0, 1.02))
    axes.grid(True)
    axes.legend(loc="lower right")
    return figure


def _cumulative(figures: Any, result: Result) -> Any:
    """The sum of all times so far, captures included, and where graphs are ahead for good."""
    if len(result.calls) < 2:
        return None
    figure, axes = _figure(figures, 2.9)
    unit, size = ("s", 1e6) if sum(call.eager_us for call in result.calls) > 1e7 else ("ms", 1e3)
    calls = range(len(result.calls) + 1)
    sums = []
    for label, color, times in _both(result.calls):
        sums.append([0.0, *(total / size for total in itertools.accumulate(times))])
        axes.plot(calls, sums[-1], color=color, label=label)
    axes.fill_between(
        calls, *sums, where=[eager > graph for eager, graph in zip(*sums, strict=True)], color=GRAPH, alpha=0.1
    )
    axes.set(xlabel="calls", ylabel=f"{unit} so far", xlim=(0, len(result.calls)))
    axes.set_ylim(bottom=0)
    found = result.break_even()
    if found is not None and found < len(result.calls):
        axes.axvline(found, color="#6b7280", linewidth=0.8, linestyle="--")
        side = "right" if found > len(result.calls) / 2 else "left"
        axes.text(found, axes.get_ylim()[1], f" ahead for good after {found} calls ", va="top", ha=side, fontsize=8)
    axes.grid(True)
    axes.legend(loc="lower right")
    return figure


def _outcomes(figures: Any, result: Result) -> Any:
    """The shares of outcomes for each set of inputs, with counts."""
    if not result.calls:
        return None
    counted = result.outcomes()
    rows = sorted(counted, key=lambda index: -counted[index].total())[:_MAX_ROWS]
    kinds = list(dict.fromkeys(["hit", "capture", *(call.outcome for call in result.calls)]))
    greys = itertools.cycle(_GREYS)
    figure, axes = _figure(figures, 0.9 + 0.27 * len(rows))
    left = [0.0] * len(rows)
    for kind in kinds:
        color = {"hit": GRAPH, "capture": CAPTURE}.get(kind) or next(greys)
        counts = [counted[index][kind] for index in rows]
        if not any(counts):
            continue
        shares = [count / max(counted[index].total(), 1) for count, index in zip(counts, rows, strict=True)]
        bars = axes.barh(range(len(rows)), shares, left=left, color=color, height=0.76, label=kind.replace("_", " "))
        texts = [str(count) if share > 0.06 else "" for count, share in zip(counts, shares, strict=True)]
        dark = color in ("#9ca3af", "#d1d5db", "#e5e7eb")
        axes.bar_label(bars, texts, label_type="center", color="#111827" if dark else "white", fontsize=7.5)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    _name_rows(axes, [result.inputs[index].label for index in rows])
    axes.set(xlim=(0, 1), xticks=[])
    axes.spines["bottom"].set_visible(False)
    figure.legend(loc="outside upper left", ncols=5, handlelength=1.0, fontsize=8)
    return figure


def _memory(figures: Any, result: Result) -> Any:
    """The memory that each graph owned at the end, the largest first."""
    held = sorted((each for each in result.inputs if each.nbytes), key=lambda each: -each.nbytes)[:_MAX_ROWS]
    if not held:
        return None
    units = (("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))
    unit, size = next(each for each in units if held[0].nbytes >= each[1])
    figure, axes = _figure(figures, 0.75 + 0.27 * len(held))
    bars = axes.barh(range(len(held)), [each.nbytes / size for each in held], color=CAPTURE, height=0.7)
    axes.bar_label(bars, [f"{each.nbytes / size:.3g}" for each in held], padding=4, fontsize=8, color="#374151")
    _name_rows(axes, [each.label for each in held])
    axes.set_xlabel(unit)
    axes.margins(x=0.1)
    return figure


def _figure(figures: Any, height: float) -> tuple[Any, Any]:
    """A figure of the page's width, and its axes."""
    figure = figures.Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _both(calls: Sequence[Measured]) -> tuple[tuple[str, str, list[float]], ...]:
    """Label, colour and times in microseconds, eagerly and through graphs."""
    return (
        ("eagerly", EAGER, [call.eager_us for call in calls]),
        ("through graphs", GRAPH, [call.us for call in calls]),
    )


def _time(microseconds: float) -> str:
    """A time in its unit."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{microseconds / size:g} {unit}"
    return f"{microseconds:g} µs"


def _name_rows(axes: Any, labels: Sequence[str]) -> None:
    """Label the bars, from the top down."""
    shown = ("".join(each if each.isprintable() else " " for each in label) for label in labels)
    axes.set_yticks(range(len(labels)), [label if len(label) <= 40 else f"{label[:39]}…" for label in shown])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.spines["left"].set_visible(False)


def _svg(figure: Any, name: str) -> str:
    """The figure as an element that scales with the page; its identifiers differ from those of other figures there."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\1{name}-", text)
    return re.sub(r'(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r'\1\2 role="img"', text, count=1)
