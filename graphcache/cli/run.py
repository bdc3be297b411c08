"""``graphcache run``: one engine or module over given shapes, eager against replay."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click
import torch

import graphcache
from graphcache import CachedModule, Reason
from graphcache.cli.options import ShapesCommand, ShapesType, Specs, points
from graphcache.cli.output import (
    Causes,
    ComparisonFailed,
    cells,
    described,
    environment,
    print_json,
    progress,
    stdout,
    table,
)
from graphcache.cli.targets import Call, Target, resolve, told
from graphcache.cli.timing import Latency, difference, timed
from graphcache.errors import GraphCacheError


@dataclass(frozen=True)
class _Row:
    """What one set of inputs gave."""

    label: str
    eager: Latency | None
    graph: Latency | None
    first: int
    reasons: dict[Reason, str]
    differences: int
    worst: str


@click.command(cls=ShapesCommand)
@click.argument("target", metavar="ENGINE|MODEL.onnx|MODULE:FACTORY")
@click.option(
    "--shapes",
    "--input-shapes",
    type=ShapesType(),
    multiple=True,
    help="Shapes of one set of inputs, such as x:8x64,y:8 or x:[8,64] y:[8]; x:1x64:8x64:64x64 runs all three. "
    "Give it again for another set. Inputs of modules take a dtype: tokens:[1,16]:int64.",
)
@click.option("--iterations", type=click.IntRange(min=1), default=200, show_default=True, help="Calls to measure.")
@click.option(
    "--warm-up", "--warmUp", type=click.IntRange(min=0), default=10, show_default=True, help="Calls made beforehand."
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where a module goes; where it is if left out.")
@click.option(
    "--strategy", type=click.Choice(["auto", "whole_graph", "per_submodule"]), default="auto", show_default=True
)
@click.option("--include", multiple=True, metavar="NAME", help="A submodule to capture on its own; may be repeated.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the inputs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def run(
    target: str,
    shapes: Sequence[Specs],
    iterations: int,
    warm_up: int,
    device: str | None,
    strategy: str,
    include: Sequence[str],
    seed: int,
    as_json: bool,
) -> None:
    """Run an engine, an ONNX model or a module on random inputs, eagerly and through its graphs.

    A factory is a function without parameters that returns an nn.Module: package.module:function or file.py:function.
    Every answer of a graph is compared with the eager one; exits with 3 if any differs.
    """
    found = resolve(target, shapes, device)
    generator = torch.Generator().manual_seed(seed)
    calls = [found.call(point, generator) for point in points(shapes) or [{}]]
    rows = []
    options: dict[str, Any] = {"strategy": strategy, "include": tuple(include), "max_graphs": max(32, len(calls))}
    with graphcache.wrap(found.module, **options) as fast, torch.no_grad(), progress("Running") as show:
        causes = Causes(fast, *fast.parts.values())
        for call in calls:
            show(f"Running {call.label}")
            rows.append(_measure(found, fast, causes, call, iterations, warm_up))
    tensorrt = any(isinstance(part, graphcache.EngineModule) for part in found.module.modules())
    versions = environment(found.device, tensorrt=tensorrt)
    differences = sum(row.differences for row in rows)
    if as_json:
        print_json(
            {
                **versions,
                "target": target,
                "iterations": iterations,
                "warm_up": warm_up,
                "seed": seed,
                "differences": differences,
                "shapes": [_as_json(row) for row in rows],
            }
        )
    else:
        _print(target, versions, rows, iterations)
    if differences:
        worst = next(row for row in rows if row.differences)
        raise ComparisonFailed(
            f"{differences} answers of graphs differ from eager execution. The first, {worst.label}: {worst.worst}"
        )


def _measure(found: Target, fast: CachedModule, causes: Causes, call: Call, iterations: int, warm_up: int) -> _Row:
    eagerly = functools.partial(found.module, *call.args, **call.kwargs)
    through = functools.partial(fast, *call.args, **call.kwargs)
    try:
        _, first = timed(through, found.device)
        for _ in range(warm_up):
            eagerly()
            through()
        before = fast.cache_info()
        eager, graph, worst, differences = [], [], "", 0
        for _ in range(iterations):
            expected, nanoseconds = timed(eagerly, found.device)
            eager.append(nanoseconds)
            hits = fast.cache_info().hits
            answer, nanoseconds = timed(through, found.device)
            graph.append(nanoseconds)
            if fast.cache_info().hits > hits and (seen := difference(answer, expected)) is not None:
                worst = worst or seen
                differences += 1
    except GraphCacheError:
        raise
    except Exception as error:
        raise click.ClickException(
            f"{found.name} refused {call.label or 'a call without inputs'}: {told(error)}"
        ) from error
    after = fast.cache_info()
    reasons = [reason for reason, count in after.eager.items() if count > before.eager.get(reason, 0)]
    replayed = after.hits > before.hits
    return _Row(
        call.label,
        Latency.of(eager),
        Latency.of(graph) if replayed else None,
        first,
        {reason: causes.explain(reason) for reason in reasons},
        differences,
        worst,
    )


def _as_json(row: _Row) -> dict[str, Any]:
    return {
        "inputs": row.label,
        "eager": asdict(row.eager) if row.eager else None,
        "graph": asdict(row.graph) if row.graph else None,
        "first_call_us": round(row.first / 1000, 1),
        "reasons": {reason.value: why for reason, why in row.reasons.items()},
        "differences": row.differences,
    }


def _print(target: str, versions: dict[str, str], rows: Sequence[_Row], iterations: int) -> None:
    console = stdout()
    console.print(described(versions), soft_wrap=True)
    console.print(f"{target}: {iterations} calls per set of inputs; µs, eager | through graphs", soft_wrap=True)
    console.print()
    shown = table("inputs", "p50", "p90", "p99", "| p50", "p90", "p99", "first call")
    for row in rows:
        p50, p90, p99 = cells(row.graph)
        shown.add_row(row.label or "(none)", *cells(row.eager), f"| {p50}", p90, p99, f"{row.first / 1000:.1f}")
    console.print(shown)
    console.print()
    for why in dict.fromkeys(why for row in rows for why in row.reasons.values()):
        console.print(f"Ran eagerly, {why}", soft_wrap=True)
    replayed = sum(row.graph is not None for row in rows)
    if replayed and not any(row.differences for row in rows):
        console.print("Every answer of a graph equals eager execution.")
