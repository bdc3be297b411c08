"""A package: a zip of named parts, none of them compressed, and a header with the size and the digest of each part.

No part takes more memory than the file takes on disk, and nothing is ever written where a name in it says.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

from graphcache.config import REMOVED, GraphConfig
from graphcache.errors import ConfigError, PackageError, shown
from graphcache.fields import FieldError, read_fields
from graphcache.files import open_regular, replacing
from graphcache.version import __version__

VERSION = 1
FORMAT = "graphcache.package"
HEADER = "header.json"
BUILD_OPTIONS = ("shapes", "weight_streaming", "refittable", "workspace")
"""Keyword arguments of ``graphcache.build`` that a package may hold."""
MOST_HEADER_BYTES = 4 * 2**20
_MOST_PARTS = 4096
_NAME = re.compile(r"header\.json|manifest\.json|weights\.safetensors|engines/\d{1,4}\.(?:engine|onnx)")
_END = b"PK\x05\x06"
_END_BYTES = 22


@dataclass(frozen=True, kw_only=True)
class PackagedEngine:
    """One engine of a package.

    ``module`` is the name of its module in the model, as ``named_modules()`` gives it, and empty for an engine by
    itself. ``part`` and ``onnx`` are parts of the package; ``build`` has keyword arguments of ``graphcache.build`` for
    the ONNX model. ``capability`` is that of the GPUs it runs on, ``None`` if it is not bound to one. ``bindings`` and
    ``device`` are for readers.
    """

    module: str
    part: str
    name: str
    inputs: list[str]
    outputs: list[str]
    bindings: list[Any] = field(default_factory=list)
    requires_output_allocator: bool = False
    profile: int | None = None
    output_shapes: str = ""
    flavour: str
    tensorrt: str
    capability: tuple[int, int] | None = None
    device: str = ""
    onnx: str | None = None
    build: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Size in bytes and SHA-256 of a part."""

    nbytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class PackageHeader:
    """The header of a package.

    An ``"engine"`` loads by itself, a ``"module"`` is engines and weights of a model. ``name`` and ``options`` are
    those of the wrapper; ``options`` is ``None`` for a module that was not wrapped. ``weights`` and ``manifest`` name
    parts, and ``parts`` has every part but the header.
    """

    graphcache: str
    kind: Literal["engine", "module"]
    engines: list[PackagedEngine]
    name: str = ""
    options: dict[str, Any] | None = None
    weights: str | None = None
    manifest: str | None = None
    parts: dict[str, Part]

    @property
    def data(self) -> bytes:
        """The header as indented JSON."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1, allow_nan=False).encode()

    def named(self) -> list[str]:
        """The parts that the header refers to."""
        engines = [part for each in self.engines for part in (each.part, each.onnx)]
        return [part for part in (*engines, self.weights, self.manifest) if part is not None]


def read_header(data: bytes, path: str) -> PackageHeader:
    """The header of the package at a path, checked."""
    try:
        tree = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError, MemoryError) as error:
        raise damaged(path, HEADER, f"it is no JSON ({' '.join(str(error).split())[:200]})") from error
    found = tree.pop("format", None) if type(tree) is dict else tree
    if found != FORMAT:
        raise damaged(path, HEADER, f"its format is {shown(found)}, not {FORMAT!r}")
    version = tree.pop("version", None)
    if type(version) is not int or version != VERSION:
        raise PackageError(
            f"{path} is a package in format version {shown(version)}, and graphcache {__version__} reads version "
            f"{VERSION}: pip install --upgrade graphcache, or save it again with this release"
        )
    try:
        header = read_fields(PackageHeader, tree)
    except FieldError as error:
        raise damaged(path, HEADER, str(error)) from error
    places = [each.module for each in header.engines]
    if header.kind == "engine" and places != [""]:
        raise damaged(path, HEADER, f"kind is 'engine', and engines are {shown(places)}; expected ['']")
    if len({*places}) < len(places):
        raise damaged(path, HEADER, "two engines have the same module")
    for name in header.named():
        if name not in header.parts:
            raise damaged(path, HEADER, f"parts does not list {shown(name)}")
    return header


def damaged(path: str, part: str, what: str) -> PackageError:
    """The error for a part of a package; an empty part is the whole file."""
    where = f"{path}: part {part!r}" if part else f"{path} is no package, or not all of one"
    return PackageError(f"{where}: {what}; copy the file again, or save the package again with module.save()")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, if no key stands twice in it."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def part_of(data: bytes) -> Part:
    """The size and the digest that the header has of a part."""
    return Part(len(data), hashlib.sha256(data).hexdigest())


def write_parts(path: str | os.PathLike[str], parts: Mapping[str, bytes]) -> None:
    """Write parts in one step: what was at ``path`` stays until all is written. The same parts give the same bytes."""
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in parts.items():
            assert _NAME.fullmatch(name), name
            archive.writestr(zipfile.ZipInfo(name), data)


class Container:
    """The parts of a file, open until the end of a ``with`` block."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)
        with ExitStack() as opened:
            try:
                file = opened.enter_context(open_regular(path))
            except (OSError, ValueError) as error:
                why = getattr(error, "strerror", None) or str(error)
                raise PackageError(
                    f"{self.path} cannot be read: {why}; expected a package that module.save() wrote"
                ) from error
            nbytes = os.fstat(file.fileno()).st_size
            file.seek(max(nbytes - _END_BYTES, 0))
            # zipfile would look for the end before a comment or anything else.
            if not file.read(_END_BYTES).startswith(_END) or nbytes < _END_BYTES:
                raise damaged(self.path, "", f"its {nbytes} bytes do not end as a package does")
            try:
                self._archive = opened.enter_context(zipfile.ZipFile(file))
            except Exception as error:  # a dozen kinds, for damaged files
                raise damaged(self.path, "", shown(error)) from error
            self._parts = self._checked(nbytes)
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @property
    def names(self) -> list[str]:
        """The names of all parts."""
        return list(self._parts)

    def header(self) -> PackageHeader:
        """The header, checked."""
        return read_header(self.read(HEADER), self.path)

    def read(self, name: str, expected: Part | None = None) -> bytes:
        """The contents of a part."""
        if name not in self._parts:
            raise damaged(self.path, name, "it is missing")
        nbytes = self._parts[name].file_size
        if expected is not None and nbytes != expected.nbytes:
            raise damaged(self.path, name, f"it has {nbytes} bytes, and the header says {expected.nbytes}")
        if expected is None and nbytes > MOST_HEADER_BYTES:
            raise damaged(self.path, name, f"it has {nbytes} bytes; expected at most {MOST_HEADER_BYTES}")
        try:
            data = self._archive.read(self._parts[name])
        except Exception as error:  # as above
            raise damaged(self.path, name, f"it cannot be read ({shown(error)})") from error
        seen = part_of(data)
        if seen.nbytes != nbytes:
            raise damaged(self.path, name, f"it has {seen.nbytes} bytes, and the list of parts says {nbytes}")
        if expected is not None and seen != expected:
            text = f"its SHA-256 is {seen.sha256[:16]}…, and the header says {expected.sha256[:16]}…"
            raise damaged(self.path, name, text)
        return data

    def _checked(self, nbytes: int) -> dict[str, zipfile.ZipInfo]:
        """The list of parts, each with a name of a package's, and as it is on disk."""
        listed = self._archive.infolist()
        if len(listed) > _MOST_PARTS:
            raise damaged(self.path, "", f"it has {len(listed)} parts; expected at most {_MOST_PARTS}")
        found: dict[str, zipfile.ZipInfo] = {}
        for part in listed:
            if not _NAME.fullmatch(part.filename):
                raise damaged(self.path, "", f"it has a part {shown(part.filename)}, which no package has")
            if part.filename in found:
                raise damaged(self.path, part.filename, "it is in the list twice")
            if part.compress_type != zipfile.ZIP_STORED or part.flag_bits & 0x1 or part.compress_size != part.file_size:
                raise damaged(self.path, part.filename, "it is compressed or encrypted, which no part of a package is")
            found[part.filename] = part
        if (total := sum(part.file_size for part in listed)) > nbytes:
            raise damaged(self.path, "", f"its parts have {total} bytes together, and the file {nbytes}")
        return found


