"""The header of a package: version, engines, options, and size and digest of each part."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from graphcache.errors import PackageError, shown
from graphcache.fields import FieldError, read_fields
from graphcache.version import __version__

VERSION = 1
FORMAT = "graphcache.package"
HEADER = "header.json"


@dataclass(frozen=True, kw_only=True)
class PackagedEngine:
    """One engine of a package.

    Args:
        module: The name of its module in the model, as ``named_modules()`` gives it; empty for an engine by itself.
        part: The part with its bytes.
        name: The name in messages.
        inputs: Names of the inputs in the order of a call.
        outputs: Names of the outputs in the order of the answer.
        bindings: For readers: each binding with its dtype, shape and ranges.
        requires_output_allocator: Whether TensorRT allocates the outputs.
        profile: The optimisation profile that was chosen, if any.
        output_shapes: Rules of the shapes of outputs; empty where they are not known.
        flavour: The flavour of TensorRT that built it.
        tensorrt: The version of TensorRT that built it.
        capability: The compute capability of the GPUs that it runs on; ``None`` if it is not bound to one.
        device: For readers: the GPU it was saved on.
        onnx: The part with its ONNX model, if the package holds it.
        build: Keyword arguments of ``graphcache.build`` for that model.
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

    Args:
        graphcache: The version that saved it.
        kind: ``"engine"``: one engine, which loads by itself. ``"module"``: engines and weights of a model.
        engines: The engines.
        name: The name of the wrapper; empty for a module that was not wrapped.
        options: The options of the wrapper; ``None`` for a module that was not wrapped.
        weights: The part with the model's tensors, if there are any.
        manifest: The part with the calls to prepare, if there are any.
        parts: Every part but the header.

    Example:
        >>> header = PackageHeader(graphcache="0.1.0", kind="module", engines=[], parts={})
        >>> read_header(header.data, "m.gcache") == header
        True
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
