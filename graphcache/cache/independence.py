"""Whether the real part of a module's answer is what it would be without padding, found by trying.

A call is padded with the declared fill, and its cropped answer held against that of the exact call. Where no fill was
declared, the module promised not to look at the margin: then it is padded with other values as well, on both sides of
everything that the input holds, and the real part has to stay as it is to the last bit, since nothing else of the two
calls differs. (A maximum over an axis padded with 0 is right as long as something positive is there.) Where a fill was
declared, the real values are moved instead, below and above it.

Trying finds a dependence that shows in the call it is given. It proves nothing for others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphcache.cache.buckets import InputAxis, Number
from graphcache.cache.padder import Call, Change, Fit, Margin, Padder, is_size
from graphcache.cache.padding import cropped
from graphcache.errors import ConfigError, shown

Run = Callable[..., Any]


class Gap(Protocol):
    """Compares two tensors; see :func:`~graphcache.graphs.verify.padded_gap`."""

    def __call__(self, got: Tensor, wanted: Tensor, *, exactly: bool = False) -> float | None:
        """How far one is from the other; ``None`` if it may be so far."""


def dependence(
    run: Run,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    padder: Padder,
    *,
    gap: Gap,
) -> str | None:
    """What differs when a call is padded; ``None`` if nothing does. Each axis is tried alone, then all together.

    Args:
        run: The module. It is called up to nine times for each axis, and must leave itself and its arguments alone.
        args: Positional arguments of a call. Where it fills its buckets, its start is tried.
        kwargs: Keyword arguments.
        padder: Which axes are padded, and which axes of the answer are cropped.
        gap: How far an output is from what it should be; ``None`` if it may be so far.

    Returns:
        One sentence, which names the axis and the output.

    Raises:
        ConfigError: If an argument has not the axis that has buckets, or cannot hold the fill.
        Exception: Whatever the module raises for the exact call.
    """
    found = padder.sizes(args, kwargs)
    if isinstance(found, str):
        return found
    if empty := [name for name, size in found.items() if size == 0]:
        return f"{empty[0]} has size 0 in this call; whether it can be padded shows only where there is something"
    judge = _Judge(gap)
    for _, fit in _trials(padder, found):
        call = padder.exchange(_start(fit), args, kwargs)
        first, second = run(*call[0], **call[1]), run(*call[0], **call[1])
        if (text := judge.compare(second, first)) is not None:
            return f"the exact call answers differently each time: {text}"
        judge.bitwise = judge.compare(second, first, exactly=True) is None
        if (text := _difference(run, call, padder, fit, first, judge)) is not None:
            grown = ", ".join(f"{each} from {fit.real[each]} to {fit.padded[each]}" for each in _grown(fit))
            return f"padding {grown} changes the answer: {text}"
    return None


def observed_outputs(
    run: Run, args: tuple[Any, ...], kwargs: Mapping[str, Any], padder: Padder
) -> dict[int, dict[int, str]]:
    """Which axes of the answer grow with which axes of the inputs, for :meth:`Padder.with_outputs`.

    Args:
        run: The module, which is called twice for each axis.
        args: Positional arguments of a call.
        kwargs: Keyword arguments.
        padder: Which axes are padded.

    Raises:
        ConfigError: If an output does not grow from the size of the axis to its bucket (a product of two axes, a
            number of rows found in the data), so that it cannot be cropped, or the call cannot be padded.
        Exception: Whatever the module raises.

    Example:
        >>> import inspect
        >>> from graphcache.cache.buckets import Buckets
        >>> def turned(x): return x.t()
        >>> padder = Padder(Buckets({"x": {0: [4], 1: [9]}}), inspect.signature(turned))
        >>> observed_outputs(turned, (torch.ones(2, 5),), {}, padder)
        {0: {1: 'x[0]', 0: 'x[1]'}}
    """
    found = padder.sizes(args, kwargs)
    if isinstance(found, str):
        raise ConfigError(f"buckets: {found}")
    outputs: dict[int, dict[int, str]] = {}
    for name, fit in _trials(padder, found):
        if len(_grown(fit)) > 1:
            continue
        call = padder.exchange(_start(fit), args, kwargs)
        padded_call = padder.pad(fit, *call)
        exact = [leaf for leaf in _leaves(run(*call[0], **call[1])) if isinstance(leaf, Tensor)]
        padded = [leaf for leaf in _leaves(run(*padded_call[0], **padded_call[1])) if isinstance(leaf, Tensor)]
        if len(exact) != len(padded):
            raise ConfigError(f"outputs: {len(exact)} tensors, but {len(padded)} once {name} is padded")
        for place, (left, right) in enumerate(zip(exact, padded, strict=True)):
            if left.dim() != right.dim():
                raise ConfigError(f"outputs[{place}]: {left.dim()} dimensions, but {right.dim()} once {name} is padded")
            for axis in range(left.dim()):
                if left.shape[axis] == right.shape[axis]:
                    continue
                if (left.shape[axis], right.shape[axis]) != (fit.real[name], fit.padded[name]):
                    raise ConfigError(
                        f"outputs[{place}][{axis}]: from {left.shape[axis]} to {right.shape[axis]} when {name} is "
                        f"padded from {fit.real[name]} to {fit.padded[name]}; expected an axis as long as {name}"
                    )
                outputs.setdefault(place, {})[axis] = name
    return outputs


def _trials(padder: Padder, sizes: Mapping[str, int]) -> Iterator[tuple[str, Fit]]:
    """Each axis padded alone, then all of them."""
    real, padded = dict(sizes), dict(sizes)
    for name, size in sizes.items():
        real[name], padded[name] = _step(padder, name, size)
    grown = [name for name in sizes if real[name] != padded[name]]
    for name in grown:
        yield name, Fit(real, {**real, name: padded[name]})
    if len(grown) > 1:
        yield "all", Fit(real, padded)


def _step(padder: Padder, name: str, size: int) -> tuple[int, int]:
    """A size to pad from and one to pad to, as near as can be to a size that was seen; equal if there are none."""
    buckets = padder.buckets.sizes[name]
    larger = padder.buckets.up(name, size + 1)
    if larger is not None:
        return size, larger
    return (buckets[-1] - 1, buckets[-1]) if buckets[-1] > 1 else (1, 1)


def _grown(fit: Fit) -> list[str]:
    return [name for name in fit.real if fit.real[name] != fit.padded[name]]


def _start(fit: Fit) -> Change:
    """Cuts an argument to the sizes to pad from."""
    return lambda value, axes: cropped(value, {place: fit.real[axis.symbol] for place, axis in axes.items()}).clone()


def _difference(run: Run, call: Call, padder: Padder, fit: Fit, exact: Any, judge: _Judge) -> str | None:
    """In words, the first thing that differs; ``None`` if nothing does."""
    grown = _grown(fit)
    axes = [axis for axes in padder.buckets.inputs.values() for axis in axes if axis.symbol in grown]
    fills = {axis.fill for axis in axes if not axis.is_mask}

    def answer(call: Call, margin: Margin | None = None) -> Any:
        args, kwargs = padder.pad(fit, *call, margin=margin)
        try:
            return padder.crop(fit, run(*args, **kwargs))
        except ConfigError as error:
            raise _Failed(str(error)) from error
        except Exception as error:
            # Whatever a module raises for sizes that do not go together.
            raise _Failed(f"the padded call raised {type(error).__name__}: {shown(str(error))}") from error

    try:
        usual = answer(call)
        if (text := judge.compare(usual, exact)) is not None:
            return f"{text} with {' and '.join(str(fill or 0) for fill in fills)} in the margin"
        if None in fills:
            for name, sign in (("large", 1), ("small", -1)):
                other = answer(call, partial(_beyond, sign))
                if (text := judge.compare(other, usual, exactly=judge.bitwise)) is not None:
                    return f"{text} with {name} values in the margin in place of 0"
        if fills - {None}:
            for name, sign in (("smaller", -1), ("larger", 1)):
                moved = padder.exchange(partial(_moved, sign), *call)
                if (text := judge.compare(answer(moved), run(*moved[0], **moved[1]))) is not None:
                    return f"{text} with {name} values beside the margin"
    except _Failed as failed:
        return str(failed)
    return None


class _Failed(Exception):
    """A padded call that raised, in words."""


class _Judge:
    """Compares answers.

    Args:
        gap: See :func:`dependence`.
    """

    def __init__(self, gap: Gap) -> None:
        self._gap = gap
        self.bitwise = True
        """Whether one call repeated gives the same bits."""

    def compare(self, got: Any, wanted: Any, *, exactly: bool = False) -> str | None:
        """In words, where two answers differ; ``None`` if they don't."""
        left, left_tree = pytree.tree_flatten(got, is_leaf=is_size)
        right, right_tree = pytree.tree_flatten(wanted, is_leaf=is_size)
        if left_tree != right_tree:
            return "the answer has another structure"
        place = -1
        for one, other in zip(left, right, strict=True):
            if not isinstance(one, Tensor) or not isinstance(other, Tensor):
                if type(one) is not type(other) or shown(one) != shown(other):
                    return f"the answer contains {shown(one)} in place of {shown(other)}"
                continue
            place += 1
            if one.shape != other.shape:
                return f"output {place} has the shape {list(one.shape)} in place of {list(other.shape)}"
            if (gap := self._gap(one, other, exactly=exactly)) is not None:
                return f"output {place} differs by {gap:.3g}"
        return None


