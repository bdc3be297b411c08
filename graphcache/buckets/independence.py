"""Whether the real part of a module's answer is what it would be without padding, found by trying.

A call is padded with the declared fill, and its cropped answer compared with that of the exact call. Where no fill was
declared, other values in the margin must change nothing, to the last bit; where one was, the real values are moved.
Values that differ are tried too, and the smallest sizes of a bucket (a single row is broadcast). It is no proof.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphcache.buckets.padder import Arguments, Fit, Margin, Padder, is_size
from graphcache.buckets.padding import varied
from graphcache.buckets.spec import InputAxis, Number
from graphcache.errors import ConfigError, Reason, Refusal, shown
from graphcache.graphs.verify import padded_gap
from graphcache.keys.call_key import KeyedCall

Run = Callable[..., Any]
"""Runs a module eagerly; it must leave its arguments and itself alone."""


def proven_padder(run: Run, call: KeyedCall, fit: Fit, padder: Padder, takes: Callable[[Arguments], bool]) -> Padder:
    """What crops the answers of a bucket; raises ``Refusal`` if they depend on padding.

    ``takes`` tells whether the module takes arguments at all: no call will have the sizes that no profile has.
    """
    given = call.args, call.kwargs
    if padder.buckets.outputs is None:
        padder = padder.with_outputs(observed_outputs(run, *given, padder))
    for arguments in given, _varied(run, call):
        if arguments is None:
            continue
        tried = [arguments]
        if (sizes := _smallest_sizes(padder, fit)) != fit.real and takes(smallest := padder.start(sizes, *arguments)):
            tried.append(smallest)
        for each in tried:
            if (text := dependence(run, *each, padder)) is not None:
                raise Refusal(Reason.PADDING, detail=text)
    return padder


def _smallest_sizes(padder: Padder, fit: Fit) -> dict[str, int]:
    """The smallest sizes that go to the buckets of a fit."""
    smaller = {name: [size for size in padder.buckets.sizes[name] if size < fit.padded[name]] for name in fit.real}
    return {name: max(sizes, default=0) + 1 for name, sizes in smaller.items()}


def _varied(run: Run, call: KeyedCall) -> Arguments | None:
    """A call with values that differ, as those of a warm-up often don't; ``None`` if the module refuses them."""
    made = {id(tensor): varied(tensor) for tensor in call.tensors}
    args, kwargs = call.key.arguments(made[id(tensor)] for tensor in call.tensors)
    try:
        run(*args, **kwargs)
    except (Refusal, torch.cuda.OutOfMemoryError):
        raise
    except Exception:
        return None
    return args, kwargs


def dependence(run: Run, args: tuple[Any, ...], kwargs: Mapping[str, Any], padder: Padder) -> str | None:
    """What differs when a call is padded; ``None`` if nothing does. Each axis is tried alone, then all together.

    The module is called up to nine times for each axis. Of a call that fills its buckets, the start is tried.
    """
    found = padder.sizes(args, kwargs)
    if isinstance(found, str):
        return found
    if empty := [name for name, size in found.items() if size == 0]:
        return f"{empty[0]} has size 0 in this call; whether it can be padded shows only where there is something"
    for fit in _steps(padder, found):
        call = padder.start(fit.real, args, kwargs)
        exact, again = run(*call[0], **call[1]), run(*call[0], **call[1])
        if (text := _difference(again, exact)) is not None:
            return f"the exact call answers differently each time: {text}"
        repeats = _difference(again, exact, exactly=True) is None
        try:
            text = _dependence(run, call, padder, fit, exact, repeats)
        except _Failed as failed:
            text = str(failed)
        if text is not None:
            grown = ", ".join(f"{each} from {fit.real[each]} to {fit.padded[each]}" for each in fit.grown)
            return f"padding {grown} changes the answer: {text}"
    return None


