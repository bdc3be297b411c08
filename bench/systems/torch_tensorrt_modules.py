"""Torch-TensorRT's two runtimes with CUDA graphs on: one graph each, recorded again whenever the shape changes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from bench.systems.base import Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from bench import store


class TorchTensorRT(Peer):
    """``TorchTensorRTModule`` (C++ runtime) or ``PythonTorchTensorRTModule``, around the same engine bytes.

    Args:
        runtime: ``"cpp"`` or ``"python"``; the latter exists up to 2.11.
    """

    rival = "graphcache"

    def __init__(self, runtime: str) -> None:
        self.name = f"torch-tensorrt-{runtime}"
        self._runtime = runtime
        self._module: Any = None
        self._set_mode: Callable[[bool], object] | None = None

    def available(self) -> str | None:
        return None if find_spec("torch_tensorrt") else "not installed: torch_tensorrt"

    def load(self, bundle: store.Bundle, device: torch.device, sizes: Sequence[int]) -> Callable[..., Tensor]:
        import torch_tensorrt
        from torch_tensorrt import runtime
        from torch_tensorrt.dynamo import CompilationSettings

        kind = "TorchTensorRTModule" if self._runtime == "cpp" else "PythonTorchTensorRTModule"
        if not hasattr(runtime, kind):
            raise RuntimeError(f"torch_tensorrt {torch_tensorrt.__version__} has no {kind}")
        # Of the process, and looked at when a module is made as well as at each call.
        self._set_mode = runtime.set_cudagraphs_mode
        runtime.set_cudagraphs_mode(True)
        self._module = getattr(runtime, kind)(
            serialized_engine=bundle.engine.read_bytes(),
            input_binding_names=list(bundle.inputs),
            output_binding_names=list(bundle.outputs),
            name=bundle.name,
            settings=CompilationSettings(device=torch_tensorrt.Device(gpu_id=device.index or 0)),
        )
        call: Callable[..., Tensor] = self._module
        return call

    def close(self) -> None:
        if self._module is not None:
            torch.cuda.synchronize()
            self._module = None
        if self._set_mode is not None:
            self._set_mode(False)
            self._set_mode = None
