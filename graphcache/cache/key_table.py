"""Everything that is known of the keys of one module, besides their graphs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from graphcache.cache.costs import KeyCosts
from graphcache.cache.denial import Denial
from graphcache.errors import Cause

MAX_KEYS = 4096
"""Keys without a graph that are remembered. The longest unused is forgotten first."""

Shapes = dict[str | int, tuple[int, ...]]
"""Position or name of an argument -> its shape."""


class KeyState:
    """What is known of one key.

    Attributes:
        shapes: Of the tensors among the arguments of its calls.
        calls: Calls that its present graph has not answered.
        denial: Why it has no graph; ``None`` if it has one, or none was tried.
        costs: What its calls and captures take.
    """

    __slots__ = ("calls", "costs", "denial", "shapes")

    def __init__(self) -> None:
        self.shapes: Shapes | None = None
        self.calls = 0
        self.denial: Denial | None = None
        self.costs: KeyCosts | None = None


class KeyTable:
    """The states of the keys of one module. Any thread may ask and tell.

    Args:
        captured: The keys that have a graph, which are not forgotten.
        size: How many others are remembered.

    Example:
        >>> import torch
        >>> from graphcache.errors import Reason
        >>> keys = KeyTable()
        >>> keys.note("8x64", (torch.zeros(8, 64),), {})
        >>> keys.deny("8x64", Cause(Reason.HOST_READ))
        >>> keys.denial("8x64").reason.value, keys.calls("8x64")
        ('host_read', 1)
    """

    def __init__(self, captured: Collection[Hashable] = (), size: int = MAX_KEYS) -> None:
        self._captured = captured
        self._size = size
        self._states: OrderedDict[Hashable, KeyState] = OrderedDict()
        self.lock = threading.Lock()
        """Held for a look or a change, never for a capture; no other lock is taken under it."""

    def __len__(self) -> int:
        return len(self._states)

    def get(self, key: Hashable) -> KeyState | None:
        """The state of a key, if it is remembered."""
        return self._states.get(key)

    def used(self, key: Hashable) -> KeyState:
        """The state of a key, which is the last to be forgotten from now on. The lock is held."""
        state = self._states.get(key)
        if state is not None:
            self._states.move_to_end(key)
            return state
        state = self._states[key] = KeyState()
        while len(self._states) > self._size + len(self._captured):
            oldest, forgotten = self._states.popitem(last=False)
            if oldest in self._captured:
                self._states[oldest] = forgotten
        return state

    def keys(self) -> list[Hashable]:
        """The keys that are remembered, the longest unused first."""
        with self.lock:
            return list(self._states)

    # ---- calls

    def note(self, key: Hashable, args: Sequence[Any], kwargs: Mapping[str, Any], count: int = 1) -> None:
        """Count a call that no graph of its key has answered so far.

        Args:
            key: Its key.
            args: Positional arguments.
            kwargs: Keyword arguments.
            count: -1 for a hit that answered a padded call, which was noted under its own key; 0 for no call at all.
        """
        with self.lock:
            state = self.used(key)
            if state.shapes is None:
                given: list[tuple[str | int, Any]] = [*enumerate(args), *kwargs.items()]
                state.shapes = {name: tuple(value.shape) for name, value in given if isinstance(value, Tensor)}
            state.calls += count

    def retire(self, key: Hashable, hits: int) -> None:
        """Count the hits of a graph that goes."""
        with self.lock:
            if (state := self._states.get(key)) is not None:
                state.calls += hits

    def calls(self, key: Hashable, hits: int = 0) -> int:
        """How many calls of a key there were, with the hits of its graph if there is one."""
        state = self._states.get(key)
        return hits if state is None else max(state.calls + hits, 0)

    def shapes(self, hits: Mapping[Hashable, int]) -> list[tuple[Shapes, int]]:
        """The shapes of the calls of each key, and how many there were."""
        with self.lock:
            return [
                (state.shapes, max(state.calls + hits.get(key, 0), 0))
                for key, state in self._states.items()
                if state.shapes is not None
            ]

    # ---- denials

    def deny(self, key: Hashable, cause: Cause, version: int = 0) -> None:
        """Remember that a key could not be captured; doubles the wait if it was denied before."""
        with self.lock:
            state = self.used(key)
            state.denial = Denial(cause, version, 1 if state.denial is None else state.denial.times + 1)

    def denial(self, key: Hashable, version: int = 0) -> Cause | None:
        """Why a call of a key runs eagerly, which counts it; ``None`` if a capture may be tried."""
        with self.lock:
            state = self._states.get(key)
            if state is None or state.denial is None or state.denial.wait(version) == 0:
                return None
            self._states.move_to_end(key)
            state.denial.calls += 1
            return state.denial.cause

    def look(self, key: Hashable, version: int = 0) -> tuple[Cause, int | None] | None:
        """Why a key is denied, and after how many calls a capture is tried again (``None``: never). Counts no call."""
        with self.lock:
            state = self._states.get(key)
            if state is None or state.denial is None:
                return None
            return state.denial.cause, state.denial.wait(version)

    def allow(self, key: Hashable) -> None:
        """Forget the denial of a key."""
        with self.lock:
            if (state := self._states.get(key)) is not None:
                state.denial = None

    def allow_all(self) -> None:
        """Forget all denials."""
        with self.lock:
            for state in self._states.values():
                state.denial = None
