"""Which submodules may be captured one by one where the whole is not."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase

import torch
from torch import nn

from graphcache.capture.engine_like import EngineLike
from graphcache.config import GraphConfig
from graphcache.errors import ConfigError
from graphcache.modules.transparent import StandIn


def find_parts(module: nn.Module, config: GraphConfig) -> dict[str, nn.Module]:
    """The submodules that an option names, or ``"per_submodule"`` implies, by name; ``{}`` where they are to be found.

    Args:
        module: The wrapped module.
        config: ``include`` names them; without it ``"per_submodule"`` takes the engines. ``strategy="whole_graph"`` has
            none, ``"auto"`` finds them by itself.

    Raises:
        ConfigError: For a name that is not a submodule's, a part inside another part or that is excluded, or
            ``"per_submodule"`` with nothing to capture.
    """
    if config.strategy == "whole_graph" or isinstance(module, EngineLike):
        return {}
    names = _submodules(module)
    for name in config.include:
        if name not in names:
            raise ConfigError(f"include names {name!r}{_near(name, names)}")
    chosen = {name: names[name] for name in config.include}
    excluded = find_excluded(module, config)
    for name in chosen:
        if outer := next((other for other in chosen if name.startswith(f"{other}.")), None):
            raise ConfigError(f"include names both {outer!r} and {name!r}, which is inside it; name one of them")
        if clash := next((other for other in excluded if _shares(name, other)), None):
            raise ConfigError(
                f"include names {name!r} and exclude matches {clash!r}, of which one is inside the other; name one of "
                f"them"
            )
    if config.strategy == "auto":
        return chosen
    if not chosen:
        engines = {name: part for name, part in names.items() if isinstance(part, EngineLike)}
        chosen = {name: part for name, part in engines.items() if not any(_shares(name, each) for each in excluded)}
    if not chosen:
        what = "contains no engine that is not excluded" if excluded else "contains no engine"
        raise ConfigError(
            f"strategy='per_submodule': {type(module).__name__} {what}; name the submodules to capture, such as "
            f"include={list(names)[:2]}"
        )
    return chosen


def find_excluded(module: nn.Module, config: GraphConfig) -> tuple[str, ...]:
    """The names of submodules that ``exclude`` keeps out of graphs; those inside them are kept out with them.

    Args:
        module: The wrapped module.
        config: ``exclude`` holds names, or patterns of them as :mod:`fnmatch` has them.

    Raises:
        ConfigError: For a pattern that matches nothing, naming what is near, or patterns that leave nothing.
    """
    if not config.exclude:
        return ()
    names = _submodules(module)
    found: dict[str, None] = {}
    for pattern in config.exclude:
        matched = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
        if not matched:
            raise ConfigError(f"exclude names {pattern!r}{_near(pattern, names)}")
        found.update(dict.fromkeys(matched))
    excluded = tuple(name for name in found if not any(name.startswith(f"{other}.") for other in found))
    if config.strategy == "auto" and not any(True for _ in candidates(module, excluded)):
        raise ConfigError(
            f"exclude={list(config.exclude)} leaves nothing of {type(module).__name__} that could be captured; exclude "
            f"less, or call the module itself"
        )
    return excluded


def candidates(module: nn.Module, excluded: Collection[str] = ()) -> Iterator[tuple[str, nn.Module]]:
    """The largest submodules that are called by themselves, are not wrapped already, and hold nothing excluded.

    Args:
        module: Whose submodules; itself it is none of them.
        excluded: Names of submodules.

    Yields:
        Each with its name; one that stands in several places once.
    """
    seen: set[int] = set()
    if not _is_closed(module):
        yield from _candidates(module, "", excluded, seen)


def _candidates(
    module: nn.Module, prefix: str, excluded: Collection[str], seen: set[int]
) -> Iterator[tuple[str, nn.Module]]:
    for key, child in module.named_children():
        name = f"{prefix}{key}"
        if id(child) in seen or isinstance(child, StandIn) or name in excluded:
            continue
        seen.add(id(child))
        if _is_closed(child):
            yield name, child
        # A list of modules is never called, and what holds something excluded is not captured as a whole.
        elif type(child).forward is nn.Module.forward or any(each.startswith(f"{name}.") for each in excluded):
            yield from _candidates(child, f"{name}.", excluded, seen)
        else:
            yield name, child


def _submodules(module: nn.Module) -> dict[str, nn.Module]:
    """Every submodule that Python calls."""
    names = dict(module.named_modules())
    closed = tuple(f"{name}." if name else "" for name, each in names.items() if _is_closed(each))
    return {name: each for name, each in names.items() if name and not name.startswith(closed)}


def _is_closed(module: nn.Module) -> bool:
    """Whether TorchScript or Dynamo runs what is inside of a module, so that no graph could stand in for a part."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if isinstance(module, torch.jit.ScriptModule) or (
        dynamo is not None and isinstance(module, dynamo.OptimizedModule)
    ):
        return True
    return module._compiled_call_impl is not None


def _shares(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.")


def _near(name: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3) or list(names)[:8]
    return (
        f", which is no submodule; did you mean {', '.join(near)}?"
        if near
        else ", but there are no submodules that Python calls"
    )
