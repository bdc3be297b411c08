from __future__ import annotations

import logging
import sys
import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import graphcache
from graphcache.errors import Cause, ConfigError, Reason
from graphcache.events import Captured, Evicted, Ledger, QuietLock, RanEagerly
from tests.helpers import in_threads


@pytest.fixture
def ledger() -> Ledger:
    return Ledger("net")


def test_captures_add_up(ledger):
    ledger.captured(Captured("a", seconds=0.5, nodes=2, nbytes=8))
    ledger.captured(Captured("b", seconds=0.25, nodes=1, nbytes=4))
    assert (ledger.captures, ledger.capture_seconds) == (2, 0.75)


def test_hits_of_an_evicted_graph_stay_in_the_account(ledger):
    ledger.evicted(Evicted("a", hits=3))
    ledger.evicted(Evicted("b", hits=4))
    assert (ledger.evictions, ledger.retired_hits) == (2, 7)


def test_eager_calls_are_counted_by_reason(ledger):
    for reason in (Reason.GRAD, Reason.GRAD, Reason.RANDOM):
        ledger.ran_eagerly(Cause(reason))
    assert ledger.eager == {Reason.GRAD: 2, Reason.RANDOM: 1}


def test_each_cause_is_logged_once_with_the_module_and_what_to_do(ledger, caplog):
    for where in ("a", "a", "b", "a"):
        ledger.ran_eagerly(Cause(Reason.RANDOM, where))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "net ran eagerly: random: " in caplog.text
    assert "call module.eval() if it is dropout" in caplog.text


@pytest.mark.parametrize("reason", [Reason.DISABLED, Reason.TRACING, Reason.OUTER_CAPTURE])
def test_what_was_asked_for_is_no_warning(ledger, caplog, reason):
    with caplog.at_level(logging.INFO, "graphcache"):
        ledger.ran_eagerly(Cause(reason))
    assert [record.levelno for record in caplog.records] == [logging.INFO]


def test_the_memory_of_what_was_logged_is_bounded(ledger, caplog):
    for index in range(1000):
        ledger.ran_eagerly(Cause(Reason.ARGUMENT, str(index)))
    assert len(ledger._told) <= 256
    assert ledger.eager[Reason.ARGUMENT] == 1000


def test_subscribers_see_every_event_in_order(ledger):
    seen: list[object] = []
    ledger.subscribe(seen.append)
    events = [Captured("a", 0.1, 1, 1), Evicted("a", 2)]
    ledger.captured(events[0])
    ledger.evicted(events[1])
    ledger.ran_eagerly(Cause(Reason.GRAD))
    assert seen == [*events, RanEagerly(Cause(Reason.GRAD))]


@pytest.mark.parametrize("subscriber", [None, 3, "x"])
def test_what_cannot_be_called_is_no_subscriber(ledger, subscriber):
    with pytest.raises(ConfigError, match="subscriber="):
        ledger.subscribe(subscriber)


def test_a_subscriber_that_fails_neither_stops_the_call_nor_the_next_subscriber(ledger, caplog):
    seen: list[object] = []
    ledger.subscribe(lambda event: 1 / 0)
    ledger.subscribe(seen.append)
    ledger.evicted(Evicted("a", 1))
    assert seen == [Evicted("a", 1)]
    assert "<lambda>" in caplog.text
    assert "failed on Evicted(key='a', hits=1); the call goes on" in caplog.text


def test_a_subscriber_may_leave_while_it_is_told(ledger):
    seen: list[object] = []

    def once(event: object) -> None:
        seen.append(event)
        leave()

    leave = ledger.subscribe(once)
    ledger.subscribe(seen.append)
    ledger.evicted(Evicted("a", 1))
    ledger.evicted(Evicted("b", 1))
    assert seen == [Evicted("a", 1), Evicted("a", 1), Evicted("b", 1)]


class Notes:
    def __init__(self):
        self.seen = []

    def before(self, kind, module):
        self.seen.append((kind, module))

    def after(self, kind, module, seconds, done):
        self.seen.append("end")


def test_spans_cost_nothing_without_an_observer_and_are_told_to_each(ledger):
    assert type(ledger.span("eager")) is nullcontext
    one, other = Notes(), Notes()
    ends = [ledger.observers.add(one), ledger.observers.add(other)]
    with ledger.span("capture"):
        assert one.seen == other.seen == [("capture", "net")]
    assert one.seen == other.seen == [("capture", "net"), "end"]
    for end in (*ends, *ends):
        end()
    assert type(ledger.span("capture")) is nullcontext
    assert not ledger.observers.active


