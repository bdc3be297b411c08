"""The arguments of a call padded to their buckets, and the answer cropped to what the call asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphcache.buckets.padding import cropped, holds, padded
from graphcache.buckets.spec import POWERS_OF_TWO, Buckets, InputAxis, Number
from graphcache.capture.engine_like import EngineLike
from graphcache.errors import ConfigError, shown

Margin = Callable[[Tensor, InputAxis], Number]
"""What the margin of an input holds on one of its axes."""
Change = Callable[[Tensor, Mapping[int, InputAxis]], Tensor]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""
Parameters = Signature | Sequence[str]
"""Of a module's ``forward``; or the names of an engine's inputs, which need not be identifiers."""


@dataclass(frozen=True, slots=True)
class ArgumentRef:
    """An argument of a function: its position and the name under which it can be passed, ``None`` for what it lacks."""

    index: int | None
    name: str | None

    def get(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The argument in a call, ``None`` where it is absent."""
        if self.index is not None and self.index < len(args):
            return args[self.index]
        return None if self.name is None else kwargs.get(self.name)

    def put(self, value: Any, args: MutableSequence[Any], kwargs: MutableMapping[str, Any]) -> None:
        """Replace the argument of a call, or pass it by its name where it is absent."""
        if self.index is not None and self.index < len(args):
            args[self.index] = value
        elif self.name is not None:
            kwargs[self.name] = value


def find_argument(key: str | int, parameters: Parameters, where: str) -> ArgumentRef:
    """The argument that a name or a position stands for."""
    if isinstance(parameters, Signature):
        kinds = {each.name: each.kind for each in parameters.parameters.values()}
    else:
        kinds = dict.fromkeys(parameters, Parameter.POSITIONAL_OR_KEYWORD)
    both = Parameter.POSITIONAL_OR_KEYWORD
    ordered = [name for name, kind in kinds.items() if kind in (Parameter.POSITIONAL_ONLY, both)]
    named = [name for name, kind in kinds.items() if kind in (both, Parameter.KEYWORD_ONLY)]
    if isinstance(key, int):
        if key < len(ordered):
            return ArgumentRef(key, ordered[key] if ordered[key] in named else None)
        if Parameter.VAR_POSITIONAL in kinds.values():
            return ArgumentRef(key, None)
        raise ConfigError(f"{where}: there are {len(ordered)} positional arguments; expected the position of one")
    if key in ordered:
        return ArgumentRef(ordered.index(key), key if key in named else None)
    if key in named or Parameter.VAR_KEYWORD in kinds.values():
        return ArgumentRef(None, key)
    known = list(dict.fromkeys([*ordered, *named]))
    raise ConfigError(f"{where}: no argument has this name; expected one of {shown(known)}")


@dataclass(frozen=True, slots=True)
class Fit:
    """The sizes of a call and the buckets they go to, by the names of the axes."""

    real: Mapping[str, int]
    padded: Mapping[str, int]

    @property
    def is_exact(self) -> bool:
        """Whether every size is a bucket already."""
        return self.real == self.padded

    @property
    def grown(self) -> list[str]:
        """The names of the axes that are padded."""
        return [name for name in self.real if self.real[name] != self.padded[name]]


