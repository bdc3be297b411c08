"""From the calls that a module has served to a manifest, and from a manifest to the calls to prepare."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from graphcache.cache.key_table import KeyState
from graphcache.capture.engine_like import EngineLike
from graphcache.dispatch.targets import arguments_of
from graphcache.errors import shown
from graphcache.keys.call_spec import CallSpec
from graphcache.modules.prepare import Job, ManifestProblem, varied
from graphcache.modules.transparent import TransparentModule, controls, dispatcher_of
from graphcache.modules.wrapped import device_of
from graphcache.persist.fingerprint import environment
from graphcache.persist.manifest import Manifest, ManifestEntry, for_environment
from graphcache.persist.saved_call import entered, example, nbytes, saved

_OFTEN = 8
"""Eager calls of a key after which it is saved although it has no graph."""
_LONGEST = 9e8
"""Seconds; no more are saved."""
_LARGEST = 2**40
"""Bytes, likewise."""


def served(fast: TransparentModule) -> tuple[Manifest, int]:
    """What a module and its parts have served, as a manifest, and how many calls no file can hold."""
    entries: list[ManifestEntry] = []
    left_out = 0
    for part, each in _targets(fast).items():
        dispatcher = dispatcher_of(each)
        captures, names = dispatcher.captures, arguments_of(dispatcher.target.module)
        for key in captures.keys.known():
            entry, state = dispatcher.entries.get(key), captures.keys.states.get(key) or KeyState(0.0)
            if entry is None and not state.capture.count and state.ran < _OFTEN:
                continue
            try:
                spec = saved(CallSpec(key, names))
            except ValueError:
                left_out += 1
                continue
            size = 0 if entry is None else min(entry.nbytes, _LARGEST)
            known = state.eager.known, state.replay.known, state.capture.known
            times = (None if seconds is None else min(seconds, _LONGEST) for seconds in known)
            entries.append(ManifestEntry(spec, state.ran + captures.keys.hits(key), part, size, *times))
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
    """
    chosen: list[ManifestEntry] = []
    for entry in sorted(entries, key=lambda entry: entry.heat):
        size, cost = max(entry.nbytes, nbytes(entry.spec)), entry.capture_seconds or 0.0
        if (max_bytes is not None and size > max_bytes) or (max_seconds is not None and cost > max_seconds):
            continue
        if len(chosen) == max_graphs:
            break
        max_bytes = None if max_bytes is None else max_bytes - size
        max_seconds = None if max_seconds is None else max_seconds - cost
        chosen.append(entry)
    return chosen


def choose(
    fast: TransparentModule, given: str | os.PathLike[str] | Manifest, seconds: float | None
) -> tuple[list[Job], int, list[ManifestProblem]]:
    """The calls of a manifest that are worth a capture here, hottest first, and what was wrong with it.

    Between them stands how many found no room in the budgets. ``seconds`` bounds what captures may take together.
    """
    here = environment(controls(fast).module)
    if isinstance(given, Manifest):
        path, manifest = "the manifest", for_environment(given, here, "the manifest")
    else:
        manifest = Manifest.load(given, expect=here)
        path = str(os.fspath(given))
    problems = list(manifest.problems)
    for part in {entry.part for entry in manifest.entries}:
        # What was found in another process because the whole was refused there.
        dispatcher_of(fast).submodules.expand_to(part)
    targets = _targets(fast)
    by_part: dict[str, list[ManifestEntry]] = {}
    for index, entry in enumerate(manifest.entries):
        if entry.part in targets:
            by_part.setdefault(entry.part, []).append(entry)
        else:
            text = f"{shown(entry.part)} is no part that is captured here"
            problems.append(ManifestProblem(path, f"entries[{index}].part", text))
    budget = dispatcher_of(fast).captures.graphs
    chosen = [
        entry for entries in by_part.values() for entry in plan(entries, budget.max_graphs, budget.max_bytes, seconds)
    ]
    chosen.sort(key=lambda entry: -entry.hits)
    jobs = [_job(entry, targets[entry.part], path) for entry in chosen]
    return jobs, sum(map(len, by_part.values())) - len(jobs), problems


def _targets(fast: TransparentModule) -> dict[str, TransparentModule]:
    """The module and its parts, by name."""
    return {"": fast, **controls(fast).parts}


def _job(entry: ManifestEntry, target: TransparentModule, path: str) -> Job:
    """The call of an entry, for a module or a part."""
    module = controls(target).module
    device = device_of(module)
    spec = replace(entry.spec, names=arguments_of(module))
    times = {"eager": entry.eager_seconds, "replay": entry.replay_seconds, "capture": entry.capture_seconds}
    measured = {name: seconds for name, seconds in times.items() if seconds is not None}

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = example(spec, device)
        if isinstance(module, EngineLike):
            args = with_host_values(module, args, spec.key.host_values)
        varied(args, kwargs)
        return args, kwargs

    return Job(
        target,
        str(spec)[:200],
        nbytes(spec),
        make,
        partial(entered, entry.spec),
        measured if len(measured) == len(times) else None,
        path,
    )


def with_host_values(engine: EngineLike, args: tuple[Any, ...], given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of an engine with the values of its host shape tensors."""
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
