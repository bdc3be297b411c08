"""Who waits for whom: calls that are known to run eagerly wait for no capture of another call."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import Reason

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Waits(nn.Module):
    """Waits within a call of three rows, after it has said so; one of two rows cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        # Not events, whose change would be one of the module.
        self.inside: SimpleQueue[None] = SimpleQueue()
        self.go_on: SimpleQueue[None] = SimpleQueue()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 3:
            self.inside.put(None)
            self.go_on.get(timeout=60)
        return x * x.sum().item() if len(x) == 2 else x + 1


@pytest.mark.parametrize(("x", "reason"), [(X, Reason.HOST_READ), (X[:1].clone().requires_grad_(), Reason.GRAD)])
def test_a_call_that_is_known_to_run_eagerly_waits_for_no_capture(x: Tensor, reason: Reason) -> None:
    module = Waits()
    fast = graphcache.wrap(module)
    for _ in range(2):
        fast(x)
    assert reason in fast.cache_info().eager
    answers: list[Tensor] = []
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(fast, torch.ones(3, 4))
        try:
            module.inside.get(timeout=60)
            pool.submit(lambda: answers.append(fast(x))).result(60)
            assert not first.done()
        finally:
            for _ in range(100):
                module.go_on.put(None)
        assert torch.equal(first.result(60), torch.full((3, 4), 2.0))
    assert torch.equal(answers[0], module(x))
    assert fast.cache_info().hits == 0
