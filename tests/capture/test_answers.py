"""What a call returns is what eager execution returns: objects, attributes and plain values too."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

import graphcache
from tests.helpers import Fn, replays

X = torch.randn(2, 3)


@dataclass
class Scaled:
    """A container of which pytree forgets a field."""

    x: Any
    scale: float = 1.0


class Pair(collections.namedtuple("Pair", "a b")):
    """A named tuple that may have attributes."""


@pytest.fixture(scope="module", autouse=True)
def known_to_pytree() -> Iterator[None]:
    pytree.register_pytree_node(Scaled, lambda value: ([value.x], None), lambda items, _: Scaled(*items))
    yield
    pytree._deregister_pytree_node(Scaled)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def noted(value: Any) -> Any:
    value.note = 3
    return value


def twice(value: Any) -> Any:
    return value, value


def mixed(x: Tensor) -> Any:
    with torch.inference_mode():
        y = x * 2
    return y, x + 1


ODD: dict[str, Callable[[Any, Tensor], Any]] = {
    "a tensor with an attribute": lambda module, x: noted(x * 2),
    "a dictionary with an attribute": lambda module, x: noted(collections.OrderedDict(y=x * 2)),
    "a named tuple with an attribute": lambda module, x: noted(Pair(x * 2, 1)),
    "a field that pytree forgets": lambda module, x: Scaled(x * 2, 3.0),
    "one list twice": lambda module, x: twice([x * 2]),
    "a dictionary of the module": lambda module, x: (x * 2, module.table),
    "a tensor of the module that is not used": lambda module, x: (x * 2, module.kept),
    "inference tensors and others": lambda module, x: mixed(x),
}


def shape_of(answer: Any) -> Any:
    """Types, attributes, and which objects are the same."""
    leaves, tree = pytree.tree_flatten(answer)
    parts = list(answer) if isinstance(answer, tuple) else [answer]
    shared = [[one is other for other in parts] for one in parts]
    flags = [(getattr(x, "note", None), x.is_inference()) if isinstance(x, Tensor) else x for x in leaves]
    return str(tree), type(answer), getattr(answer, "note", None), getattr(answer, "scale", None), shared, flags


@pytest.mark.parametrize("name", ODD)
def test_what_a_replay_could_not_return_again_is_returned_by_eager_calls(name: str) -> None:
    module = Fn(ODD[name])
    module.table, module.kept = {"a": 1}, torch.ones(3)
    fast = graphcache.wrap(module)
    for _ in range(3):
        answer, expected = fast(X), module(X)
        assert shape_of(answer) == shape_of(expected)
        if "module" in name:
            assert answer[1] is expected[1]


def test_an_argument_that_is_returned_is_the_object_given() -> None:
    fast = graphcache.wrap(Fn(lambda module, batch: (batch["x"] * 2, batch)))
    for _ in range(3):
        batch = {"x": X}
        assert fast(batch)[1] is batch


def test_a_field_of_an_argument_that_pytree_forgets_counts() -> None:
    module = Fn(lambda module, value: value.x * value.scale)
    fast = graphcache.wrap(module)
    for scale in (1.0, 1.0, 2.0, 3.0, 1.0):
        assert torch.equal(fast(Scaled(X, scale)), X * scale)
    assert fast.cache_info().hits > 0


@pytest.mark.parametrize("values", [(3.0, -0.0, 0.0, "a", None), (0, False, 1, True)])
def test_plain_values_of_an_answer_follow_the_state(values: tuple[Any, ...]) -> None:
    module = Fn(lambda module, x: (x * 2, module.value))
    fast = graphcache.wrap(module)
    for value in values:
        module.value = value
        for _ in range(3):
            assert repr(fast(X)[1]) == repr(value)


def test_a_long_constant_follows_the_state() -> None:
    module = Fn(lambda module, x: x * torch.tensor(module.table)[:3])
    module.table = [1.0] * 5000
    fast = graphcache.wrap(module)
    zeros = torch.zeros(2, 3)
    assert torch.equal(fast(zeros), zeros)
    assert replays(fast, zeros)
    module.table[0] = 5.0
    for x in (zeros, X, X):
        assert torch.equal(fast(x), module(x))


def asks_for_flags(module: Any, x: Tensor) -> Tensor:
    return x * (2 if module.weight.requires_grad else 3)


def asks_for_gradients(module: Any, x: Tensor) -> Tensor:
    return x * (1 if module.weight.grad is None else module.weight.grad)


def asks_for_versions(module: Any, x: Tensor) -> Tensor:
    return x * (module.weight * module.weight._version)


ASKS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any], object]]] = {
    "requires_grad": (asks_for_flags, lambda module: module.weight.requires_grad_(not module.weight.requires_grad)),
    "grad": (asks_for_gradients, lambda module: setattr(module.weight, "grad", torch.full((3,), 5.0))),
    "_version": (asks_for_versions, lambda module: module.weight.mul_(2)),
}


@pytest.mark.parametrize("name", ASKS)
def test_what_a_module_asks_of_its_tensors(name: str) -> None:
    forward, change = ASKS[name]
    module = Fn(forward)
    module.weight = nn.Parameter(torch.ones(3), requires_grad=False)
    twin = copy.deepcopy(module)
    fast = graphcache.wrap(module)
    for _ in range(3):
        for _ in range(3):
            assert torch.equal(fast(X), twin(X))
        change(module)
        change(twin)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def test_weights_that_parametrize_caches() -> None:
    module = nn.Linear(3, 3)
    parametrize.register_parametrization(module, "weight", Doubled())
    twin = copy.deepcopy(module)
    fast = graphcache.wrap(module)

    def answers(each: Any, call: Any) -> list[Tensor]:
        found = [call(X) for _ in range(3)]
        with parametrize.cached():
            found += [call(X) for _ in range(3)]
            each.parametrizations.weight.original.mul_(3)
            found += [call(X) for _ in range(3)]
        return [*found, *(call(X) for _ in range(3))]

    assert all(map(torch.equal, answers(module, fast), answers(twin, twin)))


@pytest.mark.parametrize("place", ["submodule", "closure"])
def test_a_change_of_a_wrapped_module_inside_another_is_noticed(place: str) -> None:
    inner = nn.Linear(3, 3)
    behind = graphcache.wrap(inner)
    outer = Fn(lambda module, x: (module.part if place == "submodule" else behind)(x) * 2)
    if place == "submodule":
        outer.part = behind
    fast = graphcache.wrap(outer)
    for change in (lambda: None, lambda: inner.weight.mul_(2), lambda: setattr(inner.weight, "data", torch.ones(3, 3))):
        change()
        for _ in range(3):
            assert torch.equal(fast(X), inner(X) * 2)
    assert fast.cache_info().hits > 0


SETTINGS: dict[str, tuple[Callable[[], object], Callable[[], object], Callable[[], object]]] = {
    "matmul precision": (
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: torch.set_float32_matmul_precision("highest"),
        torch.get_float32_matmul_precision,
    ),
    "deterministic algorithms": (
        lambda: torch.use_deterministic_algorithms(True, warn_only=True),
        lambda: torch.use_deterministic_algorithms(False),
        torch.are_deterministic_algorithms_enabled,
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_of_pytorch_that_a_call_makes_is_made_by_every_call(name: str) -> None:
    make, undo, ask = SETTINGS[name]

    def forward(module: Any, x: Tensor) -> Tensor:
        make()
        return x * 2

    fast = graphcache.wrap(Fn(forward))
    undo()
    before = ask()
    for _ in range(3):
        fast(X)
        assert ask() != before
        undo()
