"""The three strategies, with ``include`` and ``exclude``."""

import pytest
import torch
from torch import nn

import graphcache
from graphcache import Reason
from tests.helpers import frozen, outcomes, same

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Selective(nn.Module):
    """Two submodules around a choice of rows that depends on the data."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.head = nn.Sequential(nn.Linear(4, 2), nn.Tanh())

    def forward(self, x):
        y = self.encoder(x)
        return self.head(y[y.sum(1) > y.sum(1).mean()])


@pytest.fixture
def module():
    return frozen(Selective())


def called(module, **options):
    fast = graphcache.wrap(module, **options)
    for _ in range(4):
        assert same(fast(X), module(X))
    return fast


def test_the_whole_as_one_graph_or_eagerly(module):
    fast = called(module, strategy="whole_graph")
    assert fast.parts == {}
    assert outcomes(fast) == (0, 0, {Reason.DATA_DEPENDENT: 4})
    assert outcomes(called(module.encoder, strategy="whole_graph")) == (3, 1, {})


def test_submodules_by_name_each_with_a_cache_of_its_own(module):
    fast = called(module, strategy="per_submodule", include=["encoder", "head"])
    assert {name: outcomes(part) for name, part in fast.parts.items()} == {"encoder": (3, 1, {}), "head": (3, 1, {})}
    assert fast.cache_info().graphs == 2
    assert not fast.captures_whole


def test_engines_are_the_submodules_where_none_is_named(load, rows):
    module = nn.Sequential(nn.Identity(), load("affine"))
    fast = graphcache.wrap(module, strategy="per_submodule")
    for _ in range(3):
        assert torch.equal(fast(rows(2)), rows(2) * 3 + 1)
    assert list(fast.parts) == ["1"]
    assert outcomes(fast) == (2, 1, {})


def test_auto_is_the_whole_where_it_can_be(module):
    fast = called(module.encoder)
    assert fast.captures_whole
    assert (fast.parts, outcomes(fast)) == ({}, (3, 1, {}))


def test_auto_finds_the_largest_submodules_around_what_forbids_the_whole(module):
    fast = called(module)
    assert set(fast.parts) == {"encoder", "head"}
    assert all(part.cache_info().hits for part in fast.parts.values())
    assert set(fast.cache_info().eager) == {Reason.DATA_DEPENDENT}


def test_auto_takes_the_submodules_that_are_included(module):
    fast = called(module, include=["encoder"])
    assert list(fast.parts) == ["encoder"]
    assert fast.parts["encoder"].cache_info().hits > 0


@pytest.mark.parametrize("pattern", ["head", "*ead"])
def test_what_is_excluded_is_in_no_graph(module, pattern):
    fast = called(module, exclude=[pattern])
    assert list(fast.parts) == ["encoder"]
    fast = called(nn.Sequential(module.encoder, module.head), exclude=["1.0"])
    assert "1.0" not in fast.parts
    assert fast.parts["0"].cache_info().hits > 0
    assert not fast.captures_whole
