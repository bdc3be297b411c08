"""Native code compares what a graph of a module depends on, and asks Python if something differs: both say the same."""

from __future__ import annotations

import functools
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from graphcache import native
from graphcache.dispatch import fast_path
from graphcache.keys.call_key import ambient_state
from graphcache.keys.guards import ModuleGuard
from tests.dispatch import test_fast_path
from tests.dispatch.test_fast_path import Warm
from tests.engine_modules import MODULES, prepare, rows
from tests.graphs import compiled as compiled_way
from tests.graphs.fake_driver import Torch, installed
from tests.helpers import graphs_of
from tests.keys import test_guards
from tests.keys.test_ambient import SETTINGS
from tests.keys.test_guards import CHANGES, mlp

fake, plain = test_fast_path.fake, test_guards.plain


class Guarded:
    """A graph that a native table answers with as long as a module is what it was."""

    def __init__(self, fake: Torch, module: nn.Module, **options: Any) -> None:
        self.fake, self.warm, self.x = fake, Warm(fake), rows(fake, 2)
        self.warm.up(self.x)
        self.table, self.asked = fast_path.new_table(), 0
        self.guard = Asked(module, **options)
        self.prove()

    def prove(self) -> None:
        """As a recording does: the graph is right for the module of now."""
        self.guard.snapshot()
        self.guard.arm()
        entry = next(iter(graphs_of(self.warm.fast).entries.values()))
        ambient = fast_path.new_ambient_guard(ambient_state())
        with torch.no_grad():
            fast_path.put(self.table, (self.x,), entry, epoch=self.guard.version, guard=self.guard, ambient=ambient)
        self.reference = self.guard.stale_since(self.guard.version)

    def call(self, into: bool = False) -> bool:
        """Whether native code answered; ``asked`` says how often it asked Python."""
        Asked.count = 0
        with torch.no_grad(), self.fake.on(self.warm.stream):
            if into:
                answered: bool = self.table.into(self.fake.driver.heap.tensor(self.x * 0), (self.x,))
            else:
                answered = self.table.call((self.x,)) is not None
        self.asked = Asked.count
        return answered


class Asked(ModuleGuard):
    """A guard that counts how often it is asked in Python."""

    count = 0

    def is_stale(self, grad: bool) -> bool:
        Asked.count += 1
        return super().is_stale(grad)


@pytest.fixture(autouse=True)
def compared_natively(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "guard_type", lambda: compiled.Guard)


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_python_is_asked_about_changes_alone(fake: Torch, plain: nn.Module, name: str, into: bool) -> None:
    guarded = Guarded(fake, plain)
    assert guarded.call(into)
    assert guarded.call(into)
    assert guarded.asked == 0
    CHANGES[name][0](plain)
    fake.driver.calls.clear()
    assert not guarded.call(into)
    assert guarded.asked == 1
    assert guarded.reference(False)
    assert ("cuGraphLaunch" in fake.driver.calls) is not into, "before the launch where it cannot be taken back"
    guarded.prove()
    assert guarded.call(into)
    assert guarded.asked == 0


variable: ContextVar[int] = ContextVar("variable", default=1)


@functools.lru_cache(maxsize=1)
def cached(number: int) -> object:
    return object()


