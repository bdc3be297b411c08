"""How the shapes of an engine's outputs follow from those of its inputs, for compilers that trace open sizes.

TensorRT tells the shapes of outputs for given shapes of inputs, not the rule behind them. So rules of four kinds are
fitted to observations (:func:`fit`). A rule may still be wrong elsewhere: whoever uses one compares it with each run.
"""

from __future__ import annotations

import json
import math
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import combinations
from typing import Any

import torch

from graphcache.engines.engine import Engine, keeping_the_current_device

Dim = tuple[int, int]
"""Which input, and which of its axes."""
Point = Mapping[Dim, int]
"""Sizes of axes."""

_MAX_STRIDE = 32
_MAX_FACTORS = 4
"""Axes of one product."""
_MAX_VALUES = 40
"""Consecutive values of one axis that are asked for, so that a stride shows."""
_JOINT_POINTS = 24
"""Points at which all axes differ."""
_MAX_PARTNERS = 4
"""Axes that change together with another one."""


@dataclass(frozen=True, slots=True)
class Size:
    """One size of an output: ``(sum of factor * product of sizes + plus) // over``. A term is a factor and its axes."""

    terms: tuple[tuple[int, tuple[Dim, ...]], ...] = ()
    plus: int = 0
    over: int = 1

    def of(self, shapes: Sequence[Sequence[Any]]) -> Any:
        """The size for some shapes of the inputs, which may be symbolic."""
        total: Any = self.plus
        for factor, dims in self.terms:
            total = total + factor * math.prod(shapes[index][axis] for index, axis in dims)
        return total // self.over if self.over != 1 else total


