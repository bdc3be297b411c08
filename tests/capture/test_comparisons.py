"""Every comparison of snapshots and of the effects pass is needed: without it a program that keeps state goes wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import graphcache
from graphcache.capture import effects
from graphcache.keys import state_nodes, state_walk, value_nodes
from tests.capture import actions, changing, places
from tests.capture.actions import Action, Draw
from tests.capture.programs import Drive, Program, Recipe

SEEDS = range(30)
Make = Callable[[Draw], Action]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """One core, no log."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    places.register()
    yield
    places.unregister()
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


def is_wrong(make: Make, path: tuple[str, ...]) -> bool:
    """Whether one of a few programs that do one thing goes wrong."""
    recipe = Recipe((make,), most=1, argument=0.0, styles=("method",), at=path)
    return any(Drive(Program(seed, recipe), graphcache.wrap, 0.3).run(12).wrong for seed in SEEDS)


def never(*args: Any, **kwargs: Any) -> Any:
    return False


def nothing(*args: Any, **kwargs: Any) -> Any:
    return None


def reads_a_shape(draw: Draw) -> Action:
    p = draw.place("torch.ones(3)")
    return Action([f"y = y * {p.get}.shape[0]"], "none", [f"{p.get}.data = torch.ones({p.get}.shape[0] + 1)"], [p])


def reads_a_class(draw: Draw) -> Action:
    p = draw.place("Box(1.0)")
    change = f"{p.get}.__class__ = type('Other', (Box,), {{}})"
    return Action([f"y = y * (2.0 if type({p.get}) is Box else 3.0)"], "none", [change], [p])


NODES: dict[str, tuple[Make, tuple[str, ...]]] = {
    "TableNode": (changing.counts, ("attribute", "dict")),
    "NamesNode": (changing.counts, ("global",)),
    "ClassNode": (changing.counts, ("class",)),
    "ItemsNode": (changing.counts, ("attribute", "list")),
    "CellNode": (changing.counts, ("attribute", "closure")),
    "VariableNode": (actions.reads_a_number, ("attribute", "context variable")),
    "ArrayNode": (changing.counts, ("attribute", "NumPy array")),
    "ShownNode of a thread": (changing.counts, ("attribute", "thread local")),
    "HiddenNode of a cache": (actions.calls_a_cached_function, ("attribute",)),
    "HiddenNode of an iterator": (changing.advances_an_iterator, ("attribute",)),
    "ObjectNode": (reads_a_class, ("attribute",)),
    "ObjectNode of slots": (changing.counts, ("attribute", "slots")),
    "TensorNode": (reads_a_shape, ("attribute",)),
}
"""Kinds of nodes, with an action and a place of which only that kind tells."""
EFFECTS: dict[str, tuple[Make, tuple[str, ...]]] = {
    "_changed_objects": (changing.counts, ("attribute",)),
    "_changed_process_state": (changing.draws, ("attribute",)),
    "_written": (changing.rebinds_a_weight, ("attribute",)),
}
FOLLOWED: dict[str, tuple[Make, tuple[str, ...]]] = {
    "CellNode": (changing.counts, ("attribute", "closure")),
    "ItemsNode": (changing.counts, ("attribute", "list")),
    "TableNode": (changing.counts, ("attribute", "dict")),
    "ObjectNode": (changing.counts, ("attribute", "slots")),
    "ShownNode": (changing.counts, ("attribute", "thread local")),
}
"""Kinds of nodes whose places are followed."""
STEPS: dict[str, tuple[Make, tuple[str, ...]]] = {
    "_function": (changing.counts, ("attribute", "default argument")),
    "_array": (changing.counts, ("attribute", "NumPy array")),
    "_classes_of a class": (changing.counts, ("attribute", "class")),
    "_follow": (changing.counts, ("attribute", "dict")),
    "_object": (changing.counts, ("attribute", "object")),
    "_machinery": (changing.counts, ("attribute", "thread")),
    "_classes_of": (changing.counts, ("attribute", "base of a class")),
    "_named_in_modules": (changing.counts, ("attribute", "module of Python")),
}
"""Steps of the walk."""


@pytest.mark.parametrize("name", NODES)
def test_a_node_that_does_not_compare(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_wrong(*NODES[name])
    kind = name.partition(" ")[0]
    monkeypatch.setattr(getattr(state_nodes, kind, None) or getattr(value_nodes, kind), "differs", never)
    assert is_wrong(*NODES[name])


@pytest.mark.parametrize("name", EFFECTS)
def test_an_effect_that_is_not_looked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_wrong(*EFFECTS[name])
    monkeypatch.setattr(effects, name, nothing)
    assert is_wrong(*EFFECTS[name])


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_kind_of_node_that_is_not_followed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = state_walk.StateWalk._follow
    kind = getattr(state_nodes, name, None) or getattr(value_nodes, name)

    def follow(self: Any, node: Any) -> None:
        if type(node) is not kind:
            original(self, node)

    assert not is_wrong(*FOLLOWED[name])
    monkeypatch.setattr(state_walk.StateWalk, "_follow", follow)
    assert is_wrong(*FOLLOWED[name])


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_the_walk_that_is_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_wrong(*STEPS[name])
    monkeypatch.setattr(state_walk.StateWalk, name.partition(" ")[0], nothing)
    assert is_wrong(*STEPS[name])
