from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graphcache.buckets.padder import Fit, Padder
from graphcache.buckets.spec import Axis, Buckets, Mask
from graphcache.errors import ConfigError
from graphcache.graphs.verify import largest_gap
from tests.helpers import frozen, same

BATCH, LENGTH = Axis([2, 4, 8], name="batch"), Axis("powers_of_two", name="length")


def padder_of(function: Callable[..., Any], inputs: Any, outputs: Any = None) -> Padder:
    return Padder(Buckets(inputs, outputs=outputs), inspect.signature(function))


def answer(padder: Padder, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Padded, run, cropped."""
    fit = padder.fit(args, kwargs)
    assert isinstance(fit, Fit), fit
    new_args, new_kwargs = padder.pad(fit, args, kwargs)
    for each in (*new_args, *new_kwargs.values()):
        assert not isinstance(each, Tensor) or set(each.shape) <= {1, 2, 3, 4, 5, 8, 16}
    return padder.crop(fit, function(*new_args, **new_kwargs))


def forward(x: Any, y: Any = None, *, z: Any = None) -> Any:
    return x, y, z


class Model(nn.Module):
    """One of each kind that does not mix rows: indices, products, norms, elementwise."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 5)
        self.norm = nn.LayerNorm(5)
        self.linear = nn.Linear(5, 3)

    def forward(self, ids: Tensor, scale: Tensor) -> dict[str, Any]:
        hidden = torch.nn.functional.gelu(self.norm(self.embedding(ids)) * scale[:, None, None])
        return {"logits": self.linear(hidden), "rest": (hidden.mean(-1), 5), "best": hidden.argmax(-1)}


MODEL = frozen(Model())
INPUTS = {"ids": {0: BATCH, 1: LENGTH}, "scale": {0: BATCH}}
OUTPUTS = {place: {0: "batch", 1: "length"} for place in range(3)}


@given(st.integers(1, 8), st.integers(1, 16), st.integers(0, 5))
def test_padded_and_cropped_is_the_exact_answer(batch, length, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, (batch, length), generator=generator)
    scale = torch.randn(batch, generator=generator)
    got = answer(padder_of(MODEL.forward, INPUTS, OUTPUTS), MODEL, ids, scale=scale)
    exact = MODEL(ids, scale)
    assert list(got) == list(exact)
    assert same(got["best"], exact["best"])
    assert got["rest"][1] == 5
    for one, other in ((got["logits"], exact["logits"]), (got["rest"][0], exact["rest"][0])):
        # Not by bits: a product of more rows may be summed up in another order.
        assert one.shape == other.shape
        assert largest_gap(one, other) < 1e-5
        assert one.is_contiguous()


@given(st.integers(0, 8), st.integers(0, 16), st.sampled_from([torch.float32, torch.int64, torch.bool]))
def test_elementwise_is_the_exact_answer_to_the_last_bit(batch, length, dtype):
    x = (torch.randn(batch, length) * 3).to(dtype)
    padder = padder_of(forward, {"x": {0: BATCH, 1: LENGTH}}, {0: {0: "batch", 1: "length"}})
    assert same(answer(padder, lambda x: x.clone(), x), x)


def masked(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention in which everything looks at everything that the mask leaves."""
    scores = x @ x.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, :], float("-inf"))
    return scores.softmax(-1) @ x


MASKED = {"x": {0: BATCH, 1: LENGTH}, "mask": Mask(["batch", "length"])}


@given(st.integers(1, 8), st.integers(1, 16), st.booleans())
def test_a_mask_is_made_where_there_is_none_and_padded_where_there_is_one(batch, length, given_mask):
    padder = padder_of(masked, MASKED, {0: {0: "batch", 1: "length"}})
    x = torch.randn(batch, length, 3)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[:, length // 2 + 1 :] = False
    exact = masked(x, mask) if given_mask else masked(x)
    got = answer(padder, masked, x, mask) if given_mask else answer(padder, masked, x)
    # Rows of the margin see nothing at all, and are cropped.
    assert largest_gap(got, exact) < 1e-5


@pytest.mark.parametrize("call", [((), {}), ((None,), {}), ((), {"mask": None})])
def test_a_mask_is_made_of_the_real_sizes_wherever_it_stands(call):
    padder = padder_of(masked, {**MASKED, "mask": Mask(["length", "batch"], dtype=torch.float16)})
    args, kwargs = (torch.ones(3, 2, 1), *call[0]), call[1]
    new_args, new_kwargs = padder.pad(Fit({"batch": 3, "length": 2}, {"batch": 4, "length": 2}), args, kwargs)
    made = new_args[1] if call[0] else new_kwargs["mask"]
    assert (made.dtype, made.tolist()) == (torch.float16, [[1, 1, 1, 0]] * 2)
    assert (len(new_args), list(new_kwargs)) == ((2, []) if call[0] else (1, ["mask"]))


def test_a_mask_is_made_even_where_nothing_is_padded():
    args, kwargs = padder_of(masked, MASKED).pad(Fit({"batch": 2, "length": 2}, {"batch": 2, "length": 2}), X, {})
    assert args[0] is X[0]
    assert kwargs["mask"].all()


X = (torch.ones(2, 2, 1),)


def test_what_fits_is_handed_on_and_the_call_stays_as_it_was():
    padder = padder_of(forward, {"x": {0: BATCH}, "z": {0: LENGTH}})
    x, z, args, kwargs = torch.ones(4, 5), torch.ones(3), [torch.ones(4, 5)], {"z": torch.ones(3)}
    fit = padder.fit((x,), {"z": z})
    assert fit == Fit({"batch": 4, "length": 3}, {"batch": 4, "length": 4})
    new_args, new_kwargs = padder.pad(fit, (x, "other"), {"z": z, "w": args})
    assert new_args[0] is x
    assert new_args[1:] == ("other",)
    assert new_kwargs["w"] is args
    assert new_kwargs["z"].tolist() == [1, 1, 1, 0]
    assert (kwargs["z"].shape, z.shape) == ((3,), (3,))
    assert Fit({"a": 2}, {"a": 2}).is_exact
    assert not fit.is_exact


def test_margins_hold_what_was_declared():
    padder = padder_of(forward, {"x": {0: {"sizes": [3], "fill": -1}, 1: {"sizes": [3], "fill": float("-inf")}}})
    (x,), _ = padder.pad(Fit({"x[0]": 2, "x[1]": 2}, {"x[0]": 3, "x[1]": 3}), (torch.zeros(2, 2),), {})
    assert x.tolist() == [[0, 0, float("-inf")], [0, 0, float("-inf")], [-1, -1, float("-inf")]]


def test_other_margins_than_declared_leave_masks_as_they_are():
    padder = padder_of(masked, MASKED)
    fit = Fit({"batch": 1, "length": 1}, {"batch": 2, "length": 1})
    for given_mask in ({}, {"mask": torch.ones(1, 1, dtype=torch.bool)}):
        (x,), kwargs = padder.pad(fit, (torch.zeros(1, 1, 1),), given_mask, margin=lambda value, axis: 7)
        assert x.flatten().tolist() == [0, 7]
        assert kwargs["mask"].tolist() == [[True], [False]]


def test_a_later_axis_named_first_fills_the_same_corner():
    first, second = {"sizes": [2], "fill": 5}, {"sizes": [2], "fill": 7}
    for axes in ({0: first, 1: second}, {1: second, 0: first}):
        padder = padder_of(forward, {"x": axes})
        (x,), _ = padder.pad(padder.fit((torch.zeros(1, 1),), {}), (torch.zeros(1, 1),), {})  # type: ignore[arg-type]
        assert x.tolist() == [[0, 7], [5, 7]]


@pytest.mark.parametrize(
    ("args", "kwargs", "why"),
    [
        ((torch.ones(9, 1),), {}, "batch is 9, more than its largest bucket, 8"),
        ((torch.ones(2, 1), torch.ones(3)), {}, "batch is 2, but 3 on axis 0 of 'y'"),
        ((torch.ones(2, 1), torch.ones(1)), {}, "batch is 2, but 1 on axis 0 of 'y'"),
        (([torch.ones(2, 1)],), {}, "'x' is of type list; only a plain tensor can be padded"),
        ((3,), {}, "'x' is of type int; only a plain tensor can be padded"),
        ((torch.ones(2, 1).to_sparse(),), {}, "'x' is of type Tensor; only a plain tensor can be padded"),
        ((None,), {}, "there is no argument that has buckets"),
        ((), {}, "there is no argument that has buckets"),
    ],
)
def test_a_call_that_cannot_be_padded_says_why(args, kwargs, why):
    assert padder_of(forward, {"x": {0: BATCH, 1: LENGTH}, "y": {0: BATCH}}).fit(args, kwargs) == why


def test_a_mask_without_sizes_or_of_another_rank_says_why():
    padder = padder_of(forward, {"x": {0: BATCH}, "y": {0: LENGTH}, "z": Mask(["batch", "length"])})
    assert padder.fit((torch.ones(2),), {}) == "no argument of the call shows length, which a mask needs"
    why = padder.fit((torch.ones(2),), {"z": torch.ones(2)})
    assert why == "the mask 'z' has 1 dimensions; 2 are named"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"w": {0: [1]}}, r"^buckets\['w'\]: no argument has this name; expected one of \['x', 'y', 'z'\]"),
        ({5: {0: [1]}}, r"^buckets\[5\]: there are 2 positional arguments"),
        ({"x": {0: [1]}, 0: {1: [1]}}, r"^buckets\[0\] is the argument of buckets\['x'\]; expected it once"),
    ],
)
def test_arguments_that_are_not_there_or_there_twice_are_refused(inputs, message):
    with pytest.raises(ConfigError, match=message):
        padder_of(forward, inputs)


def test_a_mask_that_has_no_name_is_refused():
    def front(x: Any, mask: Any = None, /) -> Any:
        return x, mask

    with pytest.raises(ConfigError, match=r"^buckets\['mask'\]: a mask that cannot be passed by its name"):
        padder_of(front, {"x": {0: BATCH}, "mask": Mask(["batch"])})


def test_an_argument_without_the_axis_is_refused():
    with pytest.raises(ConfigError, match=r"^buckets\['x'\]\[1\]: the argument has 1 dimensions"):
        padder_of(forward, {"x": {1: BATCH}}).fit((torch.ones(1),), {})


@pytest.mark.parametrize(
    ("fill", "dtype", "shown"),
    [
        (float("nan"), torch.int64, "nan"),
        (-1, torch.uint8, "-1"),
        (0.5, torch.int32, "0.5"),
        (1e6, torch.half, "1000000.0"),
    ],
)
def test_a_fill_that_the_dtype_has_not_is_refused(fill, dtype, shown):
    padder = padder_of(forward, {"x": {0: Axis([4], fill=fill)}})
    x = torch.ones(3, dtype=dtype)
    with pytest.raises(ConfigError, match=rf"^buckets\['x'\]\[0\].fill={shown}: {dtype} has no such value"):
        padder.pad(padder.fit((x,), {}), (x,), {})  # type: ignore[arg-type]
    full = torch.ones(4, dtype=dtype)
    assert padder.pad(padder.fit((full,), {}), (full,), {})[0][0] is full  # type: ignore[arg-type]


class Pair(NamedTuple):
    left: Any
    right: Any


FIT = Fit({"batch": 3}, {"batch": 4})


def test_structures_and_what_is_no_tensor_stay_as_they_are():
    padder = padder_of(forward, {"x": {0: BATCH}}, {1: {-1: "batch"}})
    given_answer = Pair([torch.ones(4), torch.Size([4])], {"a": torch.ones(2, 4), "b": None})
    got = padder.crop(FIT, given_answer)
    assert type(got) is Pair
    assert (got.left[0].shape, got.left[1], type(got.left[1])) == ((4,), (4,), torch.Size)
    assert (got.right["a"].shape, got.right["b"]) == ((2, 3), None)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (None, r"^outputs: it is not said which axes to crop; expected Buckets\(..., outputs=...\)"),
        ({1: {0: "batch"}}, r"^outputs\[1\]: the answer has 1 tensors; expected the place of one"),
        ({0: {2: "batch"}}, r"^outputs\[0\]\[2\]: the output has 2 dimensions; expected an axis that it has"),
        ({0: {-3: "batch"}}, r"^outputs\[0\]\[-3\]: the output has 2 dimensions"),
        ({0: {1: "batch"}}, r"^outputs\[0\]\[1\]: the output has size 5 there; .* batch, which is 4, padded from 3"),
        ({0: {0: "length"}}, r"^outputs\[0\]\[0\]: no argument of this call shows length"),
    ],
)
def test_outputs_that_are_not_as_they_were_said_to_be_are_refused(outputs, message):
    padder = padder_of(forward, {"x": {0: BATCH}, "y": {0: LENGTH}}, outputs)
    with pytest.raises(ConfigError, match=message):
        padder.crop(FIT, torch.ones(4, 5))


def test_outputs_said_later():
    padder = padder_of(forward, {"x": {0: BATCH}}).with_outputs({0: {0: "batch"}})
    assert padder.crop(FIT, torch.ones(4, 5)).shape == (3, 5)


def test_one_tensor_given_several_times_stays_one_where_it_is_padded_alike() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q @ k.t() @ v

    alike = {"q": {0: [4]}, "k": {0: [4]}, "v": {0: [4]}}
    padder = Padder(Buckets(alike), inspect.signature(attend))
    x, v = torch.ones(3, 2), torch.ones(3, 2)
    fit = padder.fit((x, x, v), {})
    (q, k, other), _ = padder.pad(fit, (x, x, v), {})
    assert q is k
    assert other is not k
    (q, k, other), _ = padder.exchange(lambda value, axes: value + 1, (x, x, v), {})
    assert q is k
    assert other is not k
    filled = Padder(Buckets({**alike, "k": {0: {"sizes": [4], "fill": 7}}}), inspect.signature(attend))
    (q, k, _), _ = filled.pad(filled.fit((x, x, v), {}), (x, x, v), {})
    assert (q[3, 0].item(), k[3, 0].item()) == (0, 7)
