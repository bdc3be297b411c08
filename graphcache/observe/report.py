"""A result as one self-contained page of HTML: it opens from a file, without network or scripts."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from graphcache.errors import Reason
from graphcache.extras import optional
from graphcache.observe.plots import plots
from graphcache.observe.result import Measured, Result

_HEADINGS = (
    (
        "latencies",
        "Latency of hits",
        "Share of calls that took at most this long. Dots: medians. The slowest may be off the plot.",
    ),
    ("cumulative", "Time so far", "Captures included, in the order of the calls."),
    ("outcomes", "Outcomes of the calls", "By inputs, the most frequent first."),
    ("memory", "Memory of the graphs", "What each owned at the end of the run."),
)
_BY_NAME = {reason.value: reason for reason in Reason}
_INPUTS = ("inputs", "hits", "captures", "eager", "eagerly", "graph", "capture", "bytes")
_REASONS = ("reason", "calls", "what was seen", "what would change it")


def page(result: Result) -> str:
    """The report of a result, as HTML; everything from the result is escaped in it."""
    drawn = plots(result)
    jinja = optional("jinja2", "a report")
    environment = jinja.Environment(autoescape=True, undefined=jinja.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    versions = (value if name == "device" else f"{name} {value}" for name, value in result.environment.items())
    text: str = template.render(
        result=result,
        environment=", ".join(versions),
        figures=_figures(result),
        headings=_HEADINGS,
        plots=drawn,
        tables=[
            ("inputs", "Inputs", "Medians in microseconds.", _INPUTS, range(1, 8), _inputs(result)),
            ("reasons", "Why calls ran eagerly", "Most frequent first.", _REASONS, (1,), _reasons(result)),
        ],
    )
    return text


def _figures(result: Result) -> list[tuple[str, str, bool]]:
    """The figures at the top: name, value, and whether it is the main one."""
    counts = Counter(call.outcome for call in result.calls)
    hits = [call for call in result.calls if call.outcome == "hit"]
    graph, eager = _medians(hits)
    found = result.break_even()
    return [
        ("eager ÷ graph", f"{eager / graph:.2f}" if hits and graph else "-", True),
        ("hits, median", f"{graph:.1f} µs" if hits else "-", False),
        ("the same, eagerly", f"{eager:.1f} µs" if hits else "-", False),
        ("ahead for good after", f"{found} calls" if found is not None else "never", False),
        ("calls", f"{len(result.calls)}", False),
        ("hits", f"{counts['hit']}", False),
        ("captures", f"{counts['capture']}", False),
        ("eager", f"{_eager(counts)}", False),
    ]


def _inputs(result: Result) -> list[Sequence[str]]:
    """A row for each set of inputs."""
    rows: list[Sequence[str]] = []
    for index, counts in result.outcomes().items():
        inputs, calls = result.inputs[index], [call for call in result.calls if call.inputs == index]
        graph, eager = _medians([call for call in calls if call.outcome == "hit"])
        capture, _ = _medians([call for call in calls if call.outcome == "capture"])
        times = (
            f"{eager:.1f}" if counts["hit"] else "-",
            f"{graph:.1f}" if counts["hit"] else "-",
            f"{capture:.0f}" if counts["capture"] else "-",
        )
        numbers = (str(counts["hit"]), str(counts["capture"]), str(_eager(counts)))
        rows.append((inputs.label or "(none)", *numbers, *times, str(inputs.nbytes)))
    return rows


def _reasons(result: Result) -> list[Sequence[str]]:
    """A row for each reason, the most frequent first."""
    counts = Counter(call.outcome for call in result.calls if call.outcome not in ("hit", "capture"))
    return [
        (name, str(count), result.reasons.get(name, _BY_NAME[name].sentence), _BY_NAME[name].remedy)
        for name, count in counts.most_common()
    ]


def _eager(counts: Counter[str]) -> int:
    """How many calls ran eagerly."""
    return counts.total() - counts["hit"] - counts["capture"]


def _medians(calls: Sequence[Measured]) -> tuple[float, float]:
    """The medians through graphs and eagerly, in microseconds; 0 without calls."""
    if not calls:
        return 0.0, 0.0
    return statistics.median(call.us for call in calls), statistics.median(call.eager_us for call in calls)
