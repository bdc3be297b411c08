"""Observing costs a hit nothing while it is off: the same calls are made, in the same time."""

import time

import pytest
import torch

import graphcache
from graphcache.observe import Collector, nvtx_ranges
from tests.dispatch.test_hit_cost import counted
from tests.helpers import Fn

pytest.importorskip("prometheus_client")
pytest.importorskip("nvtx")


def wrapped():
    return graphcache.wrap(Fn(lambda m, x: x + 1))


def observed():
    """A module that is scraped, explained, and drawn in profiles, captures and eager calls alone."""
    fast = wrapped()
    collector = Collector(fast)
    ranges = nvtx_ranges(fast)
    fast(torch.ones(3))
    list(collector.collect())
    fast.explain(torch.ones(3))
    return fast, collector, ranges


def test_a_hit_calls_the_same_functions():
    fast, collector, ranges = observed()
    with torch.no_grad():
        assert counted(fast, torch.ones(3)) == counted(wrapped(), torch.ones(3))
    assert len(list(collector.collect())) == 7
    ranges.close()


def test_ranges_around_hits_leave_nothing_behind():
    fast = wrapped()
    with torch.no_grad():
        with nvtx_ranges(fast, hits=True):
            fast(torch.ones(3))
        assert counted(fast, torch.ones(3)) == counted(wrapped(), torch.ones(3))


def test_a_hit_takes_the_same_time():
    (watched, *_), bare, x = observed(), wrapped(), torch.ones(3)

    def seconds(fast):
        start = time.perf_counter()
        for _ in range(200):
            fast(x)
        return time.perf_counter() - start

    with torch.no_grad():
        seconds(watched), seconds(bare)
        # In turns, and the least of each, so that whatever else the machine does falls on neither.
        turns = [(seconds(watched), seconds(bare)) for _ in range(20)]
    assert min(turn[0] for turn in turns) / min(turn[1] for turn in turns) < 1.15
