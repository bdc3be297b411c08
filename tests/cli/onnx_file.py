"""Just enough of the ONNX file format to write the demo's network down, without the ``onnx`` package.

An ONNX file is a protocol buffer: fields, each a tag (number and kind), then either a variable-length integer or a
length and bytes. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from graphcache.cli.network import ACTION, OBSERVATION, Policy

_FLOAT = 1
_IR_VERSION = 8
_OPSET = 17


@dataclass(frozen=True, slots=True)
class OnnxNode:
    """One operation.

    Args:
        kind: ONNX's name for it, such as ``"MatMul"``.
        inputs: Names of the values it reads.
        output: Name of the value it makes.
    """

    kind: str
    inputs: Sequence[str]
    output: str


def serialize(
    nodes: Sequence[OnnxNode],
    weights: Mapping[str, Tensor],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Mapping[str, Sequence[int | str]],
) -> bytes:
    """An ONNX model of float32 values; text in a shape is the name of an axis that is left open."""
    graph = b"".join(
        [
            *(_field(1, _node(node)) for node in nodes),
            _field(2, b"network"),
            *(_field(5, _tensor(name, tensor)) for name, tensor in weights.items()),
            *(_field(11, _value(name, shape)) for name, shape in inputs.items()),
            *(_field(12, _value(name, shape)) for name, shape in outputs.items()),
        ]
    )
    return _field(1, _IR_VERSION) + _field(7, graph) + _field(8, _field(2, _OPSET))


def policy_model(policy: Policy) -> bytes:
    """The demo's network with an open batch axis; input ``observation``, output ``action``."""
    last = len(policy.weights) - 1
    nodes = [OnnxNode("MatMul", ["observation", "w0"], "m0"), OnnxNode("Relu", ["m0"], "h0")]
    for index in range(1, last):
        before = f"h{index - 1}"
        nodes += [
            OnnxNode("MatMul", [before, f"w{index}"], f"m{index}"),
            OnnxNode("Relu", [f"m{index}"], f"r{index}"),
            OnnxNode("Add", [before, f"r{index}"], f"h{index}"),
        ]
    nodes += [OnnxNode("MatMul", [f"h{last - 1}", f"w{last}"], f"m{last}"), OnnxNode("Tanh", [f"m{last}"], "action")]
    weights = {f"w{index}": weight for index, weight in enumerate(policy.weights)}
    return serialize(nodes, weights, {"observation": ["n", OBSERVATION]}, {"action": ["n", ACTION]})


def _node(node: OnnxNode) -> bytes:
    inputs = b"".join(_field(1, name.encode()) for name in node.inputs)
    return inputs + _field(2, node.output.encode()) + _field(4, node.kind.encode())


def _tensor(name: str, tensor: Tensor) -> bytes:
    values = tensor.detach().flatten().tolist()
    dims = b"".join(_field(1, size) for size in tensor.shape)
    raw = struct.pack(f"<{len(values)}f", *values)
    return dims + _field(2, _FLOAT) + _field(8, name.encode()) + _field(9, raw)


def _value(name: str, shape: Sequence[int | str]) -> bytes:
    dims = [_field(2, size.encode()) if isinstance(size, str) else _field(1, size) for size in shape]
    tensor_type = _field(1, _FLOAT) + _field(2, b"".join(_field(1, dim) for dim in dims))
    return _field(1, name.encode()) + _field(2, _field(1, tensor_type))


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _integer(number << 3) + _integer(value)
    return _integer(number << 3 | 2) + _integer(len(value)) + value


def _integer(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
