"""The networks of the demo: a policy of many small layers, as a module and as ONNX."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from graphcache.cli.onnx import OnnxNode, serialize

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

    def to_onnx(self) -> bytes:
        """The same network as an ONNX model with an open batch axis; input ``observation``, output ``action``."""
        last = len(self.weights) - 1
        nodes = [OnnxNode("MatMul", ["observation", "w0"], "m0"), OnnxNode("Relu", ["m0"], "h0")]
        for index in range(1, last):
            before = f"h{index - 1}"
            nodes += [
                OnnxNode("MatMul", [before, f"w{index}"], f"m{index}"),
                OnnxNode("Relu", [f"m{index}"], f"r{index}"),
                OnnxNode("Add", [before, f"r{index}"], f"h{index}"),
            ]
        nodes += [
            OnnxNode("MatMul", [f"h{last - 1}", f"w{last}"], f"m{last}"),
            OnnxNode("Tanh", [f"m{last}"], "action"),
        ]
        weights = {f"w{index}": weight for index, weight in enumerate(self.weights)}
        return serialize(nodes, weights, {"observation": ["n", OBSERVATION]}, {"action": ["n", ACTION]})


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
