"""From the calls that a module has served to a manifest, and from a manifest to the calls to prepare."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from graphcache.cache.manifest import Manifest, ManifestProblem, differences
from graphcache.cache.served import ManifestEntry, plan
from graphcache.cache.spec import example_of
from graphcache.errors import shown
from graphcache.modules.engine import EngineModule
from graphcache.modules.examples import Example, varied
from graphcache.modules.fingerprint import device_of, environment
from graphcache.modules.remembered import made_again

if TYPE_CHECKING:
    from graphcache.modules.cached import CachedModule


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

    target: CachedModule
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


def served(fast: CachedModule) -> tuple[Manifest, int]:
    """What a module and its parts have served, as a manifest, and how many calls cannot be told in text."""
    entries: list[ManifestEntry] = []
    untold = 0
    for part, each in _targets(fast).items():
        found, left = each._misses.remembered.served(each._misses.admission.known, part)
        entries += found
        untold += left
    return Manifest(environment(fast._module), entries), untold


def choose(fast: CachedModule, given: str | os.PathLike[str] | Manifest, seconds: float | None) -> Chosen:
    """The calls of a manifest that are worth a capture here.

    Args:
        fast: The wrapped module, whose budgets count for the module and each of its parts.
        given: The manifest, or its path.
        seconds: What captures may take together; ``None`` for no bound.

    Raises:
        ConfigError: For a path that is none.
    """
    here = environment(fast._module)
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
        fast._parts.reach(part)
    targets = _targets(fast)
    by_part: dict[str, list[ManifestEntry]] = {}
    for index, entry in enumerate(manifest.entries):
        if entry.part in targets:
            by_part.setdefault(entry.part, []).append(entry)
        else:
            text = f"{shown(entry.part)} is no part that is captured here"
            problems.append(ManifestProblem(path, f"entries[{index}].part", text))
    chosen = [
        entry
        for entries in by_part.values()
        for entry in plan(entries, fast._config.max_graphs, fast._cache.max_bytes, seconds)
    ]
    chosen.sort(key=lambda entry: -entry.hits)
    jobs = [
        Job(targets[entry.part], _example(entry, targets[entry.part]), entry.spec.modes, entry, path)
        for entry in chosen
    ]
    return Chosen(jobs, sum(map(len, by_part.values())) - len(jobs), problems)


def _targets(fast: CachedModule) -> dict[str, CachedModule]:
    return {"": fast, **fast._parts.named()}


def _example(entry: ManifestEntry, target: CachedModule) -> Example:
    module = target.module
    device = device_of(module)

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = example_of(entry.spec, device)
        if isinstance(module, EngineModule):
            args = made_again(module, args)
        varied(args, kwargs)
        return args, kwargs

    return Example(f"{entry.spec.text[:200]}", entry.spec.nbytes, make)
