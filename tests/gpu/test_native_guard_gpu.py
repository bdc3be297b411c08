"""The compiled guard reads tensors on a GPU as it reads those of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.gpu


@pytest.fixture
def library(compiled: Any) -> Any:
    return compiled


def test_changes(library: Any) -> None:
    def moved(x: Tensor) -> None:
        x.data = x.data.cpu()

    def copied(x: Tensor) -> None:
        x.data = x.data.clone()

    def in_place(x: Tensor) -> None:
        x.data.mul_(2)

    changes: list[tuple[Callable[[Tensor], object], bool]] = [(moved, False), (copied, False), (in_place, True)]
    for change, holds in changes:
        x, guard = nn.Parameter(torch.rand(6, 8, device="cuda")), library.Guard()
        guard.add_tensor(x)
        assert guard.holds()
        change(x)
        assert guard.holds() == holds
