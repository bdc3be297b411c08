from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from graphcache.buckets.independence import dependence, observed_outputs
from graphcache.buckets.padder import Padder
from graphcache.buckets.spec import Axis, Buckets, Mask
from graphcache.errors import ConfigError
from tests.helpers import frozen

ROWS = Axis([4, 8, 16], name="rows")


def one(x: Tensor) -> Any:
    return x


ONE = inspect.signature(one)


def tried(run: Callable[..., Any], *args: Any, inputs: Any = None, outputs: Any = None, **kwargs: Any) -> str | None:
    """What is found for a function of ``x`` whose first axis is padded, and cropped where it is not said otherwise."""
    signature = ONE if inputs is None else inspect.signature(run)
    buckets = Buckets(inputs or {"x": {0: ROWS}}, outputs={0: {0: "rows"}} if outputs is None else outputs)
    return dependence(run, args, kwargs, Padder(buckets, signature))


LINEAR, EMBEDDING = frozen(nn.Linear(5, 3)), frozen(nn.Embedding(7, 4))
NORM, CONV = frozen(nn.LayerNorm(5)), frozen(nn.Conv1d(5, 3, 3, padding=1))
GRU, BATCH_NORM = frozen(nn.GRU(5, 3, batch_first=True)), frozen(nn.BatchNorm1d(5))
X = torch.randn(5, 5, generator=torch.Generator().manual_seed(3))

INDEPENDENT: dict[str, Callable[[Tensor], Any]] = {
    "elementwise": lambda x: x.sin() * 2 + 1,
    "linear": LINEAR,
    "norm over the other axis": NORM,
    "softmax over the other axis": lambda x: x.softmax(-1),
    "convolution over the other axes": lambda x: CONV(x[:, :, None].expand(-1, -1, 6)),
    "recurrent over the other axis": lambda x: GRU(x[:, None].expand(-1, 3, -1))[0],
    "batch norm in eval mode": BATCH_NORM,
    "running sum from the real side": lambda x: x.cumsum(0),
    "attention that looks back only": lambda x: (
        (x @ x.t()).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), float("-inf")).softmax(-1) @ x
    ),
}

DEPENDENT: dict[str, Callable[[Tensor], Any]] = {
    "softmax over it": lambda x: x.softmax(0),
    "mean over it": lambda x: x - x.mean(0),
    "sum over it": lambda x: x + x.sum(0),
    "maximum over it": lambda x: x + x.amax(0),
    "batch norm in training": lambda x: F.batch_norm(x, None, None, training=True),
    "running sum from the padded side": lambda x: x.flip(0).cumsum(0).flip(0),
    "attention without a mask": lambda x: (x @ x.t()).softmax(-1) @ x,
    "turned round": lambda x: x.flip(0),
    "sorted": lambda x: x.sort(0).values,
    "rolled": lambda x: x.roll(1, 0),
    "its length": lambda x: x / len(x),
    "position from the end": lambda x: x + torch.arange(len(x), 0, -1)[:, None],
    "convolution over it": lambda x: CONV(x.t()[None])[0].t(),
    "recurrent from the padded side": lambda x: GRU(x.flip(0)[None])[0][0].flip(0),
    "a millionth of the last row": lambda x: x + 1e-6 * x[-1],
}


@pytest.mark.parametrize("name", INDEPENDENT)
@pytest.mark.parametrize("rows", [1, 3, 4, 15, 16, 40])
def test_an_independent_axis_is_found_to_be_one(name, rows):
    assert tried(INDEPENDENT[name], torch.randn(rows, 5)) is None


@pytest.mark.parametrize("name", DEPENDENT)
@pytest.mark.parametrize("rows", [2, 5, 16, 40])
def test_a_dependent_axis_is_found(name, rows):
    text = tried(DEPENDENT[name], torch.randn(rows, 5))
    assert text is not None
    assert text.startswith("padding rows from ")


@given(st.integers(0, 10_000), st.integers(1, 20), st.sampled_from(sorted(DEPENDENT)))
def test_whatever_the_values_and_the_size_a_dependent_axis_is_found(seed, rows, name):
    # One row of a sorted, rolled or turned tensor stands where it stood.
    x = torch.randn(rows + 1, 5, generator=torch.Generator().manual_seed(seed))
    assert tried(DEPENDENT[name], x) is not None


@given(st.integers(0, 10_000), st.integers(1, 20), st.sampled_from(sorted(INDEPENDENT)))
def test_whatever_the_values_and_the_size_an_independent_axis_passes(seed, rows, name):
    assert tried(INDEPENDENT[name], torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed))) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mean over it", r"^padding rows from 5 to 8 changes the answer: output 0 differs by .* with 0 in the margin$"),
        ("sum over it", r"output 0 differs by .* with large values in the margin in place of 0$"),
    ],
)
def test_what_differed_is_said(name, message):
    text = tried(DEPENDENT[name], X)
    assert text is not None
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(text)


