"""The modules that the examples of ``--help`` name."""

import torch
from torch import Tensor, nn


def mlp() -> nn.Module:
    """From ``[n, 16]`` to ``[n, 4]``, the same weights every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


class Picky(nn.Module):
    """With two lines that forbid a graph."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().max().item()
        kept: Tensor = x[x > 0] / scale
        return kept


class Two(nn.Module):
    """Two inputs, and two outputs by name."""

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"sum": a + b, "product": a * b}
