"""Which calls to capture at start-up: what earlier processes served and what it cost, in a file.

A file that is damaged or comes from another environment is reported and ignored. Reading one runs nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from graphcache.cache.sealed import MOST_BYTES, Damaged, Path, read_sealed, sealed, unsealed, write_sealed
from graphcache.cache.served import ManifestEntry, heat, together
from graphcache.cache.spec import Spec
from graphcache.cache.tree import TreeError
from graphcache.errors import ConfigError, shown

VERSION = 1
_KIND = "graphcache.manifest"
_MOST_TEXT = 1000
_MOST_PROBLEMS = 16
_MOST_ENTRIES = 20_000


@dataclass(frozen=True, slots=True)
class ManifestProblem:
    """Why a manifest, or an entry of one, was ignored.

    Args:
        path: Of the file.
        field: Where in it; empty for the file as a whole.
        text: What was seen there and what was expected.
    """

    path: str
    field: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.field}: {self.text}" if self.field else f"{self.path}: {self.text}"


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
        >>> from graphcache.cache.spec import spec_of
        >>> here = {"device": "cpu", "torch": "2.6"}
        >>> manifest = Manifest(here, [ManifestEntry(spec_of((torch.zeros(8, 4),), {}), hits=100)])
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
        found: dict[tuple[str, Spec], ManifestEntry] = {}
        for index, entry in enumerate(entries):
            if type(entry) is not ManifestEntry:
                raise ConfigError(f"entries[{index}]={shown(entry)}: expected a ManifestEntry")
            key = (entry.part, entry.spec)
            found[key] = together(found[key], entry) if key in found else entry
        object.__setattr__(self, "environment", dict(environment))
        object.__setattr__(self, "entries", tuple(sorted(found.values(), key=heat)))
        object.__setattr__(self, "problems", tuple(problems))

    def merge(self, other: Manifest) -> Manifest:
        """The calls of both: hits added up, the least seconds and the most bytes of what was measured.

        Raises:
            ConfigError: If they are of different environments, naming what differs.
        """
        for name, left, right in differences(self.environment, other.environment):
            raise ConfigError(
                f"environment[{name!r}]: {left} here, {right} in the other; expected manifests of one environment"
            )
        return Manifest(self.environment, (*self.entries, *other.entries), (*self.problems, *other.problems))

    def save(self, path: Path) -> int:
        """Write the manifest in one step; a reader sees the old file or the new one, whoever else writes.

        Args:
            path: Of the file, in a directory that exists.

        Returns:
            How many of the coldest entries were left out: a file holds 4 MiB and 20 000 of them.

        Raises:
            ConfigError: If it cannot be written; what was there stays.
        """
        body, left_out = self._body()
        name = _path(path)
        try:
            write_sealed(name, _KIND, VERSION, body)
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise ConfigError(f"path={shown(name)} cannot be written: {why}; what was there is as it was") from error
        return left_out

    @property
    def data(self) -> bytes:
        """What :meth:`save` writes."""
        return sealed(_KIND, VERSION, self._body()[0])

    def _body(self) -> tuple[dict[str, Any], int]:
        kept: list[dict[str, Any]] = []
        left = MOST_BYTES - 1024 - len(json.dumps(self.environment))
        for entry in self.entries[:_MOST_ENTRIES]:
            left -= len(json.dumps(entry.tree)) + 1
            if left < 0:
                break
            kept.append(entry.tree)
        return {"environment": self.environment, "entries": kept}, len(self.entries) - len(kept)

    @classmethod
    def load(cls, path: Path, *, expect: Mapping[str, str] | None = None) -> Manifest:
        """Read a manifest. Whatever is wrong with it is in ``problems``, and what is wrong is left out.

        Args:
            path: Of the file.
            expect: The environment here; a manifest of another one is ignored. ``None`` takes any.

        Returns:
            The manifest; one without entries, of the environment here, if it had to be ignored.

        Raises:
            ConfigError: For a path or an environment that is none.
        """
        return cls._read(_path(path), expect, read_sealed)

    @classmethod
    def of_data(cls, data: bytes, name: str) -> Manifest:
        """From :attr:`data`, of any environment; ``name`` is what problems call it."""
        return cls._read(name, None, lambda _, kind, version: unsealed(data, kind, version))

    @classmethod
    def _read(cls, name: str, expect: Mapping[str, str] | None, read: Callable[[str, str, int], Any]) -> Manifest:
        if expect is not None:
            _check_environment("expect", expect)
        try:
            body = read(name, _KIND, VERSION)
            found = _head(body)
        except Damaged as damaged:
            return cls(expect or {}, (), [ManifestProblem(name, damaged.field, damaged.text)])
        problems = [
            ManifestProblem(name, f"environment[{field!r}]", f"{there}, but here it is {here}")
            for field, there, here in differences(found.environment, found.environment if expect is None else expect)
        ]
        if problems:
            return cls(expect or {}, (), problems)
        entries: list[ManifestEntry] = []
        for index, tree in enumerate(body["entries"]):
            try:
                entries.append(ManifestEntry.of_tree(tree))
            except (ConfigError, TreeError) as error:
                # A file of nothing else would fill the memory with words.
                if len(problems) < _MOST_PROBLEMS:
                    problems.append(ManifestProblem(name, f"entries[{index}]", str(error)))
        unsaid = len(body["entries"]) - len(entries) - len(problems)
        if unsaid:
            problems.append(ManifestProblem(name, "entries", f"{unsaid} more that cannot be used"))
        return cls(found.environment, entries, problems)


def _head(body: Any) -> Manifest:
    """A manifest of the environment that a file names."""
    if type(body) is not dict or body.keys() != {"environment", "entries"} or type(body["entries"]) is not list:
        raise Damaged("body", f"{shown(body)} in place of an environment and a list of entries")
    if len(body["entries"]) > _MOST_ENTRIES:
        raise Damaged("entries", f"{len(body['entries'])} of them; expected at most {_MOST_ENTRIES}")
    try:
        return Manifest(body["environment"])
    except ConfigError as error:
        raise Damaged("environment", str(error)) from error


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Name by name, in what two environments differ, and what each of them has.

    Example:
        >>> list(differences({"torch": "2.6"}, {"torch": "2.7"}))
        [('torch', "'2.6'", "'2.7'")]
    """
    for name in sorted({*one, *other}):
        if one.get(name) != other.get(name):
            left, right = (shown(each[name]) if name in each else "not given" for each in (one, other))
            yield name, left, right


def _check_environment(name: str, environment: object) -> None:
    if not isinstance(environment, Mapping) or len(environment) > 64:
        raise ConfigError(f"{name}={shown(environment)}: expected names with text, at most 64")
    for key, value in environment.items():
        for text in (key, value):
            if type(text) is not str or len(text) > _MOST_TEXT:
                raise ConfigError(
                    f"{name}[{shown(key)}]={shown(value)}: expected text of at most {_MOST_TEXT} characters"
                )


def _path(path: object) -> str:
    try:
        text: object = os.fspath(path)  # type: ignore[call-overload]
        os.fsencode(text)  # type: ignore[arg-type]
    except Exception as error:
        raise ConfigError(f"path={shown(path)}: expected the path of a file") from error
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigError(f"path={shown(path)}: expected the path of a file")
    return text
