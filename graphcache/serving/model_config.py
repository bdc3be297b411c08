"""``config.json`` of a model in a repository: how it is wrapped, and what is prepared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from graphcache.buckets.spec import Buckets
from graphcache.config import REMOVED, GraphConfig
from graphcache.errors import ConfigError, ServingError, shown
from graphcache.files import open_regular

_MOST_BYTES = 2**20
_FIELDS = ("options", "buckets", "prepare")


@dataclass(frozen=True)
class ModelConfig:
    """How a model is wrapped and prepared.

    Args:
        options: Keyword arguments of :func:`graphcache.wrap`, with the buckets among them; empty for the defaults,
            or for those that a package has.
        prepare: Sets of inputs to prepare, each by the names of the inputs and their shapes.

    Example:
        >>> ModelConfig({"max_graphs": 8}, ({"x": (1, 64)},)).graphs.max_graphs
        8
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    prepare: tuple[Mapping[str, tuple[int, ...]], ...] = ()

    @property
    def graphs(self) -> GraphConfig:
        """The options over the environment over the defaults."""
        return GraphConfig.of(self.options)


def read_config(path: Path) -> ModelConfig:
    """Read and check a file such as::

        {
          "options": {"capture": "prepared", "max_graphs": 16},
          "buckets": {"x": {"0": [1, 8, 64]}},
          "prepare": [{"x": [1, 64]}, {"x": [8, 64]}]
        }

    Axes are numbers, which JSON has as text where they are keys.
    """
    try:
        with open_regular(path) as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ServingError(f"{path} has more than {_MOST_BYTES} bytes; expected the options of a model")
        tree = json.loads(data)
    except RecursionError as error:
        raise ServingError(f"{path} is no JSON that could be read: it is nested too deeply") from error
    except (OSError, ValueError) as error:
        raise ServingError(f"{path} is no JSON that could be read: {error}") from error
    tree = _object(tree, f"{path}")
    for name in tree:
        if name not in _FIELDS:
            raise ServingError(f"{path}: unknown field {shown(name)}; the fields are {', '.join(_FIELDS)}")
    options = dict(_object(tree.get("options", {}), f"{path}: options"))
    known = {each.name for each in fields(GraphConfig)} - {"buckets"}
    for name in options:
        if name not in known and name not in REMOVED:
            raise ServingError(f"{path}: options: unknown option {shown(name)}; they are {', '.join(sorted(known))}")
    if tree.get("buckets") is not None:
        options["buckets"] = _buckets(tree["buckets"], f"{path}: buckets")
    config = ModelConfig(options, _prepare(tree.get("prepare", []), f"{path}: prepare"))
    try:
        if "buckets" in options:
            Buckets.of(options["buckets"])
        GraphConfig(**options)
    except ConfigError as error:
        raise ServingError(f"{path}: {error}") from error
    return config


def _buckets(given: Any, where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, axes in _object(given, where).items():
        inner = _object(axes, f"{where}: {name}")
        for axis in inner:
            if not (axis.isascii() and axis.isdecimal() and len(axis) <= 2):
                raise ServingError(f'{where}: {name}: axis {shown(axis)}; expected a number, such as "0"')
        found[name] = {int(axis): sizes for axis, sizes in inner.items()}
    return found


def _prepare(given: Any, where: str) -> tuple[dict[str, tuple[int, ...]], ...]:
    if not isinstance(given, list):
        raise ServingError(f'{where} is {shown(given)}; expected a list of objects, such as [{{"x": [1, 64]}}]')
    found = []
    for index, each in enumerate(given):
        shapes = {}
        for name, shape in _object(each, f"{where}[{index}]").items():
            if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**31 for size in shape):
                raise ServingError(
                    f"{where}[{index}]: {name} is {shown(shape)}; expected a list of whole numbers, 0 or more"
                )
            shapes[name] = tuple(shape)
        if not shapes:
            raise ServingError(f"{where}[{index}] names no input; expected shapes by name")
        found.append(shapes)
    return tuple(found)


def _object(found: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(found, dict):
        raise ServingError(f"{where} is {shown(found)}; expected an object")
    return found
