"""The ``buckets`` option: which sizes inputs are padded to.

::

    {"x": {0: [1, 2, 4, 8], 1: "powers_of_two"}}             two axes of x, each by itself
    {"x": {0: {"sizes": [8, 64], "fill": -1}}}               the margin holds -1
    {"x": {0: {"sizes": [8, 64], "name": "batch"}},          two inputs whose sizes agree: one name,
     "y": {0: {"sizes": [8, 64], "name": "batch"}}}          or one and the same Axis object
    {"ids": {1: Axis([16, 64], name="length")},
     "mask": Mask(["length"])}                               False in the margin; made where the caller gives none
    {0: {0: [1, 2, 4]}}                                      the first positional argument
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch

from graphcache.errors import ConfigError, shown

Number = bool | int | float

MAX_SIZE = 2**31 - 1
"""The largest bucket: the largest dimension of kernels that count in 32 bits."""
MAX_SIZES_PER_AXIS = 1024
"""Each bucket may become a graph."""
POWERS_OF_TWO = tuple(2**power for power in range(31))
"""What ``"powers_of_two"`` stands for; this very object where that was said."""
_MAX_AXES = 64


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """Buckets of one axis. One object for two axes says that their sizes are always equal.

    Args:
        sizes: Whole numbers from 1 on, in any order; or ``"powers_of_two"``, which is 1, 2, 4 and so on to 2**30.
        fill: What the margin holds. ``None`` is 0, and a promise that the module's answer does not depend on it. A
            number is one that the module needs there, such as ``-inf`` before a maximum.
        name: One name for two axes says the same as one object.
    """

    sizes: Sequence[int] | str
    fill: Number | None = None
    name: str = ""


@dataclass(frozen=True, slots=True)
class Mask:
    """An input that is true where the others are real and false in the margin.

    Where the caller gives it, its margin is filled with false. Where it is absent or ``None``, it is made and passed as
    a keyword argument.

    Args:
        axes: Names of its axes, all of them, as :class:`Axis` gives them or ``"x[0]"`` for axis 0 of ``x``.
        dtype: Of a mask that is made here.
    """

    axes: Sequence[str]
    dtype: torch.dtype = torch.bool


@dataclass(frozen=True, slots=True)
class InputAxis:
    """One axis of one input: its number (from the end if negative), the name of its sizes, what its margin holds."""

    axis: int
    symbol: str
    fill: Number | None
    is_mask: bool = False


class Buckets:
    """The ``buckets`` option, checked.

    Args:
        inputs: Name or position of an argument -> axis -> its sizes; or a :class:`Mask`.
        outputs: Which axes of the answer are as long as which axes of the inputs, to be cropped: the place of a tensor
            among those of the answer, depth first -> axis -> name of the input's axis. ``None`` where it is not said.

    Raises:
        ConfigError: Naming the field.

    Example:
        >>> buckets = Buckets({"x": {0: [4, 1, 2], 1: "powers_of_two"}}, outputs={0: {0: "x[0]"}})
        >>> buckets.target("x", (3, 100, 7))
        (4, 128, 7)
        >>> buckets.target("x", (5, 100, 7)) is None
        True
    """

    def __init__(self, inputs: Mapping[Any, Any], *, outputs: Mapping[Any, Any] | None = None) -> None:
        if not isinstance(inputs, Mapping) or not inputs:
            raise ConfigError(f"buckets={shown(inputs)}: expected arguments with axes, such as {{'x': {{0: [1, 8]}}}}")
        self.sizes: dict[str, tuple[int, ...]] = {}
        """Name of an axis -> its buckets, ascending."""
        self.inputs: dict[str | int, tuple[InputAxis, ...]] = {}
        self.masks: dict[str, Mask] = {}
        names: dict[int, str] = {}
        for key, value in inputs.items():
            where = f"buckets[{shown(key)}]"
            if type(key) not in (str, int) or key == "" or (type(key) is int and not 0 <= key < MAX_SIZE):
                raise ConfigError(f"{where}: expected an argument's name, or its position from 0 on")
            if type(value) is Mask:
                continue
            if not isinstance(value, Mapping) or not value:
                raise ConfigError(f"{where}={shown(value)}: expected axes with their sizes, such as {{0: [1, 8]}}")
            self.inputs[key] = tuple(
                self._input_axis(f"{where}[{shown(axis)}]", f"{key}[{shown(axis)}]", axis, spec, names)
                for axis, spec in value.items()
            )
        for key, value in inputs.items():
            if type(value) is Mask:
                self._add_mask(key, value)
        self.outputs = None if outputs is None else self._output_axes(outputs)

    @classmethod
    def of(cls, option: Any) -> Buckets:
        """Buckets from what the option holds: buckets, or a mapping of inputs."""
        return option if type(option) is Buckets else cls(option)

    def with_outputs(self, outputs: Mapping[int, Mapping[int, str]]) -> Buckets:
        """The same inputs with these outputs."""
        other = copy(self)
        other.outputs = self._output_axes(outputs)
        return other

    def with_sizes(self, sizes: Mapping[str, tuple[int, ...]]) -> Buckets:
        """The same axes with these buckets, ascending, for some of their names."""
        other = copy(self)
        other.sizes = {**self.sizes, **sizes}
        return other

    def up(self, symbol: str, size: int) -> int | None:
        """The smallest bucket that holds a size; ``None`` where none does. An empty axis goes to the smallest."""
        sizes = self.sizes[symbol]
        place = bisect_left(sizes, size)
        return sizes[place] if place < len(sizes) else None

    def target(self, argument: str | int, shape: Sequence[int]) -> tuple[int, ...] | None:
        """The shape that an input is padded to; ``None`` if it is larger than the largest bucket."""
        if argument not in self.inputs:
            raise ConfigError(f"buckets[{shown(argument)}]: there are none; expected one of {list(self.inputs)}")
        target = list(shape)
        for axis, place in zip(self.inputs[argument], self.places(argument, len(shape)), strict=True):
            size = self.up(axis.symbol, shape[place])
            if size is None:
                return None
            target[place] = size
        return tuple(target)

    def places(self, argument: str | int, rank: int) -> list[int]:
        """The axes of an input of so many dimensions that have buckets, counted from the front."""
        found: list[int] = []
        for axis in self.inputs[argument]:
            where = f"buckets[{argument!r}][{axis.axis}]"
            place = axis.axis + rank if axis.axis < 0 else axis.axis
            if not 0 <= place < rank:
                raise ConfigError(f"{where}: the argument has {rank} dimensions; expected an axis that it has")
            if place in found:
                raise ConfigError(f"{where}: axis {place} of {rank} is named twice; expected it once")
            found.append(place)
        return found

    def _input_axis(self, where: str, usual: str, axis: Any, spec: Any, names: dict[int, str]) -> InputAxis:
        _check_axis(where, axis)
        if isinstance(spec, Mapping):
            unknown = [key for key in spec if type(key) is not str or key not in ("sizes", "fill", "name")]
            if unknown or "sizes" not in spec:
                raise ConfigError(f"{where}={shown(spec)}: expected 'sizes', and maybe 'fill' and 'name'")
            spec = Axis(**spec)
        given = spec if type(spec) is Axis else Axis(spec)
        if type(given.name) is not str:
            raise ConfigError(f"{where}.name={shown(given.name)}: expected text")
        if given.fill is not None and not _is_number(given.fill):
            raise ConfigError(f"{where}.fill={shown(given.fill)}: expected a number that fits into 64 bits")
        symbol = given.name or (names.setdefault(id(given), usual) if given is spec else usual)
        sizes = _sizes(where, given.sizes)
        if self.sizes.setdefault(symbol, sizes) != sizes:
            raise ConfigError(
                f"{where}: the sizes {shown(list(sizes))}; {symbol!r} has {shown(list(self.sizes[symbol]))} elsewhere, "
                f"expected the same"
            )
        return InputAxis(axis, symbol, given.fill)

    def _add_mask(self, key: Any, mask: Mask) -> None:
        where = f"buckets[{key!r}]"
        if type(key) is not str:
            raise ConfigError(f"{where}: a mask at a position; expected the name under which it is given")
        if type(mask.axes) not in (list, tuple) or not mask.axes:
            raise ConfigError(f"{where}.axes={shown(mask.axes)}: expected the names of its axes, such as ['batch']")
        for name in mask.axes:
            if type(name) is not str or name not in self.sizes:
                raise ConfigError(f"{where}.axes: {shown(name)} is no axis; expected some of {list(self.sizes)}")
        if type(mask.dtype) is not torch.dtype:
            raise ConfigError(f"{where}.dtype={shown(mask.dtype)}: expected a torch.dtype")
        self.masks[key] = mask
        self.inputs[key] = tuple(InputAxis(axis, name, False, is_mask=True) for axis, name in enumerate(mask.axes))

    def _output_axes(self, outputs: object) -> dict[int, dict[int, str]]:
        if not isinstance(outputs, Mapping):
            raise ConfigError(f"outputs={shown(outputs)}: expected places with axes, such as {{0: {{0: 'x[0]'}}}}")
        found: dict[int, dict[int, str]] = {}
        for place, axes in outputs.items():
            where = f"outputs[{shown(place)}]"
            if type(place) is not int or not 0 <= place < MAX_SIZE:
                raise ConfigError(f"{where}: expected the place of a tensor among those of the answer, from 0 on")
            if not isinstance(axes, Mapping):
                raise ConfigError(f"{where}={shown(axes)}: expected axes with names, such as {{0: 'x[0]'}}")
            for axis, symbol in axes.items():
                _check_axis(f"{where}[{shown(axis)}]", axis)
                if type(symbol) is not str or symbol not in self.sizes:
                    raise ConfigError(f"{where}[{axis}]={shown(symbol)}: expected one of {list(self.sizes)}")
            found[place] = dict(axes)
        return found


def _check_axis(where: str, axis: object) -> None:
    if type(axis) is not int or not -_MAX_AXES <= axis < _MAX_AXES:
        raise ConfigError(f"{where}: expected the number of an axis, from the end if it is negative")


def _is_number(fill: object) -> bool:
    return isinstance(fill, (bool, float)) or (type(fill) is int and -(2**63) <= fill < 2**63)


def _sizes(where: str, given: object) -> tuple[int, ...]:
    """Buckets in order, each once: neither the order nor a repetition can mean anything else."""
    if type(given) is str and given == "powers_of_two":
        return POWERS_OF_TWO
    if type(given) not in (list, tuple, range):
        raise ConfigError(f"{where}={shown(given)}: expected a list of sizes, or 'powers_of_two'")
    assert isinstance(given, (list, tuple, range))
    # Sliced first, since a range may be longer than len can say.
    if not 1 <= len(given[: MAX_SIZES_PER_AXIS + 1]) <= MAX_SIZES_PER_AXIS:
        raise ConfigError(f"{where}={shown(given)}: expected from 1 to {MAX_SIZES_PER_AXIS} sizes")
    for size in given:
        if type(size) is not int or not 1 <= size <= MAX_SIZE:
            raise ConfigError(f"{where}: the size {shown(size)}; expected a whole number from 1 to {MAX_SIZE}")
    return tuple(sorted(set(given)))
