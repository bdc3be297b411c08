"""Requests put together and answers taken apart: nobody gets what is somebody else's, whatever comes beside."""

from __future__ import annotations

import inspect
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphcache import Axis, Buckets, Mask
from graphcache.errors import (
    ConfigError,
    InputCountError,
    InputError,
    InputRankError,
    InputTypeError,
    ProfileRangeError,
    ServingError,
)
from graphcache.serving.batching import Batcher, Counts, answer_all
from graphcache.serving.examples import with_rows
from tests.effort import share

ROWS = [1, 2, 4, 8]
LENGTHS = [2, 5, 9]


def batcher(**outputs):
    axes = {0: Axis(ROWS, name="rows"), 1: Axis(LENGTHS, name="length")}
    return Batcher(Buckets({"x": axes, "y": {0: Axis(ROWS, name="rows")}}, **outputs), ["x", "y"])


def request(number, rows, length, dtype=torch.float32, tail=1):
    """A request all of whose elements say which it is."""
    return {
        "x": torch.full((rows, length), number, dtype=dtype),
        "y": torch.full((rows, tail), -number, dtype=torch.float64),
    }


def run(seen):
    """A module that answers each row with what the row holds, and adds what only padding brings: zeros."""

    def called(inputs):
        x, y = inputs["x"], inputs["y"]
        assert len(x) == len(y)
        seen.append(tuple(x.shape))
        return {"same": x * 2, "row": y + 1, "count": (x != 0).sum(1)}

    return called


OUTPUTS = {"outputs": {0: {0: "rows", 1: "length"}, 1: {0: "rows"}, 2: {0: "rows"}}}

kinds = st.tuples(
    st.integers(1, 8),
    st.integers(1, 9),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int32]),
    st.integers(1, 2),
)


@given(st.lists(kinds, max_size=24))
@settings(max_examples=share(150, 30))
def test_every_request_gets_its_own_answer_at_its_own_place(drawn):
    seen = []
    requests = [request(number, *each) for number, each in enumerate(drawn, 1)]
    before = [{name: tensor.clone() for name, tensor in each.items()} for each in requests]
    counts = Counts()
    answers = answer_all(batcher(**OUTPUTS), run(seen), requests, counts)
    for number, ((rows, length, dtype, tail), answer) in enumerate(zip(drawn, answers, strict=True), 1):
        assert torch.equal(answer["same"], torch.full((rows, length), 2 * number, dtype=dtype))
        assert torch.equal(answer["row"], torch.full((rows, tail), 1.0 - number, dtype=torch.float64))
        # No element of a margin, nor of a neighbour, was counted.
        assert answer["count"].tolist() == [length] * rows
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in answer.values())
    for old, new in zip(before, requests, strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    # Every call had sizes that were captured.
    assert all(rows in ROWS and length in LENGTHS for rows, length in seen)
    assert (counts.requests, counts.failed, sum(counts.batches.values())) == (len(drawn), 0, len(seen))
    asked = sum(rows * length for rows, length, _, _ in drawn)
    made = sum(rows * length for rows, length in seen)
    assert (counts.cells, counts.padded_cells) == (asked, made)
    assert counts.padding_share == (1 - asked / made if made else 0)


@given(st.lists(kinds, min_size=1, max_size=24))
def test_batches_are_full_and_hold_each_request_once_in_order(drawn):
    maker = batcher()
    requests = [maker.request(request(number, *each)) for number, each in enumerate(drawn)]
    batches = maker.batches(requests)
    assert sorted(place for batch in batches for place in batch.places) == list(range(len(drawn)))
    assert [batch.places[0] for batch in batches] == sorted(batch.places[0] for batch in batches)
    for batch in batches:
        assert list(batch.places) == sorted(batch.places)
        assert len({requests[place].kind for place in batch.places}) == 1
        assert batch.rows <= batch.size <= 8
        assert batch.size == min(size for size in ROWS if size >= batch.rows)
    # Two batches of a kind that follow one another would not have fitted into one.
    last = {}
    for batch in batches:
        kind = batch.requests[0].kind
        if kind in last:
            assert last[kind].rows + batch.requests[0].rows > 8
        last[kind] = batch


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.randoms())
def test_a_bad_request_fails_alone(drawn, draw):
    """0 is a request that makes every batch raise in which it is; 1 to 4 are refused before; 5 is good."""
    bad = {
        1: {"x": torch.ones(1, 3)},
        2: {"x": torch.ones(9, 3), "y": torch.ones(9, 1)},
        3: {"x": torch.ones(1, 10), "y": torch.ones(1, 1)},
        4: {"x": torch.ones(2, 3), "y": torch.ones(1, 1)},
    }
    requests = [
        bad.get(what, {"x": torch.full((1, 3), float("nan") if what == 0 else place + 1.0), "y": torch.ones(1, 1)})
        for place, what in enumerate(drawn)
    ]

    def called(inputs):
        if inputs["x"].isnan().any():
            raise ArithmeticError("not a number")
        return {"same": inputs["x"]}

    counts = Counts()
    answers = answer_all(batcher(outputs={0: {0: "rows", 1: "length"}}), called, requests, counts)
    for place, (what, answer) in enumerate(zip(drawn, answers, strict=True)):
        if what == 5:
            assert torch.equal(answer["same"], torch.full((1, 3), place + 1.0))
        else:
            assert isinstance(answer, ArithmeticError if what == 0 else InputError)
    assert counts.failed == sum(what != 5 for what in drawn)


