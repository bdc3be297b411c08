"""``graphcache export``: a model in the form that another server wants."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from graphcache.cli.options import ShapesCommand, Specs, json_option, points, shapes_option
from graphcache.cli.output import print_json, stdout
from graphcache.serving.triton import export as export_triton
from graphcache.serving.triton import facts


@click.group()
def export() -> None:
    """Write a model in the form that another server wants."""


@export.command(cls=ShapesCommand, short_help="Write a folder for Triton's Python backend.")
@click.argument("model", type=click.Path(path_type=Path), metavar="ENGINE|PACKAGE.gcache")
@click.option(
    "--out",
    "folder",
    type=click.Path(path_type=Path),
    required=True,
    help="The folder to make; its name becomes the model's.",
)
@shapes_option("Shapes to capture before the model is ready, such as x:8x64. May be given several times.")
@json_option
def triton(model: Path, folder: Path, shapes: Sequence[Specs], as_json: bool) -> None:
    """Write a folder for the Python backend of a Triton server.

    It holds config.pbtxt, 1/model.py and a copy of the model; the server needs graphcache in its Python. A package
    tells its inputs and outputs itself, an engine has to be loaded, which needs its GPU.

    \b
    Examples:
      graphcache export triton model.engine --out models/policy
      graphcache export triton policy.gcache --out models/policy \\
          --shapes x:1x64 --shapes x:8x64
    """
    if any(spec.dtype is not None for group in shapes for spec in group):
        raise click.UsageError("--shapes takes no dtypes here; an engine's inputs have their own.")
    prepare = [{name: spec.shapes[0] for name, spec in point.items()} for point in points(shapes)]
    spec = export_triton(model, folder, prepare=prepare)
    found = facts(spec)
    if as_json:
        print_json({"folder": str(folder), "name": spec.name, "prepare": len(prepare), **found})
        return
    described = []
    for side, tensors in found.items():
        named = ", ".join(f"{each['name']} {each['dtype']}{each['shape']}" for each in tensors)
        described.append(f"{side}: {named}")
    stdout().print(f"{folder}: {'; '.join(described)}. Signatures to prepare: {len(prepare)}.", soft_wrap=True)
