from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphcache
from graphcache import Reason
from graphcache.errors import ConfigError, EngineError
from graphcache.runtime import weight_streaming
from tests.engine_modules import load, numbers
from tests.helpers import reason, replays


def test_a_budget_is_divided_in_proportion_and_given_back(nested):
    module, (first, second) = nested("streaming", "streaming")
    second.set_device_memory_budget(1024)
    with weight_streaming(module) as weights:
        assert isinstance(weights, weight_streaming)
        assert (weights.total_device_budget, weights.device_budget) == (8192, 5120)
        weights.device_budget = 4000
        assert weights.device_budget == 4000
        assert [each.get_device_memory_budget() for each in (first, second)] == [2000, 2000]
        weights.device_budget = 0
        assert weights.device_budget == 0
    assert [each.get_device_memory_budget() for each in (first, second)] == [4096, 1024]


def test_the_automatic_budget_is_what_tensorrt_says(nested):
    module, _ = nested("streaming", "affine", "streaming")
    assert weight_streaming(module).get_automatic_weight_streaming_budget() == 2 * 2048


def test_after_an_exception_the_budgets_are_back(fake):
    engine = load("streaming")
    with pytest.raises(KeyError), weight_streaming(engine) as weights:
        weights.device_budget = 1
        raise KeyError
    assert engine.get_device_memory_budget() == 4096


def test_blocks_nest(fake):
    engine = load("streaming")
    with weight_streaming(engine) as outer:
        outer.device_budget = 100
        with weight_streaming(engine) as inner:
            inner.device_budget = 50
        assert outer.device_budget == 100
    assert engine.get_device_memory_budget() == 4096


def test_below_the_full_budget_calls_run_eagerly_and_graphs_come_back(fake):
    fast, x = graphcache.wrap(load("streaming")), numbers(fake, 1.0, 2.0)
    fast(x)
    with weight_streaming(fast) as weights:
        weights.device_budget = 10
        assert reason(fast, x) is Reason.WEIGHT_STREAMING
        assert torch.equal(fast(x), x + 1)
    fast(x)
    assert replays(fast, x)


def test_too_much_is_everything_with_an_error_in_the_log(fake, caplog):
    engine = load("streaming")
    with weight_streaming(engine) as weights:
        weights.device_budget = 10**30
        assert weights.device_budget == 4096
    [record] = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert "to 4096 bytes, the size of all streamable weights" in record.getMessage()


@pytest.mark.parametrize(
    ("network", "budget", "error", "message"),
    [
        ("streaming", -1, EngineError, r"^device_budget=-1: a budget cannot be negative; expected 0 to 4096 bytes$"),
        ("affine", 1, EngineError, r"^no engine here was built to stream its weights"),
        ("affine", 0, EngineError, r"^no engine here was built to stream"),
        ("streaming", 1.5, ConfigError, r"^device_budget=1\.5: expected a whole number of bytes$"),
        ("streaming", True, ConfigError, r"^device_budget=True: expected a whole number"),
        ("streaming", None, ConfigError, r"^device_budget=None: expected a whole number"),
    ],
)
def test_refusals(fake, network, budget, error, message):
    engine = load(network)
    before = engine.get_device_memory_budget()
    with weight_streaming(engine) as weights, pytest.raises(error, match=message):
        weights.device_budget = budget
    assert engine.get_device_memory_budget() == before
    assert issubclass(EngineError, RuntimeError), "what code for Torch-TensorRT catches"


def test_a_module_without_engines_has_nothing_to_stream():
    with weight_streaming(nn.ReLU()) as weights:
        assert (weights.total_device_budget, weights.device_budget) == (0, 0)
        assert weights.get_automatic_weight_streaming_budget() == 0


def test_an_engine_that_refuses_leaves_the_others_as_they_were(fake, nested):
    module, (first, second) = nested("streaming", "streaming")
    weights = weight_streaming(module)
    session = graphcache.wrap(second).session(numbers(fake, 1.0, 2.0))
    with pytest.raises(EngineError, match="execution contexts are still in use"):
        weights.device_budget = 100
    assert [each.get_device_memory_budget() for each in (first, second)] == [4096, 4096]
    session.close()


@given(st.lists(st.integers(0, 10**18), min_size=1, max_size=5), st.integers(0, 10**19))
def test_shares_never_exceed_what_was_given_nor_what_an_engine_has(streamable, budget):
    class Engine:
        def __init__(self, most):
            self.most = self.now = most

        def get_device_memory_budget(self):
            return self.now

        def set_device_memory_budget(self, nbytes):
            self.now = nbytes

    weights = weight_streaming(nn.ReLU())
    weights._engines = [Engine(most) for most in streamable]
    weights._streamable = streamable
    if sum(streamable):
        weights.device_budget = budget
        given_out = [engine.now for engine in weights._engines]
        assert all(0 <= now <= most for now, most in zip(given_out, streamable, strict=True))
        assert min(budget, sum(streamable)) - len(streamable) < sum(given_out) <= max(budget, 0)
