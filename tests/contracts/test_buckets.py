"""A call whose sizes lie between buckets is padded to the next ones, and its answer cropped."""

import pytest
import torch
from torch import nn

import graphcache
from graphcache import Axis, Buckets, Mask, Reason
from tests.helpers import Fn, mlp, outcomes, reason


def test_sizes_between_buckets_share_a_graph():
    module = mlp()
    fast = graphcache.wrap(module, buckets={"input": {0: [4, 8]}})
    fast(torch.ones(4, 4))
    for count in (1, 2, 3, 4):
        x = torch.randn(count, 4)
        answer = fast(x)
        assert answer.shape == (count, 4)
        torch.testing.assert_close(answer, module(x))
    info = fast.cache_info()
    assert (info.captures, info.graphs, info.padded) == (1, 1, 3)


def test_the_forms_of_buckets():
    for buckets in ({"x": {0: [4]}}, Buckets({"x": {0: [4]}}), {0: {0: Axis([4])}}, {"x": {0: "powers_of_two"}}):
        fast = graphcache.wrap(Fn(lambda _, x: x * 2), buckets=buckets)
        fast(torch.ones(4, 2))
        assert fast(torch.ones(3, 2)).tolist() == [[2, 2]] * 3


def test_an_axis_that_is_not_independent_is_not_padded():
    fast = graphcache.wrap(Fn(lambda _, x: x - x.mean()), buckets={0: {0: [4]}})
    x = torch.arange(3.0)
    assert reason(fast, x) is Reason.PADDING
    for _ in range(2):
        assert torch.equal(fast(x), x - x.mean())
    assert fast.cache_info().padded == 0


def test_a_mask_tells_the_module_what_is_padding():
    class Mean(nn.Module):
        def forward(self, x, mask=None):
            return (x * mask).sum(0) / mask.sum(0) if mask is not None else x.mean(0)

    module, rows = Mean(), Axis([4, 8], name="rows")
    fast = graphcache.wrap(module, buckets={"x": {0: rows}, "mask": Mask(["rows"])})
    for count in (4, 3, 2, 1):
        x = torch.arange(float(count))
        torch.testing.assert_close(fast(x), x.mean(0))
    assert fast.cache_info().padded == 2


def test_an_engine_is_padded(load, rows):
    fast = graphcache.wrap(load("affine"), buckets={"x": {0: [4]}})
    for count in (4, 3, 2, 3):
        x = rows(count)
        assert torch.equal(fast(x), x * 3 + 1)
    assert outcomes(fast) == (3, 1, {})
    assert fast.cache_info().padded == 3


def test_buckets_are_advised_from_what_was_seen():
    fast = graphcache.wrap(nn.ReLU())
    for count in (1, 2, 7, 8, 8):
        fast(torch.zeros(count, 4))
    assert fast.advise_buckets(most=2).option() == {0: [2, 8]}


def test_with_parts_there_are_none():
    with pytest.raises(ValueError, match="buckets with strategy='per_submodule'"):
        graphcache.wrap(mlp(), strategy="per_submodule", include=["0"], buckets={0: {0: [4]}})
