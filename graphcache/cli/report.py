"""``graphcache report``: what a run measured, as a page."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from graphcache.cli.options import json_option
from graphcache.cli.output import print_json, progress, stdout, writing
from graphcache.cli.summary import summary_of, tabulated
from graphcache.observe.report import page
from graphcache.observe.result import read_result


@click.command(short_help="Make a page of what a run measured.")
@click.argument("result", type=click.Path(path_type=Path), metavar="RESULT.json")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Where to write the page.")
@json_option
def report(result: Path, html: Path | None, as_json: bool) -> None:
    """Sum up a result of bench -o, or of run --export-times; with --html also as a page with plots.

    The page has everything in it: one file, which needs neither a network nor scripts. Plots need matplotlib.

    \b
    Examples:
      graphcache report result.json
      graphcache report result.json --html report.html
    """
    found = read_result(result)
    if html is not None:
        with progress(f"Writing {html}"), writing(html, "--html") as file:
            file.write(page(found).encode())
    if as_json:
        outcomes = Counter(call.outcome for call in found.calls)
        print_json(
            {
                "target": found.target,
                "calls": len(found.calls),
                "outcomes": dict(outcomes),
                "break_even": found.break_even(),
                "inputs": summary_of(found),
                "html": str(html) if html is not None else None,
            }
        )
        return
    console = stdout()
    tabulated(found, console)
    if html is not None:
        console.print(f"Written to {html}.", soft_wrap=True)