def _leaves(answer: Any) -> list[Any]:
    return pytree.tree_leaves(answer, is_leaf=is_size)


def _beyond(sign: int, value: Tensor, axis: InputAxis) -> Number:
    """For the margin, a number beyond all that is real. Integers may be indices: for them one of the real numbers."""
    if axis.fill is not None:
        return axis.fill
    if value.dtype is torch.bool:
        return sign > 0
    if value.dtype.is_floating_point or value.dtype.is_complex:
        return sign * _reach(value)
    if value.numel() == 0:
        return 0
    whole = value.to(torch.int64)
    return max(int(whole.max() if sign > 0 else whole.min()), torch.iinfo(value.dtype).min)


def _reach(value: Tensor) -> float:
    """Twice the largest finite magnitude, and one; at most an eighth of what the dtype holds."""
    real = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    magnitudes = real.detach().double().abs()
    finite = magnitudes[magnitudes.isfinite()]
    largest = finite.max().item() if finite.numel() else 0.0
    return float(min(2 * largest + 1, torch.finfo(value.dtype).max / 8))


def _moved(sign: int, value: Tensor, axes: Mapping[int, InputAxis]) -> Tensor:
    """An argument with a declared fill, moved as a whole below or above 0. Integers may be indices, and stay."""
    declared = any(axis.fill is not None and not axis.is_mask for axis in axes.values())
    if not declared or not value.is_floating_point():
        return value
    return (value.detach().double() + sign * _reach(value)).to(value.dtype)
