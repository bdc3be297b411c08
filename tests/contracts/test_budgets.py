"""The least recently used graphs of a module make room, within budgets in graphs and in bytes."""

import pytest
import torch

import graphcache
from graphcache import Reason
from tests.helpers import mlp, outcomes, reason, replays


def x(count):
    return torch.ones(count, 4)


def test_the_least_recently_used_graph_goes_first():
    fast = graphcache.wrap(mlp(), max_graphs=2)
    for count in (1, 2, 1, 3):
        fast(x(count))
    assert fast.graph_for(x(2)) is None
    assert fast.cache_info().evictions == 1
    assert replays(fast, x(1))
    assert replays(fast, x(3))
    assert not replays(fast, x(2)), "it is captured again"
    assert replays(fast, x(2))
    assert fast.cache_info().graphs == 2


def test_bytes_are_a_budget_too():
    once = graphcache.wrap(mlp())
    once(x(8))
    nbytes = once.cache_info().nbytes
    fast = graphcache.wrap(mlp(), max_bytes=nbytes)
    fast(x(1))
    fast(x(8))
    info = fast.cache_info()
    assert (info.graphs, info.budget) == (1, nbytes)
    assert info.nbytes <= nbytes
    assert replays(fast, x(8))


def test_a_graph_that_fits_no_budget_is_not_kept_and_the_answer_is_eager():
    fast = graphcache.wrap(mlp(), max_bytes=1)
    assert torch.equal(fast(x(2)), fast.module(x(2)))
    assert reason(fast, x(2)) is Reason.OVER_BUDGET
    assert fast.cache_info().graphs == 0


def test_each_module_has_a_cache_of_its_own():
    first, second = graphcache.wrap(mlp(), max_graphs=1), graphcache.wrap(mlp(), max_graphs=1)
    for fast in (first, second, first, second):
        fast(x(1))
    assert outcomes(first) == outcomes(second) == (1, 1, {})


def test_graphs_of_an_engine_are_evicted_and_captured_again(load, rows, fake):
    fast = graphcache.wrap(load("affine"), max_graphs=1)
    for count in (2, 3, 2, 2):
        assert torch.equal(fast(rows(count)), rows(count) * 3 + 1)
    info = fast.cache_info()
    assert (info.captures, info.evictions, info.hits, info.graphs) == (3, 2, 1, 1)
    fast.close()
    fast.module.close()
    assert fake.driver.leaked() == {}


def test_clear_drops_every_graph():
    fast = graphcache.wrap(mlp())
    fast(x(1))
    fast.clear()
    assert (fast.cache_info().graphs, fast.cache_info().nbytes) == (0, 0)
    assert not replays(fast, x(1))


@pytest.mark.parametrize(("name", "value"), [("MAX_GRAPHS", 3), ("MAX_BYTES", 5000)])
def test_the_environment_sets_budgets(monkeypatch, name, value):
    monkeypatch.setenv(f"GRAPHCACHE_{name}", str(value))
    assert getattr(graphcache.wrap(mlp()).config, name.lower()) == value
    assert getattr(graphcache.wrap(mlp(), **{name.lower(): 7}).config, name.lower()) == 7
