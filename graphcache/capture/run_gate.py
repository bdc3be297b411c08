"""No two threads run one PyTorch module at once, where one of them is a background capture."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


class RunGate:
    """Callers of a module run it beside one another; a background capture runs it alone.

    A caller waits for at most one run of a background capture, which is measured. A background capture waits until
    nobody runs the module, nor another wrapped module that shares a submodule with it.

    Args:
        module: The module.

    Example:
        >>> gate = RunGate(nn.ReLU())
        >>> with gate.shared():
        ...     gate.is_idle
        False
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._condition = threading.Condition()
        self._running = 0
        self._alone = False
        self._waiting = 0
        self._depth = threading.local()
        self.waits = 0
        """How many callers have waited for a run of a background capture."""
        self.wait_seconds = 0.0
        """How long these callers have waited, together."""
        with _lock:
            _gates.add(self)

    @property
    def is_idle(self) -> bool:
        """Whether nobody runs the module through this gate."""
        return not self._running and not self._alone

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Inside, the caller runs the module, possibly beside other callers."""
        depth = getattr(self._depth, "value", 0)
        if not depth:
            self._enter()
        self._depth.value = depth + 1
        try:
            yield
        finally:
            self._depth.value = depth
            if not depth:
                with self._condition:
                    self._running -= 1
                    if not self._running:
                        self._condition.notify_all()

    def _enter(self) -> None:
        with self._condition:
            # Whoever waits to run alone goes first, so that callers in turn do not keep it waiting for ever.
            if self._alone or self._waiting:
                start = time.perf_counter()
                self._condition.wait_for(lambda: not self._alone and not self._waiting)
                self.waits += 1
                self.wait_seconds += time.perf_counter() - start
            self._running += 1

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Inside, the module is run by this thread alone."""
        with ExitStack() as stack:
            # Always in one order, so that two background captures do not wait for each other.
            for gate in sorted(self._overlapping(), key=id):
                stack.enter_context(gate._only())
            yield

    @contextmanager
    def _only(self) -> Iterator[None]:
        with self._condition:
            self._waiting += 1
            try:
                self._condition.wait_for(lambda: not self._running and not self._alone)
            finally:
                self._waiting -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._condition:
                self._alone = False
                self._condition.notify_all()

    def _overlapping(self) -> Sequence[RunGate]:
        """The gates of modules that share a submodule with this one, its own among them."""
        module = self._module()
        if module is None:
            return [self]
        own = set(map(id, module.modules()))
        with _lock:
            gates = list(_gates)
        others = [(gate, gate._module()) for gate in gates if gate is not self]
        return [self, *(gate for gate, each in others if each is not None and own & set(map(id, each.modules())))]

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function`` inside :meth:`shared`."""
        with self.shared():
            return function(*args, **kwargs)


_lock = threading.Lock()
_gates: weakref.WeakSet[RunGate] = weakref.WeakSet()