def test_a_maximum_is_found_by_small_values_where_0_and_large_ones_would_not_do():
    assert "small values in the margin" in (tried(lambda x: x + x.amin(0).clamp(max=-1), -X.abs() - 1) or "")


def test_indices_are_tried_with_indices_that_are_there():
    assert tried(EMBEDDING, torch.tensor([1, 6, 2])) is None
    assert tried(lambda x: EMBEDDING(x) + x.amax(0), torch.tensor([1, 6, 2])) is None
    assert tried(lambda x: EMBEDDING(x) + x.sum(0), torch.tensor([1, 6, 2])) is not None
    # 0 as an index would be one too many here, and is the smallest of those given there.
    assert tried(lambda x: x + x.amin(0), torch.tensor([1, 6, 2])) is not None


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.uint16, torch.uint64, torch.int16, torch.half])
def test_dtypes_are_tried_with_values_that_they_have(dtype):
    x = torch.tensor([[1, 0], [1, 1], [0, 1]]).to(dtype)
    assert tried(lambda x: x.clone(), x) is None
    assert tried(lambda x: x.flip(0), x) is not None


def test_complex_numbers_and_what_is_not_finite():
    assert tried(lambda x: x * 2, torch.tensor([1j, 2, float("inf")])) is None
    assert tried(lambda x: x * 2, torch.tensor([float("nan")] * 3)) is None
    assert tried(lambda x: x + x.sum(0), torch.tensor([1j, 2, 3])) is not None


def test_a_declared_fill_makes_a_maximum_or_a_softmax_right():
    low = {"x": {0: Axis([8], fill=float("-inf"), name="rows")}}
    assert tried(lambda x: x.amax(0), X, inputs=low, outputs={}) is None
    assert tried(lambda x: x.softmax(0), X, inputs=low) is None
    assert tried(lambda x: x.mean(0), X, inputs=low, outputs={}) is not None


def test_a_declared_fill_is_tried_with_values_on_both_sides_of_it():
    zero = {"x": {0: Axis([8], fill=0, name="rows")}}
    x = X.abs() + 1
    assert torch.equal(F.pad(x, (0, 0, 0, 3)).amax(0), x.amax(0))
    assert "smaller values beside the margin" in (tried(lambda x: x.amax(0), x, inputs=zero, outputs={}) or "")
    assert "larger values beside the margin" in (tried(lambda x: x.amin(0), -x, inputs=zero, outputs={}) or "")
    assert tried(lambda x: x.sum(0), x, inputs=zero, outputs={}) is None


def test_declared_and_other_fills_on_one_axis():
    def module(x: Tensor, y: Tensor) -> Any:
        return x.amax(0), y * 2

    inputs = {"x": {0: Axis([8], fill=float("-inf"), name="rows")}, "y": {0: Axis([8], name="rows")}}
    assert tried(module, X, X, inputs=inputs, outputs={1: {0: "rows"}}) is None
    swapped = {"x": inputs["y"], "y": inputs["x"]}
    assert tried(module, X, X, inputs=swapped, outputs={1: {0: "rows"}}) is not None


def test_a_fill_that_the_argument_cannot_hold_is_refused():
    with pytest.raises(ConfigError, match=r"^buckets\['x'\]\[0\].fill=-inf: torch.int64 has no such value"):
        tried(one, torch.ones(3).long(), inputs={"x": {0: Axis([8], fill=float("-inf"), name="rows")}})


def test_integers_without_elements_are_tried_too():
    assert tried(lambda x: x * 2, torch.zeros(3, 0, dtype=torch.int64)) is None


def attention(x: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = x @ x.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -1e9)
    return scores.softmax(-1) @ x


BATCH, LENGTH = Axis([2, 4], name="batch"), Axis([4, 8, 16], name="length")
BOTH = {0: {0: "batch", 1: "length"}}


@pytest.mark.parametrize("shape", [(1, 3, 2), (3, 5, 2), (2, 8, 2), (4, 16, 2), (9, 40, 2)])
def test_attention_needs_its_mask(shape):
    x = torch.randn(shape)
    axes = {"x": {0: BATCH, 1: LENGTH}}
    mask = torch.ones(shape[:2], dtype=torch.bool)
    with_mask = {**axes, "mask": Mask(["batch", "length"])}
    assert tried(attention, x, inputs=with_mask, outputs=BOTH) is None
    assert tried(attention, x, mask=mask, inputs=with_mask, outputs=BOTH) is None
    text = tried(attention, x, inputs=axes, outputs=BOTH)
    assert text is not None
    assert "padding length from " in text
    assert "batch" not in text


def test_axes_are_tried_together_too():
    # Right wherever one of the two is as it was.
    run = lambda x: x * (2 if x.shape == (4, 8, 2) else 1)  # noqa: E731
    text = tried(run, torch.ones(3, 5, 2), inputs={"x": {0: BATCH, 1: LENGTH}}, outputs=BOTH)
    assert text is not None
    assert text.startswith("padding batch from 3 to 4, length from 5 to 8 changes the answer")


