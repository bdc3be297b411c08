"""Requests put together up to a size that has a graph, and the answer taken apart again.

A request is tensors by name, all with rows along axis 0. Requests go together if nothing else tells them apart: the
same names, the same dtypes, and the same other sizes once those are padded to their buckets. Their rows lie one after
another, then a margin up to the next bucket of the rows, so that every call has a size that was captured. Nothing of a
margin is ever handed out, and who asked is known by the place in the list alone.

All of this is pure: what runs a batch is given, and may be an engine, a module or a test.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphcache.buckets.padder import Fit, Padder
from graphcache.buckets.padding import cropped
from graphcache.buckets.spec import Buckets
from graphcache.errors import (
    ConfigError,
    InputCountError,
    InputError,
    InputRankError,
    InputTypeError,
    ProfileRangeError,
    ServingError,
    shown,
)
from graphcache.serving.kinds import Kind

Tensors = Mapping[str, Tensor]
Run = Callable[[dict[str, Tensor]], Tensors]


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One request, checked.

    Args:
        inputs: As they were given.
        fit: Its sizes, and the buckets of all of them but the rows.
        kind: What it must share with others to go together.
    """

    inputs: Tensors
    fit: Fit
    kind: Kind
    rows: int


@dataclass
class Counts:
    """What was batched.

    Args:
        requests: That were answered, with an error or without.
        failed: Those answered with an error.
        batches: Calls by the number of rows that was captured.
        apart: Requests that were run alone, because what they were part of failed or must not be padded.
        cells: Elements along the bucketed axes that requests asked for.
        padded_cells: The same, margins included.
        seconds: Spent in answering, waiting not included.
    """

    requests: int = 0
    failed: int = 0
    batches: Counter[int] = field(default_factory=Counter)
    apart: int = 0
    cells: int = 0
    padded_cells: int = 0
    seconds: float = 0.0

    @property
    def padding_share(self) -> float:
        """How much of what was computed was margin, from 0 to 1."""
        return 1 - self.cells / self.padded_cells if self.padded_cells else 0.0


