"""What a run measured, call by call: what ``graphcache bench`` and ``run`` write, and what reports are made of.

::

    {"format": "graphcache result", "version": 1,
     "target": "nets.py:mlp", "environment": {"device": "CPU, x86_64, 2 threads", "torch": "2.13.0"},
     "inputs": [{"label": "x:8x64", "nbytes": 4096}],
     "reasons": {"cold": "cold: calls of this key are too few so far …"},
     "calls": [[0, "capture", 5210.5, 180.2], [0, "hit", 41.3, 179.8]]}

A call is its inputs' number, its outcome, what it took and what it took eagerly, in microseconds. ``nbytes`` is what
the graph of the inputs owned at the end. Values of tensors are not in it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from graphcache.errors import Reason, ResultError, shown
from graphcache.fields import FieldError, read_fields
from graphcache.files import open_regular, replacing

FORMAT = "graphcache result"
VERSION = 1
OUTCOMES = ("hit", "capture", *(reason.value for reason in Reason))
_MOST_BYTES = 64 * 2**20
"""Of a file. Reading takes some 20 times as much memory."""
_LONGEST = 1e12


class Measured(NamedTuple):
    """One call: the number of its inputs, what became of it, and what it took with graphs and eagerly."""

    inputs: int
    outcome: str
    us: float
    eager_us: float


@dataclass(frozen=True)
class Inputs:
    """One set of inputs: its shapes, and the bytes that its graph owned at the end; 0 if it had none."""

    label: str
    nbytes: int = 0


@dataclass(frozen=True)
class Result:
    """What a run measured. ``reasons`` has in words why calls ran eagerly."""

    target: str
    environment: Mapping[str, str] = field(default_factory=dict)
    inputs: tuple[Inputs, ...] = ()
    calls: tuple[Measured, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)

    def outcomes(self) -> dict[int, Counter[str]]:
        """How often each outcome came, by the number of the inputs."""
        found: dict[int, Counter[str]] = {index: Counter() for index in range(len(self.inputs))}
        for call in self.calls:
            found[call.inputs][call.outcome] += 1
        return found

    def break_even(self) -> int | None:
        """After how many calls all of them together took no longer than eagerly, for good; ``None`` if never."""
        ahead, found = 0.0, None
        for index, call in enumerate(self.calls, 1):
            ahead += call.eager_us - call.us
            if ahead < 0:
                found = None
            elif found is None:
                found = index
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON; a reader sees the old file or the new one. A larger one than is read is refused."""
        data = json.dumps(self.tree()).encode()
        if len(data) > _MOST_BYTES:
            raise ResultError(f"{len(data)} bytes; expected at most {_MOST_BYTES}, which is what is read")
        with replacing(path) as file:
            file.write(data)

    def tree(self) -> dict[str, Any]:
        """What the JSON holds."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "target": self.target,
            "environment": dict(self.environment),
            "inputs": [{"label": each.label, "nbytes": each.nbytes} for each in self.inputs],
            "reasons": dict(self.reasons),
            "calls": [[each.inputs, each.outcome, round(each.us, 3), round(each.eager_us, 3)] for each in self.calls],
        }


def read_result(path: str | os.PathLike[str]) -> Result:
    """Read what :meth:`Result.save` wrote; a ``ResultError`` names the field of what is no result."""
    label = shown(os.fspath(path)) if isinstance(path, os.PathLike) else shown(path)
    try:
        with open_regular(path) as file:
            data = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError, TypeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ResultError(f"{label} cannot be read ({why}); expected a result") from error
    if len(data) > _MOST_BYTES:
        raise ResultError(f"{label} is larger than {_MOST_BYTES} bytes; expected a result of graphcache bench")
    try:
        tree = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ResultError(
            f"{label} is no JSON ({shown(str(error))}); expected what graphcache bench -o wrote"
        ) from error
    return _result(tree, label)


@dataclass(frozen=True)
class _File:
    """The fields of the JSON."""

    format: Literal["graphcache result"]
    version: Literal[1]
    target: str
    environment: dict[str, str]
    inputs: list[Inputs]
    reasons: dict[str, str]
    calls: list[Any]


def _result(tree: Any, label: str) -> Result:
    try:
        file = read_fields(_File, tree)
    except FieldError as error:
        raise ResultError(f"{label}: {error}; expected what graphcache bench -o wrote") from error
    calls = []
    for index, each in enumerate(file.calls):
        if type(each) is not list or len(each) != 4:
            raise ResultError(f"{label}: calls[{index}] is {shown(each)}; expected a list of four")
        number, outcome, *times = each
        for place, (fine, expected) in enumerate(
            (
                (type(number) is int and 0 <= number < len(file.inputs), f"one of {len(file.inputs)} inputs"),
                (type(outcome) is str and outcome in OUTCOMES, "hit, capture or a reason"),
                *((_is_time(time), "microseconds") for time in times),
            )
        ):
            if not fine:
                text = f"calls[{index}][{place}] is {shown(each[place])}; expected {expected}"
                raise ResultError(f"{label}: {text}")
        calls.append(Measured(number, outcome, float(times[0]), float(times[1])))
    return Result(file.target, file.environment, tuple(file.inputs), tuple(calls), file.reasons)


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= _LONGEST
