"""``graphcache doctor MODULE:FACTORY``: the lines that forbid a graph."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import click
import torch

import graphcache
from graphcache.cli.measuring import refused
from graphcache.cli.options import Specs, points
from graphcache.cli.output import ComparisonFailed, one_line, print_json, stdout
from graphcache.cli.targets import resolve
from graphcache.observe.breaks import Break, find_capture_breaks
from graphcache.serving.factories import is_factory


def examine(target: str, shapes: Sequence[Specs], device: str | None, *, as_json: bool) -> None:
    """Print what forbids a graph of some calls."""
    if not is_factory(target):
        raise click.UsageError(
            f"{target} is no package.module:function or file.py:function; an engine or an ONNX model is for inspect."
        )
    found = resolve(target, shapes, device)
    if isinstance(found.module, graphcache.EngineModule):
        raise click.ClickException(f"{target} is an engine, which has no lines to look at; try inspect")
    generator = torch.Generator().manual_seed(0)
    breaks: dict[str, Break] = {}
    with torch.no_grad():
        for point in points(shapes) or [{}]:
            call = found.call(point, generator)
            with refused(found, call):
                for each in find_capture_breaks(found.module, *call.args, **call.kwargs):
                    # The same line with another shape is the same to whoever mends it.
                    breaks.setdefault(str((each.reason, each.operation, each.place)), each)
    if as_json:
        print_json({"target": target, "breaks": [_tree(each) for each in breaks.values()]})
    else:
        _print(target, list(breaks.values()))
    if breaks:
        what = "one operation" if len(breaks) == 1 else f"{len(breaks)} operations"
        raise ComparisonFailed(f"{what} of {target} forbid{'s' * (len(breaks) == 1)} a graph of the whole")


def _tree(each: Break) -> dict[str, Any]:
    place = each.place
    return {
        "file": place.file,
        "line": place.line,
        "code": place.code,
        "module": place.module,
        "operation": each.operation,
        "reason": each.reason.value,
        "detail": each.detail,
        "remedy": each.remedy,
        "times": each.times,
    }


def _print(target: str, breaks: Sequence[Break]) -> None:
    console = stdout()
    for each in breaks:
        place = each.place
        where = f"{os.path.relpath(place.file)}:{place.line}" if place.file else "(no source)"
        inside = f", in {place.module}" if place.module else ""
        often = f", {each.times} times" if each.times > 1 else ""
        console.print(f"{where}: {each.reason.value}: {each.operation}{inside}{often}", soft_wrap=True, style="bold")
        if place.code:
            console.print(f"    {place.code}", soft_wrap=True)
        console.print(f"    {one_line(each.detail or each.reason.sentence)}", soft_wrap=True)
        console.print(f"    To change that: {each.remedy}.", soft_wrap=True)
    if not breaks:
        console.print(f"{target}: nothing in these calls forbids a graph.", soft_wrap=True)
