"""The networks of the demo: a policy of many small layers, and what is sent through them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

OBSERVATION = 48
ACTION = 12
_WIDTH = 64
_BLOCKS = 8


class Policy(nn.Module):
    """What a robot does next, from what it senses: a residual network whose launches take longer than its sums."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        sizes = [(OBSERVATION, _WIDTH), *[(_WIDTH, _WIDTH)] * _BLOCKS, (_WIDTH, ACTION)]
        generator = torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(size, generator=generator) / size[0] ** 0.5, requires_grad=False) for size in sizes
        )

    def forward(self, observation: Tensor) -> Tensor:
        """From observations ``[n, 48]`` to actions ``[n, 12]`` between -1 and 1."""
        enter, *blocks, leave = self.weights
        hidden = torch.relu(observation @ enter)
        for weight in blocks:
            hidden = hidden + torch.relu(hidden @ weight)
        return torch.tanh(hidden @ leave)


class Confident(nn.Module):
    """Only those actions whose first component is positive. How many rows that gives depends on the values, which
    forbids a graph of the whole; the policy inside keeps graphs of its own.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observation: Tensor) -> Tensor:
        """From observations ``[n, 48]`` to actions ``[k, 12]``, k at most n."""
        action: Tensor = self.policy(observation)
        return action[action[:, 0] > 0]


def observations(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """A batch of made-up observations ``[count, 48]``."""
    return torch.randn(count, OBSERVATION, generator=generator).to(device)


BATCHES: Sequence[int] = (1, 2, 8, 4, 16, 3, 32, 6, 64, 12, 24, 48)
"""The batch sizes of the demo's traffic, most frequent first."""
