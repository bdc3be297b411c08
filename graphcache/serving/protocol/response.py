"""The answer to an inference request: JSON, and after it the binary data of tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graphcache.errors import ServingError
from graphcache.serving.protocol.dtypes import datatype_of
from graphcache.serving.protocol.request import InferenceRequest
from graphcache.serving.protocol.tensors import to_binary, to_json


@dataclass(frozen=True)
class InferenceResponse:
    """What is sent.

    Args:
        body: All of it; it shares nothing with the tensors.
        header_length: Bytes of JSON at its start; ``None`` where all is JSON.
    """

    body: bytes
    header_length: int | None


def write_response(
    model: str, version: str, outputs: Mapping[str, Tensor], request: InferenceRequest
) -> InferenceResponse:
    """Write the answer to a request.

    Numbers that are none are written as ``NaN`` and ``Infinity``, which Python's clients read and strict readers of
    JSON refuse; binary data has no such limit.
    """
    wanted = dict.fromkeys(outputs, request.binary) if request.outputs is None else request.outputs
    described: list[dict[str, Any]] = []
    binary: list[memoryview] = []
    for name, as_binary in wanted.items():
        if name not in outputs:
            raise ServingError(f"{model} gave no output {name!r}; it gave {', '.join(outputs)}")
        tensor = outputs[name]
        entry: dict[str, Any] = {"name": name, "datatype": datatype_of(tensor.dtype), "shape": list(tensor.shape)}
        if as_binary:
            data = to_binary(tensor)
            binary.append(data)
            entry["parameters"] = {"binary_data_size": data.nbytes}
        else:
            entry["data"] = to_json(tensor)
        described.append(entry)
    tree: dict[str, Any] = {"model_name": model, "model_version": version}
    if request.id is not None:
        tree["id"] = request.id
    tree["outputs"] = described
    head = json.dumps(tree, separators=(",", ":")).encode()
    return InferenceResponse(b"".join([head, *binary]), len(head) if any(wanted.values()) else None)
