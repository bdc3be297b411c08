"""``graphcache run``: one engine or module over given shapes, eager against replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import torch

import graphcache
from graphcache.cli import tensors
from graphcache.cli.measuring import Turns, judge, measure, nbytes_of
from graphcache.cli.options import (
    PercentilesType,
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
    described,
    print_json,
    progress,
    save_result,
    stdout,
    table,
)
from graphcache.cli.reference import OnnxRuntime
from graphcache.cli.targets import Target, resolve
from graphcache.cli.timing import spread
from graphcache.modules.transparent import controls
from graphcache.observe.result import Inputs, Measured, Result


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the command was given."""

    target: str
    shapes: Sequence[Specs]
    load_inputs: Path | None
    save_outputs: Path | None
    iterations: int
    duration: float
    warm_up: int
    percentile: tuple[float, ...]
    compare: Literal["eager", "onnxruntime"]
    onnx: Path | None
    export_times: Path | None
    device: str | None
    strategy: str
    include: Sequence[str]
    seed: int
    as_json: bool


@click.command(cls=ShapesCommand, short_help="Run an engine or a module, eagerly and through graphs.")
@target_argument
@shapes_option(
    "Shapes of one set of inputs, such as x:8x64,y:8 or x:[8,64] y:[8]; x:1x64:8x64:64x64 runs all three. "
    "Give it again for another set. Inputs of modules take a dtype: tokens:[1,16]:int64.",
)
@click.option(
    "--load-inputs",
    "--loadInputs",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Take one set of inputs from a safetensors file, by name.",
)
@click.option(
    "--save-outputs",
    "--saveOutputs",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the last answers to a safetensors file.",
)
@click.option("--iterations", type=click.IntRange(min=1), default=200, show_default=True, help="Calls, at least.")
@click.option(
    "--duration",
    type=click.FloatRange(min=0, max=3600),
    default=0.0,
    metavar="SECONDS",
    help="Measure so long, at least.",
)
@click.option(
    "--warm-up", "--warmUp", type=click.IntRange(min=0), default=10, show_default=True, help="Calls made beforehand."
)
@click.option(
    "--percentile",
    type=PercentilesType(),
    default="50,90,99",
    show_default=True,
    metavar="P,...",
    help="Percentiles to tell, beside the median.",
)
@click.option(
    "--compare",
    type=click.Choice(["eager", "onnxruntime"]),
    default="eager",
    show_default=True,
    help="What answers are held against, on top of eager execution.",
)
@click.option("--onnx", type=click.Path(path_type=Path), metavar="FILE", help="The model for --compare onnxruntime.")
@click.option(
    "--export-times",
    "--exportTimes",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write every measured call as JSON, for graphcache report.",
)
@removed_watch_option
@device_option
@strategy_option
@include_option
@seed_option
@json_option
def run(**options: Any) -> None:
    """Run an engine, an ONNX model or a module on random inputs, eagerly and through its graphs.

    A factory is a function without parameters that returns an nn.Module: package.module:function or file.py:function.
    Every answer of a graph is compared with the eager one; exits with 3 if any differs. The last line says whether
    calls are bound by launching, where graphs help, or by computing, where they do not.

    \b
    Examples:
      graphcache run nets.py:mlp --shapes input:8x16
      graphcache run nets.py:mlp --shapes input:[1,16] --shapes input:[8,16]
      graphcache run nets.py:mlp --shapes input:8x16 --duration 0.1 \\
          --percentile 90,95,99 --export-times result.json
      graphcache run model.engine --shapes x:1x8:4x8:8x8
    """
    given = RunOptions(**options)
    if given.load_inputs is not None and given.shapes:
        raise click.UsageError("--load-inputs gives the inputs; leave --shapes out.")
    for path, option in ((given.save_outputs, "--save-outputs"), (given.export_times, "--export-times")):
        check_writable(path, option)
    reference = _reference(given)
    loaded = {} if given.load_inputs is None else tensors.load_inputs(given.load_inputs)
    found = resolve(given.target, given.shapes, given.device)
    rows, held, reasons = _measured(given, found, loaded)
    against = {row.call.label: reference.difference(row.call, row.answer) for row in rows} if reference else {}
    differs = [f"{label}: {why}" for label, why in against.items() if why]
    versions = found.versions
    _write_files(given, found, rows, Result(given.target, versions, held, _calls(rows), reasons))
    told = [_told(row, given.percentile, found, reasons) for row in rows]
    wrong = [f"{row.call.label}: {each}" for row in rows for each in row.wrong]
    if given.as_json:
        print_json(
            {
                **versions,
                "target": given.target,
                "iterations": given.iterations,
                "warm_up": given.warm_up,
                "seed": given.seed,
                "differences": len(wrong),
                "compared_with": given.compare,
                "differs": differs,
                "shapes": told,
            }
        )
    else:
        _print(given, versions, rows, told)
    if wrong:
        raise ComparisonFailed(f"{len(wrong)} answers of graphs differ from eager execution. The first, {wrong[0]}")
    if differs:
        raise ComparisonFailed(f"answers differ from onnxruntime. The first, {differs[0]}")


