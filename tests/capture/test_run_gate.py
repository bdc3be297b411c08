"""Callers and background captures of one module take turns, and never wait for each other in a circle."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import Reason
from graphcache.capture.run_gate import RunGate
from tests.helpers import frozen, settled

PATIENCE = 60
X = torch.linspace(-1, 1, 8).reshape(2, 4)


def start(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Call something in a thread of its own, which ends with the process."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def until(condition: Callable[[], bool]) -> None:
    """Let other threads run until something is so."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


def enter(gate: RunGate, order: list[str], name: str) -> None:
    with gate.shared():
        order.append(name)


def enter_alone(gate: RunGate, order: list[str], name: str) -> None:
    with gate.exclusive():
        order.append(name)


def test_callers_run_beside_one_another() -> None:
    gate, together = RunGate(nn.ReLU()), threading.Barrier(3)

    def run() -> None:
        with gate.shared():
            together.wait(PATIENCE)

    for each in [start(run) for _ in range(3)]:
        each.result(PATIENCE)
    assert not gate.inside
    assert gate.waits == 0


def test_a_background_capture_waits_until_the_module_is_idle() -> None:
    gate, order = RunGate(nn.ReLU()), list[str]()
    with gate.shared():
        alone = start(enter_alone, gate, order, "alone")
        until(lambda: gate.turns)
        order.append("caller")
        assert not alone.done()
    alone.result(PATIENCE)
    assert order == ["caller", "alone"]


def test_a_caller_waits_for_the_run_under_way_and_says_so() -> None:
    gate, order = RunGate(nn.ReLU()), list[str]()
    with gate.exclusive():
        caller = start(enter, gate, order, "caller")
        until(lambda: gate.waits == 1)
        order.append("alone")
        assert not caller.done()
    caller.result(PATIENCE)
    assert order == ["alone", "caller"]
    assert gate.wait_seconds > 0


def test_callers_who_waited_for_one_run_go_before_the_next() -> None:
    gate, order = RunGate(nn.ReLU()), list[str]()

    def background() -> list[Future[Any]]:
        with gate.exclusive():
            callers = [start(enter, gate, order, "caller") for _ in range(3)]
            until(lambda: gate.waits == 3)
        # At once, before the callers' threads have woken up.
        with gate.exclusive():
            order.append("alone")
        return callers

    for each in start(background).result(PATIENCE):
        each.result(PATIENCE)
    assert order == ["caller"] * 3 + ["alone"]


def test_callers_that_keep_coming_do_not_keep_a_background_capture_waiting() -> None:
    gate, order = RunGate(nn.ReLU()), list[str]()
    with gate.shared():
        alone = start(enter_alone, gate, order, "alone")
        until(lambda: gate.turns)
        caller = start(enter, gate, order, "caller")
        until(lambda: gate.waits == 1)
    alone.result(PATIENCE)
    caller.result(PATIENCE)
    assert order == ["alone", "caller"]


def test_one_thread_enters_as_often_as_it_likes() -> None:
    gate = RunGate(nn.ReLU())

    def callers() -> Future[Any]:
        with gate.shared(), gate.shared():
            # The third time goes before whoever waits to run alone, and for the first.
            alone = start(enter_alone, gate, [], "")
            until(lambda: gate.turns)
            with gate.shared():
                assert not alone.done()
            return alone

    def alone() -> None:
        with gate.exclusive(), gate.shared(), gate.exclusive(), gate.shared():
            assert gate.inside

    start(callers).result(PATIENCE).result(PATIENCE)
    start(alone).result(PATIENCE)
    assert not gate.inside
    start(enter_alone, gate, [], "").result(PATIENCE)


def test_what_is_raised_inside_leaves_the_gate_open() -> None:
    gate = RunGate(nn.ReLU())
    for inside in (gate.shared, gate.exclusive):
        with pytest.raises(KeyError), inside():
            raise KeyError
    assert not gate.inside
    start(enter_alone, gate, [], "").result(PATIENCE)


