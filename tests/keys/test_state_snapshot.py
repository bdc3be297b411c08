"""Bounds of a snapshot: what is too large is named, and what is ignored is left out."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphcache
from graphcache import Reason
from graphcache.errors import CaptureError
from graphcache.keys import state_walk
from graphcache.keys.state_snapshot import StateSnapshot
from graphcache.keys.values import Unobservable
from tests.helpers import Fn, replays

X = torch.ones(2, 4)


def nested(count: int) -> list[Any]:
    return [[index] for index in range(count)]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small bounds."""
    monkeypatch.setattr(state_walk, "MAX_CONTAINERS", 100)
    monkeypatch.setattr(state_walk, "MAX_ENTRIES", 5000)
    monkeypatch.setattr(state_walk, "MAX_ARRAY_BYTES", 1000)


def test_too_many_containers_name_the_part_that_has_most(few: None) -> None:
    state = {"small": nested(10), "large": nested(200)}
    with pytest.raises(Unobservable, match=r"^state\['large'\]: \d+ of the \d+ containers"):
        StateSnapshot([("state", state)])
    assert len(StateSnapshot([("state", {"small": nested(10)})]).nodes) == 12


def test_too_many_entries_of_one_container(few: None) -> None:
    with pytest.raises(Unobservable, match=r"^state"):
        StateSnapshot([("state", {"numbers": list(range(6000))})])
    StateSnapshot([("state", {"numbers": list(range(4000))})])


def test_arrays_that_would_be_compared_at_every_call(few: None) -> None:
    with pytest.raises(Unobservable, match=r"^state\['[ab]'\]: an array of 800 bytes"):
        StateSnapshot([("state", {"a": np.zeros(100), "b": np.zeros(100)})])
    StateSnapshot([("state", {"a": np.zeros(100)})])


def test_a_walk_that_takes_too_long_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_walk, "MAX_SECONDS", 0.0)
    with pytest.raises(Unobservable, match=r"^state"):
        StateSnapshot([("state", nested(3000))])


def test_an_iterator_whose_position_cannot_be_read() -> None:
    with pytest.raises(Unobservable, match="nditer"):
        StateSnapshot([("state", [np.nditer(np.arange(3))])])


def test_a_generator_without_a_state_is_refused() -> None:
    module = Fn(lambda self, x: x * 2, source=random.SystemRandom())
    fast = graphcache.wrap(module)
    assert torch.equal(fast(X), X * 2)
    assert fast.cache_info().eager == {Reason.UNOBSERVED: 1}


def test_attributes_of_an_object_are_read_past_its_own_methods() -> None:
    class Counting:
        """Counts who asks for an attribute."""

        def __init__(self) -> None:
            self.asked = 0

        def __getattribute__(self, name: str) -> Any:
            object.__getattribute__(self, "__dict__")["asked"] += 1
            return object.__getattribute__(self, name)

    held = Counting()
    module = Fn(lambda self, x: x * 2)
    module.held = held
    before = vars(module)["held"], object.__getattribute__(held, "__dict__")["asked"]
    fast = graphcache.wrap(module)
    fast(X)
    assert replays(fast, X)
    assert (vars(module)["held"], object.__getattribute__(held, "__dict__")["asked"]) == before


@pytest.mark.parametrize("ignore", ["state['large']", "state['l*']", "*large*"])
def test_what_is_ignored_is_not_walked(few: None, ignore: str) -> None:
    state = {"small": nested(10), "large": nested(200)}
    snapshot = StateSnapshot([("state", state)], ignore=[ignore])
    assert len(snapshot.nodes) == 12
    state["large"][0].append(1)
    state["large"] = []
    assert snapshot.changes() == []
    assert snapshot.holds()
    state["small"][3][0] = 9
    assert [change.path for change in snapshot.changes()] == ["state['small'][3][0]"]
    assert not snapshot.holds()


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        ("self.calls", True),
        ("self.calls.deep[0]", True),
        ("self.calls[0]", True),
        ("self.callsign", False),
        ("self", False),
        ("self.blocks[3].n", True),
        ("self.blocks[3].n.deep", True),
        ("self.blocks[3].name", False),
        ("self.blocks", False),
        ("other.self.calls", False),
    ],
)
def test_a_path_takes_everything_below_it_along_and_brackets_are_part_of_it(path: str, ignored: bool) -> None:
    snapshot = StateSnapshot([("self", [])], ignore=["self.calls", "self.blocks[*].n"])
    assert snapshot.ignores(path) is ignored
    assert not StateSnapshot([("self", [])]).ignores(path)


def test_a_module_with_too_much_state_runs_eagerly_and_says_what_to_leave_out(few: None) -> None:
    module = Fn(lambda self, x: x * 2, history=nested(200))
    fast = graphcache.wrap(module, on_failure="raise")
    with pytest.raises(CaptureError, match=r"unobserved.*self\.history: \d+ of the"):
        fast(X)
    fast = graphcache.wrap(module)
    for _ in range(2):
        assert torch.equal(fast(X), X * 2)
    assert fast.cache_info().eager == {Reason.UNOBSERVED: 2}
    fast = graphcache.wrap(module, ignore=["self.history"])
    fast(X)
    assert replays(fast, X)


def test_large_tensors_are_no_bound_of_their_own(few: None) -> None:
    fast = graphcache.wrap(nn.Linear(4, 4000).requires_grad_(False))
    fast(X)
    assert replays(fast, X)


def _renamed(owner: Any, old: str, new: str) -> None:
    value = getattr(owner, old)
    delattr(owner, old)
    setattr(owner, new, value)


@pytest.mark.parametrize("armed", [False, True])
def test_an_attribute_that_has_only_another_name_is_noticed(armed: bool) -> None:
    kind = type("Holder", (), {"last": 3.5, "__module__": "my_model"})
    local = threading.local()
    local.last = 3.5
    for owner in (kind, local):
        snapshot = StateSnapshot([("state", owner)])
        if armed:
            snapshot.arm()
        assert snapshot.holds()
        _renamed(owner, "last", "latest")
        assert {change.path.rpartition(".")[2] for change in snapshot.changes()} == {"last", "latest"}
        assert not snapshot.holds()


@pytest.mark.parametrize("armed", [False, True])
def test_an_object_in_an_array_is_compared(armed: bool) -> None:
    array = np.array([[1], None], dtype=object)
    snapshot = StateSnapshot([("state", array)])
    if armed:
        snapshot.arm()
    assert snapshot.holds()
    array[1] = [2]
    assert [change.path for change in snapshot.changes()] == ["state[1]"]
    assert not snapshot.holds()


@pytest.mark.parametrize("armed", [False, True])
def test_who_asks_while_another_thread_looks_at_a_change_is_told_of_it(
    armed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"rows": [1, 2], "other": [3]}
    snapshot = StateSnapshot([("state", state)])
    if armed:
        snapshot.arm()
    told: list[bool] = []

    def asked_within(self: StateSnapshot, path: str) -> bool:
        if not told:
            told.append(True)
            # Where a second thread may come between.
            told[:] = [snapshot.holds()]
        return False

    monkeypatch.setattr(StateSnapshot, "ignores", asked_within)
    state["rows"] = [1, 3]
    assert not snapshot.holds()
    assert told == [False]
