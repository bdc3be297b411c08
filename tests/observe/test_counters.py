"""Expectations of users' tests: they hold, they fail with what was seen, and they check what they are given."""

import pytest
import torch
from torch import nn

import graphcache
from graphcache import debug
from graphcache.errors import ConfigError
from tests.helpers import Fn, frozen


@pytest.fixture
def fast():
    return graphcache.wrap(nn.ReLU())


def calls(fast, *sizes):
    for size in sizes:
        fast(torch.zeros(size))


def test_what_is_as_expected_passes(fast):
    calls(fast, 1)
    counters = debug.counters(fast)
    with counters.expect(captures=2, hits=3, evictions=0, eager=0, padded=0):
        calls(fast, 2, 1, 2, 3, 3)
    assert counters.read() == {"hits": 3, "captures": 3, "evictions": 0, "eager": 0, "padded": 0}


def test_what_is_otherwise_is_told_with_the_captures(fast):
    with pytest.raises(AssertionError) as raised, debug.counters(fast).expect(captures=1, hits=10):
        calls(fast, 2, 3, 3)
    assert str(raised.value) == (
        "ReLU: expected captures=1, hits=10; saw captures=2, hits=1. Captured: input: float32[2]; input: float32[3]"
    )


def test_eager_calls_of_all_reasons_count():
    fast = graphcache.wrap(Fn(lambda m, x: x[x > 0]))
    with debug.counters(fast).expect(eager=2, captures=0):
        calls(fast, 2, 3)


def test_too_many_captures(fast):
    with debug.assert_max_captures(fast, 2):
        calls(fast, 2, 3, 3)
    match = r"ReLU: expected at most 0 captures; saw captures=12\. Captured: .*; and 4 more$"
    with pytest.raises(AssertionError, match=match), debug.assert_max_captures(fast, 0):
        calls(fast, *range(10, 22))
    assert fast.ledger.subscribers == []


def test_captures_of_parts_count_and_are_named():
    inner = frozen(nn.Linear(2, 2))
    fast = graphcache.wrap(Fn(lambda m, x: m.inner(x)[x[:, 0] > 0], inner=inner), include=["inner"])
    raises = pytest.raises(AssertionError, match=r"saw captures=1\. Captured: input: float32\[3, 2\]$")
    with torch.no_grad(), raises, debug.assert_max_captures(fast, 0):
        calls(fast, (3, 2), (3, 2))
    assert fast.parts["inner"].ledger.subscribers == []


def test_an_exception_of_the_block_goes_through(fast):
    for block in (debug.assert_max_captures(fast, 0), debug.counters(fast).expect(captures=0)):
        with pytest.raises(KeyError, match="mine"), block:
            calls(fast, 1)
            raise KeyError("mine")
    assert fast.ledger.subscribers == []


@pytest.mark.parametrize("count", [-1, 1.5, True, "1", None])
def test_what_is_no_count_is_refused_at_once(fast, count):
    with pytest.raises(ConfigError, match="expected a whole number, 0 or more"):
        debug.assert_max_captures(fast, count).__enter__()
    with pytest.raises(ConfigError, match=r"hits=.*: expected a whole number, 0 or more"):
        debug.counters(fast).expect(hits=count).__enter__()


def test_other_names_are_refused_at_once(fast):
    with pytest.raises(ConfigError, match=r"misses: there is no such counter; expected some of hits, captures, "):
        debug.counters(fast).expect(misses=1).__enter__()
    with pytest.raises(ConfigError, match="nothing is expected"):
        debug.counters(fast).expect().__enter__()


@pytest.mark.parametrize("what", [None, 3, nn.ReLU()])
def test_what_is_not_wrapped_is_refused(what):
    with pytest.raises(ConfigError, match="expected a wrapped module"):
        debug.counters(what)
    with pytest.raises(ConfigError, match="expected a wrapped module"):
        debug.assert_max_captures(what, 1).__enter__()
