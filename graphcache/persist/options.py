"""The options of a wrapper in a package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from graphcache.config import REMOVED, GraphConfig
from graphcache.errors import ConfigError, shown


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
