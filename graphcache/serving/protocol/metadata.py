"""What a server and a model say of themselves, and whether a request fits the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphcache.errors import shown
from graphcache.serving.backend import ModelSpec, TensorMetadata
from graphcache.serving.protocol.dtypes import datatype_of
from graphcache.serving.protocol.problems import RequestError
from graphcache.serving.protocol.request import InferenceRequest
from graphcache.version import __version__

_EXTENSIONS = ("binary_tensor_data", "model_configuration", "statistics")
"""Of Triton (https://github.com/triton-inference-server/server/tree/main/docs/protocol)."""


def server_metadata() -> dict[str, Any]:
    """The answer to ``GET /v2``."""
    return {"name": "graphcache", "version": __version__, "extensions": list(_EXTENSIONS)}


def model_metadata(spec: ModelSpec) -> dict[str, Any]:
    """The answer to ``GET /v2/models/NAME``."""
    return {
        "name": spec.name,
        "versions": list(spec.versions),
        "platform": spec.platform,
        "inputs": [_tensor(each) for each in spec.inputs],
        "outputs": [_tensor(each) for each in spec.outputs],
    }


def model_config(spec: ModelSpec) -> dict[str, Any]:
    """The answer to ``GET /v2/models/NAME/config``, which Triton's load generator asks for.

    Batches are the first axis of the shapes, and not the protocol's: ``max_batch_size`` is 0.
    """
    sides = {
        side: [
            {"name": each.name, "data_type": f"TYPE_{datatype_of(each.dtype)}", "dims": list(each.shape)}
            for each in tensors
        ]
        for side, tensors in (("input", spec.inputs), ("output", spec.outputs))
    }
    return {"name": spec.name, "platform": spec.platform, "max_batch_size": 0, **sides}


def check_request(spec: ModelSpec, request: InferenceRequest) -> None:
    """Hold a request against the model, before the model is bothered.

    Sizes that the model leaves open are not looked at.
    """
    for name in request.outputs or ():
        if name not in [each.name for each in spec.outputs]:
            raise RequestError(f"{spec.name} has no output {shown(name)}; its outputs are {_names(spec.outputs)}")
    inputs = {each.name: each for each in spec.inputs}
    for name in request.inputs:
        if name not in inputs:
            raise RequestError(f"{spec.name} has no input {shown(name)}; its inputs are {_names(spec.inputs)}")
    for name, expected in inputs.items():
        tensor = request.inputs.get(name)
        if tensor is None:
            raise RequestError(f"input {name!r} is missing; the inputs of {spec.name} are {_names(spec.inputs)}")
        datatype, shape = datatype_of(tensor.dtype), tuple(tensor.shape)
        if datatype != datatype_of(expected.dtype):
            raise RequestError(
                f"input {name!r} of {spec.name} has the datatype {datatype}; expected {datatype_of(expected.dtype)}"
            )
        fits = len(shape) == len(expected.shape) and all(
            wanted in (-1, size) for size, wanted in zip(shape, expected.shape, strict=True)
        )
        if not fits:
            raise RequestError(
                f"input {name!r} of {spec.name} has the shape {list(shape)}; expected {list(expected.shape)}, where -1 "
                f"is any size"
            )


def _names(specs: Sequence[TensorMetadata]) -> str:
    return ", ".join(each.name for each in specs) or "none"


def _tensor(spec: TensorMetadata) -> dict[str, Any]:
    return {"name": spec.name, "datatype": datatype_of(spec.dtype), "shape": list(spec.shape)}
