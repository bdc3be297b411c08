"""Captured enqueues have the gate for themselves, and nobody waits for ever."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.engines.gate import Gate, enqueues
from tests.helpers import in_threads


class Watched:
    """A gate, and who is inside of it."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.lock = threading.Lock()
        self.among = self.alone = self.most = 0

    def enter(self, alone: bool, within: Callable[[], object] = lambda: None) -> None:
        with self.gate.alone() if alone else self.gate.among_others():
            with self.lock:
                self.alone += alone
                self.among += not alone
                self.most = max(self.most, self.among)
                assert self.alone <= 1
                assert not (self.alone and self.among)
            within()
            with self.lock:
                self.alone -= alone
                self.among -= not alone


@given(st.lists(st.lists(st.booleans(), max_size=12), min_size=2, max_size=5))
def test_alone_is_alone_and_everybody_gets_in(turns: list[list[bool]]) -> None:
    watched = Watched()
    in_threads(lambda index: [watched.enter(alone) for alone in turns[index]], len(turns))
    assert (watched.alone, watched.among) == (0, 0)


def test_others_are_inside_together() -> None:
    watched, together = Watched(), threading.Barrier(3, timeout=60)
    in_threads(lambda _: watched.enter(False, together.wait), 3)
    assert watched.most == 3


def test_whoever_wants_to_be_alone_goes_first() -> None:
    watched, order = Watched(), list[str]()
    inside, go = threading.Event(), threading.Event()

    def long() -> None:
        watched.enter(False, lambda: (inside.set(), go.wait(60)))

    def alone() -> None:
        watched.enter(True, lambda: order.append("alone"))

    def late() -> None:
        watched.enter(False, lambda: order.append("late"))

    threads = [threading.Thread(target=work) for work in (long, alone, late)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    while not watched.gate._waiting:
        pass
    threads[2].start()
    go.set()
    for thread in threads:
        thread.join(60)
    assert order == ["alone", "late"]


def test_the_same_thread_may_enter_again() -> None:
    watched = Watched()
    gate = watched.gate
    with gate.among_others(), gate.among_others():
        pass
    with gate.alone(), gate.alone(), gate.among_others():
        pass
    watched.enter(True)
    watched.enter(False)


def test_a_thread_that_is_among_others_is_told_that_it_cannot_be_alone() -> None:
    gate = Gate()
    with gate.among_others(), pytest.raises(RuntimeError, match="among others already"), gate.alone():
        pass
    with gate.alone():
        pass


@pytest.mark.parametrize("alone", [True, False])
def test_an_error_inside_leaves_the_gate_open(alone: bool) -> None:
    watched = Watched()

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watched.gate.alone() if alone else watched.gate.among_others():
        fail()
    watched.enter(True)
    watched.enter(False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_fork_finds_it_open() -> None:
    inside, go = threading.Event(), threading.Event()

    def hold() -> None:
        with enqueues.among_others():
            inside.set()
            go.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(60)
    child = os.fork()
    if not child:
        with enqueues.alone():
            os._exit(7)
    go.set()
    thread.join(60)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
