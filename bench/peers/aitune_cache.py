"""NVIDIA's ``aitune``: graphs of static optimisation profiles, least frequently used out first.

Its ``TensorRTCudaGraphCache`` and ``TorchOutputAllocator`` are called in the order in which its ``TensorRTBackend``
calls them: select, copy in, execute between two events, wait, clone what the allocator holds. What the backend does
around that in Python (its own records of inputs and outputs) is left out, which is in its favour.

It makes graphs for profiles of one shape only, and these engines have one profile of many. So there is a cache per
shape, each told that profile 0 is of that shape, as it would be in an engine built for aitune.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bench.peers.base import Peer
from bench.peers.borrowed import as_tensorrt, not_installed, without_init
from bench.peers.plain import PlainEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from bench import store

_PACKAGES = ("aitune.torch", "aitune.torch.backend", "aitune.torch.backend.tensorrt")


class AITune(Peer):
    """``TensorRTCudaGraphCache`` per shape, over one engine."""

    name = "aitune"
    rival = "graphcache"

    def __init__(self) -> None:
        self._caches: dict[tuple[torch.Size, ...], Any] = {}
        self._engine: PlainEngine | None = None

    def available(self) -> str | None:
        return not_installed("aitune", "wrapt")

    def load(self, bundle: store.Bundle, device: torch.device, sizes: Sequence[int]) -> Callable[..., Tensor]:
        engine = self._engine = PlainEngine(bundle, device)
        with as_tensorrt(engine.trt):
            graphs = without_init(f"{_PACKAGES[-1]}.cuda_graphs", "aitune", *_PACKAGES)
            info = without_init(f"{_PACKAGES[-1]}.tensorrt_engine_info").TensorRTEngineInfo(engine=engine.engine)
        theirs = engine.for_others()
        stream = torch.cuda.Stream(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        (output,) = bundle.outputs

        def allocator(context: Any) -> Any:
            made = graphs.TorchOutputAllocator(engine_info=info)
            if not context.set_output_allocator(output, made):
                raise RuntimeError(f"no output allocator for {output}")
            return made

        def call(*inputs: Tensor) -> Tensor:
            shapes = tuple(value.shape for value in inputs)
            cache = self._caches.get(shapes)
            if cache is None:
                cache = self._caches[shapes] = graphs.TensorRTCudaGraphCache()
                profile = {name: (tuple(shape),) * 3 for name, shape in zip(bundle.inputs, shapes, strict=True)}
                cache.configure(theirs, {}, list(bundle.inputs), [profile])
            selected = cache.select(0, theirs, stream, allocator)
            for name, value in zip(bundle.inputs, inputs, strict=True):
                static = cache.copy_input(name, value, stream)
                if selected.graph is None:
                    # Replaying must not change the context that was captured.
                    selected.context.set_input_shape(name, tuple(value.shape))
                    selected.context.set_tensor_address(name, static.data_ptr())
            with torch.cuda.stream(stream):
                start.record(stream=stream)
                cache.execute(stream)
                end.record(stream=stream)
            stream.synchronize()
            if cache.capture_failed:
                raise RuntimeError("its capture failed; it would go on without graphs")
            answer: Tensor = selected.output_allocator.outputs[output].clone()
            return answer

        return call

    def misses(self) -> int | None:
        return sum(len(cache.profiles) for cache in self._caches.values())

    def close(self) -> None:
        if self._caches:
            torch.cuda.synchronize()
        for cache in self._caches.values():
            cache.clear()
        self._caches.clear()
        self._engine = None
