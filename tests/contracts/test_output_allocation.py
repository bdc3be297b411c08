"""Outputs whose shape is known only at run time: TensorRT allocates them, and the call runs eagerly and says why."""

import pytest
import torch
from torch import nn

import graphcache
from graphcache import Reason
from graphcache.errors import CaptureError
from tests.helpers import outcomes


def test_an_engine_that_asks_for_it_answers_eagerly(load, numbers):
    fast = graphcache.wrap(load("positive", requires_output_allocator=True))
    for values in ([1.0, -1.0, 2.0], [-1.0], [3.0, 4.0]):
        x = numbers(*values)
        assert torch.equal(fast(x), x[x > 0])
    assert outcomes(fast) == (0, 0, {Reason.OUTPUT_ALLOCATOR: 3})


def test_an_engine_that_needs_it_and_does_not_say_so_does_too(load, numbers):
    fast = graphcache.wrap(load("positive"))
    for _ in range(2):
        assert fast(numbers(1.0, -1.0, 2.0)).tolist() == [1, 2]
    assert set(fast.cache_info().eager) == {Reason.OUTPUT_ALLOCATOR}


def test_the_reason_is_told_with_the_engine_and_the_remedy(load, numbers):
    fast, x = graphcache.wrap(load("positive", requires_output_allocator=True)), numbers(1.0)
    fast(x)
    [call] = fast.explain(x).calls
    assert call.cause.reason is Reason.OUTPUT_ALLOCATOR
    assert call.cause.where == "positive"
    assert Reason.OUTPUT_ALLOCATOR.remedy in str(call)


def test_around_such_an_engine_graphs_are_kept(load, numbers):
    module = nn.Sequential(load("scaled"), load("positive", requires_output_allocator=True))
    fast = graphcache.wrap(module)
    for _ in range(4):
        assert fast(numbers(1.0, -1.0, 2.0)).tolist() == [2, 4]
    assert fast.parts["0"].cache_info().hits > 0
    assert fast.parts["1"].cache_info().hits == 0


def test_on_request_it_is_an_error(load, numbers):
    fast = graphcache.wrap(load("positive", requires_output_allocator=True), on_failure="raise")
    with pytest.raises(CaptureError, match="output_allocator"):
        fast(numbers(1.0))
