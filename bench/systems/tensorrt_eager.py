"""TensorRT without graphs: one context, shapes and addresses set at every call, every kernel enqueued."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bench.systems.base import Peer
from bench.systems.plain import PlainEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from bench import store


class TensorRTEager(Peer):
    """The loop that NVIDIA's samples show: set shapes, set addresses, ``execute_async_v3``, fresh outputs."""

    name = "tensorrt"
    rival = "graphcache"
    # 4 times the kernels of a large network are in the queue, which holds about 1000.
    burst = 4

    def __init__(self) -> None:
        self._held: tuple[Any, ...] = ()

    def load(self, bundle: store.Bundle, device: torch.device, sizes: Sequence[int]) -> Callable[..., Tensor]:
        engine = PlainEngine(bundle, device)
        context = engine.new_context()
        self._held = (engine, context)
        stream = torch.cuda.current_stream(device).cuda_stream

        def call(*inputs: Tensor) -> Tensor:
            engine.set_inputs(context, inputs)
            output = engine.new_output(context)
            if not context.execute_async_v3(stream):
                raise RuntimeError("TensorRT refused to run")
            return output

        return call

    def close(self) -> None:
        if self._held:
            torch.cuda.synchronize()
        self._held = ()
