"""What makes graphs stale, and what does not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from graphcache.modules.freshness import Freshness
from torch import nn


class User:
    """Holds graphs."""


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).requires_grad_(False).eval()


def swap_data(module: nn.Module) -> None:
    module[0].weight.data = module[0].weight.data.clone()


def replace_parameter(module: nn.Module) -> None:
    module[0].weight = nn.Parameter(module[0].weight.clone(), requires_grad=False)


def replace_buffer(module: nn.Module) -> None:
    module[1].running_mean = module[1].running_mean.clone()


def train_one(module: nn.Module) -> None:
    module[1].train()


def hook(module: nn.Module) -> None:
    module[0].register_forward_hook(lambda *_: None)


def replace_child(module: nn.Module) -> None:
    module[0] = nn.Linear(4, 4).requires_grad_(False)


def cast(module: nn.Module) -> None:
    module.double()


def reload_by_assignment(module: nn.Module) -> None:
    module.load_state_dict({name: value.clone() for name, value in module.state_dict().items()}, assign=True)


STALE = [swap_data, replace_parameter, replace_buffer, train_one, hook, replace_child, cast, reload_by_assignment]


@pytest.mark.parametrize("change", STALE, ids=lambda change: change.__name__)
def test_a_change_is_noticed_until_one_looks_again(change: Callable[[nn.Module], None]) -> None:
    module, user = net(), User()
    fresh = Freshness(module, user, checks_weights=True)
    assert not fresh.is_stale(False)
    change(module)
    assert fresh.is_stale(False)
    assert fresh.is_stale(False), "asking does not make it right"
    fresh.look_again()
    assert not fresh.is_stale(False)


@pytest.mark.parametrize("change", STALE, ids=lambda change: change.__name__)
def test_who_promises_that_weights_stay_is_not_looked_after(change: Callable[[nn.Module], None]) -> None:
    module, user = net(), User()
    fresh = Freshness(module, user, checks_weights=False)
    change(module)
    assert not fresh.is_stale(False)


def test_values_that_change_in_place_make_nothing_stale() -> None:
    module, user = net(), User()
    fresh = Freshness(module, user, checks_weights=True)
    with torch.no_grad():
        module[0].weight.mul_(2)
    module.load_state_dict(net().state_dict())
    assert not fresh.is_stale(False)


def test_a_parameter_that_begins_to_want_gradients() -> None:
    module, user = net(), User()
    fresh = Freshness(module, user, checks_weights=True)
    assert not fresh.requires_grad()
    module[0].bias.requires_grad_()
    assert fresh.requires_grad()
    assert fresh.is_stale(True)
    assert not fresh.is_stale(False)


def test_the_user_is_let_go() -> None:
    user = User()
    gone = weakref.ref(user)
    fresh = Freshness(net(), user, checks_weights=True)
    del user, fresh
    gc.collect()
    assert gone() is None
