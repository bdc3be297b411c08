from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphcache
from graphcache.buckets import advisor
from graphcache.buckets.advisor import MAX_STEPS, Advice, advise, best_buckets, padded_shape
from graphcache.errors import ConfigError

traces = st.dictionaries(
    st.tuples(st.integers(0, 9), st.integers(0, 5), st.integers(1, 3)), st.integers(1, 20), min_size=1, max_size=12
)


def padding_of(trace: dict[Any, int], sizes: dict[int, tuple[int, ...]]) -> int:
    """By definition, over shapes that have elements."""
    seen = {shape: count for shape, count in trace.items() if prod(shape)}
    return sum(count * (prod(padded_shape(shape, sizes)) - prod(shape)) for shape, count in seen.items())


def choices(trace: dict[Any, int], axis: int, most: int) -> list[tuple[int, ...]]:
    seen = sorted({shape[axis] for shape in trace if prod(shape)})
    return [(*rest, seen[-1]) for number in range(most) for rest in combinations(seen[:-1], number)] if seen else [()]


@given(traces, st.integers(0, 2), st.integers(1, 4))
def test_on_one_axis_no_buckets_pad_fewer_elements(trace, axis, most):
    advice = advise(trace, {axis: most})
    assert advice.padding == min(padding_of(trace, {axis: sizes}) for sizes in choices(trace, axis, most))
    assert len(advice.sizes[axis]) <= most


@given(traces, st.integers(1, 3), st.integers(1, 3))
def test_on_two_axes_neither_can_be_changed_for_the_better_alone(trace, first, second):
    advice = advise(trace, {0: first, 1: second})
    for axis, most in ((0, first), (1, second)):
        others = [{**advice.sizes, axis: sizes} for sizes in choices(trace, axis, most)]
        assert advice.padding == min(padding_of(trace, sizes) for sizes in others)


@given(traces, st.integers(1, 4), st.integers(1, 4))
def test_the_account_is_that_of_the_trace(trace, first, second):
    advice = advise(trace, {0: first, 1: second})
    seen = {shape: count for shape, count in trace.items() if prod(shape)}
    targets = {padded_shape(shape, advice.sizes) for shape in seen}
    assert advice.padding == padding_of(trace, dict(advice.sizes))
    assert advice.work == sum(count * prod(shape) for shape, count in seen.items())
    assert (advice.calls, advice.shapes, advice.graphs) == (sum(seen.values()), len(seen), len(targets))
    assert (advice.held, advice.held_without) == (sum(map(prod, targets)), sum(map(prod, seen)))
    assert len({target[:2] for target in targets}) <= len(advice.sizes[0]) * len(advice.sizes[1])


@given(traces)
def test_padding_covers_and_is_the_least_that_does(trace):
    sizes = advise(trace, {0: 2}).sizes
    for shape in trace:
        if prod(shape):
            target = padded_shape(shape, sizes)
            assert target[1:] == shape[1:]
            assert target[0] == min(size for size in sizes[0] if size >= shape[0])


def test_what_a_step_costs_depends_on_the_other_sizes():
    # The long rows are few and wide: counted by calls, the bucket in between would go to the many short ones.
    trace = [((1, 1), 50), ((2, 1), 50), ((3, 1000), 10), ((9, 1000), 10)]
    assert advise(trace, {0: 2}).sizes == {0: (3, 9)}
    narrow = [((size, 1), count) for (size, _), count in trace]
    assert advise(narrow, {0: 2}).sizes == {0: (2, 9)}


def test_a_mapping_and_pairs_say_the_same_and_repeated_shapes_add_up():
    pairs = [((1, 4), 3), ((2, 4), 1), ((1, 4), 2), ([5, 4], 1)]
    assert advise(iter(pairs), {0: 2}) == advise({(1, 4): 5, (2, 4): 1, (5, 4): 1}, {0: 2})


def test_empty_shapes_are_left_out_and_a_trace_of_them_advises_nothing():
    assert advise({(0, 4): 9, (3, 4): 1}, {0: 2}).sizes == {0: (3,)}
    nothing = advise({(0, 4): 9}, {0: 2})
    assert (nothing.option(), nothing.calls, nothing.overhead, nothing.saving) == ({}, 0, 0, 0)
    assert advise([], {7: 2}).option() == {}


