"""A result as one page of HTML that has everything in it: it opens from a file, without network or scripts."""

from __future__ import annotations

import html
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence

from graphcache.errors import Reason
from graphcache.observe.plots import plots
from graphcache.observe.result import Measured, Result

_HEADINGS = {
    "latencies": (
        "Latency of hits",
        "The share of calls that took at most so long; the dots are the medians. The slowest may lie beyond the edge.",
    ),
    "cumulative": ("Time so far", "Captures included, in the order of the calls."),
    "outcomes": ("What became of the calls", "By inputs, those called most first."),
    "memory": ("Memory of the graphs", "What each owned at the end of the run."),
}
_REASONS = {reason.value: reason for reason in Reason}
_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #111827; background: #f9fafb; margin: 0; }
main { max-width: 860px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 2px; }
p { margin: 0 0 12px; color: #4b5563; }
section { background: #fff; border: 1px solid #e5e7eb; border-radius: 8px; padding: 16px 20px; margin: 16px 0; }
svg { width: 100%; height: auto; display: block; }
dl { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin: 16px 0; }
dl div { background: #fff; border: 1px solid #e5e7eb; border-radius: 8px; padding: 10px 14px; }
dt { font-size: 12px; color: #6b7280; }
dd { margin: 0; font-size: 20px; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: #4b5563; border-bottom: 1px solid #d1d5db; padding: 4px 10px 4px 0; }
td { border-bottom: 1px solid #f3f4f6; padding: 4px 10px 4px 0; vertical-align: top; overflow-wrap: anywhere; }
@media (max-width: 640px) { dl { grid-template-columns: repeat(2, 1fr); } }
.number { text-align: right; white-space: nowrap; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 12.5px; }
"""


def page(result: Result) -> str:
    """The report of a result.

    Args:
        result: What was measured.

    Returns:
        A page of HTML. Whatever is from the result is escaped in it.

    Raises:
        ExtraNotFoundError: If matplotlib is not installed.
    """
    drawn = plots(result)
    sections = [_section(*_HEADINGS[name], drawn[name], name) for name in _HEADINGS if name in drawn]
    sections.append(_section("Inputs", "Medians in microseconds.", _inputs(result), "inputs"))
    if any(call.outcome not in ("hit", "capture") for call in result.calls):
        sections.append(_section("Why calls ran eagerly", "", _reasons(result), "reasons"))
    where = ", ".join(value if name == "device" else f"{name} {value}" for name, value in result.environment.items())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_told(result.target)} · graphcache</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{_told(result.target)}</h1>\n<p>{_told(where)}</p>\n{_figures(result)}\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _figures(result: Result) -> str:
    counts = Counter(call.outcome for call in result.calls)
    hits = [call for call in result.calls if call.outcome == "hit"]
    eager = sum(count for outcome, count in counts.items() if outcome not in ("hit", "capture"))
    found = result.break_even()
    figures = {
        "calls": f"{len(result.calls)}",
        "hits": f"{counts['hit']}",
        "captures": f"{counts['capture']}",
        "eager": f"{eager}",
        "hits, median": f"{_median(hits):.1f} µs" if hits else "-",
        "the same, eagerly": f"{_median_eager(hits):.1f} µs" if hits else "-",
        "eager ÷ graph": f"{_median_eager(hits) / _median(hits):.2f}" if hits and _median(hits) else "-",
        "ahead for good after": f"{found} calls" if found is not None else "never",
    }
    boxes = (f"<div><dt>{_told(name)}</dt><dd>{_told(value)}</dd></div>" for name, value in figures.items())
    return f"<dl>{''.join(boxes)}</dl>"


def _inputs(result: Result) -> str:
    rows = []
    for index, (inputs, counts) in enumerate(zip(result.inputs, result.outcomes().values(), strict=True)):
        hits = [call for call in result.calls if call.inputs == index and call.outcome == "hit"]
        captures = [call.us for call in result.calls if call.inputs == index and call.outcome == "capture"]
        eager = counts.total() - counts["hit"] - counts["capture"]
        rows.append(
            [
                f"<code>{_told(inputs.label or '(none)')}</code>",
                str(counts["hit"]),
                str(counts["capture"]),
                str(eager),
                f"{_median_eager(hits):.1f}" if hits else "-",
                f"{_median(hits):.1f}" if hits else "-",
                f"{statistics.median(captures):.0f}" if captures else "-",
                f"{inputs.nbytes}",
            ]
        )
    return _table(["inputs", "hits", "captures", "eager", "eagerly", "graph", "capture", "bytes"], rows)


def _reasons(result: Result) -> str:
    counts = Counter(call.outcome for call in result.calls if call.outcome not in ("hit", "capture"))
    rows = []
    for name, count in counts.most_common():
        reason = _REASONS[name]
        rows.append(
            [f"<code>{name}</code>", str(count), _told(result.reasons.get(name, reason.sentence)), _told(reason.remedy)]
        )
    return _table(["reason", "calls", "what was seen", "what would change it"], rows, numbers=(1,))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] | None = None) -> str:
    numeric = range(1, len(columns)) if numbers is None else numbers

    def cells(tag: str, values: Sequence[str]) -> Iterator[str]:
        for index, value in enumerate(values):
            kind = ' class="number"' if index in numeric else ""
            yield f"<{tag}{kind}>{value}</{tag}>"

    head = "".join(cells("th", columns))
    body = "".join(f"<tr>{''.join(cells('td', row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _section(title: str, text: str, content: str, name: str) -> str:
    told = f"<p>{_told(text)}</p>" if text else ""
    return f'<section id="{name}">\n<h2>{_told(title)}</h2>\n{told}\n{content}\n</section>'


def _median(calls: Sequence[Measured]) -> float:
    return statistics.median(call.us for call in calls)


def _median_eager(calls: Sequence[Measured]) -> float:
    return statistics.median(call.eager_us for call in calls)


def _told(text: str) -> str:
    return html.escape(text)
