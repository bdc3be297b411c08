"""``graphcache prepare``: capture calls, and write or check a manifest of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click
import torch

import graphcache
from graphcache import Prepared
from graphcache.cli.options import (
    ShapesCommand,
    Specs,
    device_option,
    include_option,
    json_option,
    points,
    shapes_option,
    strategy_option,
    target_argument,
)
from graphcache.cli.output import described, environment, one_line, print_json, progress, stdout
from graphcache.cli.targets import Target, resolve
from graphcache.errors import GraphCacheError
from graphcache.modules.transparent import controls
from graphcache.serving.factories import raised


@click.command(cls=ShapesCommand, short_help="Capture calls as a server would, and keep a manifest.")
@target_argument
@shapes_option(
    "Shapes of one call, as for run. Give it again for another one. Without it, MANIFEST is read and prepared.",
)
@click.option(
    "--manifest",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where the manifest is written; without --shapes, where it is.",
)
@click.option(
    "--deadline", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="None is captured later."
)
@click.option("--max-graphs", type=click.IntRange(min=1), help="How many graphs are kept, at most.")
@click.option("--max-bytes", type=click.IntRange(min=1), help="Bytes that all graphs may own together.")
@click.option(
    "--mode",
    type=click.Choice(["no_grad", "inference_mode", "grad"]),
    default="no_grad",
    show_default=True,
    help="What calls will be made under; a graph answers one of them alone.",
)
@device_option
@strategy_option
@include_option
@json_option
def prepare(
    target: str,
    shapes: Sequence[Specs],
    manifest: Path | None,
    deadline: float | None,
    max_graphs: int | None,
    max_bytes: int | None,
    mode: str,
    device: str | None,
    strategy: str,
    include: Sequence[str],
    as_json: bool,
) -> None:
    """Capture calls of an engine, an ONNX model or a module as a server would at its start, and keep a manifest.

    With --shapes, these calls are captured and written to the manifest. Without, those of the manifest are captured,
    which shows whether it holds here. Exits with 1 if anything was refused or ignored.

    \b
    Examples:
      graphcache prepare nets.py:mlp --shapes input:1x16 --shapes input:8x16 \\
          --manifest mlp.json
      graphcache prepare nets.py:mlp --manifest mlp.json --deadline 30
    """
    if not shapes and manifest is None:
        raise click.UsageError("Nothing to prepare: give --shapes, or --manifest with a file that was written before.")
    found = resolve(target, shapes, device)
    given = _calls(found, shapes) if shapes else [manifest]
    if max_graphs is None:
        wanted = len(given) if shapes else len(graphcache.Manifest.load(_there(manifest)).entries)
        max_graphs = max(graphcache.GraphConfig.max_graphs, wanted)
    options: dict[str, Any] = {"strategy": strategy, "include": tuple(include), "capture": "prepared"}
    options |= {"max_bytes": max_bytes} if max_bytes is not None else {}
    with graphcache.wrap(found.module, max_graphs=max_graphs, **options) as fast:
        try:
            with _MODES[mode]():
                done = controls(fast).prepare(*given, deadline=deadline)
        except GraphCacheError:
            raise
        except Exception as error:
            raise click.ClickException(f"{found.name} refused a call: {raised(error)}") from error
        written = 0
        if shapes and manifest is not None:
            written = len(controls(fast).save_manifest(manifest).entries)
    versions = environment(found.device, tensorrt=isinstance(found.module, graphcache.EngineModule))
    if as_json:
        print_json(
            {**versions, "target": target, **_as_json(done), "manifest": str(manifest or ""), "written": written}
        )
    else:
        _print(versions, target, done, manifest if shapes else None, written)
    if done.refused or done.problems:
        wrong = len(done.refused) + len(done.problems)
        raise click.ClickException(f"{wrong} of what was asked for could not be prepared")


def _calls(found: Target, shapes: Sequence[Specs]) -> list[graphcache.Call]:
    generator = torch.Generator().manual_seed(0)
    with progress("Making inputs"):
        calls = [found.call(point, generator) for point in points(shapes)]
    return [graphcache.Call(call.args, call.kwargs) for call in calls]


def _there(manifest: Path | None) -> Path:
    assert manifest is not None
    if not manifest.exists():
        raise click.ClickException(f"there is no file {manifest}; write it with --shapes first")
    return manifest


def _as_json(done: Prepared) -> dict[str, Any]:
    return {
        "signatures": done.signatures,
        "seconds": round(done.seconds, 4),
        "nbytes": done.nbytes,
        "left_out": done.left_out,
        "refused": [{"call": each.call, "cause": one_line(str(each.cause))} for each in done.refused],
        "problems": [one_line(str(each)) for each in done.problems],
    }


def _print(versions: dict[str, str], target: str, done: Prepared, manifest: Path | None, written: int) -> None:
    console = stdout()
    console.print(described(versions), soft_wrap=True)
    console.print(f"{target}: {done}", soft_wrap=True)
    for each in done.refused:
        console.print(f"Refused, {each.call}: {one_line(str(each.cause))}", soft_wrap=True)
    for problem in done.problems:
        console.print(f"Ignored, {one_line(str(problem))}", soft_wrap=True)
    if manifest is not None:
        console.print(f"{written} calls written to {manifest}", soft_wrap=True)


_MODES: dict[str, type[AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad": torch.enable_grad,
}
