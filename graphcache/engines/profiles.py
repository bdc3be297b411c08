"""Optimisation profiles: the shapes that an engine is built for, checked against the inputs of a model."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphcache.errors import EngineBuildError

Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]
ShapeSpec = Sequence[int] | Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]]

_MAX_DIMENSION = 2**31 - 1
_VALUES = (-(2**63), 2**63 - 1)


@dataclass(frozen=True, slots=True)
class Input:
    """An input of the model."""

    name: str
    dims: Shape
    """Its dimensions; -1 is one that the model leaves open."""
    host: bool = False
    """Whether TensorRT reads its values on the host, as shapes (a shape tensor). Its range is one of values."""
    axes: tuple[str | None, ...] = ()
    """The model's names for its dimensions, where it has them."""

    @property
    def values(self) -> int:
        """How many values a host input holds."""
        return self.dims[0] if self.dims else 1

    def __str__(self) -> str:
        axes = self.axes or (None,) * len(self.dims)
        sizes = [axis or "?" if size < 0 else str(size) for size, axis in zip(self.dims, axes, strict=True)]
        return f"{self.name} ({', '.join(sizes)}){' read on the host' if self.host else ''}"


def profiles(inputs: Sequence[Input], shapes: Mapping[str, ShapeSpec] | None) -> list[dict[str, Range]]:
    """The optimisation profiles that ``shapes`` asks for, checked against the model's inputs."""
    if shapes is not None and not isinstance(shapes, Mapping):
        raise EngineBuildError(f"shapes={shapes!r}: expected a dictionary from names of inputs to shapes")
    given = dict(shapes or {})
    by_name = {each.name: each for each in inputs}
    for name in given:
        if name not in by_name:
            known = ", ".join(map(str, inputs)) or "none"
            raise EngineBuildError(
                f"shapes names {name!r}, which is not an input of the model; its inputs are: {known}"
            )
    missing = [each for each in inputs if each.name not in given and (each.host or -1 in each.dims)]
    if missing:
        example = ", ".join(f"{each.name!r}: {_example(each)}" for each in missing)
        raise EngineBuildError(
            f"the model leaves open the shape or the value of {', '.join(map(str, missing))}: pass the range to build "
            f"for as (min, opt, max), such as shapes={{{example}}}"
        )
    ranges = {name: _ranges(by_name[name], spec) for name, spec in given.items()}
    counts = {name: len(each) for name, each in ranges.items()}
    if len(set(counts.values())) > 1:
        raise EngineBuildError(
            f"shapes gives different numbers of optimisation profiles: {counts}; expected as many (min, opt, max) "
            "triples for every input"
        )
    return [{name: each[index] for name, each in ranges.items()} for index in range(max(counts.values(), default=0))]


def _example(each: Input) -> Range:
    """A range to show in a message."""
    dims = (-1,) * each.values if each.host else each.dims
    low, usual, high = (tuple(number if size < 0 else size for size in dims) for number in (1, 8, 32))
    return low, usual, high


def _ranges(each: Input, spec: ShapeSpec) -> list[Range]:
    """The ranges of one input, one for each profile."""
    name = f"shapes[{each.name!r}]"
    found: list[Range | None]
    if (shape := _shape(spec)) is not None:
        found = [(shape, shape, shape)]
    elif (triple := _triple(spec)) is not None:
        found = [triple]
    else:
        found = [_triple(item) for item in spec] if _is_sequence(spec) else []
    ranges = [item for item in found if item is not None]
    if not ranges or len(ranges) < len(found):
        raise EngineBuildError(
            f"{name}={spec!r}: expected a shape such as (1, 64), a (min, opt, max) triple of shapes, or a list of such "
            "triples, one for each optimisation profile"
        )
    for index, item in enumerate(ranges):
        _check(each, item, name if len(ranges) == 1 else f"{name}[{index}]")
    return ranges


def _is_sequence(value: Any) -> bool:
    """Whether a value is a list or the like, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _shape(value: Any) -> Shape | None:
    """A shape, if that is one."""
    if not _is_sequence(value) or any(isinstance(size, bool) for size in value):
        return None
    try:
        return tuple(operator.index(size) for size in value)
    except TypeError:
        return None


def _triple(value: Any) -> Range | None:
    """A triple of shapes, if that is one."""
    if not _is_sequence(value) or len(value) != 3:
        return None
    low, usual, high = map(_shape, value)
    return None if low is None or usual is None or high is None else (low, usual, high)


def _check(each: Input, item: Range, name: str) -> None:
    """Compare a range with an input."""
    count, unit = (each.values, "values") if each.host else (len(each.dims), "dimensions")
    least, most = _VALUES if each.host else (0, _MAX_DIMENSION)
    for which, sizes in zip(("min", "opt", "max"), item, strict=True):
        if len(sizes) != count or not all(least <= size <= most for size in sizes):
            raise EngineBuildError(
                f"{name}: {which} is {sizes}; the model's input {each} takes {count} {unit} in [{least}, {most}]"
            )
    for axis, (low, usual, high) in enumerate(zip(*item, strict=True)):
        axis_name = None if each.host or not each.axes else each.axes[axis]
        where = f"{name}, axis {axis}{f' ({axis_name})' if axis_name else ''}: min {low}, opt {usual}, max {high}"
        if not low <= usual <= high:
            raise EngineBuildError(f"{where}; expected min <= opt <= max")
        fixed = -1 if each.host else each.dims[axis]
        if fixed >= 0 and (low, high) != (fixed, fixed):
            raise EngineBuildError(f"{where}; but the model fixes that axis at {fixed}")