class Holds(nn.Module):
    """Has and reads what no dictionary holds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.recent = deque([1, 2])
        self.names = OrderedDict(a=1, b=2)
        self.chosen = {1, 2}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cached(1)
        return x if self.linear.weight.requires_grad else x * variable.get()


HELD: dict[str, Callable[[Any], object]] = {
    "a deque": lambda m: m.recent.rotate(1),
    "the order of an OrderedDict": lambda m: m.names.move_to_end("a"),
    "a set": lambda m: m.chosen.add(3),
    "a context variable": lambda m: variable.set(2),
    "results that a function keeps": lambda m: cached.cache_clear(),
    "a result that took another's place": lambda m: (cached(2), cached(1)),
    "whether a parameter wants gradients": lambda m: m.linear.weight.requires_grad_(False),
}


@pytest.mark.parametrize("name", HELD)
def test_what_no_dictionary_holds_is_compared_natively_too(fake: Torch, compiled: Any, name: str) -> None:
    cached(1)
    module = Holds()
    guarded = Guarded(fake, module)
    try:
        compiled.Guard().add_unwritten({})
        asked = 0
    except TypeError:
        # CPython 3.13.0 and 3.14 do not count writes, and Python compares the results of cached functions.
        asked = 1
    assert guarded.call()
    cached(1)
    assert guarded.call()
    assert guarded.asked == asked
    HELD[name](module)
    assert not guarded.call()
    assert guarded.reference(False)
    guarded.prove()
    assert guarded.call()
    assert guarded.asked == asked


def test_what_is_ignored_is_not_compared(fake: Torch) -> None:
    module: Any = mlp()
    module.calls = 0
    guarded = Guarded(fake, module, ignore=["self.calls", "self.other"])
    for number in range(3):
        module.calls = number
        assert guarded.call()
        assert guarded.asked == 0
    module.other = 1
    assert guarded.call()
    assert guarded.asked == 1, "a name that was not there"
    assert guarded.call()
    module.third = 1
    assert not guarded.call()


@pytest.mark.parametrize("name", SETTINGS)
def test_python_is_asked_in_another_ambient_state(fake: Torch, name: str) -> None:
    guarded = Guarded(fake, mlp())
    with SETTINGS[name]():
        assert not guarded.call()
        assert guarded.reference(False)
    assert guarded.call()
    assert guarded.asked == 0


def test_where_native_code_cannot_compare_python_is_asked_at_every_call(fake: Torch) -> None:
    with torch.device("cpu"):
        guarded = Guarded(fake, mlp())
        assert guarded.call()
        assert guarded.asked == 1, "a function mode is on"
    guarded = Guarded(fake, mlp())
    guarded.guard.forget()
    guarded.guard.snapshot()
    guarded.table.clear()
    guarded.prove()
    assert guarded.guard.known is not None
    guarded.guard.known.compared = None
    assert guarded.call()
    assert guarded.asked == 1, "as while a part of the module is compared in Python"


@pytest.mark.parametrize("ignore", [(), ("*",)])
def test_engines_inside_by_their_epochs(fake: Torch, ignore: tuple[str, ...]) -> None:
    engines = [SimpleNamespace(epoch=1000), SimpleNamespace(epoch=2000)]
    guarded = Guarded(fake, mlp(), engines=lambda _: engines, ignore=ignore)
    assert guarded.call()
    assert guarded.asked == 0
    engines[1].epoch += 1
    assert not guarded.call()
    assert guarded.guard.is_stale(False)
    guarded.prove()
    assert guarded.call()


STEPS: dict[str, Callable[[nn.Module, Guarded], object]] = {
    "nothing": lambda m, g: None,
    "an attribute": lambda m, g: setattr(m, "number", len(vars(m))),
    "one that comes and goes": lambda m, g: (setattr(m, "number", 1), delattr(m, "number")),
    "the same value": lambda m, g: setattr(m, "training", m.training),
    "another value": lambda m, g: m.train(not m.training),
    "an inner list": lambda m, g: m.rows.append(1),
    "back": lambda m, g: m.rows.clear(),
    "a tensor's memory": lambda m, g: setattr(m[0].weight, "data", m[0].weight.data.clone()),
    "a tensor's values": lambda m, g: m[0].weight.data.zero_(),
    "forgotten": lambda m, g: g.guard.forget(),
    "looked at": lambda m, g: g.guard.snapshot(),
    "proven": lambda m, g: g.prove(),
    "an epoch": lambda m, g: vars(m)["inside"].__dict__.update(epoch=m.inside.epoch + 1),
}
FLAGS = [name for name in SETTINGS if name.startswith(("default", "matmul", "deter", "fast"))]


@given(st.lists(st.tuples(st.sampled_from([*STEPS]), st.sampled_from(["", "", "", *FLAGS])), max_size=12))
def test_both_ways_say_the_same_after_any_changes(compiled: Any, steps: list[tuple[str, str]]) -> None:
    with pytest.MonkeyPatch.context() as patch, installed(*MODULES, patch=patch) as fake:
        prepare(fake, patch)
        compiled_way.use(compiled, fake, patch)
        module: Any = mlp()
        module.rows, module.inside = [], SimpleNamespace(epoch=1000)
        guarded = Guarded(fake, module, engines=lambda _: [module.inside])
        for name, setting in steps:
            STEPS[name](module, guarded)
            with SETTINGS[setting]() if setting else nothing():
                # The reference is asked last: it may find that what changed is equal, and compare natively again.
                answered = guarded.call()
                assert answered is not guarded.reference(False)


def nothing() -> AbstractContextManager[Any]:
    return torch.no_grad()
