"""``capture_in="background"``: calls are answered eagerly until their graph is there."""

import time

import pytest
import torch
from torch import nn

import graphcache
from graphcache import Reason
from tests.helpers import Fn, mlp


def until_captured(fast, x, wanted):
    """Calls until there is a graph; every answer is right."""
    end = time.monotonic() + 60
    while fast.graph_for(x) is None:
        assert time.monotonic() < end, fast.explain()
        assert torch.equal(fast(x), wanted)
        time.sleep(0.01)


def test_calls_are_answered_eagerly_then_from_the_graph():
    module, x = mlp(), torch.randn(2, 4)
    with graphcache.wrap(module, capture_in="background") as fast:
        assert torch.equal(fast(x), module(x))
        assert fast.cache_info().eager == {Reason.PENDING: 1}
        until_captured(fast, x, module(x))
        hits = fast.cache_info().hits
        assert torch.equal(fast(x), module(x))
        assert fast.cache_info().hits == hits + 1
        assert fast.cache_info().captures == 1


def test_an_engine_too(load, rows):
    with graphcache.wrap(load("affine"), capture_in="background") as fast:
        until_captured(fast, rows(2), rows(2) * 3 + 1)
        assert torch.equal(fast(rows(2, 5)), rows(2, 5) * 3 + 1)
        assert fast.cache_info().hits >= 1


def test_no_two_threads_run_a_module_at_once():
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.most = 0, 0

        def forward(self, x):
            self.inside += 1
            self.most = max(self.most, self.inside)
            y = x * 2
            for _ in range(200):
                y = y + 0
            self.inside -= 1
            return y

    module = Slow()
    with graphcache.wrap(module, capture_in="background", ignore=["self.inside", "self.most"]) as fast:
        for count in (1, 2, 3):
            until_captured(fast, torch.ones(count), torch.ones(count) * 2)
        assert fast.cache_info().captures == 3
    assert module.most == 1


def test_what_it_could_not_capture_says_why():
    fast = graphcache.wrap(Fn(lambda _, x: x * x.sum().item()), capture_in="background")
    end = time.monotonic() + 60
    while Reason.HOST_READ not in fast.cache_info().eager:
        fast(torch.ones(2))
        assert time.monotonic() < end, fast.explain()
    fast.close()


def test_close_ends_it():
    fast = graphcache.wrap(mlp(), capture_in="background")
    fast(torch.ones(1, 4))
    fast.close()
    assert fast.cache_info().graphs == 0
    with pytest.raises(graphcache.errors.ClosedError):
        fast(torch.ones(1, 4))
