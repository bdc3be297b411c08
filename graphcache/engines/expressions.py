"""How the shapes of an engine's outputs follow from the shapes of its inputs, for those who cannot ask TensorRT.

TensorRT tells the shapes of outputs for given shapes of inputs, and never the rule behind them. A compiler that traces
a program with open sizes wants the rule. So rules of a few kinds are fitted to observations (:func:`fit`); what none of
them explains is unknown, which is said, not guessed. A rule that explains all observations may still be wrong
elsewhere: whoever uses one holds it against the shapes of each run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import Any

Dim = tuple[int, int]
"""Which input, and which of its axes."""
Point = Mapping[Dim, int]
"""Sizes of axes."""

_LARGEST_STRIDE = 32
_MOST_FACTORS = 4


@dataclass(frozen=True, slots=True)
class Size:
    """One size of an output: ``(sum of factor * product of sizes + plus) // over``.

    Args:
        terms: Factors, each with the axes whose sizes it goes with.
        plus: What is added.
        over: What the sum is divided by, rounded down.

    Example:
        >>> half = Size(((1, ((0, 2),)),), plus=1, over=2)
        >>> half.of([(1, 3, 15)])
        8
        >>> print(half)
        (input 0 axis 2 + 1) // 2
    """

    terms: tuple[tuple[int, tuple[Dim, ...]], ...] = ()
    plus: int = 0
    over: int = 1

    def of(self, shapes: Sequence[Sequence[Any]]) -> Any:
        """The size for some shapes of the inputs, which may be symbolic."""
        total: Any = self.plus
        for factor, dims in self.terms:
            total = total + factor * math.prod(shapes[index][axis] for index, axis in dims)
        return total // self.over if self.over != 1 else total

    def __str__(self) -> str:
        terms = [
            "*".join([*([str(factor)] if factor != 1 else []), *(f"input {index} axis {axis}" for index, axis in dims)])
            for factor, dims in self.terms
        ]
        total = " + ".join([*terms, *([str(self.plus)] if self.plus or not terms else [])])
        return f"({total}) // {self.over}" if self.over != 1 else total


@dataclass(frozen=True, slots=True)
class OutputShapes:
    """The shapes of all outputs; a size that no rule explains is ``None``.

    Args:
        outputs: One tuple of sizes for each output.

    Example:
        >>> shapes = OutputShapes(((Size(((1, ((0, 0),)),)), Size(plus=4)), (None,)))
        >>> shapes.of([(7, 3)])
        [(7, 4), (None,)]
        >>> OutputShapes.read(shapes.text) == shapes
        True
    """

    outputs: tuple[tuple[Size | None, ...], ...]

    def of(self, shapes: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
        """The shapes of the outputs for some shapes of the inputs."""
        return [tuple(None if size is None else size.of(shapes) for size in output) for output in self.outputs]

    @property
    def text(self) -> str:
        """As JSON."""
        return json.dumps([[_tree(size) for size in output] for output in self.outputs], separators=(",", ":"))

    @classmethod
    def read(cls, text: str) -> OutputShapes:
        """From what :attr:`text` gave.

        Raises:
            ValueError: If that is none.
        """
        try:
            return cls(tuple(tuple(_size(size) for size in output) for output in json.loads(text)))
        except (TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"not the shapes of outputs: {text[:100]}") from error


def fit(points: Sequence[Point], sizes: Sequence[int]) -> Size | None:
    """The simplest rule that explains a size at every point; ``None`` if none of the kinds known here does.

    In this order: a constant; one axis, scaled, shifted, divided and rounded down, as strides do; a sum over axes, as a
    concatenation makes; a product of axes, as flattening makes.

    Args:
        points: Sizes of the same axes at each of them.
        sizes: What was observed there.

    Example:
        >>> print(fit([{(0, 0): n} for n in range(1, 12)], [(n + 1) // 2 for n in range(1, 12)]))
        (input 0 axis 0 + 1) // 2
    """
    if len(set(sizes)) == 1:
        return Size(plus=sizes[0])
    # An axis that never changes explains nothing.
    dims = [dim for dim in points[0] if len({point[dim] for point in points}) > 1]
    for dim in dims:
        if (found := _of_one([point[dim] for point in points], sizes, dim)) is not None:
            return found
    return _sum(points, sizes, dims) or _product(points, sizes, dims)


def _of_one(values: Sequence[int], sizes: Sequence[int], dim: Dim) -> Size | None:
    low, high = min(values), max(values)
    seen = dict(zip(values, sizes, strict=True))
    if any(seen[value] != size for value, size in zip(values, sizes, strict=True)):
        return None
    slope = Fraction(seen[high] - seen[low], high - low)
    for over in range(1, _LARGEST_STRIDE + 1):
        # Rounding down moves each end by less than one.
        least = math.ceil((slope - Fraction(1, high - low)) * over)
        most = math.floor((slope + Fraction(1, high - low)) * over)
        for factor in sorted(range(least, most + 1), key=lambda each: abs(each - slope * over)):
            if not factor:
                continue
            fits = [(over * size - factor * value, over * (size + 1) - factor * value) for value, size in seen.items()]
            first, last = max(bottom for bottom, _ in fits), min(top for _, top in fits)
            if first < last:
                # Of those that explain the same, the one nearest to nothing.
                plus = min(max(first, 0), last - 1)
                return Size(((factor, (dim,)),), plus, over)
    return None


def _sum(points: Sequence[Point], sizes: Sequence[int], dims: Sequence[Dim]) -> Size | None:
    rows = [
        [Fraction(1), *(Fraction(point[dim]) for dim in dims), Fraction(size)]
        for point, size in zip(points, sizes, strict=True)
    ]
    found = _solve(rows)
    if found is None or any(value.denominator != 1 for value in found):
        return None
    plus, *factors = map(int, found)
    return Size(tuple((factor, (dim,)) for factor, dim in zip(factors, dims, strict=True) if factor), plus)


def _solve(rows: list[list[Fraction]]) -> list[Fraction] | None:
    """Exactly what solves all rows, with 0 for what they leave open; ``None`` if nothing does."""
    width = len(rows[0]) - 1
    pivots: list[int] = []
    for column in range(width):
        rank = len(pivots)
        pivot = next((index for index in range(rank, len(rows)) if rows[index][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        head = rows[rank][column]
        rows[rank] = [value / head for value in rows[rank]]
        for index, row in enumerate(rows):
            if index != rank and row[column]:
                factor = row[column]
                rows[index] = [value - factor * other for value, other in zip(row, rows[rank], strict=True)]
        pivots.append(column)
    if any(row[width] for row in rows[len(pivots) :]):
        return None
    found = [Fraction(0)] * width
    for index, column in enumerate(pivots):
        found[column] = rows[index][width]
    return found


def _product(points: Sequence[Point], sizes: Sequence[int], dims: Sequence[Dim]) -> Size | None:
    for chosen in _subsets(dims):
        products = [math.prod(point[dim] for dim in chosen) for point in points]
        telling = [(size, product) for size, product in zip(sizes, products, strict=True) if product]
        if not telling:
            continue
        ratio = Fraction(*telling[0])
        if all(size == ratio * product for size, product in zip(sizes, products, strict=True)):
            return Size(((ratio.numerator, chosen),), 0, ratio.denominator)
    return None


def _subsets(dims: Sequence[Dim]) -> Iterator[tuple[Dim, ...]]:
    for count in range(2, min(len(dims), _MOST_FACTORS) + 1):
        yield from combinations(dims, count)


def _tree(size: Size | None) -> Any:
    if size is None:
        return None
    if not size.terms and size.over == 1:
        return size.plus
    return {
        "terms": [[factor, [list(dim) for dim in dims]] for factor, dims in size.terms],
        "plus": size.plus,
        "over": size.over,
    }


def _size(tree: Any) -> Size | None:
    if tree is None:
        return None
    if isinstance(tree, int):
        return Size(plus=_whole(tree))
    terms = tuple(
        (_whole(factor), tuple((_whole(index), _whole(axis)) for index, axis in dims)) for factor, dims in tree["terms"]
    )
    over = _whole(tree["over"])
    if over < 1 or any(index < 0 or axis < 0 for _, dims in terms for index, axis in dims):
        raise ValueError(f"not a size: {tree}")
    return Size(terms, _whole(tree["plus"]), over)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r}: expected a whole number")
    return value
