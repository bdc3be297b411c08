"""Which calls to capture at start-up: what earlier processes served and what it cost, in a file.

A file that is damaged or comes from another environment is reported and ignored. Reading one runs nothing. It is JSON::

    {"digest":"4f2a…","format":"graphcache.manifest","version":2,"body":{"entries":[…],"environment":{…}}}

The digest is that of the bytes of the body. Files are replaced in one step: readers see the old one or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from graphcache.errors import ConfigError, shown
from graphcache.files import open_regular, replacing
from graphcache.keys.call_spec import CallSpec
from graphcache.modules.prepare import ManifestProblem
from graphcache.persist.saved_call import of_json, saved, text_of

VERSION = 2
MOST_BYTES = 4 * 2**20
"""Of a file, which bounds the memory (some 30 times as much) and the time (seconds) that reading takes."""
_FORMAT = "graphcache.manifest"
_MOST_TEXT = 1000
_MOST_PROBLEMS = 16
_MOST_ENTRIES = 20_000
_COUNTS = ("hits", "nbytes")
_SECONDS = ("eager_seconds", "replay_seconds", "capture_seconds")
_BODY = b',"body":'


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One call that was served.

    Args:
        spec: The call, which a file can hold.
        hits: How often it was seen.
        part: Name of the submodule that was called; empty for the module itself.
        nbytes: Bytes that its graph owned; 0 if that is not known.
        eager_seconds: What it took without a graph; ``None`` if it was not measured.
        replay_seconds: What it took with one.
        capture_seconds: What its capture took.

    Raises:
        ConfigError: For a number that is none, naming the field.
    """

    spec: CallSpec
    hits: int
    part: str = ""
    nbytes: int = 0
    eager_seconds: float | None = None
    replay_seconds: float | None = None
    capture_seconds: float | None = None

    def __post_init__(self) -> None:
        try:
            if type(self.spec) is not CallSpec:
                raise ValueError("it is none")
            object.__setattr__(self, "spec", saved(self.spec))
        except ValueError as why:
            raise ConfigError(f"spec={shown(self.spec)}: expected a CallSpec that a file can hold: {why}") from why
        if type(self.part) is not str or len(self.part) > _MOST_TEXT:
            raise ConfigError(f"part={shown(self.part)}: expected text of at most {_MOST_TEXT} characters")
        for name in _COUNTS:
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 2**63:
                raise ConfigError(f"{name}={shown(value)}: expected a whole number from 0 to 2**63 - 1")
        for name in _SECONDS:
            value = getattr(self, name)
            if value is not None and (type(value) not in (int, float) or not 0 <= value < 1e9):
                raise ConfigError(f"{name}={shown(value)}: expected seconds from 0 to 1e9, or None")

    @classmethod
    def of_json(cls, tree: Any) -> ManifestEntry:
        """An entry from what a file holds."""
        if type(tree) is not dict or tree.keys() != {*_FIELDS, "call"}:
            raise ValueError(f"an entry is {shown(tree)}; expected the fields call, {', '.join(_FIELDS)}")
        return cls(of_json(tree["call"]), **{name: tree[name] for name in _FIELDS})

    @property
    def json(self) -> dict[str, Any]:
        """What a file holds."""
        return {name: getattr(self, name) for name in _FIELDS} | {"call": json.loads(text_of(self.spec))}

    @property
    def saved_seconds(self) -> float:
        """What replays have saved over eager execution; 0 if it is not known."""
        if self.eager_seconds is None or self.replay_seconds is None:
            return 0.0
        return max(self.eager_seconds - self.replay_seconds, 0.0) * self.hits

    @property
    def heat(self) -> tuple[Any, ...]:
        """Sorts the hottest first, and equal ones always the same way."""
        return -self.hits, -self.saved_seconds, self.part, text_of(self.spec)

    def merge(self, other: ManifestEntry) -> ManifestEntry:
        """Both, whichever came first. The least of what was measured is what disturbed it least."""
        seconds: dict[str, Any] = {}
        for name in _SECONDS:
            known = [value for value in (getattr(self, name), getattr(other, name)) if value is not None]
            seconds[name] = min(known, default=None)
        hits = min(self.hits + other.hits, 2**63 - 1)
        return replace(self, hits=hits, nbytes=max(self.nbytes, other.nbytes), **seconds)


_FIELDS = tuple(each.name for each in fields(ManifestEntry) if each.name != "spec")


