"""What a wrapped module offers beside its calls: its account, its preparation, its end."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import nn

from graphcache.cache.advisor import Advice
from graphcache.cache.lru import Entry
from graphcache.cache.manifest import Manifest
from graphcache.cache.places import place_of
from graphcache.cache.seen import Seen, advise_axes
from graphcache.config import GraphConfig
from graphcache.errors import CaptureError, Cause, ConfigError, Refusal, shown
from graphcache.events import Ledger, Subscriber, log
from graphcache.graphs.buffers import put
from graphcache.graphs.graph import Graph
from graphcache.modules.arguments import arguments_of
from graphcache.modules.bucketed import Bucketed
from graphcache.modules.conditions import is_compiling
from graphcache.modules.described import described
from graphcache.modules.engine import EngineModule
from graphcache.modules.explain import Explanation, explain
from graphcache.modules.info import CacheInfo
from graphcache.modules.misses import Misses
from graphcache.modules.observers import Observer, Observers
from graphcache.modules.parts import Parts
from graphcache.modules.prepare import Prepared, prepare
from graphcache.modules.record import Recorded
from graphcache.modules.routes import Routes
from graphcache.modules.served_calls import served
from graphcache.modules.session import Session
from graphcache.modules.standin import StandIn

if TYPE_CHECKING:
    from graphcache.modules.cached import CachedModule


class Accounted(StandIn):
    """All of :class:`~graphcache.modules.cached.CachedModule` that is not the way of a call; it is nothing by itself.

    Args:
        module: The wrapped module.
    """

    _config: GraphConfig
    _ledger: Ledger
    _parts: Parts
    _observers: Observers
    _entries: Mapping[Hashable, Entry[Recorded]]
    _misses: Misses
    _seen: Seen
    _ends: list[Callable[[], object]]
    _bucketed: Bucketed | None

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.__dict__["_ends"] = []

    @property
    def config(self) -> GraphConfig:
        """The options."""
        return self._config

    @property
    def ledger(self) -> Ledger:
        """Counters, and whoever listens to events."""
        return self._ledger

    @property
    def manifest(self) -> Manifest | None:
        """The calls that the package it was loaded from lists; ``None`` if there is no package or no list."""
        found: Manifest | None = self.__dict__.get("_manifest")
        return found

    @property
    def parts(self) -> dict[str, CachedModule]:
        """The submodules that are captured one by one, and those taken apart on the way to them, by name.

        With ``strategy="auto"`` they are found when the whole is refused.

        Example:
            >>> from graphcache import wrap
            >>> list(wrap(nn.Sequential(nn.ReLU()), strategy="per_submodule", include=["0"]).parts)
            ['0']
        """
        return self._parts.named()

    @property
    def captures_whole(self) -> bool:
        """Whether calls are to be captured as a whole, rather than by parts from the start."""
        return self._parts.whole

    def session(self, *args: Any, **kwargs: Any) -> Session:
        """A graph of this signature with its buffers in the caller's hands; it is not part of the cache.

        Args:
            args: Arguments of a call, whose values the static inputs begin with.
            kwargs: Likewise.

        Raises:
            CaptureError: If the call cannot be captured, with the cause.
            Exception: Whatever the module raises for these arguments.
        """
        self._misses.check_open()
        fast = self._whole
        try:
            args, kwargs, _, inputs = described(fast, args, kwargs)
        except Refusal as refusal:
            raise CaptureError(f"{self._ledger.name}: {refusal.cause}") from refusal
        fast._notice_device(inputs)
        session = Session(self._misses.alone(inputs, args, kwargs))
        with torch.no_grad():
            for static, tensor in zip(session.inputs, fast._device_only(inputs), strict=True):
                put(static, tensor)
        return session

    def prepare(
        self, *calls: Any, pin: bool = False, deadline: float | None = None, progress: bool | None = None
    ) -> Prepared:
        """Capture calls before serving: all of them run eagerly once, then all are captured.

        A signature holds the grad mode and autocast: prepare under those that will serve. (A manifest brings its own.)
        Calls that are given are prepared largest first, so that what graphs share grows once; those of a manifest
        hottest first, as far as budgets reach. A graph that is prepared makes room for none of the others. It is one
        of the cache's, and may be evicted later, unless it is pinned.

        Args:
            calls: Tuples of positional arguments, single tensors, :class:`graphcache.Call`, manifests, or their paths.
                For an engine also shapes: of its only input, or for each input, in a sequence or by name; the values
                are made up. For a host shape tensor these are its values.
            pin: Keep these graphs whatever comes.
            deadline: Seconds after which no further capture begins; half of them at most go to the eager calls.
            progress: Draw a bar on stderr where that is a terminal; ``None`` means ``True``.

        Returns:
            How many signatures have a graph now, what it took, and what was refused, left out or ignored. A manifest
            that is damaged or of another environment is ignored, which is logged once. A line is logged at INFO.

        Raises:
            ConfigError: For what is no call, or a bad option.
            ClosedError: After :meth:`close`.
            Exception: Whatever the module raises for a call that was given. Nothing was captured then.

        Example:
            >>> from graphcache import CachedModule, GraphConfig
            >>> fast = CachedModule(nn.ReLU(), GraphConfig(capture="prepared"))
            >>> fast.prepare((torch.zeros(2),), (torch.zeros(3),)).signatures
            2
            >>> _ = fast(torch.ones(3))
            >>> fast.cache_info().hits
            1
        """
        return prepare(self._whole, calls, pin=pin, deadline=deadline, progress=progress)

    def save_manifest(self, path: str | os.PathLike[str]) -> Manifest:
        """Write what was captured, and what was often called without a graph, for :meth:`prepare` of a later process.

        It holds shapes, constants, how often they came and what they cost, not the values of tensors; and the module's
        fingerprint, device, driver and versions. The file is written in one step: a reader sees the old one or the new
        one, whoever else writes.

        Args:
            path: Of the file, in a directory that exists.

        Returns:
            What was written. Calls that cannot be told in text are left out, which is logged at INFO.

        Raises:
            ConfigError: If it cannot be written; what was there stays.
        """
        manifest, untold = served(self._whole)
        left_out = untold + manifest.save(path)
        if left_out:
            log.info("%s: %d calls were left out of the manifest", self._ledger.name, left_out)
        return manifest

    def cache_info(self) -> CacheInfo:
        """The account so far, of this module and of the parts that it captured one by one.

        Example:
            >>> from graphcache import CachedModule
            >>> CachedModule(nn.ReLU()).cache_info().graphs
            0
        """
        entries = list(self._entries.values())
        account, arbiter = self._misses.admission.account(), self._misses.arbiter
        own = CacheInfo(
            hits=self._ledger.retired_hits + sum(entry.hits for entry in entries),
            captures=self._ledger.captures,
            evictions=self._ledger.evictions,
            eager=dict(self._ledger.eager),
            graphs=len(entries),
            nbytes=self._cache.nbytes,
            capture_seconds=self._ledger.capture_seconds,
            padded=0 if self._bucketed is None else self._bucketed.padded,
            eager_seconds=account.eager_seconds,
            saved_seconds=account.saved_seconds,
            budget=self._cache.max_bytes,
            process_nbytes=arbiter.nbytes if arbiter is not None else 0,
            waits=self._misses.gate.waits,
            wait_seconds=self._misses.gate.wait_seconds,
        )
        for part in self._parts.active():
            found = Accounted.cache_info(part)
            # What was found in it is a part of a call that has been counted.
            own += replace(found, eager={}) if part._ledger.quiet else found
        if (past := self._parts.past) is not None:
            own += replace(past, eager={})
        return own

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """Say what becomes of such a call, or without arguments of all calls so far; see :func:`graphcache.explain`.

        Args:
            args: Arguments of a call, which is not made.
            kwargs: Likewise.

        Raises:
            ClosedError: After :meth:`close`.
            Exception: Whatever an engine says of arguments that it does not take.

        Example:
            >>> from graphcache import CachedModule
            >>> fast = CachedModule(nn.ReLU())
            >>> _ = fast(torch.zeros(2, 3))
            >>> print(fast.explain())
            ReLU: 0 hits, 1 captures, 0 eager calls; 1 graphs, 24 bytes
              input: float32[2, 3], grad mode on: replays (0 so far)
                capture ...
        """
        return explain(self._whole, *args, **kwargs)

    def graph_for(self, *args: Any, **kwargs: Any) -> Graph | None:
        """The graph that answers such a call, or ``None``; without arguments the graph that was used last.

        Example:
            >>> from graphcache import CachedModule
            >>> fast = CachedModule(nn.ReLU())
            >>> _ = fast(torch.zeros(2))
            >>> fast.graph_for(torch.ones(2)).nbytes, fast.graph_for(torch.ones(3))
            (8, None)
        """
        entry = max(list(self._entries.values()), key=lambda each: each.used, default=None)
        if args or kwargs:
            try:
                args, kwargs, signature, _ = described(self._whole, args, kwargs)
            except Refusal:
                return None
            padded = self._bucketed.target(signature, args, kwargs) if self._bucketed is not None else None
            entry = self._entries.get(padded or signature)
        return None if entry is None else entry.graph.graph

    def try_capture(self, *args: Any, **kwargs: Any) -> Cause | None:
        """Run a call eagerly and capture it; return why it has no graph, or ``None`` if it has one.

        Example:
            >>> from graphcache import CachedModule
            >>> CachedModule(nn.Dropout()).try_capture(torch.zeros(2)).reason.value
            'random'
        """
        try:
            args, kwargs, signature, inputs = described(self._whole, args, kwargs)
        except Refusal as refusal:
            return refusal.cause
        return self._misses.prepare(signature, inputs, args, kwargs)

    def advise_buckets(
        self, trace: Any = None, most: int | Mapping[int, int] = 8, *, argument: str | int = 0
    ) -> Advice:
        """Buckets for one argument that would have served its shapes with the least padding.

        Args:
            trace: Shapes with how often each was seen; ``None`` for those of the calls so far (of the last 4096
                signatures).
            most: How many buckets an axis may have, on every axis where the shapes differ; or axis -> how many.
            argument: Its name or position; it is a tensor, and an argument of the call itself.

        Returns:
            The advice; ``option()`` gives what the ``buckets`` option takes for the argument.

        Raises:
            ConfigError: Naming the field, or if no shape of the argument was seen.

        Example:
            >>> from graphcache import CachedModule
            >>> fast = CachedModule(nn.ReLU())
            >>> for rows in (1, 2, 7, 8, 8):
            ...     _ = fast(torch.zeros(rows, 4))
            >>> fast.advise_buckets(most=2).option()
            {0: [2, 8]}
        """
        if trace is None:
            if type(argument) not in (str, int) or (isinstance(argument, int) and argument < 0):
                raise ConfigError(f"argument={shown(argument)}: expected a name, or a position from 0 on")
            place = place_of(argument, arguments_of(self._module), f"argument={argument!r}")
            trace = self._seen.counts(place, {key: entry.hits for key, entry in list(self._entries.items())})
            if not trace:
                raise ConfigError(
                    f"argument={argument!r}: {self._ledger.name} was not called with a tensor there; call it first, or "
                    f"give a trace"
                )
        return advise_axes(trace, most)

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call ``subscriber`` with every capture, eviction and eager call from now on, in the thread of the call.

        Returns:
            A function that ends it.
        """
        subscribers = self._ledger.subscribers
        subscribers.append(subscriber)

        def end() -> None:
            with suppress(ValueError):
                subscribers.remove(subscriber)

        return end

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Tell an observer before and after every eager run, capture and replay of the module and of its parts.

        While somebody observes, hits take the longer way, which costs some 10 µs; without anybody they cost what they
        did. A session's ``run()`` is not observed. See :class:`graphcache.Observer`.

        Returns:
            A function that ends it.

        Raises:
            ConfigError: For what has no ``before`` and ``after``.
        """
        return self._observers.add(observer)

    def clear(self, *, wait: bool = True) -> None:
        """Drop every graph, and forget what could not be captured; the next call of each signature captures anew.

        Args:
            wait: Wait for the last replays, so that all memory is given back. Otherwise what they use goes when they
                have finished, at the latest with the next capture.
        """
        if "_misses" not in self.__dict__:
            # Its options were refused when it was made, and an engine still knows it.
            return
        # What is captured beside the calls uses the module too.
        wait = wait or self._config.capture_in == "background"
        with self._misses.lock:
            self._misses.clear(wait=wait)
            for part in self._parts.active():
                Accounted.clear(part, wait=wait)
        if wait:
            self._misses.finish()

    def close(self) -> None:
        """Drop every graph and refuse further calls; the module itself stays usable. Twice does nothing."""
        with self._misses.lock:
            self._misses.closed = True
            self._misses.clear()
            for part in self._parts.active():
                Accounted.close(part)
        self._misses.finish()
        for end in self._ends:
            end()

    def _calling(self) -> AbstractContextManager[object]:
        """While a method of the module runs, calls of the module and of its parts use their graphs."""
        if self._misses.closed or isinstance(self._module, EngineModule) or is_compiling():
            return nullcontext()
        return Routes(lambda: (self._whole, *self._parts.active())).active()

    def _ends_with(self, function: Callable[[], object]) -> None:
        """Call a function after :meth:`close`, or when nobody holds this module any more."""
        # Once, whichever comes first.
        self._ends.append(weakref.finalize(self, function))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        Accounted.close(self)

    def _run_from_now(self, function: Callable[..., Any]) -> None:
        """Call ``function`` instead of the module from now on; graphs of another one are dropped."""
        if function != self._misses.run:
            Accounted.clear(self)
            self._misses.runs(function)

    def extra_repr(self) -> str:
        return f"{self._ledger.name}, {len(self._entries)} graphs, strategy={self._config.strategy!r}"

    @property
    def _whole(self) -> CachedModule:
        return cast("CachedModule", self)
