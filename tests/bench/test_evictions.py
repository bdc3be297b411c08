"""What is timed while graphs are made: it has to be there, and to be undone."""

from __future__ import annotations

from pkgutil import resolve_name

import pytest
import torch
from torch import nn

import graphcache
from bench import evictions
from graphcache.graphs import driver
from tests.graphs.fake_driver import Torch, installed
from tests.modules.test_engine_module import MODULES, load, prepare, rows


@pytest.mark.parametrize("name", [each for names in evictions.PHASES.values() for each in names])
def test_what_is_timed_is_there(name):
    assert callable(resolve_name(name))


def test_it_is_put_back_whatever_happens():
    before = driver.instantiate
    with pytest.raises(KeyError), evictions.timed({}):
        assert driver.instantiate is not before
        raise KeyError
    assert driver.instantiate is before


def test_captures_and_recalls_are_seen_to_take_time(monkeypatch):
    with installed(*MODULES, patch=monkeypatch) as fake:
        prepare(fake, monkeypatch)
        fast = graphcache.wrap(load("affine"), max_graphs=1)
        captured, recalled = {}, {}
        with evictions.timed(captured):
            passes(fast, fake)
        with evictions.timed(recalled):
            passes(fast, fake)
        fast.close()
    assert fast.cache_info().recalls == 2
    assert {"instantiate", "verification", "addresses", "eager runs and capture"} <= set(captured)
    assert set(recalled) == {"instantiate", "move the template", "close what was evicted"}


def passes(fast: graphcache.CachedModule, fake: Torch) -> None:
    for count in (1, 2):
        fast(rows(fake, count))


def test_what_is_no_wrapped_module_has_no_captures():
    assert evictions._captures(nn.ReLU()) == 0
    fast = graphcache.wrap(nn.ReLU())
    fast(torch.zeros(2))
    assert evictions._captures(fast) == 1
