"""Captured enqueues have the gate for themselves, nobody waits for ever, and Ctrl-C leaves it open."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.engines import context as room
from graphcache.engines.context import EnqueueGate, enqueues
from tests.helpers import in_threads


class Watched:
    """A gate, and who is inside of it."""

    def __init__(self) -> None:
        self.gate = EnqueueGate()
        self.lock = threading.Lock()
        self.shared = self.exclusive = self.most = 0

    def enter(self, exclusive: bool, within: Callable[[], object] = lambda: None) -> None:
        (self.gate.exclusive if exclusive else self.gate.shared)(self._inside, exclusive, within)

    def _inside(self, exclusive: bool, within: Callable[[], object]) -> None:
        with self.lock:
            self.exclusive += exclusive
            self.shared += not exclusive
            self.most = max(self.most, self.shared)
            assert self.exclusive <= 1
            assert not (self.exclusive and self.shared)
        within()
        with self.lock:
            self.exclusive -= exclusive
            self.shared -= not exclusive


@given(st.lists(st.lists(st.booleans(), max_size=12), min_size=2, max_size=5))
def test_exclusive_is_exclusive_and_everybody_gets_in(turns: list[list[bool]]) -> None:
    watched = Watched()
    in_threads(lambda index: [watched.enter(exclusive) for exclusive in turns[index]], len(turns))
    assert (watched.exclusive, watched.shared) == (0, 0)


def test_others_are_inside_together() -> None:
    watched, together = Watched(), threading.Barrier(3, timeout=60)
    in_threads(lambda _: watched.enter(False, together.wait), 3)
    assert watched.most == 3


def test_exclusive_callers_go_first() -> None:
    watched, order = Watched(), list[str]()
    inside, go = threading.Event(), threading.Event()

    def long() -> None:
        watched.enter(False, lambda: (inside.set(), go.wait(60)))

    def exclusive() -> None:
        watched.enter(True, lambda: order.append("exclusive"))

    def late() -> None:
        watched.enter(False, lambda: order.append("late"))

    threads = [threading.Thread(target=work) for work in (long, exclusive, late)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    while not watched.gate._exclusive:
        pass
    threads[2].start()
    go.set()
    for thread in threads:
        thread.join(60)
    assert order == ["exclusive", "late"]


def test_the_same_thread_may_enter_again() -> None:
    watched = Watched()
    gate = watched.gate
    assert gate.shared(gate.shared, int) == 0
    assert gate.exclusive(gate.exclusive, gate.shared, int) == 0
    watched.enter(True)
    watched.enter(False)


def test_a_thread_inside_enters_again_while_another_one_waits_to_be_exclusive() -> None:
    gate, order = EnqueueGate(), list[str]()
    waiting = threading.Thread(target=gate.exclusive, args=(order.append, "exclusive"))

    def again() -> None:
        waiting.start()
        while not gate._exclusive:
            pass
        gate.shared(order.append, "again")

    gate.shared(again)
    waiting.join(60)
    assert order == ["again", "exclusive"]


def test_a_thread_that_shares_is_told_that_it_cannot_be_exclusive() -> None:
    gate = EnqueueGate()
    with pytest.raises(RuntimeError, match="shares the gate already"):
        gate.shared(gate.exclusive, int)
    gate.exclusive(int)


@pytest.mark.parametrize("exclusive", [True, False])
def test_an_error_inside_leaves_the_gate_open(exclusive: bool) -> None:
    watched = Watched()

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        (watched.gate.exclusive if exclusive else watched.gate.shared)(fail)
    watched.enter(True)
    watched.enter(False)


def interrupted_at(step: int, work: Callable[[], object], file: str) -> bool:
    """Whether Ctrl-C came before the end of some work, at the ``step``-th place in a file where Python looks for it.

    Python looks when a function begins and after a C function was called.
    """
    left = step

    def look(frame: FrameType, event: str, _: Any) -> None:
        nonlocal left
        if event in ("call", "c_return") and frame.f_code.co_filename == file:
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

    try:
        sys.setprofile(look)
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


@pytest.mark.parametrize("entry", ["shared", "exclusive"])
def test_ctrl_c_at_any_place_leaves_the_gate_open(entry: str) -> None:
    gate = EnqueueGate()
    for step in range(1, 100):
        come = interrupted_at(step, lambda: getattr(gate, entry)(int), room.__file__)
        assert (gate._inside, gate._exclusive) == (set(), set()), step
        in_threads(lambda _: gate.exclusive(int), 1)
        if not come:
            break
    assert 3 < step < 99


def test_ctrl_c_at_any_place_while_another_thread_is_exclusive() -> None:
    for step in range(1, 100):
        gate, inside, go = EnqueueGate(), threading.Event(), threading.Event()
        other = threading.Thread(target=gate.exclusive, args=(lambda: (inside.set(), go.wait(60)),))  # noqa: B023
        other.start()
        assert inside.wait(60)
        threading.Timer(0.01, go.set).start()
        come = interrupted_at(step, lambda: gate.shared(int), room.__file__)  # noqa: B023
        go.set()
        other.join(60)
        assert (gate._inside, gate._exclusive) == (set(), set()), step
        in_threads(lambda _: gate.exclusive(int), 1)  # noqa: B023
        if not come:
            break
    assert 5 < step < 99


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_fork_finds_it_open() -> None:
    inside, go = threading.Event(), threading.Event()
    thread = threading.Thread(target=enqueues.shared, args=(lambda: (inside.set(), go.wait(60)),))
    thread.start()
    assert inside.wait(60)
    child = os.fork()
    if not child:
        enqueues.exclusive(os._exit, 7)
    go.set()
    thread.join(60)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
