"""Modules to serve. Every row of an answer carries a value that only its own row of the request can have given."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 8
LENGTHS = (4, 8, 12, 16, 24, 32, 48, 64)
"""Eight buckets of the second axis of :class:`Sums`."""


class Checked(nn.Module):
    """Two layers, the check value, and which version answered."""

    def __init__(self, version: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 4)).requires_grad_(False)
        self.version = version

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {
            "y": self.layers(x) * self.version,
            "check": x[:, :1] * 3 + self.version,
            "version": torch.full_like(x[:, :1], self.version),
        }


class Sums(nn.Module):
    """Any number of columns, which zeros do not change, and any number of rows."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sum(1), x[:, 0] * 3 + 1


class Running(nn.Module):
    """Every row depends on those before it, so that requests must not be put together."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(0)


class Half(nn.Module):
    """In bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 + 1


class Lookup(nn.Module):
    """Refuses indices from 10 on, whose rows then fail with everybody else's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 4).requires_grad_(False)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"row": self.table(ids)[:, 0], "ids": ids}


def first() -> nn.Module:
    return Checked(1.0)


def second() -> nn.Module:
    return Checked(2.0)


def broken() -> nn.Module:
    raise OSError("no such weights")