def test_modules_that_share_a_submodule_exclude_each_other() -> None:
    shared = nn.ReLU()
    first, second, other = nn.Sequential(shared), nn.Sequential(nn.Tanh(), shared), nn.Sequential(nn.Tanh())
    one, two, three = RunGate(first), RunGate(second), RunGate(other)
    order: list[str] = []
    with two.shared():
        alone = start(enter_alone, one, order, "alone")
        until(lambda: one.turns)
        assert not alone.done()
        start(enter_alone, three, order, "other").result(PATIENCE)
    alone.result(PATIENCE)
    with one.exclusive():
        caller = start(enter, two, order, "caller")
        until(lambda: two.waits == 1)
        start(enter, three, order, "other").result(PATIENCE)
        assert not caller.done()
    caller.result(PATIENCE)
    assert order == ["other", "alone", "other", "caller"]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_caller_inside_one_module_goes_on_into_another_that_is_wanted(reverse: bool) -> None:
    inner = nn.ReLU()
    outer = nn.Sequential(inner)
    gates = [RunGate(outer), RunGate(inner)]
    first, second = reversed(gates) if reverse else gates

    def caller() -> Future[Any]:
        with first.shared():
            alone = start(enter_alone, gates[0], [], "")
            until(lambda: second.turns)
            with second.shared():
                assert not alone.done()
            return alone

    start(caller).result(PATIENCE).result(PATIENCE)


def test_a_module_that_is_gone_is_nobodys_concern() -> None:
    module = nn.Sequential(nn.ReLU())
    gate, other = RunGate(module), RunGate(module[0])
    del module
    with gate.exclusive():
        assert not other.inside


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_does_not_wait_for_threads_of_its_parent() -> None:
    gate, go_on, inside = RunGate(nn.ReLU()), threading.Event(), threading.Event()

    def run_alone() -> None:
        with gate.exclusive():
            inside.set()
            go_on.wait(PATIENCE)

    alone = start(run_alone)
    assert inside.wait(PATIENCE)
    child = os.fork()
    if not child:
        signal.alarm(PATIENCE)
        with gate.shared():
            pass
        with gate.exclusive():
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    go_on.set()
    alone.result(PATIENCE)


def test_a_wrapped_module_inside_another_is_run_by_its_background_capture_and_not_captured() -> None:
    linear = frozen(nn.Linear(4, 4))
    inner = graphcache.wrap(linear)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.linear = inner, linear

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * 2

    fast = graphcache.wrap(Outer(), capture_in="background")
    assert torch.equal(fast(X), linear(X) * 2)
    settled(fast)
    assert torch.equal(fast(X), linear(X) * 2)
    assert (fast.cache_info().captures, fast.cache_info().hits) == (1, 1)
    assert inner.cache_info().captures == 0


def test_the_first_call_of_a_key_is_answered_by_the_callers_own_run() -> None:
    threads: list[str] = []
    # A call that asks which thread runs it is not captured.
    mine = threading.local()
    mine.name = "caller"

    class Tells(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            threads.append(getattr(mine, "name", "background"))
            return x + 1

    fast = graphcache.wrap(Tells(), capture_in="background", ignore=["*"])
    assert torch.equal(fast(X), X + 1)
    settled(fast)
    assert fast.cache_info().eager == {Reason.PENDING: 1}
    assert fast.cache_info().captures == 1
    assert threads[0] == "caller"
    assert set(threads[1:]) == {"background"}


def test_calls_of_other_keys_wait_for_at_most_one_run_of_a_background_capture() -> None:
    running: list[str] = []
    together: list[tuple[str, ...]] = []
    mine = threading.local()

    class Counts(nn.Module):
        """Notes which threads are inside."""

        def forward(self, x: Tensor) -> Tensor:
            name = getattr(mine, "name", "background")
            running.append(name)
            together.append(tuple(running))
            y = x + 1
            running.remove(name)
            return y

    fast = graphcache.wrap(Counts(), capture_in="background", ignore=["*"])

    def call(size: int) -> None:
        mine.name = "caller"
        assert torch.equal(fast(torch.ones(size)), torch.full((size,), 2.0))

    calls: list[Future[None]] = [start(call, size) for size in range(1, 9) for _ in range(3)]
    for each in calls:
        each.result(PATIENCE)
    settled(fast)
    background = [names for names in together if "background" in names]
    assert background
    assert all(len(names) == 1 for names in background)
