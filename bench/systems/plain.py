"""TensorRT by hand: what is written where no runtime is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from bench import store


def kernel_strategy(trt: Any) -> Any:
    """Which kernels TensorRT-RTX runs shapes with, as graphcache has it, so that systems differ in how they launch.

    Compiled for the shape before it first runs; 1.4 has no such kernels whose answers are right.
    """
    strategies = trt.DynamicShapesKernelSpecializationStrategy
    return strategies.NONE if str(trt.__version__).startswith("1.4.") else strategies.EAGER


class PlainEngine:
    """An engine, and contexts of it.

    Args:
        bundle: The engine.
        device: Where outputs lie.

    Raises:
        RuntimeError: If TensorRT refuses the engine.
    """

    def __init__(self, bundle: store.Bundle, device: torch.device) -> None:
        from graphcache.engines.library import library

        found = library()
        self.trt: Any = found.module
        self.device = device
        self.bundle = bundle
        self.runtime = self.trt.Runtime(found.logger)
        self.engine = self.runtime.deserialize_cuda_engine(bundle.engine.read_bytes())
        if self.engine is None:
            raise RuntimeError(f"{found.flavour} {found.version} refused the engine of {bundle.name}")
        self._config: Any = None
        self._kernels: Any = None

    def new_context(self, *, whole_graphs: bool = False) -> Any:
        """An execution context with scratch memory of its own.

        Args:
            whole_graphs: Let TensorRT-RTX capture and replay what is enqueued.

        Raises:
            RuntimeError: If this TensorRT has no such thing, or makes no context.
        """
        if whole_graphs and not hasattr(self.trt, "CudaGraphStrategy"):
            raise RuntimeError(f"{self.trt.__name__} {self.trt.__version__} captures no graphs itself")
        if self._config is None:
            self._config = self.engine.create_runtime_config()
            if hasattr(self.trt, "DynamicShapesKernelSpecializationStrategy"):
                self._config.dynamic_shapes_kernel_specialization_strategy = kernel_strategy(self.trt)
                # The bindings do not keep it alive for the configuration.
                self._kernels = self._config.create_runtime_cache()
                self._config.set_runtime_cache(self._kernels)
            if whole_graphs:
                self._config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        context = self.engine.create_execution_context(self._config)
        if context is None:
            raise RuntimeError(f"no execution context of {self.bundle.name}")
        return context

    def set_inputs(self, context: Any, inputs: Sequence[Tensor]) -> None:
        """Shapes and addresses of a call's inputs.

        Raises:
            RuntimeError: If TensorRT refuses one.
        """
        for name, value in zip(self.bundle.inputs, inputs, strict=True):
            if not context.set_input_shape(name, tuple(value.shape)):
                raise RuntimeError(f"shape {tuple(value.shape)} of {name} was refused")
            context.set_tensor_address(name, value.data_ptr())

    def new_output(self, context: Any) -> Tensor:
        """Memory for the output of the inputs that were set, and its address told."""
        (name,) = self.bundle.outputs
        output = torch.empty(tuple(context.get_tensor_shape(name)), dtype=torch.float32, device=self.device)
        context.set_tensor_address(name, output.data_ptr())
        return output
