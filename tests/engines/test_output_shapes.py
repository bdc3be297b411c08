"""Rules of output shapes, fitted to observations."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcache.engines.output_shapes import OutputShapes, Size, fit

N, M = (0, 0), (1, 2)


def line(count: int = 40) -> list[dict[tuple[int, int], int]]:
    return [{N: value} for value in range(1, count + 1)]


def grid(seed: int = 0) -> list[dict[tuple[int, int], int]]:
    draw = random.Random(seed)
    return [{N: draw.randint(1, 64), M: draw.randint(1, 512)} for _ in range(30)]


def shapes(point: dict[tuple[int, int], int]) -> list[tuple[int, ...]]:
    return [(point[N],), (3, 5, point.get(M, 0))]


@given(st.integers(1, 12), st.integers(-20, 20), st.integers(1, 12))
def test_strides_are_found_and_hold_where_nobody_looked(factor: int, plus: int, over: int) -> None:
    points = line()
    found = fit(points, [(factor * point[N] + plus) // over for point in points])
    assert found is not None
    for value in range(1, 41):
        assert found.of([(value,)]) == (factor * value + plus) // over
    if len({(factor * point[N] + plus) // over for point in points}) > 1:
        # Equal slopes; what is added shifts the answer by one at most.
        assert abs(found.of([(1000,)]) - (factor * 1000 + plus) // over) <= 1 + 960 // 40


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 2, 1), (7, 2, 3), (1, 1, 0), (16, 16, 0), (3, 3, 0), (5, 4, 2)]
)
def test_a_convolution(kernel: int, stride: int, padding: int) -> None:
    layer = torch.nn.Conv1d(1, 1, kernel, stride, padding)
    points = [{N: value} for value in range(kernel, kernel + 45)]
    sizes = [layer(torch.zeros(1, 1, point[N])).shape[-1] for point in points]
    found = fit(points, sizes)
    assert found is not None
    for value in (224, 640, 1023):
        assert found.of([(value,)]) == layer(torch.zeros(1, 1, value)).shape[-1]


@given(st.integers(-5, 5), st.integers(-5, 5), st.integers(-9, 9), st.integers(0, 5))
def test_sums(first: int, second: int, plus: int, seed: int) -> None:
    points = grid(seed)
    found = fit(points, [first * point[N] + second * point[M] + plus for point in points])
    assert found is not None
    for value in (1, 1000):
        assert found.of([(value,), (3, 5, 2 * value)]) == first * value + second * 2 * value + plus


@given(st.integers(1, 12), st.integers(0, 5))
def test_products(factor: int, seed: int) -> None:
    points = grid(seed)
    found = fit(points, [factor * point[N] * point[M] for point in points])
    assert found == Size(((factor, (N, M)),))


def test_what_always_has_the_same_size_as_another_axis_needs_one_of_them() -> None:
    points = [{(0, 0): value, (1, 0): value} for value in range(1, 9)]
    assert fit(points, [2 * point[N] for point in points]) == Size(((2, (N,)),))


def test_constants_and_axes_that_never_change() -> None:
    points = [{N: value, M: 7} for value in range(1, 5)]
    assert fit(points, [9, 9, 9, 9]) == Size(plus=9)
    assert fit([{N: 3}], [5]) == Size(plus=5)
    assert fit(points, [point[N] + 7 for point in points]) == Size(((1, (N,)),), 7)


def test_what_no_rule_explains_is_unknown() -> None:
    points = line()
    assert fit(points, [point[N] ** 2 for point in points]) is None
    assert fit(points, [max(point[N], 7) for point in points]) is None
    assert fit([{N: 2}, {N: 2}, {N: 3}], [1, 2, 3]) is None
    draw = random.Random(0)
    assert fit(grid(), [draw.randint(0, 99) for _ in grid()]) is None


def test_symbolic_sizes_stay_symbolic() -> None:
    class Symbol:
        def __init__(self, text: str) -> None:
            self.text = text

        def __mul__(self, other: Any) -> Symbol:
            return Symbol(f"({self.text}*{getattr(other, 'text', other)})")

        __rmul__ = __mul__

        def __add__(self, other: Any) -> Symbol:
            return Symbol(f"({self.text}+{getattr(other, 'text', other)})")

        __radd__ = __add__

        def __floordiv__(self, other: Any) -> Symbol:
            return Symbol(f"({self.text}//{other})")

    rule = Size(((2, (N,)),), 1, 3)
    text = rule.of([(Symbol("n"),)]).text
    assert eval(text, {"n": 10}) == 7
    assert rule.of([(10,)]) == 7


sizes = st.one_of(
    st.none(),
    st.builds(
        Size,
        st.lists(
            st.tuples(
                st.integers(-9, 9),
                st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=3).map(tuple),
            ),
            max_size=3,
        ).map(tuple),
        st.integers(-99, 99),
        st.integers(1, 32),
    ),
)


@given(st.lists(st.lists(sizes, max_size=4).map(tuple), max_size=3).map(tuple))
def test_rules_are_written_and_read(outputs: Any) -> None:
    rules = OutputShapes(outputs)
    again = OutputShapes.read(rules.text)
    given_shapes = [(2, 3, 4, 5, 6, 7)] * 4
    assert again.of(given_shapes) == rules.of(given_shapes)
    assert OutputShapes.read(again.text) == again


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.text(max_size=3), st.floats(allow_nan=False)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["terms", "plus", "over"]), inner)
    ),
    max_leaves=8,
)


@given(json_values)
def test_what_is_no_rule_raises_and_nothing_else(tree: Any) -> None:
    try:
        rules = OutputShapes.read(json.dumps(tree))
    except ValueError:
        return
    assert all(size is None or size.over >= 1 for output in rules.outputs for size in output)


@pytest.mark.parametrize("text", ["", "{", "5", '[[{"terms":[],"plus":0,"over":0}]]', "[[true]]", "[" * 100_000])
def test_damaged_text(text: str) -> None:
    with pytest.raises(ValueError):
        OutputShapes.read(text)
