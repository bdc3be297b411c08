"""A record of the signatures that calls came with, in the order of the calls: what traffic looks like.

A trace is a text file of one JSON object a line. The first says what it is; a signature is described once, before its
first call; every call names its signature; what was measured may follow, for simulations::

    {"format": "graphcache trace", "version": 1, "module": "mlp8"}
    {"signature": 0, "inputs": {"x": {"shape": [8, 64], "dtype": "float32"}}}
    {"call": 0}
    {"call": 0}
    {"costs": 0, "eager": 0.00018, "replay": 0.00005, "capture": 0.0052}

Signatures are numbered from 0 as they come; times are in seconds. It holds no values of tensors.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple, NoReturn

from graphcache.cache.estimates import checked_seconds
from graphcache.errors import ConfigError, TraceError, shown

FORMAT = "graphcache trace"
VERSION = 1
_LONGEST_LINE = 2**20

log = logging.getLogger("graphcache")


class Input(NamedTuple):
    """Shape and dtype of one tensor of a signature; the dtype as PyTorch names it, without ``torch.``."""

    shape: tuple[int, ...]
    dtype: str


class Costs(NamedTuple):
    """What calls of a signature were measured to take, in seconds."""

    eager: float
    replay: float
    capture: float


@dataclass(frozen=True)
class Trace:
    """A trace that was read.

    Args:
        module: What the module was called; may be empty.
        signatures: The inputs of each signature, by name.
        calls: The signature of each call, as an index into ``signatures``.
        costs: What was measured, by signature, where it was.
        cut: Whether the last line was incomplete, and left out: the writer did not get to close the file.
    """

    module: str
    signatures: list[dict[str, Input]] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    costs: dict[int, Costs] = field(default_factory=dict)
    cut: bool = False


class TraceWriter:
    """Writes a trace while calls happen, from any thread. A context manager, which closes the file.

    A full disk or a lost file system ends the recording, is logged once, and never fails a call.

    Args:
        path: Of the file, which must not exist.
        module: What the module is called.
        max_calls: How many calls are recorded at most, 12 bytes each; the others are left out.

    Raises:
        TraceError: If the file exists or cannot be made.
        ConfigError: If ``max_calls`` is not a whole number, 1 or more.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with TraceWriter(f"{folder}/a.jsonl", module="mlp8") as writer:
        ...         for rows in (8, 1, 8):
        ...             writer.call(rows, {"x": Input((rows, 64), "float32")})
        ...     read_trace(f"{folder}/a.jsonl").calls
        [0, 1, 0]
    """

    def __init__(self, path: str | os.PathLike[str], *, module: str = "", max_calls: int = 10_000_000) -> None:
        if isinstance(max_calls, bool) or not isinstance(max_calls, int) or max_calls < 1:
            raise ConfigError(f"max_calls={shown(max_calls)}: expected a whole number, 1 or more")
        self._numbers: dict[Hashable, int] = {}
        self._left = max_calls
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        try:
            self._file = open(os.fspath(path), "xb")  # noqa: SIM115 - closed by close()
        except FileExistsError:
            raise TraceError(f"{shown(path)} exists; a trace never writes over a file: choose another name") from None
        except Exception as error:
            # Anything may be given for a path.
            raise TraceError(f"{shown(path)} cannot be written: {error}; choose a path that can") from error
        self._write({"format": FORMAT, "version": VERSION, "module": str(module)})

    def call(self, key: Hashable, inputs: Mapping[str, Input]) -> None:
        """Record a call.

        Args:
            key: What tells its signature from others.
            inputs: Its tensors by name; looked at for the first call of a key alone.
        """
        with self._lock:
            if self._left <= 0:
                return
            self._left -= 1
            number = self._numbers.get(key)
            if number is None:
                number = self._numbers[key] = len(self._numbers)
                described = {name: {"shape": list(each.shape), "dtype": each.dtype} for name, each in inputs.items()}
                self._write({"signature": number, "inputs": described})
            self._write({"call": number})

    def costs(self, key: Hashable, *, eager: float, replay: float, capture: float) -> None:
        """Record what was measured, in seconds; nothing for a key that was never called.

        Raises:
            ConfigError: If one of them cannot be a time.
        """
        times = {"eager": eager, "replay": replay, "capture": capture}
        times = {name: checked_seconds(seconds, name) for name, seconds in times.items()}
        with self._lock:
            if key in self._numbers:
                self._write({"costs": self._numbers[key], **times})

    def close(self) -> None:
        """Write out what is left and close the file; later calls are not recorded. Twice does nothing."""
        with self._lock:
            self._left = 0
            self._end(None)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._file is not None:
            try:
                self._file.write(json.dumps(record, separators=(", ", ": ")).encode() + b"\n")
            except OSError as error:
                self._end(error)

    def _end(self, error: OSError | None) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as failed:
                error = error or failed
        if error is not None:
            log.warning("recording the trace ended, as the file could not be written: %s", error)


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a trace, and check every line of it.

    An incomplete last line is left out, and noted in ``cut``.

    Raises:
        TraceError: If the file cannot be read, is no trace, is one of another version, or is damaged; the message
            names the line and the field.
    """
    try:
        name = os.fspath(path)
        with open(name, "rb") as file:
            return _Reader(str(name)).read(file)
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(f"{shown(path)} cannot be read: {error}") from error


