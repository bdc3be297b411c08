"""A model with one of every capture break. Each line that is one says so, with its reason, for the tests to find."""

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """Random, and with a state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1  # break: mutates
        dropped: Tensor = self.dropout(x)  # break: random
        return dropped


class Seven(nn.Module):
    """The seven breaks that a user meets, each in a line of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().max().item()  # break: host_read
        rows = torch.nonzero(x[:, 0])  # break: data_dependent
        kept = x[x[:, 1] > 0]  # break: data_dependent
        mean = x.mean(0).cpu()  # break: host_read
        bias = torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device)  # break: host_read
        pair = x[:, torch.tensor([0, 2])]  # break: host_read
        x = self.head(x)  # break: random
        return x * scale + bias + mean.numel() + pair.sum() + rows.numel() + kept.numel()


class More(nn.Module):
    """What else there is; and lines that look alike and are none."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Head()
        self.register_buffer("seen", torch.zeros(4))
        self.table = torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.table  # break: host_read
        if x.sum() > 0:  # break: host_read
            x = x + 1
        self.seen += x.mean(0)
        steps = torch.arange(4).to(x.device)  # break: host_read
        chosen = x[:, [0, 2]]  # break: host_read
        listed = x.tolist()  # break: host_read
        fresh = x.new_tensor([1.0, 2.0])  # break: host_read
        x = x + torch.zeros(4)  # break: host_read
        single = torch.unique(x)  # break: data_dependent
        x[x > 2] = x[x > 2] * 2  # break: data_dependent
        noise = torch.rand_like(x)  # break: random
        half = x * torch.tensor(0.5)
        count = int(torch.tensor(3)) + torch.zeros(2).sum().item()
        there = torch.zeros(4, device=x.device) + x.new_zeros(4) + torch.zeros_like(x)
        same = x.to(torch.float32).to(x.device)
        clipped = torch.where(x > 2, 2.0, x)
        clipped[clipped > 1] = 0.0
        for _ in range(3):
            x.max().item()  # break: host_read
        rest = steps.sum() + chosen.sum() + len(listed) + fresh.sum() + single.sum() + noise.sum() + count
        answer: Tensor = self.head(half + there + same + clipped + rest)
        return answer
