"""``torch.compile(mode="reduce-overhead")``: fused kernels behind PyTorch's own tree of graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from bench import networks
from bench.systems.base import Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from bench import store


class Compiled(Peer):
    """Answers are overwritten by the next call.

    Args:
        dynamic: Compile once for all shapes, and record a graph for each; otherwise compile for each shape, of which
            PyTorch by default takes 8 and then gives up.
    """

    kind: ClassVar[Literal["engine", "torch"]] = "torch"
    rival = "graphcache-compiled"

    def __init__(self, *, dynamic: bool) -> None:
        self.name = "compile-dynamic" if dynamic else "compile-static"
        self._dynamic = dynamic
        self._compiled: Any = None

    def load(self, bundle: store.Bundle, device: torch.device, sizes: Sequence[int]) -> Callable[..., Tensor]:
        import torch._dynamo

        limit = int(torch._dynamo.config.recompile_limit)
        if not self._dynamic and len(sizes) > limit:
            raise RuntimeError(f"PyTorch compiles at most {limit} shapes of a function and runs further ones eagerly")
        module = networks.on_device(bundle.name, device)
        self._compiled = torch.compile(module, mode="reduce-overhead", dynamic=self._dynamic)
        call: Callable[..., Tensor] = self._compiled
        return call

    def close(self) -> None:
        if self._compiled is not None:
            torch.cuda.synchronize()
            self._compiled = None
            torch._dynamo.reset()
