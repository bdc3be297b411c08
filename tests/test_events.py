from __future__ import annotations

import logging
import sys
from contextlib import contextmanager

import pytest

from graphcache.errors import Cause, Reason
from graphcache.events import Captured, Evicted, Ledger, RanEagerly
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
    ledger.subscribers.append(seen.append)
    events = [Captured("a", 0.1, 1, 1), Evicted("a", 2)]
    ledger.captured(events[0])
    ledger.evicted(events[1])
    ledger.ran_eagerly(Cause(Reason.GRAD))
    assert seen == [*events, RanEagerly(Cause(Reason.GRAD))]


def test_a_subscriber_that_fails_neither_stops_the_call_nor_the_next_subscriber(ledger, caplog):
    seen: list[object] = []
    ledger.subscribers += [lambda event: 1 / 0, seen.append]
    ledger.evicted(Evicted("a", 1))
    assert seen == [Evicted("a", 1)]
    assert "a subscriber failed on Evicted; the call goes on" in caplog.text


def test_a_subscriber_may_leave_while_it_is_told(ledger):
    seen: list[object] = []

    def once(event: object) -> None:
        seen.append(event)
        ledger.subscribers.remove(once)

    ledger.subscribers += [once, seen.append]
    ledger.evicted(Evicted("a", 1))
    ledger.evicted(Evicted("b", 1))
    assert seen == [Evicted("a", 1), Evicted("a", 1), Evicted("b", 1)]


def test_spans_cost_nothing_without_a_tracer_and_nest_with_several():
    ledger = Ledger("module")
    assert ledger.span("eager") is ledger.span("capture")
    seen = []

    @contextmanager
    def tracer(label):
        seen.append(label)
        yield
        seen.append("end")

    ledger.tracers += [tracer, tracer]
    with ledger.span("capture"):
        seen.append("inside")
    assert seen == ["capture module", "capture module", "inside", "end", "end"]


def test_a_tracer_that_fails_closes_those_before_it():
    ledger, seen = Ledger("module"), []

    @contextmanager
    def tracer(label):
        try:
            yield
        finally:
            seen.append("end")

    @contextmanager
    def fails(label):
        raise KeyError(label)
        yield

    ledger.tracers += [tracer, fails]
    with pytest.raises(KeyError):
        ledger.span("eager")
    assert seen == ["end"]


def test_no_eager_call_of_many_threads_is_lost():
    ledger, before = Ledger("module"), sys.getswitchinterval()
    cause = Cause(Reason.COLD)
    sys.setswitchinterval(1e-6)
    try:
        in_threads(lambda index: [ledger.ran_eagerly(cause) for _ in range(20_000)])
    finally:
        sys.setswitchinterval(before)
    assert ledger.eager == {Reason.COLD: 80_000}