class Batcher:
    """Knows which requests go together, and up to which sizes."""

    def __init__(self, buckets: Buckets, arguments: inspect.Signature | Sequence[str]) -> None:
        self.buckets = buckets
        self._padder = Padder(buckets, arguments)
        required, self.known = argument_names(arguments)
        self.required = tuple(name for name in required if name not in buckets.masks)
        self.symbol = _rows_symbol(buckets)
        self.sizes = buckets.sizes[self.symbol]
        """Rows that have a graph, ascending."""
        self.outputs = {place: dict(axes) for place, axes in (buckets.outputs or {}).items()}

    @property
    def largest(self) -> int:
        """How many rows a batch may have."""
        return self.sizes[-1]

    @property
    def padder(self) -> Padder:
        """What pads single calls."""
        return self._padder

    def with_outputs(self, outputs: Mapping[int, Mapping[int, str]]) -> None:
        """From now on take the answer's axes to be as long as these axes of the inputs."""
        self._padder = self._padder.with_outputs(outputs)
        self.outputs = {place: dict(axes) for place, axes in outputs.items()}

    def request(self, inputs: Any) -> Request:
        """Check what somebody asks for. Nothing is copied."""
        if not isinstance(inputs, Mapping):
            raise InputTypeError(f"a request of type {type(inputs).__name__}; expected tensors by name")
        self._check_names(inputs)
        for name, value in inputs.items():
            if type(value) is not Tensor or value.layout is not torch.strided or value.is_nested:
                raise InputTypeError(f"input {name!r} is of type {type(value).__name__}; expected a plain torch.Tensor")
        try:
            fit = self._padder.fit((), inputs)
        except ConfigError as error:
            raise InputRankError(f"the request lacks an axis: {error}") from error
        if isinstance(fit, str):
            beyond = "more than its largest bucket" in fit
            kind: type[InputError] = ProfileRangeError if beyond else InputError
            raise kind(f"the request has sizes that cannot be served: {fit}; {self._expected()}")
        for symbol, size in fit.real.items():
            if size == 0:
                raise ProfileRangeError(f"the request is empty: {symbol} is 0; {self._expected()}")
        rows = fit.real[self.symbol]
        own = Fit(fit.real, {**fit.padded, self.symbol: rows})
        return Request(inputs, own, self._kind(inputs, own), rows)

    def batches(self, requests: Sequence[Request]) -> list[Batch]:
        """The batches that answer some requests, each within the largest size, in the order of their first ones."""
        open_: dict[Kind, list[int]] = {}
        done: list[list[int]] = []
        for place, request in enumerate(requests):
            batch = open_.get(request.kind)
            if batch is None or sum(requests[each].rows for each in batch) + request.rows > self.largest:
                batch = open_[request.kind] = []
                done.append(batch)
            batch.append(place)
        return [Batch(self, tuple(places), [requests[place] for place in places]) for places in done]

    def _kind(self, inputs: Tensors, fit: Fit) -> Kind:
        found = []
        for name, value in inputs.items():
            shape = list(value.shape)
            if name in self.buckets.inputs:
                places = self.buckets.places(name, value.dim())
                for axis, place in zip(self.buckets.inputs[name], places, strict=True):
                    shape[place] = fit.padded[axis.symbol]
            found.append((name, value.dtype, tuple(shape[1:])))
        for name, mask in self.buckets.masks.items():
            if name not in inputs:
                # It will be made, as if it had been given.
                found.append((name, mask.dtype, tuple(fit.padded[symbol] for symbol in mask.axes[1:])))
        return tuple(sorted(found, key=lambda each: each[0]))

    def _check_names(self, inputs: Mapping[Any, Any]) -> None:
        expected = ", ".join(self.known or self.required)
        for name in self.required:
            if name not in inputs:
                raise InputCountError(f"input {name!r} is missing; expected {expected}")
        for name in inputs:
            if type(name) is not str or (self.known is not None and name not in self.known):
                raise InputCountError(f"there is no input {shown(name)}; expected {expected}")
            if name not in self.buckets.inputs:
                raise InputCountError(
                    f"input {name!r} has no buckets, so it has no rows to put together; expected "
                    f"{', '.join(map(str, self.buckets.inputs))}"
                )

    def _expected(self) -> str:
        return "expected " + ", ".join(f"{name} from 1 to {sizes[-1]}" for name, sizes in self.buckets.sizes.items())


class Batch:
    """Requests that are answered by one call."""

    def __init__(self, batcher: Batcher, places: tuple[int, ...], requests: Sequence[Request]) -> None:
        self.places = places
        self.requests = requests
        self.rows = sum(request.rows for request in requests)
        size = batcher.buckets.up(batcher.symbol, self.rows)
        assert size is not None, "no request is larger than the largest size"
        self.size = size
        """Rows of the call, which is a size that was captured."""
        self._batcher = batcher

    @property
    def cells(self) -> tuple[int, int]:
        """Elements along the bucketed axes: those asked for, and those of the call."""
        others = dict(self.requests[0].fit.padded)
        others.pop(self._batcher.symbol)
        asked = sum(math.prod(request.fit.real.values()) for request in self.requests)
        return asked, self.size * math.prod(others.values())

    def inputs(self) -> dict[str, Tensor]:
        """The arguments of the call, by name: all rows, then the margin."""
        padder, symbol = self._batcher.padder, self._batcher.symbol
        each = [padder.pad(request.fit, (), dict(request.inputs))[1] for request in self.requests]
        joined = each[0] if len(each) == 1 else {name: torch.cat([one[name] for one in each]) for name in each[0]}
        full = self.requests[0].fit.padded
        return padder.pad(Fit({**full, symbol: self.rows}, {**full, symbol: self.size}), (), joined)[1]

    def split(self, answer: Tensors) -> list[dict[str, Tensor]]:
        """The answer of each request, in memory of its own."""
        answers: list[dict[str, Tensor]] = [{} for _ in self.requests]
        for place, (name, tensor) in enumerate(answer.items()):
            axes = self._batcher.outputs.get(place, {})
            along = next((axis for axis, symbol in axes.items() if symbol == self._batcher.symbol), 0)
            if not -tensor.dim() <= along < tensor.dim() or tensor.shape[along] != self.size:
                raise ServingError(
                    f"output {name!r} has the shape {list(tensor.shape)}; expected {self.size} rows on axis {along}, "
                    f"as the inputs have, so that it can be told whose they are"
                )
            start = 0
            for request, own in zip(self.requests, answers, strict=True):
                part = tensor.narrow(along, start, request.rows)
                others = {axis: request.fit.real[symbol] for axis, symbol in axes.items() if axis != along}
                own[name] = cropped(part, others).clone(memory_format=torch.contiguous_format)
                start += request.rows
        return answers


