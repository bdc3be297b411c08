"""No two threads run one PyTorch module at once, where one of them is a background capture."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

from torch import nn


class RunGate:
    """Callers of a module run it beside one another; a background capture runs it alone.

    A background capture waits for its turn until nobody runs the module, nor another wrapped module that shares a
    submodule with it. A caller that comes meanwhile waits until the capture has run the module once, which is measured,
    and goes before its next run. A thread that is inside may enter again, and may enter gates of other modules.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.waits = 0
        """How many callers have waited for a run of a background capture, or wait now."""
        self.wait_seconds = 0.0
        """How long these callers have waited, together."""
        self.inside: set[int] = set()
        """Threads that run the module."""
        self.turns: set[int] = set()
        """Threads that run it alone, or wait for that."""
        self._visits = 0
        # Threads of callers that wait, and whether each goes before the next turn.
        self._waiting: dict[int, bool] = {}
        with _condition:
            _gates.add(self)

    def enter(self) -> bool:
        """Begin to run the module, possibly beside other callers; whether this thread was not inside already."""
        thread = get_ident()
        if thread in self.inside:
            return False
        # Who wants to be alone says so first, and looks who is inside then: in this order no lock is needed.
        self.inside.add(thread)
        if self.turns:
            self.inside.discard(thread)
            with _condition:
                _condition.notify_all()
                if self.turns:
                    self._wait(thread)
                self.inside.add(thread)
        self._visits += 1
        return True

    def leave(self) -> None:
        """End what :meth:`enter` has begun."""
        self.inside.discard(get_ident())
        if self.turns or self._waiting:
            with _condition:
                _condition.notify_all()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Inside, the caller runs the module, possibly beside other callers."""
        entered = self.enter()
        try:
            yield
        finally:
            if entered:
                self.leave()

    def visits(self) -> int:
        """For a caller inside: what :meth:`alone` is told later; another number once somebody else has been inside."""
        with _condition:
            return -1 if self.inside - {get_ident()} else self._visits

    @contextmanager
    def alone(self, visits: int) -> Iterator[bool]:
        """For a caller inside: whether nobody else is, has been since, nor comes until the end. It waits for nobody."""
        thread = get_ident()
        gates = self._overlapping()
        with _condition:
            entered = [gate for gate in gates if thread not in gate.turns]
            for gate in entered:
                gate.turns.add(thread)
            is_alone = visits == self._visits and not any((gate.inside | gate.turns) - {thread} for gate in gates)
            if not is_alone:
                for gate in entered:
                    gate.turns.discard(thread)
                entered = []
        try:
            yield is_alone
        finally:
            with _condition:
                for gate in entered:
                    gate.turns.discard(thread)
                _condition.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Inside, the module is run by this thread alone. Not to be entered by a caller that runs the module."""
        thread = get_ident()
        # All gates at once: a caller may be inside one of them and go on into another.
        gates = [gate for gate in self._overlapping() if thread not in gate.inside]
        try:
            with _condition:
                for gate in gates:
                    gate.turns.add(thread)
                _condition.wait_for(lambda: not any(gate.inside or any(gate._waiting.values()) for gate in gates))
                for gate in gates:
                    gate.inside.add(thread)
            yield
        finally:
            with _condition:
                for gate in gates:
                    gate.inside.discard(thread)
                    gate.turns.discard(thread)
                    gate._waiting = dict.fromkeys(gate._waiting, True)
                _condition.notify_all()

    def _wait(self, thread: int) -> None:
        """Wait for a turn, also one that is yet to begin: callers that keep coming must not keep it waiting for ever.

        A thread inside another gate waits only for one that has begun: the others may be waiting for that gate.
        """
        self._waiting[thread] = any(thread in gate.inside for gate in _gates)

        def may_enter() -> bool:
            return self.inside.isdisjoint(self.turns) if self._waiting[thread] else not self.turns

        try:
            if not may_enter():
                self.waits += 1
                start = time.perf_counter()
                _condition.wait_for(may_enter)
                self.wait_seconds += time.perf_counter() - start
        finally:
            del self._waiting[thread]

    def _overlapping(self) -> set[RunGate]:
        """The gates of modules that share a submodule with this one, its own among them."""
        own = self._submodules()
        with _condition:
            gates = list(_gates)
        return {self, *(gate for gate in gates if not own.isdisjoint(gate._submodules()))}

    def _submodules(self) -> set[int]:
        module = self._module()
        return set(map(id, module.modules())) if module is not None else set()


def _after_fork() -> None:
    """Forget the threads that are not here."""
    global _condition
    _condition = threading.Condition()
    for gate in _gates:
        gate.inside &= {get_ident()}
        gate.turns &= gate.inside
        gate._waiting = {}


_condition = threading.Condition()
"""The one lock of all gates of the process."""
_gates: weakref.WeakSet[RunGate] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