@dataclass(frozen=True)
class Manifest:
    """Calls that were served in one environment, hottest first. Entries of the same call are put together.

    Args:
        environment: What must be the same for costs and captures to mean anything: the engine's hash, the device's
            name, the driver, versions.
        entries: The calls.
        problems: What was found wrong when it was loaded.

    Raises:
        ConfigError: For an environment or entries that are none.

    Example:
        >>> import tempfile
        >>> import torch
        >>> here = {"device": "cpu", "torch": "2.6"}
        >>> manifest = Manifest(here, [ManifestEntry(CallSpec.of((torch.zeros(8, 4),), {}), hits=100)])
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     left_out = manifest.save(f"{directory}/shapes.json")
        ...     again = Manifest.load(f"{directory}/shapes.json", expect=here)
        ...     other = Manifest.load(f"{directory}/shapes.json", expect={**here, "torch": "2.7"})
        >>> left_out, again == manifest, other.entries, other.problems[0].text
        (0, True, (), "'2.6', but here it is '2.7'")
    """

    environment: Mapping[str, str]
    entries: tuple[ManifestEntry, ...] = ()
    problems: tuple[ManifestProblem, ...] = ()

    def __init__(
        self,
        environment: Mapping[str, str],
        entries: Iterable[ManifestEntry] = (),
        problems: Iterable[ManifestProblem] = (),
    ) -> None:
        _check_environment("environment", environment)
        found: dict[tuple[str, CallSpec], ManifestEntry] = {}
        for index, entry in enumerate(entries):
            if type(entry) is not ManifestEntry:
                raise ConfigError(f"entries[{index}]={shown(entry)}: expected a ManifestEntry")
            key = (entry.part, entry.spec)
            found[key] = found[key].merge(entry) if key in found else entry
        object.__setattr__(self, "environment", dict(environment))
        object.__setattr__(self, "entries", tuple(sorted(found.values(), key=lambda entry: entry.heat)))
        object.__setattr__(self, "problems", tuple(problems))

    def merge(self, other: Manifest) -> Manifest:
        """The calls of both: hits added up, the least seconds and the most bytes of what was measured."""
        for name, left, right in differences(self.environment, other.environment):
            raise ConfigError(
                f"environment[{name!r}]: {left} here, {right} in the other; expected manifests of one environment"
            )
        return Manifest(self.environment, (*self.entries, *other.entries), (*self.problems, *other.problems))

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the manifest in one step; a reader sees the old file or the new one, whoever else writes.

        Args:
            path: Of the file, in a directory that exists.

        Returns:
            How many of the coldest entries were left out: a file holds 4 MiB and 20 000 of them.

        Raises:
            ConfigError: If it cannot be written; what was there stays.
        """
        data, left_out = self._written()
        name = _path(path)
        try:
            with replacing(name) as file:
                file.write(data)
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise ConfigError(f"path={shown(name)} cannot be written: {why}; what was there is as it was") from error
        return left_out

    @property
    def data(self) -> bytes:
        """What :meth:`save` writes."""
        return self._written()[0]

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, expect: Mapping[str, str] | None = None) -> Manifest:
        """Read a manifest. Whatever is wrong with it is in ``problems``, and what is wrong is left out.

        Args:
            path: Of the file.
            expect: The environment here; a manifest of another one is ignored. ``None`` takes any.

        Returns:
            The manifest; one without entries, of the environment here, if it had to be ignored.

        Raises:
            ConfigError: For a path or an environment that is none.
        """
        name = _path(path)
        if expect is not None:
            _check_environment("expect", expect)
        try:
            with open_regular(name) as file:
                data = file.read(MOST_BYTES + 1)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or f"not as it was written: {error}"
            return cls(expect or {}, (), [ManifestProblem(name, "", why)])
        found = cls.of_data(data, name)
        if expect is None:
            return found
        if found.problems and not found.entries:
            return cls(expect, (), found.problems)
        return for_environment(found, expect, name)

    @classmethod
    def of_data(cls, data: bytes, name: str) -> Manifest:
        """From :attr:`data`, of any environment; ``name`` is what problems call it."""
        try:
            body = _unsealed(data)
            found = cls(body["environment"])
        except _Damaged as damaged:
            return cls({}, (), [ManifestProblem(name, *damaged.args)])
        except ConfigError as error:
            return cls({}, (), [ManifestProblem(name, "environment", str(error))])
        entries: list[ManifestEntry] = []
        problems: list[ManifestProblem] = []
        for index, tree in enumerate(body["entries"]):
            try:
                entries.append(ManifestEntry.of_json(tree))
            except ValueError as error:
                # A file of nothing else would fill the memory with words.
                if len(problems) < _MOST_PROBLEMS:
                    problems.append(ManifestProblem(name, f"entries[{index}]", str(error)))
        if unsaid := len(body["entries"]) - len(entries) - len(problems):
            problems.append(ManifestProblem(name, "entries", f"{unsaid} more that cannot be used"))
        return cls(found.environment, entries, problems)

    def _written(self) -> tuple[bytes, int]:
        """The file, and how many of the coldest entries found no room in it."""
        environment = _compact(self.environment)
        left = MOST_BYTES - len(environment) - 1024
        kept: list[str] = []
        for entry in self.entries[:_MOST_ENTRIES]:
            text = _compact(entry.json)
            left -= len(text) + 1
            if left < 0:
                break
            kept.append(text)
        body = f'{{"entries":[{",".join(kept)}],"environment":{environment}}}'.encode("ascii")
        head = _compact({"digest": _digest(body), "format": _FORMAT, "version": VERSION}).encode("ascii")
        return b"".join((head[:-1], _BODY, body, b"}\n")), len(self.entries) - len(kept)


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Name by name, in what two environments differ, and what each of them has."""
    for name in sorted({*one, *other}):
        if one.get(name) != other.get(name):
            left, right = (shown(each[name]) if name in each else "not given" for each in (one, other))
            yield name, left, right


