from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcache.buckets.spec import MAX_SIZE, MAX_SIZES_PER_AXIS, Axis, Buckets, InputAxis, Mask
from graphcache.errors import ConfigError

sizes = st.lists(st.integers(1, 100), min_size=1, max_size=8)


def test_lists_words_dictionaries_and_objects_say_the_same():
    spellings: list[Any] = [[1, 2, 4], (4, 2, 1), range(1, 5), {"sizes": [1, 2, 4]}, Axis([1, 2, 4])]
    targets = [Buckets({"x": {0: spelling}}).target("x", (2, 9)) for spelling in spellings]
    assert targets == [(2, 9)] * 5


@given(sizes, st.integers(0, 120))
def test_a_size_goes_to_the_smallest_bucket_that_holds_it_in_whatever_order_they_were_given(given_sizes, size):
    buckets = Buckets({"x": {0: given_sizes}})
    holding = [each for each in given_sizes if each >= size]
    assert buckets.up("x[0]", size) == (min(holding) if holding else None)
    assert buckets.target("x", (size, 5)) == ((min(holding), 5) if holding else None)


@given(st.integers(1, 2**30))
def test_powers_of_two_are_less_than_twice_as_large(size):
    up = Buckets({"x": {1: "powers_of_two"}}).up("x[1]", size)
    assert up is not None
    assert size <= up < 2 * size
    assert up & (up - 1) == 0


def test_beyond_the_largest_power_there_is_no_bucket():
    buckets = Buckets({"x": {0: "powers_of_two"}})
    assert buckets.target("x", (2**30,)) == (2**30,)
    assert buckets.target("x", (2**30 + 1,)) is None


def test_an_empty_axis_goes_to_the_smallest_bucket():
    assert Buckets({"x": {0: [4, 8]}}).target("x", (0, 3)) == (4, 3)


def test_axes_count_from_the_end_too():
    buckets = Buckets({"x": {-1: [8], 0: [2]}})
    assert buckets.target("x", (1, 5, 5)) == (2, 5, 8)
    assert buckets.places("x", 3) == [2, 0]


def test_any_axis_above_its_largest_bucket_leaves_no_target():
    buckets = Buckets({"x": {0: [2], 1: [8]}})
    assert buckets.target("x", (2, 8)) == (2, 8)
    assert buckets.target("x", (3, 8)) is None
    assert buckets.target("x", (2, 9)) is None


def test_one_name_or_one_object_makes_one_axis_of_two():
    batch = Axis([2, 4])
    by_object = Buckets({"x": {0: batch}, "y": {1: batch}})
    by_name = Buckets({"x": {0: Axis([2, 4], name="b")}, "y": {1: {"sizes": [4, 2], "name": "b"}}})
    apart = Buckets({"x": {0: Axis([2, 4])}, "y": {1: Axis([2, 4])}})
    assert [list(each.sizes) for each in (by_object, by_name, apart)] == [["x[0]"], ["b"], ["x[0]", "y[1]"]]
    assert by_object.inputs["y"] == (InputAxis(1, "x[0]", None),)


def test_the_same_list_twice_is_no_promise():
    both = [2, 4]
    assert list(Buckets({"x": {0: both, 1: both}}).sizes) == ["x[0]", "x[1]"]


def test_each_place_has_its_own_fill():
    batch = {"sizes": [4], "name": "b"}
    buckets = Buckets({"x": {0: batch}, 1: {0: {**batch, "fill": -1}}})
    assert [axes[0].fill for axes in buckets.inputs.values()] == [None, -1]


def test_a_mask_may_stand_before_what_it_names():
    buckets = Buckets({"mask": Mask(["b", "x[1]"]), "x": {0: Axis([4], name="b"), 1: [8]}})
    assert buckets.target("mask", (3, 5)) == (4, 8)
    assert buckets.masks["mask"].dtype is torch.bool


def test_the_option_is_buckets_or_what_makes_them():
    buckets = Buckets({"x": {0: [1]}})
    assert Buckets.of(buckets) is buckets
    assert Buckets.of({"x": {0: [1]}}).sizes == buckets.sizes