def _reference(given: RunOptions) -> OnnxRuntime | None:
    if given.compare == "eager":
        if given.onnx is not None:
            raise click.UsageError("--onnx is the model for --compare onnxruntime; give that too.")
        return None
    if given.onnx is None and not given.target.endswith(".onnx"):
        raise click.UsageError("--compare onnxruntime needs the model: give it with --onnx.")
    return OnnxRuntime(given.onnx or Path(given.target))


def _measured(
    given: RunOptions, found: Target, loaded: dict[str, torch.Tensor]
) -> tuple[list[Turns], tuple[Inputs, ...], dict[str, str]]:
    """What was measured for each set of inputs, what its graph owned, and why calls ran eagerly."""
    generator = torch.Generator().manual_seed(given.seed)
    calls = [found.given(loaded)] if loaded else [found.call(at, generator) for at in points(given.shapes) or [{}]]
    room = max(graphcache.GraphConfig.max_graphs, len(calls))
    options: dict[str, Any] = {"strategy": given.strategy, "include": tuple(given.include), "max_graphs": room}
    times: dict[str, Any] = {name: getattr(given, name) for name in ("iterations", "duration", "warm_up")}
    rows: list[Turns] = []
    with graphcache.wrap(found.module, **options) as fast, torch.no_grad(), progress("Running") as show:
        causes = Causes(fast, *controls(fast).parts.values())
        for call in calls:
            show(f"Running {call.label}")
            rows.append(measure(found, fast, call, **times))
        held = tuple(Inputs(row.call.label, nbytes_of(fast, row.call)) for row in rows)
    return rows, held, {name: causes.explain(name) for row in rows for name in row.reasons}


def _calls(rows: Sequence[Turns]) -> tuple[Measured, ...]:
    """Every call, for the result."""
    return tuple(each.measured(index) for index, row in enumerate(rows) for each in (row.first, *row.turns))


def _write_files(given: RunOptions, found: Target, rows: Sequence[Turns], result: Result) -> None:
    """The answers and the measured calls, if they were asked for."""
    if given.save_outputs is not None:
        names = [binding.name for binding in getattr(getattr(found.module, "engine", None), "outputs", ())]
        tensors.save_outputs(given.save_outputs, {row.call.label: row.answer for row in rows}, names)
    save_result(result, given.export_times, "--export-times")


def _told(row: Turns, percentiles: Sequence[float], found: Target, reasons: dict[str, str]) -> dict[str, Any]:
    eager = spread([each.eager for each in row.turns], percentiles)
    graph = spread([each.graph for each in row.turns], percentiles)
    enqueue = spread([each.enqueue for each in row.turns], percentiles)
    assert eager is not None
    assert graph is not None
    assert enqueue is not None
    replayed = any(each.replayed for each in row.turns)
    return {
        "inputs": row.call.label,
        "eager": eager,
        "enqueue": enqueue,
        "graph": graph if replayed else None,
        "calls_per_second": {
            "eager": _rate(eager["mean"]),
            "graph": _rate(graph["mean"]) if replayed else None,
        },
        "first_call_us": round(row.first.graph / 1000, 1),
        "reasons": {name: reasons[name] for name in row.reasons},
        "differences": len(row.wrong),
        "verdict": judge(found, row.turns),
    }


def _rate(mean: float) -> float:
    return round(1e6 / mean, 1) if mean else 0.0


def _print(given: RunOptions, versions: dict[str, str], rows: Sequence[Turns], told: Sequence[dict[str, Any]]) -> None:
    console = stdout()
    console.print(described(versions), soft_wrap=True)
    counts = sorted({len(row.turns) for row in rows})
    calls = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    console.print(f"{given.target}: {calls} calls per set of inputs; µs, eager | through graphs", soft_wrap=True)
    console.print()
    names = [f"p{share:g}" for share in dict.fromkeys([50.0, *given.percentile])]
    shown = table("inputs", *names, f"| {names[0]}", *names[1:], "first call")
    for each in told:
        eager, graph = each["eager"], each["graph"] or {}
        cells = [f"{graph[name]:.1f}" if graph else "-" for name in names]
        shown.add_row(
            each["inputs"] or "(none)",
            *(f"{eager[name]:.1f}" for name in names),
            f"| {cells[0]}",
            *cells[1:],
            f"{each['first_call_us']:.1f}",
        )
    console.print(shown)
    console.print()
    for why in dict.fromkeys(why for each in told for why in each["reasons"].values()):
        console.print(f"Ran eagerly, {why}", soft_wrap=True)
    if any(each["graph"] for each in told) and not any(each["differences"] for each in told):
        also = " and onnxruntime" if given.compare == "onnxruntime" else ""
        console.print(f"Every answer of a graph equals eager execution{also}.")
    verdicts = {each["inputs"]: f"{each['verdict']['kind']}: {each['verdict']['text']}" for each in told}
    if len(set(verdicts.values())) == 1:
        console.print(f"Verdict: {next(iter(verdicts.values()))}.", soft_wrap=True)
    else:
        for inputs, text in verdicts.items():
            console.print(f"Verdict, {inputs}: {text}.", soft_wrap=True)
