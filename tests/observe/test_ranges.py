"""Ranges for profilers: they are balanced, they are where they are promised, and off they are nowhere."""

import sys
import types

import pytest
import torch
from torch import nn

import graphcache
from graphcache.errors import ConfigError, ExtraNotFoundError
from graphcache.observe import nvtx_ranges
from tests.helpers import Fn


@pytest.fixture
def drawn(monkeypatch):
    """What a profiler would see, from a package that only writes it down."""
    seen = []

    class Domain:
        def get_event_attributes(self, message):
            return message

        def push_range(self, attributes):
            seen.append(attributes)
            return len(seen)  # The depth, as PyTorch's own says.

        def pop_range(self):
            seen.append("end")
            return len(seen)

    package = types.ModuleType("nvtx")
    package.get_domain = lambda name: seen.append(name) or Domain()
    monkeypatch.setitem(sys.modules, "nvtx", package)
    return seen


def calls(fast):
    for x in (torch.zeros(3), torch.ones(3), torch.zeros(2, 2)):
        fast(x)


def mixed():
    return graphcache.wrap(Fn(lambda m, x: x[x > 0] if x.dim() > 1 else x + 1))


def test_captures_and_eager_calls_have_ranges_and_hits_none(drawn):
    fast = mixed()
    with nvtx_ranges(fast):
        calls(fast)
        fast(torch.zeros(2, 2))
    assert drawn == ["graphcache", "capture Fn", "end", "capture Fn", "end", "eager Fn", "end"]
    calls(fast)
    assert len(drawn) == 7
    assert fast.ledger.observers.listeners == ()


def test_every_call_has_one_where_that_is_asked_for(drawn):
    fast = mixed()
    ranges = nvtx_ranges(fast, hits=True)
    assert torch.equal(fast(torch.zeros(3)), torch.ones(3))
    fast(torch.zeros(3))
    assert drawn[1:] == ["call Fn", "capture Fn", "end", "end", "call Fn", "end"]
    ranges.close()
    ranges.close()
    fast(torch.zeros(3))
    assert len(drawn) == 7


def test_a_call_that_raises_closes_its_ranges(drawn):
    def fail(m, x):
        raise KeyError("mine")

    fast = graphcache.wrap(Fn(fail))
    with nvtx_ranges(fast, hits=True), pytest.raises(KeyError):
        fast(torch.zeros(3))
    assert drawn[1:].count("end") == len(drawn[1:]) - drawn[1:].count("end") > 0


def test_two_at_once_are_drawn_both_and_end_each_for_itself(drawn):
    fast = mixed()
    first, second = nvtx_ranges(fast), nvtx_ranges(fast)
    fast(torch.zeros(3))
    assert drawn.count("capture Fn") == 2
    first.close()
    fast(torch.zeros(4))
    assert drawn.count("capture Fn") == 3
    second.close()


def test_parts_have_ranges_of_their_own(drawn):
    inner = nn.Linear(2, 2).requires_grad_(False)
    fast = graphcache.wrap(Fn(lambda m, x: m.inner(x)[x[:, 0] > 0], inner=inner), include=["inner"])
    with torch.no_grad(), nvtx_ranges(fast):
        for _ in range(2):
            fast(torch.ones(3, 2))
    assert "capture inner" in drawn


def test_the_package_itself():
    pytest.importorskip("nvtx")
    fast = mixed()
    with nvtx_ranges(fast, hits=True):
        calls(fast)
    assert fast.cache_info().hits == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch's own ranges are used there")
def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(ExtraNotFoundError, match=r'pip install "graphcache\[nvtx\]"$'):
        nvtx_ranges(mixed())


def test_what_is_given_is_checked(drawn):
    with pytest.raises(ConfigError, match="expected a wrapped module"):
        nvtx_ranges(nn.ReLU())
    with pytest.raises(ConfigError, match="hits=1: expected True or False"):
        nvtx_ranges(mixed(), hits=1)


def test_the_profiler_of_torch_sees_captures_and_eager_calls():
    fast = mixed()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        calls(fast)
        fast(torch.zeros(2, 2))
    names = [event.name for event in profile.events() if event.name.startswith("graphcache")]
    assert names == ["graphcache: capture Fn", "graphcache: capture Fn", "graphcache: eager Fn"]