def test_outputs_can_be_said_later_and_leave_the_first_as_it_was():
    first = Buckets({"x": {0: [1]}})
    second = first.with_outputs({0: {-1: "x[0]"}})
    assert (first.outputs, second.outputs) == (None, {0: {-1: "x[0]"}})
    assert second.target("x", (1,)) == (1,)
    with pytest.raises(ConfigError, match=r"^outputs\[0\]\[0\]='y': expected one of \['x\[0\]'\]"):
        first.with_outputs({0: {0: "y"}})


class Ints(list):  # type: ignore[type-arg]
    """Might be anything."""


X = {"x": {0: [1]}}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, r"^buckets=None: expected arguments with axes, such as \{'x': \{0: \[1, 8\]\}\}"),
        ([1, 2], r"^buckets=\[1, 2\]:"),
        ({}, r"^buckets=\{\}:"),
        ({1.5: {0: [1]}}, r"^buckets\[1.5\]: expected an argument's name, or its position"),
        ({True: {0: [1]}}, r"^buckets\[True\]:"),
        ({-1: {0: [1]}}, r"^buckets\[-1\]:"),
        ({10**30: {0: [1]}}, r"^buckets\[1000000000000000000000000000000\]:"),
        ({"": {0: [1]}}, r"^buckets\[''\]:"),
        ({"x": [1, 2]}, r"^buckets\['x'\]=\[1, 2\]: expected axes with their sizes"),
        ({"x": {}}, r"^buckets\['x'\]=\{\}:"),
        ({"x": {"0": [1]}}, r"^buckets\['x'\]\['0'\]: expected the number of an axis"),
        ({"x": {True: [1]}}, r"^buckets\['x'\]\[True\]:"),
        ({"x": {64: [1]}}, r"^buckets\['x'\]\[64\]:"),
        ({"x": {10**5000: [1]}}, r"^buckets\['x'\]\[an object of type int"),
        (
            {"x": {0: "powers_of_three"}},
            r"^buckets\['x'\]\[0\]='powers_of_three': expected a list of sizes, or",
        ),
        ({"x": {0: 8}}, r"^buckets\['x'\]\[0\]=8:"),
        ({"x": {0: {1, 2}}}, r"^buckets\['x'\]\[0\]=\{1, 2\}:"),
        ({"x": {0: iter([1])}}, r"^buckets\['x'\]\[0\]=<list_iterator"),
        ({"x": {0: Ints([1])}}, r"^buckets\['x'\]\[0\]=\[1\]: expected a list"),
        ({"x": {0: []}}, rf"^buckets\['x'\]\[0\]=\[\]: expected from 1 to {MAX_SIZES_PER_AXIS} sizes"),
        ({"x": {0: range(1, 10**30)}}, r"^buckets\['x'\]\[0\]=range\(1, 10+\): expected from 1"),
        ({"x": {0: [1, 0]}}, rf"^buckets\['x'\]\[0\]: the size 0; expected a whole number from 1 to {MAX_SIZE}"),
        ({"x": {0: [-4]}}, r"^buckets\['x'\]\[0\]: the size -4;"),
        ({"x": {0: [True]}}, r"^buckets\['x'\]\[0\]: the size True;"),
        ({"x": {0: [2.0]}}, r"^buckets\['x'\]\[0\]: the size 2.0;"),
        ({"x": {0: ["8"]}}, r"^buckets\['x'\]\[0\]: the size '8';"),
        ({"x": {0: [MAX_SIZE + 1]}}, r"^buckets\['x'\]\[0\]: the size 2147483648;"),
        ({"x": {0: {"fill": 1}}}, r"^buckets\['x'\]\[0\]=\{'fill': 1\}: expected 'sizes', and maybe 'fill' and 'name'"),
        ({"x": {0: {"sizes": [1], "size": 1}}}, r"^buckets\['x'\]\[0\]=.*: expected 'sizes', and maybe"),
        ({"x": {0: {"sizes": [1], 5: 1}}}, r"^buckets\['x'\]\[0\]=.*: expected 'sizes', and maybe"),
        ({"x": {0: {"sizes": [1], "fill": "0"}}}, r"^buckets\['x'\]\[0\].fill='0': expected a number"),
        ({"x": {0: Axis([1], fill=2**64)}}, r"^buckets\['x'\]\[0\].fill=18446744073709551616: .* into 64 bits"),
        ({"x": {0: Axis([1], name=None)}}, r"^buckets\['x'\]\[0\].name=None: expected text"),  # type: ignore[arg-type]
        (
            {"x": {0: Axis([1, 2], name="b")}, "y": {0: Axis([1], name="b")}},
            r"^buckets\['y'\]\[0\]: the sizes \[1\]; 'b' has \[1, 2\] elsewhere, expected the same",
        ),
        ({0: Mask(["x[0]"]), **X}, r"^buckets\[0\]: a mask at a position; expected the name under which"),
        ({"m": Mask([]), **X}, r"^buckets\['m'\].axes=\[\]: expected the names of its axes"),
        ({"m": Mask("x[0]"), **X}, r"^buckets\['m'\].axes='x\[0\]':"),
        ({"m": Mask(["y"]), **X}, r"^buckets\['m'\].axes: 'y' is no axis; expected some of \['x\[0\]'\]"),
        ({"m": Mask([["y"]]), **X}, r"^buckets\['m'\].axes: \['y'\] is no axis"),  # type: ignore[list-item]
        ({"m": Mask(["x[0]"], dtype=bool), **X}, r"^buckets\['m'\].dtype=<class 'bool'>:"),  # type: ignore[arg-type]
        ({"m": Mask(["m"])}, r"^buckets\['m'\].axes: 'm' is no axis; expected some of \[\]"),
    ],
)
def test_impossible_buckets_are_refused_by_name(inputs: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        Buckets(inputs)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([0], r"^outputs=\[0\]: expected places with axes, such as \{0: \{0: 'x\[0\]'\}\}"),
        ({"0": {}}, r"^outputs\['0'\]: expected the place of a tensor"),
        ({-1: {}}, r"^outputs\[-1\]:"),
        ({True: {}}, r"^outputs\[True\]:"),
        ({0: ["x[0]"]}, r"^outputs\[0\]=\['x\[0\]'\]: expected axes with names"),
        ({0: {"0": "x[0]"}}, r"^outputs\[0\]\['0'\]: expected the number of an axis"),
        ({0: {0: "x"}}, r"^outputs\[0\]\[0\]='x': expected one of \['x\[0\]'\]"),
        ({0: {0: 5}}, r"^outputs\[0\]\[0\]=5:"),
    ],
)
def test_impossible_outputs_are_refused_by_name(outputs: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        Buckets(X, outputs=outputs)


def test_a_shape_without_the_axis_is_refused():
    buckets = Buckets({"x": {2: [1]}, "y": {-3: [1]}, "z": {0: [1], -1: [1]}})
    with pytest.raises(ConfigError, match=r"^buckets\['x'\]\[2\]: the argument has 2 dimensions; expected an axis"):
        buckets.target("x", (1, 1))
    with pytest.raises(ConfigError, match=r"^buckets\['y'\]\[-3\]: the argument has 2 dimensions"):
        buckets.target("y", (1, 1))
    with pytest.raises(ConfigError, match=r"^buckets\['z'\]\[-1\]: axis 0 of 1 is named twice"):
        buckets.target("z", (1,))
    with pytest.raises(ConfigError, match=r"^buckets\['w'\]: there are none; expected one of \['x', 'y', 'z'\]"):
        buckets.target("w", (1,))


odd = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just("powers_of_two"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.integers(-2, 3) | st.text(max_size=2), inner),
    max_leaves=8,
)


@given(odd | st.dictionaries(st.text(max_size=2) | st.integers(-1, 3), st.dictionaries(st.integers(-2, 2), odd)), odd)
def test_whatever_is_given_there_are_buckets_or_a_typed_error(inputs, outputs):
    try:
        buckets = Buckets(inputs, outputs=outputs)
        targets = [buckets.target(key, (3, 3, 3)) for key in buckets.inputs]
    except ConfigError as error:
        said = str(error)
    else:
        said = "buckets"
        assert all(target is None or len(target) == 3 for target in targets)
    assert said.startswith(("buckets", "outputs"))
