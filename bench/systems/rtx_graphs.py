"""TensorRT-RTX's own graphs: ``IRuntimeConfig.cuda_graph_strategy = WHOLE_GRAPH_CAPTURE``.

It replays what it captured as long as shapes and addresses stay as they were, and captures again when they change. So a
context per shape and buffers that stay are how NVIDIA says to use it, and how it is used here.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from bench.systems.base import Peer
from bench.systems.plain import PlainEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from bench import store


class RtxGraphs(Peer):
    """A context per shape, inputs and outputs that stay where they are.

    Args:
        copied: Copy inputs in and hand out copies of outputs, for callers whose tensors are others every time.
    """

    def __init__(self, *, copied: bool = False) -> None:
        self.name = "rtx-graphs-copy" if copied else "rtx-graphs"
        self.rival = "graphcache" if copied else "graphcache-into"
        # Buffers that stay, and a call that does nothing but launch, are what a session is.
        self.also = () if copied else ("graphcache-session",)
        self._copied = copied
        self._engine: PlainEngine | None = None
        self._stream = 0
        self._slots: dict[tuple[torch.Size, ...], tuple[Any, list[Tensor], Tensor]] = {}

    def load(self, bundle: store.Bundle, device: torch.device, sizes: Sequence[int]) -> Callable[..., Tensor]:
        engine = self._engine = PlainEngine(bundle, device)
        stream = self._stream = torch.cuda.current_stream(device).cuda_stream

        def call(*inputs: Tensor) -> Tensor:
            shapes = tuple(value.shape for value in inputs)
            slot = self._slots.get(shapes)
            if slot is None:
                slot = self._slots[shapes] = self._slot(engine, inputs)
            context, static, output = slot
            for buffer, value in zip(static, inputs, strict=True):
                buffer.copy_(value)
            if not self._copied:
                output.fill_(float("nan"))
            if not context.execute_async_v3(stream):
                raise RuntimeError("TensorRT refused to run")
            return output.clone() if self._copied else output

        return call

    def timed(self, inputs: Sequence[Tensor]) -> Callable[[], object] | None:
        if self._copied:
            return None
        context, _, _ = self._slots[tuple(value.shape for value in inputs)]
        return partial(context.execute_async_v3, self._stream)

    def close(self) -> None:
        if self._slots:
            torch.cuda.synchronize()
        self._slots.clear()
        self._engine = None

    @staticmethod
    def _slot(engine: PlainEngine, inputs: Sequence[Tensor]) -> tuple[Any, list[Tensor], Tensor]:
        context = engine.new_context(whole_graphs=True)
        static = [value.clone() for value in inputs]
        engine.set_inputs(context, static)
        return context, static, engine.new_output(context)
