"""Asking TensorRT for the shapes of an engine's outputs at some shapes of its inputs, to learn the rule behind them."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import torch

from graphcache.engines.bindings import Binding
from graphcache.engines.engine import Engine, keeping_the_current_device
from graphcache.engines.expressions import Dim, OutputShapes, Size, fit

_MOST_VALUES = 40
"""Of one axis: consecutive ones, so that a stride shows."""
_MOST_TOGETHER = 24
_MOST_PARTNERS = 4
_CODES = {torch.int32: "i", torch.int64: "q"}
Ranges = dict[Dim, tuple[int, int]]


def output_shapes(engine: Engine) -> OutputShapes:
    """How the shapes of an engine's outputs follow from those of its inputs, within its profiles.

    It makes an execution context and sets shapes on it; nothing runs. Axes that TensorRT refuses to change alone are
    changed together with others of the same range; that one of them may also be 1, and is broadcast, is not part of
    the rule. Host shape tensors take values at random, so that a size that depends on them is found to be unknown.

    Args:
        engine: On the current device.

    Raises:
        EngineExecutionError: If TensorRT makes no context.
    """
    with keeping_the_current_device(), engine.collect_errors():
        points, found = _observed(engine)
    return OutputShapes(
        tuple(
            tuple(
                _rule(points, [shapes[index][axis] for shapes in found]) if points else None
                for axis in range(len(binding.shape))
            )
            for index, binding in enumerate(engine.outputs)
        )
    )


def _observed(engine: Engine) -> tuple[list[dict[Dim, int]], list[list[tuple[int, ...]]]]:
    """Points, and the shapes of the outputs there."""
    context = engine.new_context()
    points: list[dict[Dim, int]] = []
    found: list[list[tuple[int, ...]]] = []
    for profile in range(engine.profiles):
        asked = _Asked(engine, context, profile)
        for point in _points(asked):
            if (shapes := asked.shapes(point)) is not None:
                points.append(point)
                found.append(shapes)
    return points, found


def _rule(points: Sequence[dict[Dim, int]], sizes: Sequence[int]) -> Size | None:
    # Negative where only running the engine will tell.
    return None if min(sizes) < 0 else fit(points, sizes)


class _Asked:
    """One profile of a context that is asked for shapes."""

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
        self.ranges: Ranges = {
            (index, axis): (low, high)
            for index, binding in enumerate(engine.inputs)
            if not binding.on_host
            for axis, (low, high) in enumerate(binding.ranges[profile])
        }

    def shapes(self, point: dict[Dim, int]) -> list[tuple[int, ...]] | None:
        """The shapes of the outputs at a point; ``None`` if TensorRT refuses it."""
        for index, binding in enumerate(self._engine.inputs):
            shape = binding.shape if binding.on_host else [point[index, axis] for axis in range(len(binding.shape))]
            if not self._context.set_input_shape(binding.name, tuple(shape)):
                return None
            if binding.on_host:
                self._set_values(binding)
        try:
            if self._context.infer_shapes():
                return None
        except RuntimeError:
            return None
        return [tuple(self._context.get_tensor_shape(binding.name)) for binding in self._engine.outputs]

    def _set_values(self, binding: Binding) -> None:
        ranges = binding.ranges[self._profile]
        values = array(_CODES[binding.dtype], [self._random.randint(low, high) for low, high in ranges] or [0])
        # TensorRT reads them whenever it likes.
        self._held.append(values)
        self._context.set_tensor_address(binding.name, values.buffer_info()[0])


def _points(asked: _Asked) -> Iterator[dict[Dim, int]]:
    """The corners, each axis by itself from either corner, and all of them at random."""
    low = {dim: bounds[0] for dim, bounds in asked.ranges.items()}
    high = {dim: bounds[1] for dim, bounds in asked.ranges.items()}
    yield low
    yield high
    groups = _groups(asked, high)
    for group in groups:
        first, last = asked.ranges[group[0]]
        for value in _values(first, last):
            yield low | dict.fromkeys(group, value)
            yield high | dict.fromkeys(group, value)
    draw = random.Random(1)
    for _ in range(_MOST_TOGETHER if len(groups) > 1 else 0):
        point = dict(low)
        for group in groups:
            point.update(dict.fromkeys(group, draw.randint(*asked.ranges[group[0]])))
        yield point


def _values(first: int, last: int) -> list[int]:
    near = {*range(first, min(first + _MOST_VALUES, last) + 1), *range(max(first, last - 8), last + 1)}
    return sorted({*near, (first + last) // 2})


def _groups(asked: _Asked, high: dict[Dim, int]) -> list[list[Dim]]:
    """Axes that change together: the fewest that TensorRT lets change without the others."""
    left = [dim for dim, (first, last) in asked.ranges.items() if first < last]
    groups = []
    while left:
        first, *others = left
        alike = [dim for dim in others if asked.ranges[dim] == asked.ranges[first]]
        found = [first, *alike]
        for chosen in _subsets(alike):
            if _may_change(asked, high, [first, *chosen]):
                found = [first, *chosen]
                break
        groups.append(found)
        left = [dim for dim in left if dim not in found]
    return groups


def _subsets(dims: Sequence[Dim]) -> Iterator[tuple[Dim, ...]]:
    for count in range(min(len(dims), _MOST_PARTNERS) + 1):
        yield from combinations(dims, count)


def _may_change(asked: _Asked, high: dict[Dim, int], group: Sequence[Dim]) -> bool:
    """Whether some axes may have another size than at the corner; 1 is no other size, as it may be broadcast."""
    first, last = asked.ranges[group[0]]
    values = {value for value in (last - 1, (first + last) // 2) if max(first, 2) <= value < last}
    return not values or any(asked.shapes(high | dict.fromkeys(group, value)) is not None for value in sorted(values))