def options_of(config: GraphConfig) -> dict[str, Any]:
    """The options of a wrapper, as JSON has them."""
    found = {field.name: getattr(config, field.name) for field in fields(config)}
    return {**found, "include": list(config.include), "buckets": _plain(config.buckets)}


def config_of(options: Mapping[str, Any]) -> GraphConfig:
    """The options that :func:`options_of` gave, without those of version 0.1 that were removed."""
    known = {field.name for field in fields(GraphConfig)}
    kept = {name: value for name, value in options.items() if name not in REMOVED}
    if unknown := sorted(kept.keys() - known):
        raise ConfigError(f"unknown option {shown(unknown[0])}")
    return GraphConfig(**{**kept, "buckets": _unplain(kept.get("buckets"))})


def _plain(value: Any) -> Any:
    """Buckets as JSON; a mapping becomes a list of pairs, as its keys may be numbers."""
    if isinstance(value, Mapping):
        return {"map": [[_plain(key), _plain(each)] for key, each in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(
        f"buckets holds {shown(value)}, which a package does not; give plain lists, dictionaries and numbers, or wrap "
        f"the module after loading it"
    )


def _unplain(value: Any) -> Any:
    """The inverse of :func:`_plain`."""
    if isinstance(value, dict):
        try:
            return {_unplain(key): _unplain(each) for key, each in value["map"]}
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"buckets={shown(value)}: not as it was written") from error
    return [_unplain(each) for each in value] if isinstance(value, list) else value
