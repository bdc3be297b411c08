"""What runs inside a Triton server: a model of its Python backend.

Of ``triton_python_backend_utils`` it uses what
https://github.com/triton-inference-server/python_backend/blob/main/README.md documents. Triton imports it, nobody else.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import dlpack

from graphcache.errors import InputError
from graphcache.modules.cached_module import CachedModule
from graphcache.modules.transparent import controls
from graphcache.modules.wrapped import device_of
from graphcache.modules.wrapping import wrap
from graphcache.persist.loading import load

log = logging.getLogger("graphcache.serving")

PARAMETER = "graphcache"
"""The parameter of ``config.pbtxt`` that says which file is loaded, and what is prepared."""


class TritonPythonModel:
    """An engine or a package behind a cache of graphs. ``graphcache export triton`` writes what names it."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the model and capture what is to be prepared; Triton calls it once for each instance."""
        self._utils: Any = importlib.import_module("triton_python_backend_utils")
        config = json.loads(args["model_config"])
        own = json.loads(config["parameters"][PARAMETER]["string_value"])
        self._inputs, self._outputs = ([each["name"] for each in config[side]] for side in ("input", "output"))
        if "GPU" in args["model_instance_kind"]:
            torch.cuda.set_device(int(args["model_instance_device_id"]))
        loaded = load(Path(args["model_repository"]) / args["model_version"] / own["file"])
        self._module: CachedModule = loaded if isinstance(loaded, CachedModule) else wrap(loaded)
        self._device = device_of(controls(self._module).module)
        manifest = controls(self._module).manifest
        calls = [*([] if manifest is None else [manifest]), *own["prepare"]]
        if calls:
            # A signature holds the grad mode.
            with torch.inference_mode():
                controls(self._module).prepare(*calls)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests, each by itself: one that is wrong leaves the others as they are."""
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        """Give back what the graphs hold."""
        controls(self._module).close()

    def _answer(self, request: Any) -> Any:
        try:
            inputs = [self._input(request, name) for name in self._inputs]
            with torch.inference_mode():
                answer = self._module(*inputs)
            several = answer if isinstance(answer, (tuple, list)) else (answer,)
            wanted = set(request.requested_output_names())
            outputs = [
                self._output(name, value) for name, value in zip(self._outputs, several, strict=True) if name in wanted
            ]
            if self._device.type == "cuda":
                # Triton reads the outputs on streams of its own.
                torch.cuda.current_stream(self._device).synchronize()
        except InputError as error:
            return self._failed(str(error))
        except Exception:
            log.exception("a request failed")
            return self._failed("the model failed to answer; the server's log says why")
        return self._utils.InferenceResponse(output_tensors=outputs)

    def _failed(self, message: str) -> Any:
        return self._utils.InferenceResponse(output_tensors=[], error=self._utils.TritonError(message))

    def _input(self, request: Any, name: str) -> Tensor:
        given = self._utils.get_input_tensor_by_name(request, name)
        if given is None:
            raise InputError(f"input {name!r} is missing")
        tensor: Tensor = dlpack.from_dlpack(given.to_dlpack())
        return tensor.to(self._device)

    def _output(self, name: str, value: Tensor) -> Any:
        dense: Any = value.contiguous()
        return self._utils.Tensor.from_dlpack(name, dense.__dlpack__())
