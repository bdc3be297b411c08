from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphcache
from graphcache.errors import ConfigError, ProfileRangeError
from graphcache.runtime import optimization_profile
from tests.engine_modules import load, numbers, rows
from tests.helpers import replays


def test_inside_one_profile_is_used_and_outside_whichever_fits(fake):
    engine = load("affine")
    with optimization_profile(engine, 1) as inside:
        assert inside is engine
        assert engine.profile_choice == 1
        with pytest.raises(ProfileRangeError):
            engine(rows(fake, 2))
        assert torch.equal(engine(rows(fake, 8)), rows(fake, 8) * 3 + 1)
    assert engine.profile_choice is None
    assert torch.equal(engine(rows(fake, 2)), rows(fake, 2) * 3 + 1)


def test_blocks_nest_and_end_well_after_an_exception(fake):
    engine = load("affine")
    with pytest.raises(KeyError), optimization_profile(engine, 0):
        with optimization_profile(engine, 1), optimization_profile(engine, "auto"):
            assert engine.profile_choice is None
        assert engine.profile_choice == 0
        raise KeyError
    assert engine.profile_choice is None


def test_engines_at_any_depth(nested):
    module, engines = nested("affine", "overlapping")
    engines[1].set_optimization_profile(0)
    with optimization_profile(module, 1):
        assert [each.profile_choice for each in engines] == [1, 1]
    assert [each.profile_choice for each in engines] == [None, 0]


def test_graphs_of_before_are_not_used_inside(fake):
    fast, x = graphcache.wrap(load("overlapping")), numbers(fake, *range(6))
    fast(x)
    with optimization_profile(fast, 1):
        assert torch.equal(fast(x), x * 2)
        assert replays(fast, x)
        assert fast.cache_info().captures == 2
    assert torch.equal(fast(x), x * 2)


def test_a_profile_that_one_engine_lacks_changes_none(nested):
    module, (first, second) = nested("affine", "scaled")
    with pytest.raises(ConfigError, match=r"^scaled has optimisation profiles 0 to 0, not 1$"):
        optimization_profile(module, 1).__enter__()
    assert (first.profile_choice, second.profile_choice) == (None, None)


@given(st.one_of(st.text(max_size=4), st.floats(), st.booleans(), st.lists(st.integers(), max_size=2), st.binary()))
def test_what_is_no_profile(odd):
    if odd != "auto":
        with pytest.raises(ConfigError, match="expected the index of a profile, 'auto' or None"):
            optimization_profile(nn.ReLU(), odd).__enter__()


def test_without_engines_nothing_happens():
    with optimization_profile(nn.ReLU(), 3) as module:
        assert isinstance(module, nn.ReLU)