def test_an_advice_in_words_and_as_an_option():
    advice = advise([((1, 8), 100), ((7, 8), 5), ((64, 2), 1)], {0: 2, 1: 2})
    assert advice.option() == {0: [1, 64], 1: [2, 8]}
    assert str(advice) == (
        "axis 0: 1, 64; axis 1: 2, 8; 3 graphs in place of 3 hold 338 % of the memory, 188.7 % more work"
    )
    assert advice.saving == 1 - (8 + 512 + 128) / (8 + 56 + 128)


def test_rounds_end_even_where_axes_pull_each_other(monkeypatch):
    rounds = []
    real = advisor._weights
    monkeypatch.setattr(advisor, "_weights", lambda *given: rounds.append(1) or real(*given))
    trace = {(a, b): (a * 7 + b * 3) % 5 + 1 for a, b in product(range(1, 12), repeat=2)}
    assert isinstance(advise(trace, {0: 3, 1: 3}), Advice)
    assert len(rounds) <= 2 * advisor._MAX_ROUNDS


@pytest.mark.parametrize(
    ("trace", "most", "message"),
    [
        (5, {0: 1}, r"^trace=5: expected shapes with how often"),
        ("ab", {0: 1}, r"^trace='ab':"),
        ([(1, 2, 3)], {0: 1}, r"^trace\[0\]=\(1, 2, 3\): expected a shape and how often"),
        ([((1,), 1), 7], {0: 1}, r"^trace\[1\]=7:"),
        ([("ab", 1)], {0: 1}, r"^trace\[0\]: the shape 'ab'; expected whole numbers from 0 to"),
        ([((1.0,), 1)], {0: 1}, r"^trace\[0\]: the shape \(1.0,\);"),
        ([((True,), 1)], {0: 1}, r"^trace\[0\]: the shape \(True,\);"),
        ([((-1,), 1)], {0: 1}, r"^trace\[0\]: the shape \(-1,\);"),
        ([((2**63,), 1)], {0: 1}, r"^trace\[0\]: the shape \(9223372036854775808,\);"),
        ([((1,), 0)], {0: 1}, r"^trace\[0\]: the count 0; expected a whole number, 1 or more"),
        ([((1,), 1.0)], {0: 1}, r"^trace\[0\]: the count 1.0;"),
        ([((1,), 1), ((1, 2), 1)], {0: 1}, r"^trace\[1\]: 2 dimensions after shapes of 1; expected one input's"),
        ([((1,), 1)], {}, r"^most=\{\}: expected axes with how many"),
        ([((1,), 1)], 0, r"^most=0:"),
        ({(): 1}, 3, r"^most: the axis 0; expected"),
        ([((1,), 1)], {1: 1}, r"^most: the axis 1; .* \(the trace has 1 dimensions\)"),
        ([((1,), 1)], {-1: 1}, r"^most: the axis -1;"),
        ([((), 1)], {0: 1}, r"^most: the axis 0; .* \(the trace has 0 dimensions\)"),
        ([], {"0": 1}, r"^most: the axis '0'; expected the number of an axis, from 0 on$"),
        ([((1,), 1)], {0: 0}, r"^most\[0\]=0: expected a whole number"),
        ([], {0: True}, r"^most\[0\]=True:"),
    ],
)
def test_bad_input_is_refused_by_name(trace: Any, most: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        advise(trace, most)


def test_a_trace_without_end_is_refused():
    endless = (((size,), 1) for size in iter(range(1, 10**12)))
    with pytest.raises(ConfigError, match=r"^trace: more than 100000 distinct shapes"):
        advise(endless, {0: 4})


# ---- one axis

histograms = st.dictionaries(st.integers(1, 40), st.integers(1, 9), min_size=1, max_size=9)


def padding_on_one_axis(weights: Mapping[int, int], buckets: Sequence[int]) -> int:
    """By definition: each size goes to the smallest bucket that holds it."""
    targets = {size: min(bucket for bucket in buckets if bucket >= size) for size in weights}
    return sum(weight * (targets[size] - size) for size, weight in weights.items())


@given(histograms, st.integers(1, 10))
def test_no_choice_of_buckets_pads_less_and_none_as_little_has_fewer(weights: dict[int, int], most: int) -> None:
    top = max(weights)
    wanted = min(
        (padding_on_one_axis(weights, (*rest, top)), number)
        for number in range(1, most + 1)
        for rest in combinations(sorted(set(weights) - {top}), number - 1)
    )
    found = best_buckets(weights, most)
    assert (padding_on_one_axis(weights, found), len(found)) == wanted
    assert list(found) == sorted(set(found) & set(weights))
    assert found[-1] == top


@given(st.dictionaries(st.integers(1, 7), st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 3))
def test_sizes_that_were_not_seen_would_not_help(weights: dict[int, int], most: int) -> None:
    top = max(weights)
    anything = min(
        padding_on_one_axis(weights, (*rest, top))
        for number in range(most)
        for rest in combinations(range(1, top), min(number, top - 1))
    )
    assert padding_on_one_axis(weights, best_buckets(weights, most)) == anything


def test_numbers_of_any_size_stay_exact() -> None:
    huge = 10**400
    assert best_buckets({1: huge, 2: 1, 3: huge}, 2) == (1, 3)
    assert best_buckets({huge: 1, huge + 1: 1}, 1) == (huge + 1,)
    assert best_buckets({}, 3) == ()


def test_more_steps_than_anybody_waits_for_are_refused() -> None:
    count = int((MAX_STEPS / 100) ** 0.5) + 1
    with pytest.raises(ConfigError, match=rf"^most=100: {count} distinct sizes squared times 100 buckets are more"):
        best_buckets(dict.fromkeys(range(1, count + 1), 1), 100)


# ---- what it is asked for


def test_axes_that_do_not_differ_need_no_buckets() -> None:
    assert advise([((1, 4, 2), 1), ((2, 4, 3), 1)], 5).option() == {0: [1, 2], 2: [2, 3]}
    assert advise([((3, 4), 1)], 5).option() == {0: [3], 1: [4]}
    assert advise(iter([((3, 4), 1), ((4, 4), 2)]), {1: 1}).option() == {1: [4]}


@pytest.mark.parametrize("trace", [None, 5, "abc", b"abc", [5], [()], [((1,), 0)], [((1,), 1), ((1, 2), 1)], [(1, 1)]])
@pytest.mark.parametrize("most", [1, 8])
def test_odd_traces_are_named(trace: Any, most: int) -> None:
    with pytest.raises(ConfigError, match=r"^trace"):
        advise(trace, most)


@pytest.mark.parametrize("most", [0, -1, True, 1.5, "8", None, [1], {}, {0: 0}, {"0": 1}])
def test_odd_numbers_are_named(most: Any) -> None:
    with pytest.raises(ConfigError, match=r"^most"):
        advise({(1,): 1}, most)


class Net(nn.Module):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return x * 1


@pytest.mark.parametrize("argument", [0, "x"])
def test_an_argument_is_found_by_position_and_by_name(argument: str | int) -> None:
    fast = graphcache.wrap(Net())
    fast(torch.zeros(2, 3))
    with pytest.raises(ConfigError, match=r"^argument='y': Net was not called with a tensor there"):
        fast.advise_buckets(argument="y")
    for _ in range(2):
        fast(x=torch.zeros(4, 3), y=torch.zeros(9))
    advice = fast.advise_buckets(most={0: 9}, argument=argument)
    assert (advice.calls, advice.option()) == (3, {0: [2, 4]})
    assert fast.advise_buckets(most={0: 9}, argument="y").option() == {0: [9]}


def test_of_shapes_of_several_ranks_those_of_most_calls() -> None:
    fast = graphcache.wrap(Net())
    for shape in [(2, 3), (2,), (3,), (4, 5, 6)]:
        fast(torch.zeros(shape))
    assert fast.advise_buckets(most={0: 9}).option() == {0: [2, 3]}
