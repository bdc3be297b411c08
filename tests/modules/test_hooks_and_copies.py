"""Hooks of wrapped modules, and what copies keep of them."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import graphcache
from tests.helpers import Fn

X = torch.ones(1, 2)


def sevens(module: Any, args: Any, answer: Tensor) -> Tensor:
    """A hook."""
    return answer * 0 + 7


@pytest.mark.parametrize("name", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_run(name: str) -> None:
    fast, seen = graphcache.wrap(nn.Linear(2, 2)), list[Any]()
    getattr(fast, name)(lambda *args: seen.append(args))
    fast(X.clone().requires_grad_()).sum().backward()
    assert len(seen) == 1


@pytest.mark.parametrize("when", ["pre", "post"])
@pytest.mark.parametrize("what", ["state_dict", "load_state_dict"])
def test_hooks_of_the_state_run(what: str, when: str) -> None:
    fast, seen = graphcache.wrap(nn.Linear(2, 2)), list[Any]()
    getattr(fast, f"register_{what}_{when}_hook")(lambda *args: seen.append(what))
    state = fast.state_dict()
    if what == "load_state_dict":
        fast.load_state_dict(state)
    assert seen == [what]


def test_hooks_of_all_modules_run_once() -> None:
    module = nn.Linear(2, 2).requires_grad_(False)
    fast = graphcache.wrap(module)
    handles = [register_module_forward_hook(lambda module, args, answer: answer + 1)]
    handles.append(register_module_forward_pre_hook(lambda module, args: (args[0] * 2,)))
    try:
        for _ in range(3):
            assert torch.equal(fast(X), module(X))
        with torch.enable_grad():
            assert torch.equal(fast(X.clone().requires_grad_()), module(X))
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(fast(X), module(X))


def test_apply_comes_to_the_module_itself() -> None:
    fast = graphcache.wrap(nn.Linear(2, 2))

    def ones(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.ones_(module.weight)

    assert fast.apply(ones) is fast
    assert torch.equal(fast.weight, torch.ones(2, 2))


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickled])
def test_copies_keep_what_was_set_on_the_wrapped_module(way: Callable[[Any], Any]) -> None:
    fast = graphcache.wrap(nn.Linear(2, 2).requires_grad_(False))
    handle = fast.register_forward_hook(sevens)
    fast(X)
    other = way(fast)
    assert other.module is not fast.module or way is copy.copy
    for _ in range(2):
        assert torch.equal(other(X), torch.full((1, 2), 7.0))
    handle.remove()
    assert torch.equal(fast(X), fast.module(X))
    assert torch.equal(other(X), torch.full((1, 2), 7.0)), "hooks of a copy are its own"


class Cell(nn.Module):
    """Puts another tensor into an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.h = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.h + x
        return self.h * 1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = Cell(), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.cell(x))


@pytest.mark.parametrize("options", [{"exclude": ["out"]}, {"strategy": "per_submodule", "include": ["cell"]}])
def test_another_forward_of_a_part_with_state(options: dict[str, Any]) -> None:
    module = Net().requires_grad_(False)
    twin, fast, x = copy.deepcopy(module), graphcache.wrap(module, **options), torch.ones(1)
    for call in range(8):
        if call == 3:
            for each in (module, twin):
                each.cell.forward = types.MethodType(lambda self, x: Cell.forward(self, x) * 2, each.cell)
        assert torch.equal(fast(x), twin(x))
        assert torch.equal(module.cell.h, twin.cell.h)


def test_a_hit_that_raises_leaves_the_state_that_an_eager_call_leaves() -> None:
    def forward(self: Any, index: Tensor) -> Any:
        self.n = self.n + 1
        return self.table(index)

    module = Fn(forward)
    module.table, module.n = nn.Embedding(4, 1).requires_grad_(False), torch.zeros(())
    twin, fast = copy.deepcopy(module), graphcache.wrap(module)
    for index in (1, 1, 1, 9, 1, 9, 1):
        for each in (fast, twin):
            if index > 3:
                with pytest.raises(IndexError):
                    each(torch.tensor([index]))
            else:
                each(torch.tensor([index]))
        assert torch.equal(module.n, twin.n)
    assert fast.cache_info().hits == 3


def test_a_hit_that_raises_updates_state_in_place_once() -> None:
    class Both(nn.Module):
        """Counts in a buffer, and in an attribute that it rebinds."""

        def __init__(self) -> None:
            super().__init__()
            self.table, self.n = nn.Embedding(4, 1).requires_grad_(False), torch.zeros(())
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, index: Tensor) -> Any:
            self.seen.add_(1)
            self.n = self.n + 1
            return self.table(index)

    module = Both()
    fast = graphcache.wrap(module)
    for calls, index in enumerate((1, 1, 1, 1, 9, 1), start=1):
        if index > 3:
            with pytest.raises(IndexError):
                fast(torch.tensor([index]))
        else:
            fast(torch.tensor([index]))
        assert module.seen.item() == calls
    assert fast.cache_info().hits >= 2