def observed_outputs(
    run: Run, args: tuple[Any, ...], kwargs: Mapping[str, Any], padder: Padder
) -> dict[int, dict[int, str]]:
    """Which axes of the answer grow with which axes of the inputs, for :meth:`Padder.with_outputs`."""
    found = padder.sizes(args, kwargs)
    if isinstance(found, str):
        raise ConfigError(f"buckets: {found}")
    outputs: dict[int, dict[int, str]] = {}
    for fit in _steps(padder, found):
        if len(fit.grown) > 1:
            continue
        [name] = fit.grown
        call = padder.start(fit.real, args, kwargs)
        padded_call = padder.pad(fit, *call)
        exact, padded = (_tensors(run(*each[0], **each[1])) for each in (call, padded_call))
        if len(exact) != len(padded):
            raise ConfigError(f"outputs: {len(exact)} tensors, but {len(padded)} once {name} is padded")
        for place, (left, right) in enumerate(zip(exact, padded, strict=True)):
            if left.dim() != right.dim():
                raise ConfigError(f"outputs[{place}]: {left.dim()} dimensions, but {right.dim()} once {name} is padded")
            for axis, sizes in enumerate(zip(left.shape, right.shape, strict=True)):
                if sizes[0] == sizes[1]:
                    continue
                if sizes != (fit.real[name], fit.padded[name]):
                    raise ConfigError(
                        f"outputs[{place}][{axis}]: from {sizes[0]} to {sizes[1]} when {name} is "
                        f"padded from {fit.real[name]} to {fit.padded[name]}; expected an axis as long as {name}"
                    )
                outputs.setdefault(place, {})[axis] = name
    return outputs


def _steps(padder: Padder, sizes: Mapping[str, int]) -> Iterator[Fit]:
    """Each axis padded alone, then all of them."""
    real, padded = dict(sizes), dict(sizes)
    for name, size in sizes.items():
        real[name], padded[name] = _step(padder, name, size)
    grown = Fit(real, padded).grown
    for name in grown:
        yield Fit(real, {**real, name: padded[name]})
    if len(grown) > 1:
        yield Fit(real, padded)


def _step(padder: Padder, name: str, size: int) -> tuple[int, int]:
    """A size to pad from and one to pad to, as near as can be to a size that was seen; equal if there are none."""
    buckets = padder.buckets.sizes[name]
    larger = padder.buckets.up(name, size + 1)
    if larger is not None:
        return size, larger
    return (buckets[-1] - 1, buckets[-1]) if buckets[-1] > 1 else (1, 1)


def _dependence(run: Run, call: Arguments, padder: Padder, fit: Fit, exact: Any, repeats: bool) -> str | None:
    """In words, what differs once a call is padded; ``repeats`` says that the exact call repeats itself bit for bit."""
    axes = [axis for axes in padder.buckets.inputs.values() for axis in axes if axis.symbol in fit.grown]
    fills = {axis.fill for axis in axes if not axis.is_mask}
    usual = _padded_answer(run, call, padder, fit)
    if (text := _difference(usual, exact)) is not None:
        return f"{text} with {' and '.join(str(fill or 0) for fill in fills)} in the margin"
    if None in fills:
        for name, sign in (("large", 1), ("small", -1)):
            other = _padded_answer(run, call, padder, fit, partial(_beyond, sign))
            if (text := _difference(other, usual, exactly=repeats)) is not None:
                return f"{text} with {name} values in the margin in place of 0"
    if fills - {None}:
        for name, sign in (("smaller", -1), ("larger", 1)):
            moved = padder.exchange(partial(_moved, sign), *call)
            got = _padded_answer(run, moved, padder, fit)
            if (text := _difference(got, run(*moved[0], **moved[1]))) is not None:
                return f"{text} with {name} values beside the margin"
    return None


class _Failed(Exception):
    """A padded call that raised, in words."""


def _padded_answer(run: Run, call: Arguments, padder: Padder, fit: Fit, margin: Margin | None = None) -> Any:
    """The answer of a padded call, cropped."""
    args, kwargs = padder.pad(fit, *call, margin=margin)
    try:
        return padder.crop(fit, run(*args, **kwargs))
    except ConfigError as error:
        raise _Failed(str(error)) from error
    except (Refusal, torch.cuda.OutOfMemoryError):
        # Says nothing of the axis.
        raise
    except Exception as error:
        # Whatever a module raises for sizes that do not go together.
        raise _Failed(f"the padded call raised {type(error).__name__}: {shown(str(error))}") from error


def _difference(got: Any, wanted: Any, *, exactly: bool = False) -> str | None:
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
        if (gap := padded_gap(one, other, exactly=exactly)) is not None:
            return f"output {place} differs by {gap:.3g}"
    return None


def _tensors(answer: Any) -> list[Tensor]:
    """The tensors of an answer, depth first."""
    return [leaf for leaf in pytree.tree_leaves(answer, is_leaf=is_size) if isinstance(leaf, Tensor)]


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
