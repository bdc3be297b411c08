"""``graphcache inspect``: what an engine, a model or a module takes, gives and holds, and what forbids graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

import graphcache
from graphcache.cli.build import check_onnx
from graphcache.cli.options import (
    ShapesCommand,
    Specs,
    device_option,
    json_option,
    points,
    shapes_option,
    target_argument,
)
from graphcache.cli.output import one_line, print_json, stdout, table
from graphcache.cli.targets import Target, resolve
from graphcache.engines.engine import read_header
from graphcache.errors import NoGpuError
from graphcache.extras import optional
from graphcache.graphs.buffers import nbytes_of
from graphcache.modules.transparent import controls
from graphcache.observe.breaks import find_capture_breaks
from graphcache.serving.factories import is_factory


@click.command(cls=ShapesCommand, short_help="Tell inputs, outputs, layers, memory, and what forbids graphs.")
@target_argument
@shapes_option(
    "Shapes of one set of inputs, as for run: whether such a call can be captured is tried.",
)
@click.option("--layers", is_flag=True, help="List every layer.")
@device_option
@json_option
def inspect(target: str, shapes: Sequence[Specs], layers: bool, device: str | None, as_json: bool) -> None:
    """Tell what an engine, an ONNX model or a module takes, gives and holds, and whether it can be captured.

    Of an engine a machine without a GPU can read no more than the header, which is printed before the command fails.

    \b
    Examples:
      graphcache inspect nets.py:mlp --shapes input:8x16
      graphcache inspect nets.py:mlp --layers --json
      graphcache inspect model.onnx
      graphcache inspect model.engine
    """
    path = Path(target)
    missing: NoGpuError | None = None
    if is_factory(target):
        found = _module(resolve(target, shapes, device), shapes, layers)
    elif path.suffix == ".onnx":
        check_onnx(path)
        found = onnx_facts(path, layers=layers)
    else:
        found, missing = _engine(target, path, shapes, layers)
    if as_json:
        print_json(found)
    else:
        _print(found)
    if missing is not None:
        raise click.ClickException(one_line(missing))


def _engine(target: str, path: Path, shapes: Sequence[Specs], layers: bool) -> tuple[dict[str, Any], NoGpuError | None]:
    try:
        with path.open("rb") as file:
            header = read_header(file.read(64))
        nbytes = path.stat().st_size
    except OSError as error:
        raise click.ClickException(
            f"{path} cannot be read ({error.strerror}); expected an engine, an ONNX model, or package.module:function"
        ) from error
    facts: dict[str, Any] = {"target": target, "kind": "engine", "file_bytes": nbytes}
    if header is not None:
        facts |= {"built_by": f"tensorrt_rtx {header.version}", "complete": header.nbytes == nbytes}
    try:
        loaded = resolve(target, shapes, None)
    except NoGpuError as error:
        return facts, error
    module = loaded.module
    assert isinstance(module, graphcache.EngineModule)
    engine = module.engine
    facts |= {
        "inputs": [_binding(each) for each in engine.inputs],
        "outputs": [_binding(each) for each in engine.outputs],
        "profiles": engine.profiles,
        "scratch_bytes": engine.scratch_bytes,
        "streamable_bytes": engine.streamable_bytes,
    }
    found = engine.layers()
    facts["layers"] = found if layers else len(found)
    cause = module.forbids_capture()
    facts["capturable"] = _capturable(loaded, shapes) if shapes and cause is None else None
    if cause is not None:
        facts["capturable"] = {"yes": False, "why": [one_line(str(cause))]}
    return facts, None


def _binding(binding: Any) -> dict[str, Any]:
    return {
        "name": binding.name,
        "dtype": str(binding.dtype).removeprefix("torch."),
        "shape": list(binding.shape),
        "on_host": binding.on_host,
        "profiles": [[list(sizes) for sizes in profile] for profile in binding.ranges],
    }


def _module(found: Target, shapes: Sequence[Specs], layers: bool) -> dict[str, Any]:
    module = found.module
    parameters, buffers = list(module.parameters()), list(module.buffers())
    named = [(name, part) for name, part in module.named_modules() if name and not list(part.children())]
    facts: dict[str, Any] = {
        "target": found.name,
        "kind": type(module).__name__,
        "device": str(found.device),
        "inputs": [{"name": name} for name in _parameters(module)],
        "parameters": sum(each.numel() for each in parameters),
        "parameter_bytes": nbytes_of(parameters) if parameters else 0,
        "buffer_bytes": nbytes_of(buffers) if buffers else 0,
        "training": module.training,
        "engines": [name for name, part in module.named_modules() if isinstance(part, graphcache.EngineModule)],
        "layers": [f"{name}: {type(part).__name__}" for name, part in named] if layers else len(named),
        "capturable": _capturable(found, shapes) if shapes else None,
    }
    return facts


def _parameters(module: nn.Module) -> list[str]:
    import inspect as standard

    try:
        return list(standard.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return []


def _capturable(found: Target, shapes: Sequence[Specs]) -> dict[str, Any]:
    """Whether calls can be captured: what the doctor finds, and what comes of capturing them."""
    generator = torch.Generator().manual_seed(0)
    calls = [found.call(point, generator) for point in points(shapes)]
    # Room for all of them, so that no graph is evicted before its memory is counted.
    room = max(graphcache.GraphConfig.max_graphs, len(calls))
    why: list[str] = []
    with graphcache.wrap(found.module, max_graphs=room, max_bytes=None) as fast, torch.no_grad():
        for call in calls:
            if not isinstance(found.module, graphcache.EngineModule):
                # An engine has no lines, and reads on the host what is part of its signature.
                why += [one_line(str(each)) for each in find_capture_breaks(found.module, *call.args, **call.kwargs)]
            cause = controls(fast).try_capture(*call.args, **call.kwargs)
            if cause is not None and not why:
                why.append(one_line(str(cause)))
        graphs = controls(fast).cache_info().nbytes
    return {"yes": not why, "why": list(dict.fromkeys(why)), "graph_bytes": graphs}


def _print(facts: dict[str, Any]) -> None:
    console = stdout()
    rows = table("", "")
    rows.show_header = False
    for column in rows.columns:
        column.justify = "left"
    for name, value in facts.items():
        if value is None or (value == [] and name != "inputs"):
            continue
        rows.add_row(name.replace("_", " "), _shown(value))
    console.print(rows)


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "yes" in value:
        if value["yes"]:
            return f"yes; graphs of these calls own {value['graph_bytes']} bytes"
        return "\n".join(["no", *value["why"]])
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    if isinstance(value, list):
        return "\n".join(_line(each) for each in value) or "none"
    return str(value)


def _line(each: Any) -> str:
    if not isinstance(each, dict):
        return str(each)
    shape = f"[{', '.join(map(str, each['shape']))}]" if "shape" in each else ""
    text = f"{each['name']}: {each['dtype']}{shape}" if "dtype" in each else each["name"]
    if each.get("on_host"):
        text += ", read on the host"
    for index, ranges in enumerate(each.get("profiles", [])):
        text += f"; profile {index}: {', '.join(f'{low}..{high}' for low, high in ranges)}"
    return str(text)


FORBIDDING = {
    "NonZero": "the shape of its output depends on the values",
    "Unique": "the shape of its output depends on the values",
    "Compress": "the shape of its output depends on the values",
    "NonMaxSuppression": "the shape of its output depends on the values",
    "Loop": "TensorRT runs loops with the host's help",
    "Scan": "TensorRT runs loops with the host's help",
    "If": "TensorRT runs conditionals with the host's help",
    "RandomNormal": "it draws random numbers",
    "RandomUniform": "it draws random numbers",
}
"""Operators that mostly forbid a graph of the engine that is built of them."""


def onnx_facts(path: Path, *, layers: bool) -> dict[str, Any]:
    """What can be told of a model without building it."""
    onnx = optional("onnx", "inspecting an ONNX model")
    try:
        model = onnx.load(str(path), load_external_data=False)
        graph = model.graph
        weights = {each.name for each in graph.initializer}
        facts = {
            "target": str(path),
            "kind": "ONNX model",
            "file_bytes": path.stat().st_size,
            "opset": {each.domain or "ai.onnx": each.version for each in model.opset_import},
            "inputs": [_value(onnx, each) for each in graph.input if each.name not in weights],
            "outputs": [_value(onnx, each) for each in graph.output],
        }
        kinds = Counter(node.op_type for node in graph.node)
        names = [f"{node.name or node.output[0]}: {node.op_type}" for node in graph.node]
    except click.ClickException:
        raise
    except Exception as error:
        # What the reader raises for other files is a type of its own.
        raise click.ClickException(f"{path} is no ONNX model: {one_line(error)[:200]}") from error
    if not graph.node and not graph.output:
        raise click.ClickException(f"{path} is no ONNX model: it has neither nodes nor outputs")
    facts["layers"] = names if layers else dict(kinds.most_common())
    why = [f"{name} ({kinds[name]}): {text}" for name, text in FORBIDDING.items() if kinds[name]]
    facts["capturable"] = {"yes": False, "why": why} if why else None
    return facts


def _value(onnx: Any, value: Any) -> dict[str, Any]:
    kind = value.type.tensor_type
    names = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
    shape = [each.dim_param or (each.dim_value if each.HasField("dim_value") else "?") for each in kind.shape.dim]
    return {"name": value.name, "dtype": {"float": "float32", "double": "float64"}.get(names, names), "shape": shape}
