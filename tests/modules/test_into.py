"""``forward_into``: the same answer, in the caller's tensors or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphcache
from graphcache.errors import ClosedError, OutputMismatchError
from graphcache.modules.into import copy_into
from tests.helpers import Fn, mlp, outcomes

X = torch.linspace(-1, 1, 8).reshape(2, 4)


def two(_: nn.Module, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
    return {"y": x * scale, "sum": x.sum(-1)}


def test_captures_hits_and_eager_calls_answer_into_the_callers_tensor() -> None:
    fast = graphcache.wrap(mlp())
    out = torch.empty(2, 4)
    for scale in (1, 2, 3):
        assert fast.forward_into(out, X * scale) is out
        assert torch.equal(out, fast.module(X * scale))
    assert outcomes(fast) == (2, 1, {})


def test_structures_keywords_and_strides() -> None:
    fast = graphcache.wrap(Fn(two))
    out = {"y": torch.empty(4, 2).t(), "sum": torch.empty(4)[::2]}
    for scale in (1.0, 2.0, 1.0, 2.0):
        wanted = two(fast.module, X, scale=scale)
        assert fast.forward_into(out, X, scale=scale) is out
        assert all(torch.equal(out[name], wanted[name]) for name in wanted)


def test_the_answer_may_replace_an_input() -> None:
    fast = graphcache.wrap(mlp())
    for _ in range(3):
        x = X.clone()
        fast.forward_into(x, x)
        assert torch.equal(x, fast.module(X))


@pytest.mark.parametrize(
    ("out", "said"),
    [
        (
            torch.empty(2, 3),
            r"out is torch.float32 \[2, 3\] on cpu; Fn answers torch.float32 \[2, 4\] on cpu, and",
        ),
        (torch.empty(2, 4, dtype=torch.float64), r"out is torch.float64 \[2, 4\] on cpu; Fn answers torch.float32"),
        (torch.empty(2, 4, device="meta"), r"out is torch.float32 \[2, 4\] on meta; Fn answers"),
        (torch.empty(2, 4, requires_grad=True), r"out requires gradients, which no answer is written into"),
        ([torch.empty(2, 4)], r"Fn answers a tensor; out is 1 values in a list"),
        (None, r"out is of type NoneType; expected a torch.Tensor"),
        (5, r"out is of type int; expected a torch.Tensor"),
    ],
)
def test_what_does_not_fit_is_not_written(out: Any, said: str) -> None:
    fast = graphcache.wrap(Fn(lambda _, x: x + 1))
    before = out.clone() if isinstance(out, Tensor) and out.device.type == "cpu" else None
    for _ in range(2):
        with pytest.raises(OutputMismatchError, match=f"^({said})"):
            fast.forward_into(out, X)
    if before is not None:
        assert torch.equal(out.nan_to_num(), before.nan_to_num())
    assert torch.equal(fast(X), X + 1)


def test_all_of_it_or_nothing() -> None:
    out = [torch.zeros(2), torch.zeros(3)]
    with pytest.raises(OutputMismatchError, match=r"^out\[1\] is torch.float32 \[3\]"):
        copy_into(out, [torch.ones(2), torch.ones(4)], "net")
    assert out[0].sum() == 0
    with pytest.raises(OutputMismatchError, match=r"^net answers int in the place of out\[1\]"):
        copy_into(out, [torch.ones(2), 7], "net")
    assert out[0].sum() == 0


def test_a_closed_module_and_a_failing_one() -> None:
    fast = graphcache.wrap(mlp())
    out = torch.empty(2, 4)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fast.forward_into(out, torch.ones(2, 5))
    fast.close()
    with pytest.raises(ClosedError):
        fast.forward_into(out, X)


@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["new", "same", "turned", "input"])), max_size=10))
def test_any_sequence_of_sizes_and_places(steps: list[tuple[int, str]]) -> None:
    fast = graphcache.wrap(mlp(), max_graphs=2)
    kept = {size: torch.empty(size, 4) for size in range(1, 5)}
    for turn, (size, place) in enumerate(steps):
        x = torch.full((size, 4), float(turn))
        wanted = fast.module(x)
        out = {"new": torch.empty(size, 4), "same": kept[size], "turned": torch.empty(4, size).t(), "input": x}[place]
        assert fast.forward_into(out, x) is out
        assert torch.equal(out, wanted)