class _Reader:
    """Reads one file; knows the line for its messages."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._line = 0

    def read(self, file: BinaryIO) -> Trace:
        head = self._next(file)
        if head is None:
            self._fail("the file is empty, or its only line is not complete", "a trace")
        if head.get("format") != FORMAT:
            self._fail(f"'format' is {shown(head.get('format'))}", f"{FORMAT!r}: this is another file")
        if head.get("version") != VERSION or isinstance(head["version"], bool):
            self._fail(f"'version' is {shown(head.get('version'))}", f"{VERSION}, as this graphcache writes it")
        self._fields(head, "format", "version", "module")
        if not isinstance(head["module"], str):
            self._fail(f"'module' is {shown(head['module'])}", "a text")
        trace = Trace(head["module"])
        while (record := self._next(file)) is not None:
            if "call" in record:
                self._fields(record, "call")
                trace.calls.append(self._number(record, "call", len(trace.signatures)))
            elif "signature" in record:
                self._fields(record, "signature", "inputs")
                expected = len(trace.signatures)
                if self._number(record, "signature", expected + 1) != expected:
                    self._fail(f"'signature' is {record['signature']}", f"{expected}, the next one")
                trace.signatures.append(self._inputs(record["inputs"]))
            elif "costs" in record:
                self._fields(record, "costs", "eager", "replay", "capture")
                number = self._number(record, "costs", len(trace.signatures))
                trace.costs[number] = Costs(*(self._seconds(record, name) for name in Costs._fields))
            else:
                self._fail(f"the fields are {shown(sorted(record))}", "'signature', 'call' or 'costs' among them")
        return trace if self._complete else Trace(trace.module, trace.signatures, trace.calls, trace.costs, cut=True)

    _complete = True

    def _next(self, file: BinaryIO) -> dict[str, Any] | None:
        line = file.readline(_LONGEST_LINE + 1)
        if not line:
            return None
        self._line += 1
        if len(line) > _LONGEST_LINE:
            self._fail(f"it is longer than {_LONGEST_LINE} bytes", "a line of a trace")
        if not line.endswith(b"\n"):
            self._complete = False
            return None
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            self._fail(f"it cannot be read ({type(error).__name__})", "one JSON object in UTF-8", error)
        if not isinstance(record, dict):
            self._fail(f"it holds {shown(record)}", "one JSON object")
        return record

    def _fields(self, record: Mapping[str, Any], *names: str) -> None:
        for name in names:
            if name not in record:
                self._fail(f"the field {name!r} is missing", f"the fields {', '.join(map(repr, names))}")
        for name in record:
            if name not in names:
                self._fail(f"there is a field {shown(name)}", f"the fields {', '.join(map(repr, names))} alone")

    def _number(self, record: Mapping[str, Any], name: str, below: int) -> int:
        value = record[name]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < below:
            self._fail(f"{name!r} is {shown(value)}", f"a signature before it, a whole number below {below}")
        return value

    def _seconds(self, record: Mapping[str, Any], name: str) -> float:
        try:
            return checked_seconds(record[name], name)
        except ConfigError as error:
            self._fail(f"{name!r} is {shown(record[name])}", "a time in seconds", error)

    def _inputs(self, inputs: object) -> dict[str, Input]:
        if not isinstance(inputs, dict):
            self._fail(f"'inputs' is {shown(inputs)}", "an object of inputs by name")
        found = {}
        for name, described in inputs.items():
            where = f"'inputs' of {shown(name)}"
            if not isinstance(described, dict) or set(described) != {"shape", "dtype"}:
                self._fail(f"{where} is {shown(described)}", "an object with 'shape' and 'dtype'")
            shape, dtype = described["shape"], described["dtype"]
            if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
                self._fail(f"{where} has the shape {shown(shape)}", "a list of whole numbers, 0 or more")
            if not isinstance(dtype, str):
                self._fail(f"{where} has the dtype {shown(dtype)}", "a text such as 'float32'")
            found[name] = Input(tuple(shape), dtype)
        return found

    def _fail(self, seen: str, expected: str, cause: BaseException | None = None) -> NoReturn:
        raise TraceError(
            f"{self._path}, line {self._line}: {seen}; expected {expected}. Record the trace again, or mend that line"
        ) from cause


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def shapes_of(trace: Trace, name: str) -> list[Sequence[int]]:
    """The shape of one input in every call, for whoever chooses sizes to pad to.

    Raises:
        TraceError: If a signature has no input of that name.
    """
    for number, inputs in enumerate(trace.signatures):
        if name not in inputs:
            raise TraceError(f"signature {number} has no input {shown(name)}; its inputs are {shown(sorted(inputs))}")
    return [trace.signatures[number][name].shape for number in trace.calls]
