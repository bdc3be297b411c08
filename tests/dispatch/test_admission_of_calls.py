"""Which calls of a wrapped module are captured: at once, when it is worth it, or when it was prepared."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import graphcache
from graphcache import Reason
from graphcache.cache.graph_cache import budget_of, set_process_budget
from graphcache.dispatch import dispatcher as misses
from graphcache.errors import ConfigError
from tests.engine_modules import fake, load, rows  # noqa: F401 - the fixture is used by its name
from tests.graphs.fake_driver import Torch
from tests.helpers import Fn, dispatcher_of, graphs_of, mlp, own_budgets, replays, same


class Clock:
    """Time that passes only where it is said: eager calls and replays of these modules take what they are told."""

    def __init__(self, eager: float, replay: float, capture: float) -> None:
        self.now, self.eager, self.replay, self.capture = 0.0, eager, replay, capture

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(200e-6, 20e-6, 5e-3)
    monkeypatch.setattr(misses.time, "perf_counter", clock)
    return clock


def timed(clock: Clock, **options: Any) -> Any:
    """A module whose eager calls, captures and replays take what the clock says."""

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        clock.now += clock.eager
        return x * 2

    fast = graphcache.wrap(Fn(run), verify=False, ignore=["self.function.clock"], **options)
    attempt, put = dispatcher_of(fast).target.recorder.attempt, graphs_of(fast).put

    def slow_attempt(*args: Any, **kwargs: Any) -> Any:
        clock.now += clock.capture
        return attempt(*args, **kwargs)

    def slow_replays(key: Any, recorded: Any, **kwargs: Any) -> Any:
        replay = recorded.replay

        def slow(inputs: Any, out: Any = None) -> Any:
            clock.now += clock.replay
            return replay(inputs, out)

        recorded.replay = slow
        return put(key, recorded, **kwargs)

    dispatcher_of(fast).target.recorder.attempt = slow_attempt
    graphs_of(fast).put = slow_replays
    return fast


def x(rows: int) -> torch.Tensor:
    return torch.arange(rows * 3.0).reshape(rows, 3)


def test_a_signature_is_captured_when_it_has_lost_what_a_capture_takes(clock: Clock) -> None:
    fast = timed(clock, capture="worthwhile")
    calls = 0
    while not fast.cache_info().captures:
        assert torch.equal(fast(x(2)), x(2) * 2)
        calls += 1
        assert calls < 2000
    assert calls > 3
    info = fast.cache_info()
    assert info.eager == {Reason.COLD: calls - 1}
    for _ in range(5):
        assert torch.equal(fast(x(2)), x(2) * 2)
    assert (fast.cache_info().hits, fast.cache_info().captures) == (5, 1)


def test_signatures_that_never_come_again_are_never_captured(clock: Clock) -> None:
    fast = timed(clock, capture="worthwhile")
    for size in range(1, 200):
        fast(x(size))
    assert (fast.cache_info().captures, fast.cache_info().eager) == (0, {Reason.COLD: 199})


def test_what_is_no_faster_is_dropped_and_said(clock: Clock) -> None:
    fast = timed(clock, capture="worthwhile")
    fast(x(2))
    # Until the first capture nobody knows.
    clock.replay = 300e-6
    for _ in range(400):
        assert torch.equal(fast(x(2)), x(2) * 2)
    info = fast.cache_info()
    assert (info.captures, info.graphs, info.evictions) == (1, 0, 1)
    assert info.eager[Reason.NOT_WORTH_IT] > 100


def test_what_changes_before_every_call_waits_and_has_a_graph_again_once_it_does_not(clock: Clock) -> None:
    fast = timed(clock, capture="worthwhile")
    fast.prepare(x(2))
    for step in range(64):
        fast.module.unused = step
        assert torch.equal(fast(x(2)), x(2) * 2)
    info = fast.cache_info()
    assert info.captures <= 8 + 7
    assert set(info.eager) == {Reason.UNSETTLED}
    for _ in range(2000):
        fast(x(2))
    assert replays(fast, x(2))


def test_only_what_is_prepared() -> None:
    fast = graphcache.wrap(mlp(), capture="prepared", on_failure="raise")
    inputs = torch.ones(2, 4)
    for _ in range(3):
        assert same(fast(inputs), fast.module(inputs))
    assert (fast.cache_info().captures, fast.cache_info().eager) == (0, {Reason.NOT_PREPARED: 3})


def test_a_first_call_is_captured_unless_it_is_said_otherwise() -> None:
    fast = graphcache.wrap(mlp())
    fast(torch.ones(2, 4))
    assert fast.cache_info().captures == 1


@pytest.mark.parametrize("bad", ["always", None, 3, ["first"]])
def test_a_policy_that_is_none(bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"^capture=.* is not an option; expected one of 'first', 'worthwhile', "):
        graphcache.wrap(mlp(), capture=bad)


def test_an_engine_is_admitted_too(fake: Torch) -> None:  # noqa: F811
    fast = graphcache.wrap(load("affine"), capture="worthwhile")
    with torch.no_grad():
        for _ in range(5000):
            if fast.cache_info().captures:
                break
            assert torch.equal(fast(rows(fake, 2)), rows(fake, 2) * 3 + 1)
        hits = fast.cache_info().hits
        assert torch.equal(fast(rows(fake, 2)), rows(fake, 2) * 3 + 1)
    assert fast.cache_info().captures == 1
    assert fast.cache_info().hits == hits + fast.cache_info().graphs


# ---- what all modules own together


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> Any:
    own_budgets(monkeypatch)
    return set_process_budget


def test_modules_share_a_budget_and_the_coldest_graph_of_all_goes(budget: Any) -> None:
    one, other = graphcache.wrap(mlp()), graphcache.wrap(mlp())
    one(torch.ones(2, 4))
    nbytes = one.cache_info().nbytes
    budget(int(nbytes * 2.5))
    for count in (2, 3, 4, 5):
        for fast in (one, other):
            inputs = torch.ones(count, 4)
            assert same(fast(inputs), fast.module(inputs))
            assert same(fast(inputs), fast.module(inputs))
            assert budget_of("cpu").nbytes <= nbytes * 4
    assert one.cache_info().evictions + other.cache_info().evictions >= 4
    assert (one.cache_info().hits, other.cache_info().hits) == (5, 4)


def test_a_module_that_is_gone_is_out_of_the_account(budget: Any) -> None:
    budget(1 << 30)
    fast = graphcache.wrap(mlp())
    fast(torch.ones(2, 4))
    assert budget_of("cpu").nbytes > 0
    gone = weakref.ref(fast)
    del fast
    gc.collect()
    assert gone() is None
    assert budget_of("cpu").nbytes == 0


def test_a_graph_that_does_not_fit_the_process_is_refused_with_a_reason(budget: Any) -> None:
    fast = graphcache.wrap(mlp())
    fast(torch.ones(2, 4))
    budget(1)
    assert fast.cache_info().graphs == 0
    for _ in range(3):
        assert same(fast(torch.ones(3, 4)), fast.module(torch.ones(3, 4)))
    assert Reason.OVER_BUDGET in fast.cache_info().eager
    new = graphcache.wrap(mlp())
    assert same(new(torch.ones(3, 4)), new.module(torch.ones(3, 4)))
    assert (new.cache_info().graphs, new.cache_info().eager) == (0, {Reason.OVER_BUDGET: 1}), "of unknown size before"
