"""Stands in for ``triton_python_backend_utils``, as far as its README documents it, and for the server around it.

https://github.com/triton-inference-server/python_backend. It refuses what the real one refuses: tensors without a name,
of two strides, of a datatype or a shape that is not the configuration's, responses that lack what was asked for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils import dlpack

DTYPES = {
    "TYPE_BOOL": torch.bool,
    "TYPE_FP16": torch.float16,
    "TYPE_BF16": torch.bfloat16,
    "TYPE_FP32": torch.float32,
    "TYPE_INT64": torch.int64,
}


class Tensor:
    """One tensor; of those that a model makes, the memory is whose capsule was given."""

    def __init__(self, name: str, held: torch.Tensor) -> None:
        if not name:
            raise ValueError("Tensor name cannot be an empty string.")
        self._name, self._held = name, held

    @staticmethod
    def from_dlpack(name: str, capsule: Any) -> Tensor:
        if type(capsule).__name__ != "PyCapsule":
            raise TypeError("expected a DLPack capsule")
        held = dlpack.from_dlpack(capsule)
        if not held.is_contiguous():
            raise ValueError("DLPack tensor is not contiguous.")
        return Tensor(name, held)

    def to_dlpack(self) -> Any:
        return self._held.__dlpack__()

    def name(self) -> str:
        return self._name


class TritonError:
    def __init__(self, message: str) -> None:
        self._message = message

    def message(self) -> str:
        return self._message


class InferenceResponse:
    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        if not all(isinstance(each, Tensor) for each in output_tensors):
            raise TypeError("expected tensors")
        self.tensors, self.failure = list(output_tensors), error


class InferenceRequest:
    def __init__(self, inputs: dict[str, torch.Tensor], outputs: Sequence[str]) -> None:
        self._inputs, self._outputs = {name: Tensor(name, each) for name, each in inputs.items()}, list(outputs)

    def requested_output_names(self) -> list[str]:
        return list(self._outputs)


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return request._inputs.get(name)


class Server:
    """Loads a folder as Triton's Python backend does, and calls the model.

    Args:
        folder: With ``config.pbtxt`` and the versions.
        patch: What undoes it.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        text_format = pytest.importorskip("google.protobuf.text_format")
        json_format = pytest.importorskip("google.protobuf.json_format")
        config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
        utils = ModuleType("triton_python_backend_utils")
        for each in (Tensor, TritonError, InferenceResponse, get_input_tensor_by_name):
            setattr(utils, each.__name__, each)
        patch.setitem(sys.modules, utils.__name__, utils)
        self.device: list[int] = []
        patch.setattr(torch.cuda, "set_device", self.device.append)
        text = (folder / "config.pbtxt").read_text(encoding="utf-8")
        self.config = text_format.Parse(text, config_pb2.ModelConfig())
        assert self.config.name == folder.name
        model = ModuleType("model")
        exec(compile((folder / "1" / "model.py").read_text(encoding="utf-8"), "model.py", "exec"), model.__dict__)
        self.model = model.TritonPythonModel()
        tree = json_format.MessageToDict(self.config, preserving_proto_field_name=True)
        self.model.initialize(
            {
                "model_config": json.dumps({"input": [], "output": [], **tree}),
                "model_instance_kind": "GPU",
                "model_instance_name": f"{folder.name}_0",
                "model_instance_device_id": "0",
                "model_repository": str(folder),
                "model_version": "1",
                "model_name": folder.name,
            }
        )

    def answers(self, *requests: dict[str, torch.Tensor], outputs: Sequence[str] | None = None) -> list[Any]:
        """By request, what the outputs are by name, or the message of an error."""
        names = [each.name for each in self.config.output] if outputs is None else list(outputs)
        responses = self.model.execute([InferenceRequest(each, names) for each in requests])
        assert len(responses) == len(requests)
        return [self._checked(each, names) for each in responses]

    def _checked(self, response: InferenceResponse, names: Sequence[str]) -> Any:
        if response.failure is not None:
            return response.failure.message()
        found = {each.name(): each._held for each in response.tensors}
        assert list(found) == [each.name for each in self.config.output if each.name in names]
        for each in self.config.output:
            if each.name in found:
                dims = [] if each.HasField("reshape") else list(each.dims)
                kind = type(self.config.output[0]).DESCRIPTOR.fields_by_name["data_type"].enum_type
                assert found[each.name].dtype is DTYPES[kind.values_by_number[each.data_type].name]
                assert len(dims) == found[each.name].dim()
                assert all(want in (-1, got) for want, got in zip(dims, found[each.name].shape, strict=True))
        return found
