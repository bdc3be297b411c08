"""State that calls rebind, as ``self.h = cell(x, self.h)`` does: an input and an output of a graph that no caller sees.

An observed call that only puts other tensors of the same kind into attributes, dictionaries and lists shows where. From
the next call on, the tensors there are arguments of the call, by a name that no argument has, and what the call leaves
there is part of its answer. So the call is a function of its tensors, and what holds for those holds for its state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

from torch.utils import _pytree as pytree

from graphcache.keys.call_key import StateName
from graphcache.keys.state_snapshot import StatePlace

_MOST = 16
"""How often other places may be found: a call that finds some is observed, which is slow."""


class StateFunction:
    """A module, or its ``forward``, as a function of its arguments and of the state that it rebinds."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run
        self.name = ""
        """Of the argument with the state; empty if there is none."""
        self._places: dict[str, Sequence[StatePlace]] = {}
        self._found = 0
        self._own: dict[tuple[int, Any], Any] = {}
        """What is the caller's at these places, while a repetition with other tensors runs."""

    def adopt(self, places: Sequence[StatePlace]) -> bool:
        """Take the state at these places, and at no others, for an argument; not if that has changed too often."""
        if self._found >= _MOST:
            return False
        name = StateName(f"(state {self._found})")
        self._places[name], self.name = places, name
        self._found += 1
        return True

    def let_go(self) -> None:
        """Drop earlier places, while no repetition is under way."""
        self._places = {name: places for name, places in self._places.items() if name == self.name}

    def given(self) -> dict[str, Any]:
        """The argument with the state of now; nothing if there is none."""
        if not (name := self.name):
            return {}
        places = self._places.get(name, ())
        while True:
            own, state = self._own, _state(places)
            found = tuple([own.get(key, value) for key, value in zip(_keys(places), state, strict=True)])
            # A repetition may have begun or ended meanwhile.
            if self._own is own:
                return {name: found}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's answer; with the argument for the state, also what the call leaves there. The state stays."""
        name = next((name for name in kwargs if type(name) is StateName), "")
        if not name:
            return self.run(*args, **kwargs)
        given = kwargs.pop(name)
        if (places := self._places.get(name)) is None:
            # Other places were found since the call was described.
            return self.run(*args, **kwargs), given
        before = _state(places)
        one, other = pytree.tree_leaves(given), pytree.tree_leaves(before)
        if len(one) == len(other) and all(map(is_, one, other)):
            # If it raises, it leaves what it has left by then, as without graphs.
            answer = self.run(*args, **kwargs)
            after = _state(places)
            _put(places, before)
            return answer, after
        self._own = dict(zip(_keys(places), before, strict=True))
        try:
            _put(places, given)
            return self.run(*args, **kwargs), _state(places)
        finally:
            _put(places, before)
            self._own = {}

    def put(self, name: str, state: Sequence[Any]) -> None:
        """Leave a state at its places, whatever is there."""
        if (places := self._places.get(name)) is not None:
            _put(places, state)


def _keys(places: Sequence[StatePlace]) -> list[tuple[int, Any]]:
    return [(id(place.table), place.name) for place in places]


def _state(places: Sequence[StatePlace]) -> tuple[Any, ...]:
    return tuple([place.value for place in places])


def _put(places: Sequence[StatePlace], state: Sequence[Any]) -> None:
    for place, value in zip(places, state, strict=True):
        place.put(value)
