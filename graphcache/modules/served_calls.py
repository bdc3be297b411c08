"""From the calls that a module has served to a manifest, and from a manifest to the calls to prepare."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from graphcache.errors import shown
from graphcache.modules.arguments import arguments_of
from graphcache.modules.controls import controls
from graphcache.modules.engine import EngineModule
from graphcache.modules.examples import Example, varied
from graphcache.modules.fingerprint import device_of, environment
from graphcache.modules.key_view import budget_of, reach_part, views_of
from graphcache.persist.manifest import Manifest, ManifestEntry, ManifestProblem, differences

_LONGEST = 9e8
"""Seconds; no more are saved."""
_LARGEST = 2**40
"""Bytes, likewise."""


@dataclass(frozen=True)
class Job:
    """One call to prepare.

    Args:
        target: The wrapped module, or a part of it.
        call: The call.
        modes: Makes a context in which it is prepared.
        entry: Where it comes from, if that is a manifest.
        path: Of that manifest.
    """

    target: Any
    call: Example
    modes: Callable[[], AbstractContextManager[object]] = nullcontext
    entry: ManifestEntry | None = None
    path: str = ""

    @property
    def measured(self) -> dict[str, float] | None:
        """What the call was measured to take, in seconds, if all of it was."""
        if self.entry is None:
            return None
        entry = self.entry
        times = {"eager": entry.eager_seconds, "replay": entry.replay_seconds, "capture": entry.capture_seconds}
        known = {name: seconds for name, seconds in times.items() if seconds is not None}
        return known if len(known) == len(times) else None


class Chosen(NamedTuple):
    """Calls of a manifest, hottest first; how many found no room in the budgets; and what was wrong."""

    jobs: list[Job]
    left_out: int
    problems: list[ManifestProblem]


def served(fast: Any) -> tuple[Manifest, int]:
    """What a module and its parts have served, as a manifest, and how many calls no file can hold."""
    entries: list[ManifestEntry] = []
    left_out = 0
    for part, each in _targets(fast).items():
        for view in views_of(each):
            if not view.is_worth_saving:
                continue
            if view.spec.unsaveable:
                left_out += 1
                continue
            times = (
                None if seconds is None else min(seconds, _LONGEST)
                for seconds in (view.costs.eager, view.costs.replay, view.costs.capture)
            )
            entries.append(ManifestEntry(view.spec, view.answered, part, min(view.nbytes, _LARGEST), *times))
    return Manifest(environment(controls(fast).module), entries), left_out


def plan(
    entries: Iterable[ManifestEntry],
    max_graphs: int,
    max_bytes: int | None = None,
    max_seconds: float | None = None,
) -> list[ManifestEntry]:
    """The entries to capture, hottest first, as far as budgets reach; one too large for what is left is passed over.

    An entry's bytes are those its graph owned, or those of its inputs if they are more. An entry whose capture was
    never measured counts no seconds: whoever captures has to watch the clock.

    Args:
        entries: Of one module.
        max_graphs: How many graphs may be captured.
        max_bytes: Bytes that they may own together; ``None`` for no bound.
        max_seconds: What capturing them may take; ``None`` for no bound.

    Example:
        >>> from graphcache.keys.call_spec import CallSpec
        >>> seen = [ManifestEntry(CallSpec.of((torch.zeros(n),), {}), hits=n, nbytes=100 * n) for n in (1, 2, 3)]
        >>> [entry.hits for entry in plan(seen, 2, max_bytes=450)]
        [3, 1]
    """
    chosen: list[ManifestEntry] = []
    for entry in sorted(entries, key=lambda entry: entry.heat):
        size, cost = max(entry.nbytes, entry.spec.nbytes), entry.capture_seconds or 0.0
        if (max_bytes is not None and size > max_bytes) or (max_seconds is not None and cost > max_seconds):
            continue
        if len(chosen) == max_graphs:
            break
        max_bytes = None if max_bytes is None else max_bytes - size
        max_seconds = None if max_seconds is None else max_seconds - cost
        chosen.append(entry)
    return chosen


def choose(fast: Any, given: str | os.PathLike[str] | Manifest, seconds: float | None) -> Chosen:
    """The calls of a manifest that are worth a capture here.

    Args:
        fast: The wrapped module, whose budgets count for the module and each of its parts.
        given: The manifest, or its path.
        seconds: What captures may take together; ``None`` for no bound.

    Raises:
        ConfigError: For a path that is none.
    """
    here = environment(controls(fast).module)
    if isinstance(given, Manifest):
        manifest, path = given, "the manifest"
        problems = [
            ManifestProblem(path, f"environment[{name!r}]", f"{there}, but here it is {found}")
            for name, there, found in differences(given.environment, here)
        ]
        if problems:
            return Chosen([], 0, problems)
    else:
        manifest, path = Manifest.load(given, expect=here), str(os.fspath(given))
    problems = list(manifest.problems)
    for part in {entry.part for entry in manifest.entries}:
        # What was found in another process because the whole was refused there.
        reach_part(fast, part)
    targets = _targets(fast)
    by_part: dict[str, list[ManifestEntry]] = {}
    for index, entry in enumerate(manifest.entries):
        if entry.part in targets:
            by_part.setdefault(entry.part, []).append(entry)
        else:
            text = f"{shown(entry.part)} is no part that is captured here"
            problems.append(ManifestProblem(path, f"entries[{index}].part", text))
    chosen = [entry for entries in by_part.values() for entry in plan(entries, *budget_of(fast), seconds)]
    chosen.sort(key=lambda entry: -entry.hits)
    jobs = [
        Job(targets[entry.part], _example(entry, targets[entry.part]), entry.spec.entered, entry, path)
        for entry in chosen
    ]
    return Chosen(jobs, sum(map(len, by_part.values())) - len(jobs), problems)


def _targets(fast: Any) -> dict[str, Any]:
    """The module and its parts, by name."""
    return {"": fast, **controls(fast).parts}


def _example(entry: ManifestEntry, target: Any) -> Example:
    """The call of an entry, for a module or a part."""
    module = controls(target).module
    device = device_of(module)
    spec = replace(entry.spec, names=arguments_of(module))

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = spec.example(device)
        if isinstance(module, EngineModule):
            args = with_host_values(module, args, spec.contents.host_values)
        varied(args, kwargs)
        return args, kwargs

    return Example(str(spec)[:200], spec.nbytes, make)


def with_host_values(engine: EngineModule, args: tuple[Any, ...], given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of an engine with the values of its host shape tensors.

    Raises:
        ValueError: If values are not those of the engine's host shape tensors.
    """
    hosts = [(index, binding) for index, binding in enumerate(engine.engine.inputs) if binding.on_host]
    if len(hosts) != len(given) or any(index >= len(args) for index, _ in hosts):
        raise ValueError(f"values of {len(given)} host shape tensors for {len(args)} inputs; expected {len(hosts)}")
    made = list(args)
    for (index, binding), values in zip(hosts, given, strict=True):
        try:
            made[index] = torch.tensor(values, dtype=binding.dtype).reshape(binding.shape)
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"args[{index}] holds no values of {binding.name!r}: {error}") from error
    return tuple(made)
