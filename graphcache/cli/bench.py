"""``graphcache bench``: mixed traffic over several shapes, eager against graphs, captures included."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

import graphcache
from graphcache.cli.measuring import judge, nbytes_of, refused, turn
from graphcache.cli.options import (
    ShapesCommand,
    Specs,
    device_option,
    include_option,
    json_option,
    points,
    removed_watch_option,
    seed_option,
    shapes_option,
    strategy_option,
    target_argument,
)
from graphcache.cli.output import (
    Causes,
    ComparisonFailed,
    check_writable,
    print_json,
    progress,
    save_result,
    stdout,
)
from graphcache.cli.summary import summary_of, tabulated
from graphcache.cli.targets import resolve
from graphcache.modules.transparent import controls
from graphcache.observe.result import Inputs, Result


@click.command(cls=ShapesCommand, short_help="Measure mixed traffic, captures included.")
@target_argument
@shapes_option(
    "Shapes of one set of inputs, as for run. Give it again for another set; those named first come most often.",
    required=True,
)
@click.option("--calls", type=click.IntRange(min=1), default=500, show_default=True, help="How many calls to make.")
@click.option(
    "--capture", type=click.Choice(["first", "worthwhile"]), default="first", show_default=True, help="The policy."
)
@click.option("--max-graphs", type=click.IntRange(min=1), help="How many graphs are kept, at most.")
@click.option("--max-bytes", type=click.IntRange(min=1), help="Bytes that all graphs may own together.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the result, for graphcache report."
)
@removed_watch_option
@device_option
@strategy_option
@include_option
@seed_option
@json_option
def bench(
    target: str,
    shapes: Sequence[Specs],
    calls: int,
    capture: str,
    max_graphs: int | None,
    max_bytes: int | None,
    output: Path | None,
    device: str | None,
    strategy: str,
    include: Sequence[str],
    seed: int,
    as_json: bool,
) -> None:
    """Make calls of several shapes in random order, each eagerly and through graphs, from the very first one on.

    The n-th shape comes with a weight of 1/n. Every answer of a graph is compared with the eager one; exits with 3 if
    any differs.

    \b
    Examples:
      graphcache bench nets.py:mlp --shapes input:1x16:4x16:8x16 --calls 100
      graphcache bench nets.py:mlp --shapes input:1x16 --shapes input:4x16 \\
          --calls 100 -o result.json
      graphcache bench nets.py:mlp --shapes input:8x16 --capture worthwhile --json
    """
    check_writable(output, "--output")
    found = resolve(target, shapes, device)
    generator = torch.Generator().manual_seed(seed)
    made = [found.call(point, generator) for point in points(shapes)]
    options: dict[str, Any] = {"strategy": strategy, "include": tuple(include), "capture": capture}
    options |= {"max_graphs": max_graphs} if max_graphs is not None else {}
    options |= {"max_bytes": max_bytes} if max_bytes is not None else {}
    with (
        graphcache.wrap(found.module, **options) as fast,
        torch.no_grad(),
        progress("Running") as show,
    ):
        causes = Causes(fast, *controls(fast).parts.values())
        traffic = []
        for index, number in enumerate(_traffic(len(made), calls, seed)):
            if index % 64 == 0:
                show(f"Call {index + 1} of {calls}")
            with refused(found, made[number]):
                traffic.append((number, turn(found, fast, made[number], graph_first=index % 2 == 0)[0]))
        held = tuple(Inputs(call.label, nbytes_of(fast, call)) for call in made)
    names = dict.fromkeys(each.outcome for _, each in traffic if each.outcome not in ("hit", "capture"))
    result = Result(
        target,
        found.versions,
        held,
        tuple(each.measured(number) for number, each in traffic),
        {name: causes.explain(name) for name in names},
    )
    save_result(result, output, "--output")
    judged = judge(found, [each for _, each in traffic])
    wrong = [(made[number], each.wrong) for number, each in traffic if each.wrong]
    _tell(result, judged, len(wrong), seed, output, as_json=as_json)
    if wrong:
        call, why = wrong[0]
        raise ComparisonFailed(
            f"{len(wrong)} of {calls} answers differ from eager execution. The first, {call.label}: {why}"
        )


def _traffic(shapes: int, calls: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(shapes), [1 / rank for rank in range(1, shapes + 1)], k=calls)


def _tell(result: Result, judged: dict[str, str], wrong: int, seed: int, output: Path | None, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                **result.environment,
                "target": result.target,
                "calls": len(result.calls),
                "seed": seed,
                "differences": wrong,
                "break_even": result.break_even(),
                "inputs": summary_of(result),
                "reasons": dict(result.reasons),
                "verdict": judged,
                "output": str(output) if output is not None else None,
            }
        )
        return
    console = stdout()
    tabulated(result, console)
    if not wrong:
        console.print("Every answer of a graph equals eager execution.")
    console.print(f"Verdict: {judged['kind']}: {judged['text']}.", soft_wrap=True)
    if output is not None:
        console.print(f"Written to {output}; graphcache report {output} --html report.html", soft_wrap=True)