def test_who_hears_no_replays_keeps_no_hit_from_native_code(ledger):
    notes = Notes()
    ledger.observers.add(notes, replays=False)
    assert not ledger.observers.active
    for kind, traced in (("replay", False), ("eager", False), ("eager", True), ("capture", True)):
        with ledger.span(kind, traced=traced):
            pass
    assert notes.seen == [("eager", "net"), "end", ("capture", "net"), "end"]


def test_who_hears_no_eager_runs_hears_the_rest(ledger):
    notes = Notes()
    ledger.observers.add(notes, eager=False)
    assert ledger.observers.active
    for kind in ("replay", "eager", "capture"):
        with ledger.span(kind):
            pass
    assert notes.seen == [("replay", "net"), "end", ("capture", "net"), "end"]


def test_no_eager_call_of_many_threads_is_lost():
    ledger, before = Ledger("module"), sys.getswitchinterval()
    cause = Cause(Reason.COLD)
    sys.setswitchinterval(1e-6)
    try:
        in_threads(lambda index: [ledger.ran_eagerly(cause) for _ in range(20_000)])
    finally:
        sys.setswitchinterval(before)
    assert ledger.eager == {Reason.COLD: 80_000}


def test_an_event_waits_for_the_last_lock_of_the_thread(ledger):
    seen: list[object] = []
    ledger.subscribe(seen.append)
    one, other = QuietLock(), QuietLock()
    with one:
        ledger.evicted(Evicted("a", 1))
        with other, one:
            ledger.evicted(Evicted("b", 1))
        assert seen == []
    assert seen == [Evicted("a", 1), Evicted("b", 1)]
    ledger.evicted(Evicted("c", 1))
    assert len(seen) == 3


def test_an_event_is_delivered_when_what_held_the_lock_failed(ledger):
    seen: list[object] = []
    ledger.subscribe(seen.append)
    with pytest.raises(KeyError), QuietLock():
        ledger.evicted(Evicted("a", 1))
        raise KeyError
    assert seen == [Evicted("a", 1)]


def test_a_lock_of_another_thread_keeps_no_event_back(ledger):
    seen: list[object] = []
    ledger.subscribe(seen.append)
    with QuietLock():
        in_threads(lambda index: ledger.evicted(Evicted(index, 1)), 2)
        assert len(seen) == 2


def test_a_lock_that_is_not_to_be_had_is_not_held(ledger):
    lock, seen = QuietLock(), []
    ledger.subscribe(seen.append)

    def other(_):
        assert not lock.acquire(timeout=0.01)
        ledger.evicted(Evicted("a", 1))
        assert seen

    with lock:
        in_threads(other, 1)


class Cut(nn.Module):
    def forward(self, x):
        return x[x > 0]


@pytest.mark.parametrize("kind", ["Captured", "Evicted", "RanEagerly"])
def test_a_subscriber_may_wait_for_a_thread_that_clears_and_calls(kind):
    linear = nn.Linear(4, 4).requires_grad_(False)
    fast = graphcache.wrap(nn.Sequential(linear, Cut()), max_graphs=1)
    for _ in range(3):
        fast(torch.ones(1, 4))
    done = []

    def subscriber(event):
        if type(event).__name__ == kind and not done:
            done.append(kind)
            other = threading.Thread(target=lambda: done.append((fast.clear(), fast(torch.ones(1, 4)))), daemon=True)
            other.start()
            other.join(30)
            done.append(other.is_alive())
            fast.clear()

    for each in (fast, fast.parts["0"]):
        each.subscribe(subscriber)
    for size in (2, 3, 2):
        fast(torch.ones(size, 4))
    assert done[0] == kind
    assert done[-1] is False


def test_an_observer_hears_of_the_end_of_a_capture_without_locks():
    fast = graphcache.wrap(nn.Linear(4, 4).requires_grad_(False))
    alive = []

    class Waits:
        def before(self, kind, module):
            pass

        def after(self, kind, module, seconds, done):
            other = threading.Thread(target=fast.clear, daemon=True)
            other.start()
            other.join(30)
            alive.append(other.is_alive())

    fast.observe(Waits())
    fast(torch.ones(1, 4))
    assert alive == [False]
