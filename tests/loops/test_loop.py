"""Loops over a module: each step reads what the one before returned."""

from __future__ import annotations

import gc
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphcache
from graphcache.errors import CaptureError, ClosedError, ConfigError
from tests.helpers import Fn


class Walk(nn.Module):
    """Two states that change places and grow, a token, and whether they are large."""

    def __init__(self, limit: float = 1e9) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 3).requires_grad_(False)
        self.limit = limit

    def forward(self, x: Tensor, h: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        moved = torch.tanh(self.mix(x)) * scale + h
        done = moved.abs().max() > self.limit
        return {"x": h * 0.5, "h": moved, "token": moved.argmax(-1), "done": done}


class Moved(NamedTuple):
    """An answer with names."""

    total: Tensor
    moved: Tensor


def eagerly(module: nn.Module, x: Tensor, h: Tensor, steps: int) -> tuple[list[dict[str, Tensor]], Tensor, Tensor]:
    """The answers of a loop in Python, and the inputs of the step after it."""
    found = []
    while len(found) < steps and not (found and found[-1]["done"]):
        found.append(module(x, h))
        x, h = found[-1]["x"], found[-1]["h"]
    return found, x, h


def check(
    loop: graphcache.Loop, wanted: list[dict[str, Tensor]], x: Tensor, h: Tensor, tokens: Tensor, states: Tensor
) -> None:
    """A run has made the steps of :func:`eagerly`, and has kept their tokens and states."""
    taken = len(wanted)
    assert int(loop.taken) == taken
    assert torch.equal(tokens[:taken], torch.stack([each["token"] for each in wanted]))
    assert torch.equal(states[:taken], torch.stack([each["h"] for each in wanted]))
    assert (tokens[taken:] == -1).all()
    assert (states[taken:] == -1).all(), "no step reached these rows"
    assert torch.equal(loop.inputs[0], x)
    assert torch.equal(loop.inputs[1], h)
    assert torch.equal(loop.outputs["h"], wanted[-1]["h"])


@given(st.integers(1, 12), st.sampled_from([0.5, 2.0, 1e9]), st.integers(0, 9), st.integers(1, 3), st.booleans())
def test_steps_are_those_of_a_loop_in_python(steps: int, limit: float, seed: int, rows: int, wrapped: bool) -> None:
    torch.manual_seed(seed)
    module, x, h = Walk(limit), torch.randn(rows, 3), torch.randn(rows, 3)
    tokens, states = torch.full((steps + 1, rows), -1), torch.full((steps, rows, 3), -1.0)
    wanted, next_x, next_h = eagerly(module, x, h, steps)
    given = graphcache.wrap(module) if wrapped else module
    options: dict[str, Any] = {"feed": {"x": "x", "h": 1}, "until": "done"}
    with graphcache.loop(given, (x, h), steps=steps, collect={"token": tokens, "h": states}, **options) as loop:
        loop.run()
        check(loop, wanted, next_x, next_h, tokens, states)
        assert loop.fallback == "the module is on the CPU"
        # Again from here, and again from the beginning.
        further, *_ = eagerly(module, next_x, next_h, steps)
        loop.run()
        assert int(loop.taken) == len(further)
        assert torch.equal(loop.outputs["h"], further[-1]["h"])
        loop.inputs[0].copy_(x)
        loop.inputs[1].copy_(h)
        loop.run()
        assert int(loop.taken) == len(wanted)
        assert torch.equal(loop.outputs["h"], wanted[-1]["h"])


def test_arguments_by_name_and_constants() -> None:
    x, h = torch.ones(1, 3), torch.zeros(1, 3)
    module = Walk()
    with graphcache.loop(module, {"h": h, "x": x, "scale": 0.5}, feed={"h": "h"}, steps=3) as loop:
        loop.run()
        for _ in range(3):
            h = module(x, h, 0.5)["h"]
        assert torch.equal(loop.outputs["h"], h)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "named tuple"])
def test_outputs_by_place_and_by_field(kind: str) -> None:
    def step(_: Any, x: Tensor) -> Any:
        if kind == "tensor":
            return x + 1
        return Moved(x.sum(), x + 1) if kind == "named tuple" else (x.sum(), x + 1)

    feed = {"tensor": {0: 0}, "tuple": {1: 0}, "named tuple": {"moved": 0}}[kind]
    with graphcache.loop(Fn(step), torch.zeros(2), feed=feed, steps=5) as loop:
        loop.run()
        assert torch.equal(loop.inputs[0], torch.full((2,), 5.0))