def test_a_mask_that_says_the_same_as_none_is_part_of_the_promise():
    def module(x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x if mask is None else x + 1

    text = tried(module, X, inputs={"x": {0: ROWS}, "mask": Mask(["rows"])})
    assert text is not None
    assert "output 0 differs" in text


def test_masks_are_never_moved():
    seen = set()

    def module(x: Tensor, mask: Tensor) -> Tensor:
        seen.update(mask.unique().tolist())
        return (x * mask[:, None]).sum(0)

    inputs = {"x": {0: Axis([8], fill=0, name="rows")}, "mask": Mask(["rows"])}
    assert tried(module, X, mask=torch.ones(5), inputs=inputs, outputs={}) is None
    assert seen == {0, 1}


@pytest.mark.parametrize(
    ("run", "outputs", "message"),
    [
        (lambda x: x, {0: {1: "rows"}}, r"outputs\[0\]\[1\]: the output has size 5 there; expected that of rows"),
        (lambda x: x, {}, r"output 0 has the shape \[8, 5\] in place of \[5, 5\]"),
        (lambda x: (x, len(x)), None, r"the answer contains 8 in place of 5"),
        (lambda x: list(x), {}, r"the answer has another structure"),
        (lambda x: x if len(x) == 5 else 7, {}, r"the answer contains 7 in place of tensor"),
        (lambda x: x + torch.ones(5, 5), None, r"the padded call raised RuntimeError: .*size of tensor a \(8\)"),
    ],
)
def test_answers_of_another_kind_are_found(run, outputs, message):
    text = tried(run, X, outputs=outputs)
    assert text is not None
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(text)


def test_a_module_that_answers_differently_each_time_is_told_apart():
    assert "answers differently each time: output 0 differs" in (tried(lambda x: x + torch.rand(1), X) or "")


def test_atomic_sums_are_allowed_the_same_between_two_margins_as_between_two_calls():
    noise = iter([0.0, 1e-6] * 9)
    assert tried(lambda x: x + next(noise), X) is None
    loud = iter([0.0, 1e-6] * 9)
    assert tried(lambda x: x + x.sum(0) + next(loud), X) is not None


def test_what_cannot_be_tried_says_so():
    assert "rows has size 0 in this call" in (tried(lambda x: x, X[:0]) or "")
    assert tried(lambda x: x, [X]) == "'x' is of type list; only a plain tensor can be padded"


def test_a_single_bucket_of_one_pads_nothing_and_nothing_can_differ():
    assert tried(DEPENDENT["its length"], X, inputs={"x": {0: Axis([1], name="rows")}}) is None


def test_what_the_exact_call_raises_is_the_callers():
    with pytest.raises(ZeroDivisionError):
        tried(lambda x: 1 / 0, X)


def test_arguments_stay_as_they_were():
    x = X.clone()
    tried(lambda x: x.mul_(2), x)
    assert torch.equal(x, X)


def turned(x: Tensor) -> Any:
    return {"t": x.transpose(0, 1), "s": (x.sum(0), x.sum(), x.unsqueeze(0))}


@pytest.mark.parametrize("shape", [(1, 3, 2), (4, 4, 2), (4, 16, 2), (9, 40, 2)])
def test_axes_that_grow_are_observed(shape):
    padder = Padder(Buckets({"x": {0: BATCH, 1: LENGTH}}), inspect.signature(turned))
    found = observed_outputs(turned, (torch.ones(shape),), {}, padder)
    assert found == {0: {0: "length", 1: "batch"}, 1: {0: "length"}, 3: {1: "batch", 2: "length"}}
    assert padder.with_outputs(found).buckets.outputs == found


def test_a_size_that_is_only_by_chance_the_same_is_not_cropped():
    run = lambda x: x @ torch.ones(5, 8)  # noqa: E731
    assert observed_outputs(run, (X,), {}, Padder(Buckets({"x": {0: ROWS}}), ONE)) == {0: {0: "rows"}}


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda x: x.flatten(),
            r"^outputs\[0\]\[0\]: from 25 to 40 when rows is padded from 5 to 8; expected",
        ),
        (lambda x: x[x[:, 0] == 0], r"^outputs\[0\]\[0\]: from 0 to 3 when rows is padded"),
        (lambda x: list(x), r"^outputs: 5 tensors, but 8 once rows is padded"),
        (lambda x: x.view([1] * len(x) + [-1]), r"^outputs\[0\]: 6 dimensions, but 9 once rows is padded"),
    ],
)
def test_an_output_that_grows_otherwise_is_refused(run, message):
    with pytest.raises(ConfigError, match=message):
        observed_outputs(run, (X,), {}, Padder(Buckets({"x": {0: ROWS}}), ONE))


def test_a_call_without_sizes_is_refused():
    with pytest.raises(ConfigError, match=r"^buckets: there is no argument that has buckets"):
        observed_outputs(one, (), {}, Padder(Buckets({"x": {0: ROWS}}), ONE))