@dataclass(frozen=True, slots=True)
class OutputShapes:
    """The shapes of all outputs; a size that no rule explains is ``None``."""

    outputs: tuple[tuple[Size | None, ...], ...]

    def of(self, shapes: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
        """The shapes of the outputs for some shapes of the inputs."""
        return [tuple(None if size is None else size.of(shapes) for size in output) for output in self.outputs]

    @property
    def text(self) -> str:
        """As JSON."""
        trees = [[None if size is None else asdict(size) for size in output] for output in self.outputs]
        return json.dumps(trees, separators=(",", ":"))

    @classmethod
    def read(cls, text: str) -> OutputShapes:
        """From the JSON of :attr:`text`."""
        try:
            return cls(tuple(tuple(_size(size) for size in output) for output in json.loads(text)))
        except (TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"not the shapes of outputs: {text[:100]}") from error


def output_shapes(engine: Engine) -> OutputShapes:
    """How the shapes of an engine's outputs follow from those of its inputs, within its profiles.

    It makes an execution context and sets shapes on it; nothing runs. Axes that TensorRT refuses to change alone are
    changed together with others of the same range. That one of them may also be 1, and is broadcast, is not part of
    the rule. Host shape tensors take values at random, so that a size that depends on them is unknown.
    """
    points: list[Point] = []
    found: list[list[tuple[int, ...]]] = []
    with keeping_the_current_device(), engine.collect_errors():
        context = engine.new_context()
        for profile in range(engine.profiles):
            probe = _ShapeProbe(engine, context, profile)
            for point in probe.points():
                if (shapes := probe.shapes(point)) is not None:
                    points.append(point)
                    found.append(shapes)
        del context, probe

    def rule(output: int, axis: int) -> Size | None:
        sizes = [shapes[output][axis] for shapes in found]
        # A size is negative where only running the engine will tell.
        return fit(points, sizes) if sizes and min(sizes) >= 0 else None

    return OutputShapes(
        tuple(
            tuple(rule(index, axis) for axis in range(len(binding.shape)))
            for index, binding in enumerate(engine.outputs)
        )
    )


def fit(points: Sequence[Point], sizes: Sequence[int]) -> Size | None:
    """The simplest rule that explains a size at every point; ``None`` if none of the kinds known here does.

    In this order: a constant; one axis, scaled, shifted, divided and rounded down, as a stride does; the sum of two
    axes and a constant, as a concatenation makes; a product of axes, as flattening makes.
    """
    if len(set(sizes)) == 1:
        return Size(plus=sizes[0])
    # An axis that never changes explains nothing.
    dims = [dim for dim in points[0] if len({point[dim] for point in points}) > 1]
    for dim in dims:
        if (found := _one_axis([point[dim] for point in points], sizes, dim)) is not None:
            return found
    return _sum(points, sizes, dims) or _product(points, sizes, dims)


def _one_axis(values: Sequence[int], sizes: Sequence[int], dim: Dim) -> Size | None:
    """``(factor * axis + plus) // over``."""
    low, high = min(values), max(values)
    seen = dict(zip(values, sizes, strict=True))
    if any(seen[value] != size for value, size in zip(values, sizes, strict=True)):
        return None
    slope = Fraction(seen[high] - seen[low], high - low)
    for over in range(1, _MAX_STRIDE + 1):
        # Rounding down moves each end by less than one.
        least = math.ceil((slope - Fraction(1, high - low)) * over)
        most = math.floor((slope + Fraction(1, high - low)) * over)
        for factor in sorted(range(least, most + 1), key=lambda each: abs(each - slope * over)):
            first = max(over * size - factor * value for value, size in seen.items())
            last = min(over * (size + 1) - factor * value for value, size in seen.items())
            if factor and first < last:
                # Of those that explain the same, the one nearest to zero.
                return Size(((factor, (dim,)),), min(max(first, 0), last - 1), over)
    return None


def _sum(points: Sequence[Point], sizes: Sequence[int], dims: Sequence[Dim]) -> Size | None:
    """``first factor * one axis + second factor * another axis + plus``."""
    for one, other in combinations(dims, 2):
        rows = [(point[one], point[other], size) for point, size in zip(points, sizes, strict=True)]
        x0, y0, s0 = rows[0]
        steps = [(x - x0, y - y0, s - s0) for x, y, s in rows[1:]]
        pair = next(((a, b) for a, b in combinations(steps, 2) if a[0] * b[1] != a[1] * b[0]), None)
        if pair is None:
            continue
        (ax, ay, a), (bx, by, b) = pair
        whole = ax * by - ay * bx
        first, second = Fraction(a * by - b * ay, whole), Fraction(ax * b - bx * a, whole)
        if first.denominator == second.denominator == 1 and all(first * x + second * y == s for x, y, s in steps):
            terms = tuple((int(factor), (dim,)) for factor, dim in ((first, one), (second, other)) if factor)
            return Size(terms, int(s0 - first * x0 - second * y0))
    return None


def _product(points: Sequence[Point], sizes: Sequence[int], dims: Sequence[Dim]) -> Size | None:
    """A ratio times the product of some axes."""
    for chosen in _subsets(dims, 2, _MAX_FACTORS):
        products = [math.prod(point[dim] for dim in chosen) for point in points]
        ratio = next((Fraction(size, product) for size, product in zip(sizes, products, strict=True) if product), None)
        if ratio and all(size == ratio * product for size, product in zip(sizes, products, strict=True)):
            return Size(((ratio.numerator, chosen),), 0, ratio.denominator)
    return None


def _subsets(dims: Sequence[Dim], least: int, most: int) -> Iterator[tuple[Dim, ...]]:
    """Smaller subsets first."""
    for count in range(least, min(len(dims), most) + 1):
        yield from combinations(dims, count)


class _ShapeProbe:
    """Asks TensorRT for the shapes of outputs under one profile of a context."""

    def __init__(self, engine: Engine, context: Any, profile: int) -> None:
        self._engine = engine
        self._context = context
        self._random = random.Random(0)
        self._held: list[array[int]] = []
        self._profile = profile
        stream = torch.cuda.current_stream(engine.device)
        if profile:
            context.set_optimization_profile_async(profile, stream.cuda_stream)
            stream.synchronize()
        self._ranges: dict[Dim, tuple[int, int]] = {
            (index, axis): bounds
            for index, binding in enumerate(engine.inputs)
            if not binding.on_host
            for axis, bounds in enumerate(binding.ranges[profile])
        }

    def shapes(self, point: Point) -> list[tuple[int, ...]] | None:
        """The shapes of the outputs at a point; ``None`` if TensorRT refuses it."""
        for index, binding in enumerate(self._engine.inputs):
            shape = binding.shape if binding.on_host else [point[index, axis] for axis in range(len(binding.shape))]
            if not self._context.set_input_shape(binding.name, tuple(shape)):
                return None
            if binding.on_host:
                ranges = binding.ranges[self._profile]
                code = "i" if binding.dtype is torch.int32 else "q"
                values = array(code, [self._random.randint(low, high) for low, high in ranges] or [0])
                # TensorRT may read them at any time.
                self._held.append(values)
                self._context.set_tensor_address(binding.name, values.buffer_info()[0])
        try:
            if self._context.infer_shapes():
                return None
        except RuntimeError:
            return None
        return [tuple(self._context.get_tensor_shape(binding.name)) for binding in self._engine.outputs]

    def points(self) -> Iterator[dict[Dim, int]]:
        """The corners, each axis by itself from either corner, and all of them at random."""
        low = {dim: bounds[0] for dim, bounds in self._ranges.items()}
        high = {dim: bounds[1] for dim, bounds in self._ranges.items()}
        yield low
        yield high
        groups = self._groups(high)
        for group in groups:
            first, last = self._ranges[group[0]]
            near = {*range(first, min(first + _MAX_VALUES, last) + 1), *range(max(first, last - 8), last + 1)}
            for value in sorted({*near, (first + last) // 2}):
                yield low | dict.fromkeys(group, value)
                yield high | dict.fromkeys(group, value)
        draw = random.Random(1)
        for _ in range(_JOINT_POINTS if len(groups) > 1 else 0):
            point = dict(low)
            for group in groups:
                point.update(dict.fromkeys(group, draw.randint(*self._ranges[group[0]])))
            yield point

    def _groups(self, high: Point) -> list[list[Dim]]:
        """Axes that change together: the fewest that TensorRT lets change without the others."""
        left = [dim for dim, (first, last) in self._ranges.items() if first < last]
        groups = []
        while left:
            first, *others = left
            alike = [dim for dim in others if self._ranges[dim] == self._ranges[first]]
            subsets = ([first, *chosen] for chosen in _subsets(alike, 0, _MAX_PARTNERS))
            group = next((each for each in subsets if self._may_change(high, each)), [first, *alike])
            groups.append(group)
            left = [dim for dim in left if dim not in group]
        return groups

    def _may_change(self, high: Point, group: Sequence[Dim]) -> bool:
        """Whether some axes may differ from the corner. 1 is not tried, as it may be broadcast."""
        first, last = self._ranges[group[0]]
        values = {value for value in (last - 1, (first + last) // 2) if max(first, 2) <= value < last}
        return not values or any(
            self.shapes({**high, **dict.fromkeys(group, value)}) is not None for value in sorted(values)
        )


def _size(tree: Any) -> Size | None:
    """A size of what JSON holds: its fields, ``None``, or, written by 0.1.0, the number that it is."""
    if tree is None:
        return None
    if isinstance(tree, int):
        tree = {"terms": (), "plus": tree, "over": 1}
    terms = tuple((factor, tuple((index, axis) for index, axis in dims)) for factor, dims in tree["terms"])
    places = [number for _, dims in terms for dim in dims for number in dim]
    numbers = [tree["plus"], tree["over"], *(factor for factor, _ in terms), *places]
    if any(type(each) is not int for each in numbers) or tree["over"] < 1 or min(places, default=0) < 0:
        raise ValueError(f"not a size: {tree}")
    return Size(terms, tree["plus"], tree["over"])