class Padder:
    """Pads the calls of one module: arguments that are tensors, not tensors inside a list or a dictionary."""

    def __init__(self, buckets: Buckets, parameters: Parameters) -> None:
        self.buckets = buckets
        self._parameters = parameters
        self._refs = {key: find_argument(key, parameters, f"buckets[{key!r}]") for key in buckets.inputs}
        for key, ref in self._refs.items():
            if (other := next(each for each in self._refs if self._refs[each] == ref)) != key:
                raise ConfigError(f"buckets[{key!r}] is the argument of buckets[{other!r}]; expected it once")
            if key in buckets.masks and ref.name is None:
                raise ConfigError(f"buckets[{key!r}]: a mask that cannot be passed by its name; expected one that can")

    def with_outputs(self, outputs: Mapping[int, Mapping[int, str]]) -> Padder:
        """The same, cropping these axes of the answer."""
        return Padder(self.buckets.with_outputs(outputs), self._parameters)

    def fit(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Fit | str:
        """What a call is padded to, or in words why it cannot be padded."""
        sizes = self.sizes(args, kwargs)
        if isinstance(sizes, str):
            return sizes
        buckets: dict[str, int] = {}
        for symbol, size in sizes.items():
            bucket = self.buckets.up(symbol, size)
            if bucket is None:
                return f"{symbol} is {size}, more than its largest bucket, {self.buckets.sizes[symbol][-1]}"
            buckets[symbol] = bucket
        return Fit(sizes, buckets)

    def sizes(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, int] | str:
        """The sizes of a call by the names of its axes, or in words why it has none.

        An argument that is absent or ``None`` is passed over.
        """
        found: dict[str, int] = {}
        for key, ref in self._refs.items():
            value = ref.get(args, kwargs)
            if value is None:
                continue
            if type(value) not in (Tensor, torch.nn.Parameter) or value.is_nested or value.layout is not torch.strided:
                return f"{key!r} is of type {type(value).__name__}; only a plain tensor can be padded"
            if key in self.buckets.masks and value.dim() != len(self.buckets.inputs[key]):
                return f"the mask {key!r} has {value.dim()} dimensions; {len(self.buckets.inputs[key])} are named"
            for position, axis in self._axes(key, value):
                size = value.shape[position]
                if found.setdefault(axis.symbol, size) != size:
                    return f"{axis.symbol} is {found[axis.symbol]}, but {size} on axis {position} of {key!r}"
        if not found:
            return "there is no argument that has buckets"
        missing = [symbol for mask in self.buckets.masks.values() for symbol in mask.axes if symbol not in found]
        return f"no argument of the call shows {missing[0]}, which a mask needs" if missing else found

    def pad(
        self, fit: Fit, args: Sequence[Any], kwargs: Mapping[str, Any], *, margin: Margin | None = None
    ) -> Arguments:
        """The arguments in their buckets; what needs no padding is passed on as it is.

        One tensor given several times stays one tensor, if it is padded alike each time. ``margin`` replaces the fill
        values, but for those of masks.
        """
        new_args, new_kwargs = list(args), dict(kwargs)
        given = {key: value for key, ref in self._refs.items() if (value := ref.get(args, kwargs)) is not None}
        device = next(iter(given.values())).device
        for name, mask in self.buckets.masks.items():
            if name not in given:
                sizes = [fit.real[symbol] for symbol in mask.axes]
                given[name] = torch.ones(sizes, dtype=mask.dtype, device=device)
        made: dict[Any, Tensor] = {}
        for key, value in given.items():
            shape, fills = self._margins(fit, key, value, margin)
            alike = id(value), *shape, *fills.items()
            if alike not in made:
                made[alike] = padded(value, shape, fills) if fills else value
            self._refs[key].put(made[alike], new_args, new_kwargs)
        return tuple(new_args), new_kwargs

    def crop(self, fit: Fit, answer: Any) -> Any:
        """What a call of the real sizes would have answered; a cropped tensor may share memory with the answer."""
        if self.buckets.outputs is None:
            raise ConfigError("outputs: it is not said which axes to crop; expected Buckets(..., outputs=...)")
        # Taking a single tensor apart and putting it together takes longer than cropping it.
        bare = type(answer) is Tensor
        leaves, structure = ([answer], None) if bare else pytree.tree_flatten(answer, is_leaf=is_size)
        tensors = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for place, axes in self.buckets.outputs.items():
            if place >= len(tensors):
                raise ConfigError(f"outputs[{place}]: the answer has {len(tensors)} tensors; expected the place of one")
            tensor = leaves[tensors[place]]
            for axis, symbol in axes.items():
                _check_output(fit, f"outputs[{place}][{axis}]", tensor, axis, symbol)
            leaves[tensors[place]] = cropped(tensor, {axis: fit.real[symbol] for axis, symbol in axes.items()})
        return leaves[0] if structure is None else pytree.tree_unflatten(leaves, structure)

    def exchange(self, change: Change, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        """The arguments with another tensor for each that is given and has buckets, masks among them.

        One tensor given several times stays one tensor, if its axes are alike each time and it gets one shape.
        ``change`` takes a tensor and its axes that have buckets, counted from the front.
        """
        new_args, new_kwargs = list(args), dict(kwargs)
        made: dict[Any, Tensor] = {}
        for key, ref in self._refs.items():
            if (value := ref.get(args, kwargs)) is not None:
                axes = dict(self._axes(key, value))
                other = change(value, axes)
                alike = id(value), other.shape, *[(at, axis.fill, axis.is_mask) for at, axis in axes.items()]
                ref.put(made.setdefault(alike, other), new_args, new_kwargs)
        return tuple(new_args), new_kwargs

    def start(self, sizes: Mapping[str, int], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        """The arguments cut to smaller sizes, as copies."""

        def cut(value: Tensor, axes: Mapping[int, InputAxis]) -> Tensor:
            return cropped(value, {place: sizes[axis.symbol] for place, axis in axes.items()}).clone()

        return self.exchange(cut, args, kwargs)

    def _axes(self, key: str | int, value: Tensor) -> list[tuple[int, InputAxis]]:
        """The axes of an argument that have buckets, each with its number counted from the front."""
        return list(zip(self.buckets.places(key, value.dim()), self.buckets.inputs[key], strict=True))

    def _margins(
        self, fit: Fit, key: str | int, value: Tensor, margin: Margin | None
    ) -> tuple[list[int], dict[int, Number]]:
        """The shape of a padded argument, and what the margin on each axis that grows holds."""
        shape = list(value.shape)
        fills: dict[int, Number] = {}
        for position, axis in self._axes(key, value):
            if fit.padded[axis.symbol] == shape[position]:
                continue
            shape[position] = fit.padded[axis.symbol]
            own = 0 if axis.fill is None else axis.fill
            fill = fills[position] = own if margin is None or axis.is_mask else margin(value, axis)
            if not holds(value.dtype, fill):
                raise ConfigError(
                    f"buckets[{key!r}][{axis.axis}].fill={shown(fill)}: {value.dtype} has no such value; expected one "
                    f"that the argument can hold"
                )
        return shape, fills


def is_size(value: Any) -> bool:
    """Whether a value is a ``torch.Size``, which pytree would take apart and give back as a tuple."""
    return isinstance(value, torch.Size)


def _check_output(fit: Fit, where: str, tensor: Tensor, axis: int, symbol: str) -> None:
    """Raise if an output has not the axis and size that were said."""
    if not -tensor.dim() <= axis < tensor.dim():
        raise ConfigError(f"{where}: the output has {tensor.dim()} dimensions; expected an axis that it has")
    if symbol not in fit.real:
        raise ConfigError(f"{where}: no argument of this call shows {symbol}; expected one that does")
    if tensor.shape[axis] != fit.padded[symbol]:
        raise ConfigError(
            f"{where}: the output has size {tensor.shape[axis]} there; expected that of {symbol}, which is "
            f"{fit.padded[symbol]}, padded from {fit.real[symbol]}"
        )


def engine_buckets(buckets: Buckets, module: EngineLike) -> Buckets:
    """The buckets that the engine takes: listed sizes must fit a profile, powers of two are chosen to."""
    inputs = module.engine.inputs
    if module.engine.aliases:
        raise ConfigError(f"buckets: {module.name} updates an input in place, and a padded one would be a copy")
    sizes = dict(buckets.sizes)
    for key in buckets.inputs:
        ref = find_argument(key, module.input_binding_names, f"buckets[{key!r}]")
        assert ref.index is not None
        binding = inputs[ref.index]
        if binding.on_host:
            raise ConfigError(
                f"buckets[{key!r}]: {module.name} reads {binding.name!r} on the host, and its values are sizes; "
                f"expected an input on the device"
            )
        for axis, position in zip(buckets.inputs[key], buckets.places(key, len(binding.shape)), strict=True):
            where = f"buckets[{key!r}][{axis.axis}]"
            ranges = [profile[position] for profile in binding.ranges]
            shown_ranges = ", ".join(f"{low}" if low == high else f"{low}..{high}" for low, high in ranges)
            wanted = sizes[axis.symbol]
            fitting = tuple(size for size in wanted if any(low <= size <= high for low, high in ranges))
            if buckets.sizes[axis.symbol] is not POWERS_OF_TWO and fitting != wanted:
                wrong = next(size for size in wanted if size not in fitting)
                raise ConfigError(f"{where}: the size {wrong}; expected one that a profile takes: {shown_ranges}")
            if not fitting:
                raise ConfigError(
                    f"{where}='powers_of_two': none of them is a size that a profile takes: {shown_ranges}"
                )
            sizes[axis.symbol] = fitting
    return buckets.with_sizes(sizes)
