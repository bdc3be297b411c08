"""Roboflow's ``inference-models``: a least-recently-used cache of graphs by shape, dtype and device.

Its public function ``infer_from_trt_engine`` is called as its models call it. Each graph has a context, a stream and
buffers of its own; inputs are copied in, outputs cloned, and the host waits for the device in every call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bench.peers.base import Peer
from bench.peers.borrowed import as_tensorrt, not_installed, stand_in, without_init
from bench.peers.plain import PlainEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from bench import store

_PACKAGE = "inference_models"


class InferenceModels(Peer):
    """``infer_from_trt_engine`` with a ``TRTCudaGraphCache`` that has room for every shape."""

    name = "inference-models"
    rival = "graphcache"

    def __init__(self) -> None:
        self._cache: Any = None
        self._engine: Any = None

    def available(self) -> str | None:
        return not_installed(_PACKAGE, "pydantic", "dotenv")

    def load(self, bundle: store.Bundle, device: torch.device, sizes: Sequence[int]) -> Callable[..., Tensor]:
        if len(bundle.inputs) != 1:
            raise RuntimeError(f"it runs engines of one input; {bundle.name} has {len(bundle.inputs)}")
        from graphcache.engines.library import library

        # pycuda is imported by the file, and used by other parts of the package alone.
        with as_tensorrt(library().module), stand_in("pycuda", "pycuda.driver"):
            theirs = without_init(f"{_PACKAGE}.models.common.trt", _PACKAGE)
        low, usual, high = bundle.facts["batch"]
        config = theirs.TRTConfig(
            static_batch_size=None,
            dynamic_batch_size_min=low,
            dynamic_batch_size_opt=usual,
            dynamic_batch_size_max=high,
        )
        engine = self._engine = PlainEngine(bundle, device).for_others()
        (name,), outputs = theirs.get_trt_engine_inputs_and_outputs(engine)
        cache = self._cache = theirs.TRTCudaGraphCache(capacity=len(sizes))
        infer = theirs.infer_from_trt_engine
        stream = torch.cuda.Stream(device)

        def call(value: Tensor) -> Tensor:
            answer: Tensor = infer(
                pre_processed_images=value,
                trt_config=config,
                engine=engine,
                context=None,
                device=device,
                input_name=name,
                outputs=outputs,
                stream=stream,
                trt_cuda_graph_cache=cache,
            )[0]
            return answer

        return call

    def misses(self) -> int | None:
        # One entry per capture: there is room for all of them.
        return int(self._cache.get_current_size())

    def close(self) -> None:
        if self._cache is not None:
            torch.cuda.synchronize()
            self._cache.purge()
        self._cache = self._engine = None
