"""``graphcache build``: ONNX to engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import click

import graphcache
from graphcache.cli.options import ShapesCommand, ShapesType, Specs, json_option, ranges, shapes_option
from graphcache.cli.output import described, print_json, progress, stdout, tensorrt_version, writing

_ENGINE_MAGICS = (b"vtrt", b"ftrt")


@click.command(cls=ShapesCommand, short_help="Build a TensorRT engine from an ONNX model.")
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL.onnx")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write; MODEL.engine if left out.")
@shapes_option(
    "Shapes to build for, such as x:1x64:8x64:64x64 (smallest, usual, largest) or x:[8,64]. "
    "Given several times, each is an optimisation profile of its own.",
)
@click.option(
    "--min-shapes", "--minShapes", "--trt-min-shapes", "low", type=ShapesType(), multiple=True, help="Smallest shapes."
)
@click.option(
    "--opt-shapes", "--optShapes", "--trt-opt-shapes", "usual", type=ShapesType(), multiple=True, help="Usual shapes."
)
@click.option(
    "--max-shapes", "--maxShapes", "--trt-max-shapes", "high", type=ShapesType(), multiple=True, help="Largest shapes."
)
@click.option("--tensorrt", help="Which TensorRT: tensorrt, tensorrt_rtx or tensorrt_lean.")
@json_option
def build(
    model: Path,
    output: Path | None,
    shapes: Sequence[Specs],
    low: Sequence[Specs],
    usual: Sequence[Specs],
    high: Sequence[Specs],
    tensorrt: str | None,
    as_json: bool,
) -> None:
    """Build a TensorRT engine from an ONNX model. TensorRT-RTX needs no GPU for that.

    Shapes are written as for trtexec (x:8x64,y:8) or as for Polygraphy (x:[8,64] y:[8]). Inputs of fixed shape may be
    left out.

    \b
    Examples:
      graphcache build model.onnx --shapes x:1x8:4x8:8x8 -o model.engine
      graphcache build model.onnx --min-shapes x:1x8 --opt-shapes x:4x8 \\
          --max-shapes x:8x8
    """
    wanted = ranges(shapes, low, usual, high)
    target = output or model.with_suffix(".engine")
    check_onnx(model)
    start = time.perf_counter()
    with writing(target, "--output") as file, progress(f"Building {target}") as show:
        engine = graphcache.build(
            model,
            shapes=wanted or None,
            library=tensorrt,
            progress=lambda phase, done, steps: show(f"Building {target}: {phase} {done}/{steps}"),
        )
        file.write(engine)
    seconds = time.perf_counter() - start
    versions = tensorrt_version(tensorrt)
    if as_json:
        print_json({**versions, "engine": str(target), "nbytes": len(engine), "seconds": round(seconds, 3)})
    else:
        console = stdout()
        console.print(
            f"{target}: {len(engine)} bytes, built in {seconds:.1f} s by {described(versions)}. It runs only under "
            "this version.",
            soft_wrap=True,
        )


def check_onnx(model: Path) -> None:
    """Refuse what cannot be an ONNX model, before TensorRT is looked for."""
    try:
        with model.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise click.ClickException(f"{model} cannot be read ({error.strerror}); expected an ONNX model") from error
    if start in _ENGINE_MAGICS:
        raise click.ClickException(
            f"{model} is a TensorRT engine already; expected an ONNX model. To run it: graphcache run {model}"
        )