X, H = torch.zeros(2, 3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "expected steps from 1"),
        ({"steps": True}, "expected steps from 1"),
        ({"steps": 2**31}, "expected steps from 1"),
        ({"feed": {"y": "x"}}, "returns no tensor 'y'; there are 'x', 'h', 'token', 'done'"),
        ({"feed": {"x": "y"}}, "no tensor is given as argument 'y'; there are x, h"),
        ({"feed": {"x": 2}}, "no tensor is given as argument 2"),
        ({"feed": {"x": -1}}, "no tensor is given as argument -1"),
        ({"feed": {"token": "x"}}, r"expected shape \(2,\), torch.int64 on cpu; got \(2, 3\), torch.float32"),
        ({"feed": {"x": "x", "h": "x"}}, "two outputs become input 'x'"),
        ({"feed": [("h", "h")]}, "expected a mapping by output"),
        ({"collect": [torch.zeros(4)]}, "expected a mapping by output"),
        ({"feed": {("h",): "h"}}, "returns no tensor"),
        ({"feed": {"h": True}}, "no tensor is given as argument True"),
        ({"until": ["done"]}, "returns no tensor"),
        ({"until": "token"}, "expected one bool or integer"),
        ({"until": "h"}, "expected one bool or integer"),
        ({"until": "stop"}, "returns no tensor 'stop'"),
        ({"collect": {"h": torch.zeros(3, 2, 3)}}, r"expected shape \(4, 2, 3\)"),
        ({"collect": {"h": torch.zeros(4, 2, 3, dtype=torch.float64)}}, "torch.float64"),
        ({"collect": {"h": torch.zeros(4, 3, 2).mT}}, "contiguous"),
        ({"collect": {"h": torch.zeros(4, 2, 3, requires_grad=True)}}, "without gradients"),
        ({"collect": {"h": [0.0]}}, "contiguous tensor"),
        ({"collect": {"h": (kept := torch.zeros(4, 2, 3)), "x": kept}}, "shares memory"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing_behind(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        graphcache.loop(Walk(), (X, H), **{"feed": {"h": "h"}, "steps": 4, **options})


def test_an_output_that_is_an_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="output 0 is an input of the module itself"):
        graphcache.loop(Fn(lambda _, x: (x, x + 1)), torch.zeros(2), feed={0: 0}, steps=2)


def test_a_call_that_cannot_be_captured_says_why() -> None:
    with pytest.raises(CaptureError, match="host"):
        graphcache.loop(Fn(lambda _, x: x * float(x.sum())), torch.ones(2), feed={0: 0}, steps=2)


def test_closing_gives_everything_back_and_leaves_the_callers_module_open() -> None:
    module = Walk()
    fast = graphcache.wrap(module)
    loop = graphcache.loop(fast, (X, H), feed={"h": "h"}, steps=2)
    loop.run()
    static = weakref.ref(loop.inputs[0])
    loop.close()
    loop.close()
    with pytest.raises(ClosedError, match="make a new one"):
        loop.run()
    del loop
    gc.collect()
    assert static() is None
    assert torch.equal(fast(X, H)["h"], module(X, H)["h"])


def test_a_module_that_was_wrapped_for_the_loop_ends_with_it() -> None:
    module = Walk()
    loop = graphcache.loop(module, (X, H), feed={"h": "h"}, steps=2)
    loop.close()
    alive = weakref.ref(module)
    del module, loop
    gc.collect()
    assert alive() is None


def test_a_tensor_that_is_given_twice_cannot_be_fed() -> None:
    x = torch.ones(2)
    with pytest.raises(ConfigError, match="feed a copy of it"):
        graphcache.loop(Fn(lambda _, x, h: x + h), (x, x), feed={0: 0}, steps=2)
    with graphcache.loop(Fn(lambda _, x, h: x + h), (x, x.clone()), feed={0: 0}, steps=4) as loop:
        loop.run()
        assert loop.outputs.tolist() == [5.0, 5.0]


def test_what_was_made_in_inference_mode_runs_outside_of_it() -> None:
    with torch.inference_mode():
        loop = graphcache.loop(Fn(lambda _, x: x + 1), torch.zeros(2), feed={0: 0}, steps=3)
    with loop:
        loop.run()
        assert (int(loop.taken), loop.outputs.tolist()) == (3, [3.0, 3.0])
