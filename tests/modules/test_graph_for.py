"""The graph of a call, and whether a call can be captured, by public names."""

import pytest
import torch
from torch import nn

import graphcache
from graphcache import Reason
from graphcache.errors import ClosedError
from tests.helpers import Fn, outcomes


def test_a_call_has_its_graph_and_is_not_made():
    fast = graphcache.wrap(nn.ReLU())
    assert fast.graph_for() is None
    assert fast.graph_for(torch.ones(2)) is None
    fast(torch.ones(2)), fast(torch.ones(3)), fast(torch.ones(2))
    before = fast.cache_info()
    two, three = fast.graph_for(torch.zeros(2)), fast.graph_for(torch.zeros(3))
    assert None is not two is not three is not None
    assert fast.graph_for(input=torch.zeros(2)) in (None, two)
    assert fast.graph_for() is two, "which was used last"
    assert fast.graph_for(object()) is None
    assert fast.cache_info() == before


def test_a_call_that_is_padded_has_the_graph_of_its_bucket():
    fast = graphcache.wrap(nn.ReLU(), buckets={0: {0: [4, 8]}})
    for _ in range(2):
        fast(torch.zeros(3, 2))
    assert fast.cache_info().padded
    assert fast.graph_for(torch.zeros(3, 2)) is fast.graph_for(torch.zeros(4, 2)) is not None


def test_a_call_is_captured_or_says_why_not():
    fast = graphcache.wrap(Fn(lambda m, x: x[x > 0] if x.dim() > 1 else x + 1))
    assert fast.try_capture(torch.ones(2)) is None
    assert fast.graph_for(torch.ones(2)) is not None
    assert fast.try_capture(torch.ones(2, 2)).reason is Reason.DATA_DEPENDENT
    assert fast.try_capture(iter([])).reason is Reason.ARGUMENT
    fast(torch.ones(2))
    assert outcomes(fast)[0] == 1
    fast.close()
    with pytest.raises(ClosedError):
        fast.try_capture(torch.ones(2))


def test_a_module_that_has_these_names_keeps_its_own():
    class Named(nn.ReLU):
        def graph_for(self):
            return "mine"

    fast = graphcache.wrap(Named())
    fast(torch.ones(2))
    assert fast.graph_for() == "mine"
    assert graphcache.controls(fast).graph_for(torch.ones(2)) is not None