def for_environment(manifest: Manifest, environment: Mapping[str, str], name: str) -> Manifest:
    """A manifest, if it is of this environment; otherwise one without entries, whose problems say what differs."""
    foreign = [
        ManifestProblem(name, f"environment[{field!r}]", f"{there}, but here it is {here}")
        for field, there, here in differences(manifest.environment, environment)
    ]
    return Manifest(environment, (), foreign) if foreign else manifest


class _Damaged(Exception):
    """A file that cannot be believed: where, and what was seen there and expected."""


def _unsealed(data: bytes) -> Any:
    """The body of a file, whose entries have not been looked at."""
    if len(data) > MOST_BYTES:
        raise _Damaged("", f"more than {MOST_BYTES} bytes, which is the most that is read")
    head, mark, body = data.partition(_BODY)
    try:
        document = json.loads(head + b"}" if mark else data)
        if type(document) is not dict or document.get("format") != _FORMAT:
            raise _Damaged("format", f"{_field(document, 'format')} in place of {_FORMAT!r}")
        if type(document.get("version")) is not int or document["version"] != VERSION:
            seen = _field(document, "version")
            raise _Damaged("version", f"{seen}; this is a reader of version {VERSION}, so write the manifest again")
        if document.get("digest") != _digest(body[:-2]) or body[-2:] != b"}\n" or len(document) != 3:
            raise _Damaged("digest", "not that of the body: something changed after it was written")
        found = json.loads(body[:-2])
    except (ValueError, RecursionError, MemoryError) as error:
        raise _Damaged("", f"not as it was written: {type(error).__name__}: {str(error)[:200]}") from error
    if type(found) is not dict or found.keys() != {"entries", "environment"} or type(found["entries"]) is not list:
        raise _Damaged("body", f"{shown(found)} in place of an environment and a list of entries")
    if len(found["entries"]) > _MOST_ENTRIES:
        raise _Damaged("entries", f"{len(found['entries'])} of them; expected at most {_MOST_ENTRIES}")
    return found


def _field(document: Any, name: str) -> str:
    """A field of a file's head as text."""
    if type(document) is not dict:
        return f"a {type(document).__name__}"
    return shown(document[name]) if name in document else "nothing"


def _digest(body: bytes) -> str:
    """The digest of a body."""
    return hashlib.sha256(f"{_FORMAT}\n{VERSION}\n".encode("ascii") + body).hexdigest()


def _compact(tree: Any) -> str:
    """A tree as JSON on one line."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _check_environment(name: str, environment: object) -> None:
    """Raise unless an environment is names with text."""
    if not isinstance(environment, Mapping) or len(environment) > 64:
        raise ConfigError(f"{name}={shown(environment)}: expected names with text, at most 64")
    for key, value in environment.items():
        if any(type(text) is not str or len(text) > _MOST_TEXT for text in (key, value)):
            raise ConfigError(f"{name}[{shown(key)}]={shown(value)}: expected text of at most {_MOST_TEXT} characters")


def _path(path: object) -> str:
    """A path as text."""
    try:
        text: object = os.fspath(path)  # type: ignore[call-overload]
        os.fsencode(text)  # type: ignore[arg-type]
    except Exception as error:
        raise ConfigError(f"path={shown(path)}: expected the path of a file") from error
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigError(f"path={shown(path)}: expected the path of a file")
    return text
