"""``forward_into``: the same answer, in the caller's tensors or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphcache
from graphcache.dispatch.forward_into import copy_into, overlap
from graphcache.errors import ClosedError, OutputMismatchError
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


def pair(_: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return x + 1, x + 2


def resized() -> Tensor:
    tensor = torch.zeros(2, 4)
    tensor.untyped_storage().resize_(0)
    return tensor


WHOLE = torch.zeros(6, 4)
UNFIT = {
    "expanded": torch.zeros(1, 4).expand(2, 4),
    "folded": torch.zeros(8).as_strided((2, 4), (2, 1)),
    "sparse": torch.zeros(2, 4).to_sparse(),
    "resized": resized(),
    "requires gradients": torch.zeros(2, 4, requires_grad=True),
    "a generator": (torch.zeros(2, 4) for _ in range(1)),
    "the same": WHOLE[:2],
    "overlapping": WHOLE[1:3],
    "the same memory in another tensor": torch.from_numpy(WHOLE.numpy())[:2],
}


@pytest.mark.parametrize("unfit", UNFIT.values(), ids=UNFIT.keys())
@pytest.mark.parametrize("first", [True, False])
def test_nothing_is_written_unless_all_of_it_can_be(unfit: Any, first: bool) -> None:
    fast = graphcache.wrap(Fn(pair))
    WHOLE.zero_()
    fits = WHOLE[:2]
    for _ in range(2):
        with pytest.raises(OutputMismatchError):
            fast.forward_into((unfit, fits) if first else (fits, unfit), X)
        assert not WHOLE.any()


def test_what_contains_itself_is_no_answer() -> None:
    fast = graphcache.wrap(Fn(pair))
    inside: list[Any] = []
    inside.append(inside)
    named: dict[str, Any] = {}
    named["itself"] = named
    for out in (inside, named):
        for _ in range(2):
            with pytest.raises(OutputMismatchError, match="out contains itself"):
                fast.forward_into(out, X)


def test_parts_of_one_tensor_that_do_not_meet_are_written() -> None:
    fast = graphcache.wrap(Fn(pair))
    for whole in (torch.zeros(2, 8), torch.zeros(4, 4), torch.zeros(2, 4, 2)):
        out = {(2, 8): (whole[:, ::2], whole[:, 1::2]), (4, 4): (whole[:2], whole[2:])}.get(
            tuple(whole.shape), tuple(whole.unbind(-1))
        )
        fast.forward_into(out, X)
        assert torch.equal(out[0], X + 1)
        assert torch.equal(out[1], X + 2)


def test_what_an_output_overwrites_is_read_first() -> None:
    fast = graphcache.wrap(Fn(lambda _, x: (x + 1, x, x.t())))
    for _ in range(2):
        x = X.clone()
        out = (x, torch.empty(2, 4), torch.empty(4, 2))
        fast.forward_into(out, x)
        for found, wanted in zip(out, (X + 1, X, X.t()), strict=True):
            assert torch.equal(found, wanted)


def test_one_tensor_for_an_answer_that_comes_twice() -> None:
    def twice(_: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x + 1
        return y, y, x + 2

    fast = graphcache.wrap(Fn(twice))
    one, other = torch.zeros(2, 4), torch.zeros(2, 4)
    for _ in range(2):
        with pytest.raises(OutputMismatchError, match="elements of out share memory"):
            fast.forward_into((one, other, one), X)


def test_an_inference_tensor_is_written() -> None:
    fast = graphcache.wrap(mlp())
    with torch.inference_mode():
        out = torch.zeros(2, 4)
    for _ in range(2):
        assert torch.equal(fast.forward_into(out, X), fast.module(X))


def places(draw: st.DrawFn) -> Tensor:
    size, strides = draw(st.tuples(st.integers(1, 3), st.integers(1, 3))), draw(st.tuples(*[st.integers(0, 4)] * 2))
    return MEMORY.view(draw(st.sampled_from([torch.int16, torch.int32]))).as_strided(
        size, strides, draw(st.integers(0, 6))
    )


MEMORY = torch.zeros(64, dtype=torch.int32)


@given(st.lists(st.composite(places)(), max_size=3))
def test_overlap_is_what_the_bytes_say(tensors: list[Tensor]) -> None:
    taken = [
        tensor.data_ptr() + tensor.element_size() * (row * tensor.stride(0) + column * tensor.stride(1)) + byte
        for tensor in tensors
        for row in range(tensor.shape[0])
        for column in range(tensor.shape[1])
        for byte in range(tensor.element_size())
    ]
    assert overlap(tensors) == (len(set(taken)) < len(taken))