def test_masks_are_made_for_each_request_and_say_what_is_real():
    axes = {0: Axis([4], name="rows"), 1: Axis([6], name="length")}
    maker = Batcher(
        Buckets({"ids": axes, "mask": Mask(["rows", "length"])}), inspect.signature(lambda ids, mask=None: 0)
    )
    own = torch.tensor([[True, False, True, True]])
    requests = [{"ids": torch.ones(2, 3)}, {"ids": torch.ones(1, 4), "mask": own}]
    [batch] = maker.batches([maker.request(each) for each in requests])
    inputs = batch.inputs()
    assert inputs["ids"].shape == (4, 6)
    assert inputs["mask"].int().tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]


def test_margins_hold_their_fill_and_rows_may_lie_on_another_axis_of_the_answer():
    maker = Batcher(Buckets({"x": {0: Axis([4], fill=7, name="rows")}}, outputs={0: {1: "rows"}}), ["x"])
    counts = Counts()
    requests = [{"x": torch.full((1, 2), 1.0)}, {"x": torch.full((2, 2), 2.0)}]

    def called(inputs):
        assert inputs["x"][3].tolist() == [7, 7]
        return {"t": inputs["x"].t()}

    answers = answer_all(maker, called, requests, counts)
    assert [answer["t"].tolist() for answer in answers] == [[[1.0], [1.0]], [[2.0, 2.0], [2.0, 2.0]]]
    assert counts.batches == Counter({4: 1})


def test_an_answer_without_rows_is_nobodys():
    [found] = answer_all(batcher(), lambda inputs: {"mean": inputs["x"].mean()}, [request(1, 2, 2)], Counts())
    assert isinstance(found, ServingError)
    assert "output 'mean' has the shape []; expected 2 rows on axis 0, as the inputs have" in str(found)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (5, InputTypeError, "a request of type int; expected tensors by name"),
        ({}, InputCountError, "input 'x' is missing; expected x, y"),
        ({"x": torch.ones(1, 2)}, InputCountError, "input 'y' is missing"),
        ({"x": torch.ones(1, 2), "y": torch.ones(1), "z": torch.ones(1)}, InputCountError, "there is no input 'z'"),
        ({"x": torch.ones(1, 2), "y": torch.ones(1), 3: torch.ones(1)}, InputCountError, "there is no input 3"),
        ({"x": [1.0], "y": torch.ones(1)}, InputTypeError, "input 'x' is of type list; expected a plain"),
        ({"x": torch.ones(1, 2).to_sparse(), "y": torch.ones(1)}, InputTypeError, "input 'x' is of type Tensor"),
        ({"x": torch.ones(1), "y": torch.ones(1)}, InputRankError, "the argument has 1 dimensions"),
        ({"x": torch.tensor(1.0), "y": torch.ones(1)}, InputRankError, "the argument has 0 dimensions"),
        ({"x": torch.ones(0, 2), "y": torch.ones(0)}, ProfileRangeError, "rows is 0; expected rows from 1 to 8"),
        ({"x": torch.ones(1, 0), "y": torch.ones(1)}, ProfileRangeError, "length is 0"),
        ({"x": torch.ones(9, 2), "y": torch.ones(9)}, ProfileRangeError, "rows is 9, more than its largest bucket, 8"),
        ({"x": torch.ones(2, 2), "y": torch.ones(3)}, InputError, "rows is 2, but 3 on axis 0 of 'y'"),
    ],
)
def test_what_is_no_request(inputs, error, message):
    with pytest.raises(error) as caught:
        batcher().request(inputs)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ({"x": {1: [4]}}, "buckets['x']: axis 0 has no sizes; expected those of the rows"),
        ({0: {0: [4]}}, "buckets[0]: requests have inputs by name"),
        ({"x": {0: [4]}, "y": {0: [4]}}, "the rows are named 'y[0]', those of 'x' 'x[0]'; expected one name"),
    ],
)
def test_buckets_without_rows(buckets, message):
    with pytest.raises(ConfigError) as caught:
        Batcher(Buckets(buckets), ["x", "y"])
    assert message in str(caught.value)


def test_inputs_that_have_no_buckets_have_no_rows():
    maker = Batcher(Buckets({"x": {0: [4]}}), inspect.signature(lambda x, scale=None: 0))
    with pytest.raises(InputCountError, match="input 'scale' has no buckets, so it has no rows to put together"):
        maker.request({"x": torch.ones(1), "scale": torch.ones(1)})


def test_rows_are_added_where_nobody_named_them():
    made = with_rows({"ids": {1: [16]}, "mask": Mask(["rows"])}, [1, 2], ["ids", "more"])
    assert made.sizes == {"rows": (1, 2), "ids[1]": (16,)}
    assert set(made.inputs) == {"ids", "more", "mask"}
    own = with_rows({"x": {0: Axis([8], name="batch")}}, [1, 2], ["x"])
    assert own.sizes == {"batch": (8,)}
    with pytest.raises(ConfigError, match="buckets=5: expected sizes of the rows"):
        with_rows(5, [1], ["x"])
    with pytest.raises(ConfigError, match="expected from 1 to 1024 sizes"):
        with_rows({}, [], ["x"])
