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
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from graphcache.errors import Reason, ResultError, shown
from graphcache.files import open_regular, replacing

FORMAT = "graphcache result"
VERSION = 1
OUTCOMES = ("hit", "capture", *(reason.value for reason in Reason))
_MOST_BYTES = 64 * 2**20
"""Of a file. Reading takes some 20 times as much memory."""
_LONGEST = 1e12


class Measured(NamedTuple):
    """One call.

    Args:
        inputs: Which of the result's inputs it had.
        outcome: ``"hit"``, ``"capture"``, or the reason why it ran eagerly.
        us: What it took, in microseconds.
        eager_us: What the same call took without graphs.
    """

    inputs: int
    outcome: str
    us: float
    eager_us: float


@dataclass(frozen=True)
class Inputs:
    """One set of inputs.

    Args:
        label: Its shapes, such as ``"x:8x64"``.
        nbytes: Bytes that its graph owned at the end; 0 if it had none.
    """

    label: str
    nbytes: int = 0


@dataclass(frozen=True)
class Result:
    """What a run measured.

    Args:
        target: What ran, as it was typed.
        environment: Device and versions.
        inputs: The sets of inputs.
        calls: In their order.
        reasons: Why calls ran eagerly, in words.
    """

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
        """After how many calls all of them together took no longer than eagerly, for good; ``None`` if never.

        Example:
            >>> calls = (Measured(0, "capture", 90.0, 30.0), *[Measured(0, "hit", 10.0, 30.0)] * 4)
            >>> Result("x", inputs=(Inputs("x:1"),), calls=calls).break_even()
            4
        """
        ahead, found = 0.0, None
        for index, call in enumerate(self.calls, 1):
            ahead += call.eager_us - call.us
            if ahead < 0:
                found = None
            elif found is None:
                found = index
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON; a reader sees the old file or the new one.

        Raises:
            OSError: If the file cannot be written; what was there stays.
            ResultError: If it would be larger than what is read: 64 MiB, some 1.5 million calls.
        """
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
    """Read what :meth:`Result.save` wrote.

    Raises:
        ResultError: If the file cannot be read, or is no result; the message names the field.
    """
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


def _result(tree: Any, label: str) -> Result:
    def expect(fine: bool, name: str, value: Any, expected: str) -> None:
        if not fine:
            raise ResultError(f"{label}: {name} is {shown(value)}; expected {expected}")

    expect(type(tree) is dict, "the whole", tree, "an object")
    expect(tree.get("format") == FORMAT, "format", tree.get("format"), f"{FORMAT!r}, as graphcache bench -o writes it")
    expect(tree.get("version") == VERSION, "version", tree.get("version"), f"{VERSION}, which this version reads")
    expect(type(tree.get("target")) is str, "target", tree.get("target"), "text")
    for name in ("environment", "reasons"):
        value = tree.get(name)
        fine = type(value) is dict and all(type(each) is str for each in value.values())
        expect(fine, name, value, "an object of texts")
    for name in ("inputs", "calls"):
        expect(type(tree.get(name)) is list, name, tree.get(name), "a list")
    inputs = []
    for index, each in enumerate(tree["inputs"]):
        fine = type(each) is dict and type(each.get("label")) is str and _is_count(each.get("nbytes"))
        expect(fine, f"inputs[{index}]", each, "an object with label (text) and nbytes (a whole number)")
        inputs.append(Inputs(each["label"], each["nbytes"]))
    calls = []
    for index, each in enumerate(tree["calls"]):
        name = f"calls[{index}]"
        expect(type(each) is list and len(each) == 4, name, each, "a list of four")
        number, outcome, *times = each
        expect(_is_count(number) and number < len(inputs), f"{name}[0]", number, f"one of {len(inputs)} inputs")
        expect(type(outcome) is str and outcome in OUTCOMES, f"{name}[1]", outcome, "hit, capture or a reason")
        for place, value in enumerate(times, 2):
            expect(_is_time(value), f"{name}[{place}]", value, "microseconds")
        calls.append(Measured(number, outcome, float(times[0]), float(times[1])))
    return Result(tree["target"], tree["environment"], tuple(inputs), tuple(calls), tree["reasons"])


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= _LONGEST
