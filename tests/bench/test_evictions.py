"""What is timed while graphs are made: it has to be there, and to be undone."""

from __future__ import annotations

from pkgutil import resolve_name

import pytest
import torch
from torch import nn

import graphcache
from bench import evictions
from graphcache.graphs import driver
from tests.graphs.fake_driver import installed
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


def test_captures_are_seen_to_take_time(monkeypatch):
    with installed(*MODULES, patch=monkeypatch) as fake:
        prepare(fake, monkeypatch)
        fast = graphcache.wrap(load("affine"), max_graphs=1)
        captured = {}
        with evictions.timed(captured):
            for count in (1, 2):
                fast(rows(fake, count))
        fast.close()
    wanted = {"instantiate", "verification", "addresses", "eager runs and capture", "close what was evicted"}
    assert wanted <= set(captured)


def test_what_is_no_wrapped_module_has_no_captures():
    assert evictions._captures(nn.ReLU()) == 0
    fast = graphcache.wrap(nn.ReLU())
    fast(torch.zeros(2))
    assert evictions._captures(fast) == 1
