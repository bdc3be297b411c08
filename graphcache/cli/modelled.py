"""What an ONNX model takes, gives and consists of, read by the package ``onnx``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from graphcache.cli.output import one_line
from graphcache.extras import optional

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
