"""What the calls of a module were like, remembered at misses alone, and what becomes a manifest of them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from graphcache.cache.costs import Known
from graphcache.cache.lru import Entry
from graphcache.cache.served import ManifestEntry
from graphcache.cache.spec import Spec, spec_of
from graphcache.errors import Refusal
from graphcache.modules.engine import EngineModule

OFTEN = 8
"""The eager call of a signature at which it is remembered: writing it down takes some 50 µs, too much for a signature
that never comes again."""
_MOST = 1024
_MOST_CHARACTERS = 4 * 2**20
_LONGEST = 2**40


class Remembered:
    """The calls that had a graph, or were made often without one: at most 1024 of the latter, and 4 MiB of text.

    Values of tensors are not kept, except for those that an engine reads on the host, which are part of a signature.

    Args:
        entries: The cache's; what has a graph is forgotten last.
        engine: Whose calls, if they are an engine's.
    """

    def __init__(self, entries: Mapping[Any, Entry[Any]], engine: EngineModule | None = None) -> None:
        self._entries = entries
        self._hosts = engine.host_inputs if engine is not None else ()
        self._specs: OrderedDict[Any, Spec | None] = OrderedDict()
        self._characters = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._specs)

    def note(self, signature: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember a call, under the modes of this moment; one that cannot be told in text is remembered as such."""
        with self._lock:
            if signature in self._specs:
                self._specs.move_to_end(signature)
                return
            try:
                spec = spec_of(_told(args, self._hosts), kwargs)
            except Refusal:
                spec = None
            self._specs[signature] = spec
            self._characters += len(spec.text) if spec is not None else 0
            self._forget()

    def served(self, known: Callable[[Any], Known], part: str = "") -> tuple[list[ManifestEntry], int]:
        """What becomes a manifest.

        Args:
            known: What admission knows of a signature.
            part: The submodule that these calls are of; empty for the module itself.

        Returns:
            An entry for each call, and how many calls cannot be told in text.
        """
        with self._lock:
            specs = dict(self._specs)
        found = []
        for signature, spec in specs.items():
            if spec is not None:
                seen, entry = known(signature), self._entries.get(signature)
                times = (None if each is None else min(each, 9e8) for each in (seen.eager, seen.replay, seen.capture))
                nbytes = min(entry.nbytes, _LONGEST) if entry is not None else 0
                found.append(ManifestEntry(spec, seen.calls, part, nbytes, *times))
        return found, sum(spec is None for spec in specs.values())

    def _forget(self) -> None:
        graphs = len(self._entries)
        for _ in range(len(self._specs)):
            if len(self._specs) <= _MOST + graphs and self._characters <= _MOST_CHARACTERS:
                return
            oldest = next(iter(self._specs))
            if oldest in self._entries:
                self._specs.move_to_end(oldest)
                continue
            spec = self._specs.pop(oldest)
            self._characters -= len(spec.text) if spec is not None else 0


def _told(args: tuple[Any, ...], hosts: tuple[int, ...]) -> tuple[Any, ...]:
    """Arguments with the values that an engine reads on the host in place of their tensors."""
    if not hosts:
        return args
    return tuple(
        value.flatten().tolist() if index in hosts and isinstance(value, Tensor) else value
        for index, value in enumerate(args)
    )


def made_again(engine: EngineModule, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a remembered call of an engine, with its host shape tensors.

    Raises:
        ValueError: If values are not those of the engine's host shape tensor.
    """
    made = list(args)
    for index, binding in _host_bindings(engine):
        if index < len(made):
            if not isinstance(made[index], list):
                raise ValueError(f"args[{index}] is no list of values")
            try:
                made[index] = torch.tensor(made[index], dtype=binding.dtype).reshape(binding.shape)
            except (RuntimeError, TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"args[{index}] holds no values of {binding.name!r}: {error}") from error
    return tuple(made)


def _host_bindings(engine: EngineModule) -> Iterator[tuple[int, Any]]:
    return ((index, binding) for index, binding in enumerate(engine.engine.inputs) if binding.on_host)
