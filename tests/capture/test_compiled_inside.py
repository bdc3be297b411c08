"""Modules that Dynamo compiles behind wrap: higher-order operators, compiled submodules, compiled wholes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as map_over
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import flex_attention

import graphcache
from graphcache import Reason
from graphcache.observe.breaks import find_capture_breaks
from tests.helpers import Fn, frozen, same

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
X = torch.randn(1, 2, 16, 8, generator=torch.Generator().manual_seed(0))


def branches(m: nn.Module, x: Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda t: t * 2, lambda t: t * 3, (x,))


def loop(m: nn.Module, x: Tensor) -> Any:
    return while_loop(lambda i, t: i < 3, lambda i, t: (i + 1, t * 2), (x.new_zeros((), dtype=torch.long), x))[1]


OPERATORS: dict[str, tuple[Callable[..., Any], Reason]] = {
    "cond": (branches, Reason.HOST_READ),
    "while_loop": (loop, Reason.HOST_READ),
    "map": (lambda m, x: map_over(lambda t: t * 2 + 1, x), Reason.CAPTURE_FAILED),
    "flex_attention": (
        lambda m, x: flex_attention(x, x, x, score_mod=lambda s, b, h, i, j: s + i),
        Reason.CAPTURE_FAILED,
    ),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", OPERATORS)
def test_higher_order_operators_run_eagerly_by_name_and_disturb_nobody(name, mode):
    function, reason = OPERATORS[name]
    module, other = Fn(function), Fn(function)
    torch._dynamo.reset()
    with mode(), graphcache.wrap(module) as fast:
        for sign in (1, -1, 1):
            assert same(fast(sign * X), module(sign * X))
        # The first call may be observed once more, since Dynamo compiled in it.
        assert set(fast.cache_info().eager) - {Reason.UNSETTLED} == {reason}
        assert same(other(X), module(X))
        assert same(torch.compile(other, backend="eager", fullgraph=True)(X), module(X))


@pytest.mark.parametrize("name", OPERATORS)
def test_the_doctor_names_the_operators_that_read_a_condition(name):
    function, reason = OPERATORS[name]
    with torch.no_grad():
        found = find_capture_breaks(Fn(function), X)
        assert {each.reason for each in found} == ({reason} & {Reason.HOST_READ})
        assert same(Fn(function)(X), Fn(function)(X))


def test_the_doctor_looks_into_the_functions_of_an_operator():
    [found] = find_capture_breaks(Fn(lambda m, x: map_over(lambda t: t + torch.rand_like(t), x)), X)
    assert found.reason is Reason.RANDOM


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("options", [{}, {"fullgraph": True}, {"dynamic": True}])
def test_a_compiled_module_is_captured(backend, options):
    torch._dynamo.reset()
    module = torch.compile(frozen(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), backend=backend, **options)
    with torch.no_grad(), graphcache.wrap(module) as fast:
        for step in range(4):
            assert same(fast(X + step), module(X + step))
        info = fast.cache_info()
        assert info.captures == 1
        assert set(info.eager) <= {Reason.UNSETTLED}


def test_state_of_a_compiled_module_is_updated_once_a_call():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)
            return x + self.seen

    torch._dynamo.reset()
    module = Counts()
    with torch.no_grad(), graphcache.wrap(torch.compile(module, backend="aot_eager", fullgraph=True)) as fast:
        for step in range(1, 6):
            assert same(fast(X), X + step)
            assert module.seen.tolist() == [float(step)] * 8
        assert fast.cache_info().captures == 1


def test_effects_of_a_compiled_module_are_the_reason():
    compiled = torch.compile(Fn(lambda _, x: x.add_(1) * 2), backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    with torch.no_grad(), graphcache.wrap(compiled) as fast:
        for kept in [X.clone() for _ in range(8)]:
            assert same(fast(kept), (X + 1) * 2)
            assert same(kept, X + 1)
        assert Reason.MUTATES in fast.cache_info().eager