def answer_all(
    batcher: Batcher,
    run: Run,
    requests: Sequence[Any],
    counts: Counts,
    *,
    alone: Callable[[Request], Tensors | None] = lambda request: None,
) -> list[dict[str, Tensor] | Exception]:
    """Answer every request: its outputs, or what was wrong with it, each at the place of the request.

    Where a batch raises, its requests are run one by one, so that each fails for itself. ``alone`` answers a request
    that must not be padded or put together, and gives ``None`` for one that may be.
    """
    answers: list[Any] = [None] * len(requests)
    checked: list[Request] = []
    places: list[int] = []
    counts.requests += len(requests)
    for place, inputs in enumerate(requests):
        try:
            request = batcher.request(inputs)
            single = alone(request)
        except Exception as error:
            answers[place] = error
            continue
        if single is not None:
            counts.apart += 1
            answers[place] = dict(single)
            continue
        checked.append(request)
        places.append(place)
    for batch in batcher.batches(checked):
        for place, found in zip(batch.places, _answered(batcher, run, batch, counts), strict=True):
            answers[places[place]] = found
    counts.failed += sum(isinstance(each, Exception) for each in answers)
    return answers


def _answered(batcher: Batcher, run: Run, batch: Batch, counts: Counts) -> list[Any]:
    try:
        answers = batch.split(run(batch.inputs()))
    except Exception as error:
        if len(batch.requests) == 1:
            return [error]
        counts.apart += len(batch.requests)
        return [
            answer
            for request in batch.requests
            for answer in _answered(batcher, run, Batch(batcher, (0,), [request]), counts)
        ]
    counts.batches[batch.size] += 1
    asked, made = batch.cells
    counts.cells += asked
    counts.padded_cells += made
    return answers


def argument_names(
    arguments: inspect.Signature | Sequence[str],
) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Arguments that a call needs, and all that it may have by name; ``None`` where that is open."""
    if not isinstance(arguments, inspect.Signature):
        return tuple(arguments), tuple(arguments)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = [each for each in arguments.parameters.values() if each.kind in kinds]
    is_open = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in arguments.parameters.values())
    required = tuple(each.name for each in named if each.default is inspect.Parameter.empty)
    return required, None if is_open else tuple(each.name for each in named)


def _rows_symbol(buckets: Buckets) -> str:
    found: dict[str, str | int] = {}
    for key, axes in buckets.inputs.items():
        if type(key) is not str:
            raise ConfigError(f"buckets[{key!r}]: requests have inputs by name; expected the name of the argument")
        symbol = next((axis.symbol for axis in axes if axis.axis == 0), None)
        if symbol is None:
            raise ConfigError(
                f"buckets[{key!r}]: axis 0 has no sizes; expected those of the rows, such as {{0: [1, 8]}}"
            )
        found.setdefault(symbol, key)
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise ConfigError(
            f"buckets[{second!r}][0]: the rows are named {other!r}, those of {first!r} {one!r}; expected one name, or "
            f"one Axis object, for the rows of all inputs"
        )
    return next(iter(found))
