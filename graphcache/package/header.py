"""What a package says of itself: version, engines, options and the digest of each part."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from graphcache.errors import shown

VERSION = 1
FORMAT = "graphcache.package"
Kind = Literal["engine", "module"]


class HeaderError(Exception):
    """A header that is none; the message names the field."""


class FormatVersionError(HeaderError):
    """A header of another version of the format."""


@dataclass(frozen=True, kw_only=True)
class PackagedEngine:
    """One engine of a package.

    Args:
        module: The name of its module in the model, as ``named_modules()`` gives it; empty for an engine by itself.
        part: Of its bytes.
        name: What messages call it.
        inputs: Names in the order of a call.
        outputs: Names in the order of the answer.
        bindings: For readers: each binding with its dtype, shape and ranges.
        requires_output_allocator: Whether TensorRT allocates the outputs.
        profile: The optimisation profile that was chosen, if any.
        output_shapes: Rules of the shapes of outputs; empty where they are not known.
        flavour: The flavour of TensorRT that built it.
        tensorrt: Its version.
        capability: The compute capability of the GPUs that it runs on; ``None`` where it is not bound to one.
        device: For readers: the GPU it was saved on.
        onnx: The part with its ONNX model, if that is inside.
        build: Keyword arguments of ``graphcache.build`` for that model.
    """

    module: str
    part: str
    name: str
    inputs: list[str]
    outputs: list[str]
    bindings: list[dict[str, Any]] = field(default_factory=list)
    requires_output_allocator: bool = False
    profile: int | None = None
    output_shapes: str = ""
    flavour: str
    tensorrt: str
    capability: list[int] | None = None
    device: str = ""
    onnx: str | None = None
    build: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a package says of itself.

    Args:
        graphcache: The version that saved it.
        kind: ``"engine"``: one engine, which loads by itself. ``"module"``: engines and weights of a model.
        engines: The engines.
        name: Of the wrapper; empty for a module that was not wrapped.
        options: Of the wrapper; ``None`` for a module that was not wrapped.
        weights: The part with the model's tensors, if there are any.
        manifest: The part with the calls to prepare, if there are any.
        parts: Size in bytes and SHA-256 of every part but the header.

    Example:
        >>> header = Header(graphcache="0.1.0", kind="module", engines=[], parts={})
        >>> read_header(header.data) == header
        True
    """

    graphcache: str
    kind: Kind
    engines: list[PackagedEngine]
    name: str = ""
    options: dict[str, Any] | None = None
    weights: str | None = None
    manifest: str | None = None
    parts: dict[str, dict[str, Any]]

    @property
    def data(self) -> bytes:
        """As JSON, for people too."""
        tree = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(tree, indent=1, allow_nan=False).encode()

    def named(self) -> list[str]:
        """The parts that the header refers to."""
        engines = [part for each in self.engines for part in (each.part, each.onnx)]
        return [part for part in (*engines, self.weights, self.manifest) if part is not None]


def read_header(data: bytes) -> Header:
    """The header of a package.

    Raises:
        FormatVersionError: If it is of another version.
        HeaderError: If it is none, naming the field.
    """
    try:
        tree = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError, MemoryError) as error:
        raise HeaderError(f"it is no JSON ({' '.join(str(error).split())[:200]})") from error
    if type(tree) is not dict or tree.get("format") != FORMAT:
        raise HeaderError(f"its format is {shown(tree.get('format') if type(tree) is dict else tree)}, not {FORMAT!r}")
    version = tree.get("version")
    if type(version) is not int or version != VERSION:
        raise FormatVersionError(shown(version))
    tree = {name: value for name, value in tree.items() if name not in ("format", "version")}
    engines = _field("engines", tree.get("engines"), list)
    header: Header = _made(
        Header,
        "",
        {**tree, "engines": [_made(PackagedEngine, f"engines[{index}]", each) for index, each in enumerate(engines)]},
    )
    if header.kind == "engine" and [each.module for each in header.engines] != [""]:
        raise HeaderError("kind is 'engine', and there is not just one engine")
    if len({each.module for each in header.engines}) < len(header.engines):
        raise HeaderError("two engines have the same module")
    for name in header.named():
        if name not in header.parts:
            raise HeaderError(f"parts does not list {shown(name)}")
    return header


def _made(kind: type[Any], where: str, tree: Any) -> Any:
    checks = _CHECKS[kind]
    known = {each.name for each in fields(kind)}
    if type(tree) is not dict:
        raise HeaderError(f"{where} is {shown(tree)}; expected an object")
    if unknown := sorted(tree.keys() - known):
        raise HeaderError(f"{where}: {shown(unknown[0])} is no field of version {VERSION}")
    for name in known:
        if name not in tree:
            raise HeaderError(f"{where}: {name} is missing")
        if not checks[name](tree[name]):
            raise HeaderError(f"{f'{where}.' if where else ''}{name} is {shown(tree[name])}")
    return kind(**tree)


def _field(name: str, value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise HeaderError(f"{name} is {shown(value)}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _text(value: Any) -> bool:
    return type(value) is str and len(value) <= 2**20


def _texts(value: Any) -> bool:
    return type(value) is list and all(_text(each) for each in value)


def _texts_or_none(value: Any) -> bool:
    return value is None or _text(value)


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _object_or_none(value: Any) -> bool:
    return value is None or type(value) is dict


def _part(value: Any) -> bool:
    return (
        type(value) is dict
        and value.keys() == {"nbytes", "sha256"}
        and _whole(value["nbytes"])
        and _text(value["sha256"])
    )


_CHECKS: Mapping[type[Any], Mapping[str, Callable[[Any], bool]]] = {
    PackagedEngine: {
        "module": _text,
        "part": _text,
        "name": _text,
        "inputs": _texts,
        "outputs": _texts,
        "bindings": lambda value: type(value) is list,
        "requires_output_allocator": lambda value: type(value) is bool,
        "profile": lambda value: value is None or _whole(value),
        "output_shapes": _text,
        "flavour": _text,
        "tensorrt": _text,
        "capability": lambda value: (
            value is None or (type(value) is list and len(value) == 2 and all(map(_whole, value)))
        ),
        "device": _text,
        "onnx": _texts_or_none,
        "build": lambda value: type(value) is dict,
    },
    Header: {
        "graphcache": _text,
        "kind": lambda value: value in get_args(Kind),
        "engines": lambda value: True,
        "name": _text,
        "options": _object_or_none,
        "weights": _texts_or_none,
        "manifest": _texts_or_none,
        "parts": lambda value: type(value) is dict and all(map(_part, value.values())),
    },
}
