"""Modules that update tensors of their own in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

SIZE = 4


class Recurrent(nn.Module):
    """A GRU that keeps its hidden state in a buffer, and counts its steps in a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(SIZE, SIZE).requires_grad_(False)
        self.register_buffer("hidden", torch.zeros(1, SIZE))
        self.steps = torch.zeros((), dtype=torch.long)

    def forward(self, x: Tensor) -> Tensor:
        self.hidden.copy_(self.cell(x, self.hidden))
        self.steps.add_(1)
        return self.hidden * 2


@dataclass
class Cache:
    keys: Tensor = field(default_factory=lambda: torch.zeros(16, SIZE))
    layers: list[Tensor] = field(default_factory=lambda: [torch.zeros(16, SIZE)])


class Attention(nn.Module):
    """Attention over keys and values in an object, at a place that is given as a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(SIZE, 2 * SIZE).requires_grad_(False)
        self.cache = Cache()

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        key, value = self.project(x).chunk(2, -1)
        self.cache.keys.index_copy_(0, place, key)
        self.cache.layers[0][place] = value
        return torch.softmax(x @ self.cache.keys.t(), -1) @ self.cache.layers[0]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "recurrent": (Recurrent, lambda _: (torch.randn(1, SIZE),)),
    "attention": (Attention, lambda step: (torch.randn(1, SIZE), torch.tensor([step % 16]))),
    "running statistics": (lambda: nn.BatchNorm1d(SIZE).requires_grad_(False), lambda _: (torch.randn(5, SIZE),)),
}
"""What makes a module, and the inputs of a call of it, by the number of the call."""


def state_of(module: nn.Module) -> list[Tensor]:
    """Every tensor that a module of these keeps."""
    cache = getattr(module, "cache", None)
    plain = [value for value in vars(module).values() if isinstance(value, Tensor)]
    return [*module.state_dict().values(), *plain, *([cache.keys, *cache.layers] if cache is not None else [])]


def same(module: nn.Module, twin: nn.Module) -> bool:
    """Whether two of them are in the same state, to the bit."""
    return all(map(torch.equal, state_of(module), state_of(twin)))
