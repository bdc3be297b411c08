"""graphcache, in each way that it can be called."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from bench import networks
from bench.systems.base import Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from bench import store


class Fresh(Peer):
    """Inputs anywhere, answers in fresh tensors: what a call of the wrapped module does.

    Args:
        name: Of the system.
        native: As installed; otherwise without the native code, as where there is no compiler.
        options: Of ``graphcache.wrap``.
    """

    exact = True

    def __init__(self, name: str = "graphcache", *, native: bool = True, **options: Any) -> None:
        self.name = name
        self._native = native
        self._options = options
        self._module: Any = None
        self._wrapped: Any = None

    def load(self, bundle: store.Bundle, device: torch.device, sizes: Sequence[int]) -> Callable[..., Tensor]:
        import graphcache

        if not self._native:
            os.environ["GRAPHCACHE_NATIVE"] = "0"
        self._module = self._unwrapped(bundle, device)
        self._wrapped = graphcache.wrap(self._module, max_graphs=len(sizes), **self._options)
        call: Callable[..., Tensor] = self._wrapped
        return call

    def misses(self) -> int | None:
        info = self._wrapped.cache_info()
        return int(info.captures + sum(info.eager.values()))

    def close(self) -> None:
        if self._wrapped is not None:
            self._wrapped.close()
        if hasattr(self._module, "close"):
            self._module.close()
        self._wrapped = self._module = None
        if not self._native:
            os.environ.pop("GRAPHCACHE_NATIVE", None)

    def _unwrapped(self, bundle: store.Bundle, device: torch.device) -> Any:
        import graphcache

        return graphcache.EngineModule(bundle.engine.read_bytes(), bundle.inputs, name=bundle.name)


class Into(Fresh):
    """``forward_into`` for a caller that keeps its buffers: one set of inputs and outputs for each shape."""

    def __init__(self, name: str = "graphcache-into", **options: Any) -> None:
        super().__init__(name, **options)
        self._kept: dict[tuple[torch.Size, ...], tuple[list[Tensor], Tensor]] = {}

    def load(self, bundle: store.Bundle, device: torch.device, sizes: Sequence[int]) -> Callable[..., Tensor]:
        wrapped: Any = super().load(bundle, device, sizes)

        def call(*inputs: Tensor) -> Tensor:
            shapes = tuple(value.shape for value in inputs)
            if shapes not in self._kept:
                self._kept[shapes] = [value.clone() for value in inputs], torch.empty_like(wrapped(*inputs))
            kept, out = self._kept[shapes]
            for buffer, value in zip(kept, inputs, strict=True):
                buffer.copy_(value)
            out.fill_(float("nan"))
            answer: Tensor = wrapped.forward_into(out, *kept)
            return answer

        return call

    def timed(self, inputs: Sequence[Tensor]) -> Callable[[], object] | None:
        kept, out = self._kept[tuple(value.shape for value in inputs)]
        return partial(self._wrapped.forward_into, out, *kept)

    def close(self) -> None:
        self._kept.clear()
        super().close()


class Session(Fresh):
    """``CachedModule.session(...).run()``: static buffers in the caller's hands, nothing but the launch."""

    def __init__(self, name: str = "graphcache-session", **options: Any) -> None:
        super().__init__(name, **options)
        self._sessions: dict[tuple[torch.Size, ...], Any] = {}

    def load(self, bundle: store.Bundle, device: torch.device, sizes: Sequence[int]) -> Callable[..., Tensor]:
        wrapped: Any = super().load(bundle, device, sizes)

        def call(*inputs: Tensor) -> Tensor:
            shapes = tuple(value.shape for value in inputs)
            if shapes not in self._sessions:
                self._sessions[shapes] = wrapped.session(*inputs)
            session = self._sessions[shapes]
            for static, value in zip(session.inputs, inputs, strict=True):
                static.copy_(value)
            session.outputs.fill_(float("nan"))
            session.run()
            answer: Tensor = session.outputs
            return answer

        return call

    def timed(self, inputs: Sequence[Tensor]) -> Callable[[], object] | None:
        run: Callable[[], object] = self._sessions[tuple(value.shape for value in inputs)].run
        return run

    def misses(self) -> int | None:
        return len(self._sessions)

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
        super().close()


class Module(Fresh):
    """The torch network behind graphcache.

    Args:
        name: Of the system.
        compiled: Let ``torch.compile`` fuse its kernels first.
        options: Of ``graphcache.wrap``.
    """

    kind: ClassVar[Literal["engine", "torch"]] = "torch"

    def __init__(self, name: str = "graphcache-torch", *, compiled: bool = False, **options: Any) -> None:
        super().__init__(name, **options)
        self._compiled = compiled

    def _unwrapped(self, bundle: store.Bundle, device: torch.device) -> Any:
        network = networks.on_device(bundle.name, device)
        return torch.compile(network) if self._compiled else network
