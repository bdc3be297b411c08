"""Any module behind a cache of graphs."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Self

import torch
from torch import nn

from graphcache.capture.engine_like import EngineLike
from graphcache.capture.run_gate import RunGate
from graphcache.config import GraphConfig
from graphcache.dispatch.fast_path import open_to
from graphcache.dispatch.forward_into import copy_into
from graphcache.dispatch.preconditions import global_hooks, global_pre_hooks, is_compiling
from graphcache.errors import CaptureError, Cause, ConfigError, Refusal, shown
from graphcache.events import Ledger, Observer, Observers, Subscriber, log
from graphcache.features import features
from graphcache.graphs.buffers import put
from graphcache.graphs.graph import Graph
from graphcache.modules.explain import Explanation, explain
from graphcache.modules.forward_patch import Routes
from graphcache.modules.info import CacheInfo
from graphcache.modules.prepare import Prepared, prepare
from graphcache.modules.session import Session
from graphcache.modules.submodules import Parts
from graphcache.modules.transparent import StandIn, gives_way
from graphcache.modules.wrapped import Wrapped, new_dispatcher, state_of


@gives_way
class CachedModule(StandIn):
    """A module that replays a CUDA graph (on the CPU: a host graph) for every call key it has seen.

    It takes what the module takes and returns what the module returns. Names, parameters, ``state_dict`` and every
    other attribute are the module's own, which is left exactly as it was; an attribute that is set here is set there.
    Where both have a name (``config``, ``save``), it is the module's; :func:`graphcache.controls` gives that of this
    class. Methods of it that call ``forward`` or a submodule (``generate``) use the graphs, unless it has hooks, or
    they are generators or coroutines. A call that cannot be captured is answered eagerly, counted and logged once.

    Args:
        module: An engine, or any other module.
        config: Options; see :class:`~graphcache.config.GraphConfig`.
        name: What messages call it; the class's name if empty.
        run: What a call of this object calls; the module itself if ``None``.
        within: The name of the module that it was found in as a submodule, if it was found.
        observers: Those of the module that it is a submodule of.
        gate: Likewise, what keeps background captures and callers apart.

    Raises:
        ConfigError: If ``module`` is not a module, is wrapped already, or has nothing for the strategy to capture.

    Example:
        >>> fast = CachedModule(nn.Linear(4, 2).requires_grad_(False))
        >>> x = torch.ones(3, 4)
        >>> torch.equal(fast(x), fast(x)), fast.cache_info().hits
        (True, 1)
    """

    _graphcache: Wrapped
    _graphcache_table: Any
    """Native code that answers calls, if there is any."""

    keeps_its_own_state = True
    """Counters and caches here are no state of the module's, when one wrapped module contains another."""

    def __init__(
        self,
        module: nn.Module,
        config: GraphConfig | None = None,
        *,
        name: str = "",
        run: Callable[..., Any] | None = None,
        within: str = "",
        observers: Observers | None = None,
        gate: RunGate | None = None,
    ) -> None:
        if isinstance(module, CachedModule):
            raise ConfigError(f"{state_of(module).name} is wrapped already; use it as it is, or wrap its .module")
        if not isinstance(module, nn.Module):
            raise ConfigError(
                f"expected an nn.Module, got {type(module).__name__}; graphcache.load makes one of an engine"
            )
        super().__init__(module)
        config = config or GraphConfig()
        own_name = name or _name_of(module)
        everybody = Observers() if observers is None else observers
        gate = gate or RunGate(module)

        def part(name: str, child: nn.Module, options: GraphConfig) -> CachedModule:
            full = f"{own_name}.{name}" if within else name
            found_in = own_name if options.strategy == "auto" else ""
            return CachedModule(
                child, options, name=full, run=child.forward, within=found_in, observers=everybody, gate=gate
            )

        submodules = Parts(module, config, part)
        # Past nn.Module's __setattr__, which would make submodules of modules.
        own, this = self.__dict__, weakref.ref(self)

        def publish(table: Any) -> None:
            if (fast := this()) is not None:
                fast.__dict__["_graphcache_table"] = table
                if table is not None:
                    open_to(CachedModule.__call__, CachedModule.forward_into)

        # Native code finds it by this name.
        own["_graphcache_table"] = None
        dispatcher = new_dispatcher(
            module,
            config,
            run=run,
            ledger=Ledger(own_name, quiet=bool(within), observers=everybody),
            gate=gate,
            user=self,
            publish=publish,
        )
        dispatcher.submodules = submodules
        if config.buckets is not None:
            dispatcher.padding = features.padding(config.buckets, dispatcher)
        own["_graphcache"] = Wrapped(dispatcher, submodules)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # What nn.Module.__call__ adds is hooks, at 0.9 µs; it is asked only if there are any.
        if _has_hooks(self):
            return super().__call__(*args, **kwargs)
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Answer a call: replay its graph, or capture one, or run eagerly and say why.

        Args:
            args: What the module takes.
            kwargs: Likewise.

        Returns:
            What the module returns; its tensors belong to the caller.

        Raises:
            CaptureError: If the call cannot be captured and ``on_failure="raise"``.
            ClosedError: After :meth:`close`.
            Exception: Whatever the module raises for these arguments.
        """
        dispatcher = self._graphcache.dispatcher
        if is_compiling():
            # Nothing of what follows belongs into a compiled program.
            return dispatcher.target.run(*args, **kwargs)
        return dispatcher(args, kwargs)

    def forward_into(self, out: Any, *args: Any, **kwargs: Any) -> Any:
        """Answer a call into tensors of the caller's.

        A hit on a device writes straight into them where they lie as the graph's own outputs do (contiguous for an
        engine), begin at a multiple of 256 bytes and share no memory with an input or each other. In all other cases
        the answer is copied into them.

        Args:
            out: Tensors in the structure of the answer, of its shapes, dtypes and device, that require no gradients.
            args: What the module takes.
            kwargs: Likewise.

        Returns:
            ``out``.

        Raises:
            OutputMismatchError: If ``out`` does not fit the answer. It was not written into.
            Exception: As :meth:`forward`.

        Example:
            >>> fast, y = CachedModule(nn.ReLU()), torch.empty(2)
            >>> fast.forward_into(y, torch.tensor([-1.0, 3.0]))
            tensor([0., 3.])
        """
        table = self._graphcache_table
        if table is not None and not (kwargs or is_compiling() or _has_hooks(self)) and table.into(out, args):
            return out
        return self._graphcache_into(out, *args, **kwargs)

    def _graphcache_into(self, out: Any, *args: Any, **kwargs: Any) -> Any:
        """:meth:`forward_into`, where native code left it alone; native code finds it by this name."""
        straight = not (is_compiling() or _has_hooks(self))
        if not (straight and self._graphcache.dispatcher.into(out, args, kwargs)):
            copy_into(out, self(*args, **kwargs), self._graphcache.name)
        return out

    @property
    def config(self) -> GraphConfig:
        """The options."""
        return self._graphcache.config

    @property
    def ledger(self) -> Ledger:
        """Counters, and whoever listens to events."""
        return self._graphcache.dispatcher.ledger

    @property
    def manifest(self) -> Any:
        """The calls that the package it was loaded from lists; ``None`` if there is no package or no list."""
        return self._graphcache.manifest

    @property
    def parts(self) -> dict[str, Any]:
        """The submodules that are captured one by one, and those taken apart on the way to them, by name.

        With ``strategy="auto"`` they are found when the whole is refused.

        Example:
            >>> from graphcache import wrap
            >>> list(wrap(nn.Sequential(nn.ReLU()), strategy="per_submodule", include=["0"]).parts)
            ['0']
        """
        found: dict[str, Any] = self._graphcache.submodules.named()
        return found

    @property
    def captures_whole(self) -> bool:
        """Whether calls are to be captured as a whole, rather than by submodules from the start."""
        return bool(self._graphcache.submodules.whole)

    def session(self, *args: Any, **kwargs: Any) -> Session:
        """A graph of this call with its buffers in the caller's hands; it is not part of the cache.

        Args:
            args: Arguments of a call, whose values the static inputs begin with.
            kwargs: Likewise.

        Raises:
            CaptureError: If the call cannot be captured, with the cause.
            Exception: Whatever the module raises for these arguments.
        """
        dispatcher = self._graphcache.dispatcher
        dispatcher.check_open()
        try:
            call = dispatcher.target.describe(args, kwargs)
        except Refusal as refusal:
            raise CaptureError(f"{self._graphcache.name}: {refusal.cause}") from refusal
        session = Session(dispatcher.capture_alone(call))
        with torch.no_grad():
            for static, tensor in zip(session.inputs, dispatcher.target.graph_inputs(call.tensors), strict=True):
                put(static, tensor)
        return session

    def prepare(
        self, *calls: Any, pin: bool = False, deadline: float | None = None, progress: bool | None = None
    ) -> Prepared:
        """Capture calls before serving: all of them run eagerly once, then all are captured.

        A call key holds the grad mode and autocast: prepare under those that will serve. (A manifest brings its own.)
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
            How many keys have a graph now, what it took, and what was refused, left out or ignored. A manifest that is
            damaged or of another environment is ignored, which is logged once. A line is logged at INFO.

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
        return prepare(self, calls, pin=pin, deadline=deadline, progress=progress)

    def save_manifest(self, path: str | os.PathLike[str]) -> Any:
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
        manifest, left_out = features.manifest_of(self)
        left_out += manifest.save(path)
        if left_out:
            log.info("%s: %d calls were left out of the manifest", self._graphcache.name, left_out)
        return manifest

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        onnx: Any = None,
        build: Mapping[str, Any] | None = None,
        manifest: bool = True,
    ) -> None:
        """Write the module as a package, for :func:`graphcache.load` of another process or machine.

        The file holds engines, weights, these options, and the calls that were served, as :meth:`save_manifest` writes
        them. It is written in one step. It holds no code and nothing is pickled: a model that is more than one engine
        is loaded ``into`` a model of the same make.

        Args:
            path: Of the file, in a directory that exists; ``.gcache`` is the usual ending.
            onnx: As :meth:`EngineModule.save` takes it, for a wrapped engine.
            build: Likewise.
            manifest: Whether the calls that were served are part of it.

        Raises:
            ConfigError: If the file cannot be written, the state holds more than tensors, or for a bad option.
            EngineError: If an engine was refitted, and TensorRT cannot serialise it again.

        Example:
            >>> import tempfile
            >>> import torch
            >>> import graphcache
            >>> fast = graphcache.wrap(torch.nn.Linear(4, 2).requires_grad_(False), max_graphs=8)
            >>> y = fast(torch.ones(3, 4))
            >>> other = torch.nn.Linear(4, 2).requires_grad_(False)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     fast.save(f"{folder}/linear.gcache")
            ...     again = graphcache.load(f"{folder}/linear.gcache", into=other, prepare=True)
            >>> torch.equal(again(torch.ones(3, 4)), y), again.cache_info().hits, again.config.max_graphs
            (True, 1, 8)
        """
        state = self._graphcache
        state.dispatcher.check_open()
        if type(manifest) is not bool:
            raise ConfigError(f"manifest={shown(manifest)}: expected True or False")
        calls = features.manifest_of(self)[0] if manifest else None
        features.save(state.module, path, onnx=onnx, build=build, config=state.config, name=state.name, manifest=calls)

    def cache_info(self) -> CacheInfo:
        """The account so far, of this module and of the submodules that it captured one by one.

        Example:
            >>> from graphcache import CachedModule
            >>> CachedModule(nn.ReLU()).cache_info().graphs
            0
        """
        return self._graphcache.cache_info()

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
        return explain(self, *args, **kwargs)

    def graph_for(self, *args: Any, **kwargs: Any) -> Graph | None:
        """The graph that answers such a call, or ``None``; without arguments the graph that was used last.

        Example:
            >>> from graphcache import CachedModule
            >>> fast = CachedModule(nn.ReLU())
            >>> _ = fast(torch.zeros(2))
            >>> fast.graph_for(torch.ones(2)).nbytes, fast.graph_for(torch.ones(3))
            (8, None)
        """
        state = self._graphcache
        if not args and not kwargs:
            entry = max(list(state.graphs.entries.values()), key=lambda each: each.used, default=None)
        else:
            try:
                call = state.dispatcher.target.describe(args, kwargs)
            except Refusal:
                return None
            padding = state.dispatcher.padding
            padded = None if padding is None else padding.target(call)
            entry = state.graphs.entries.get(padded or call.key)
        return None if entry is None else entry.graph.graph

    def try_capture(self, *args: Any, **kwargs: Any) -> Cause | None:
        """Run a call eagerly and capture it; return why it has no graph, or ``None`` if it has one.

        Example:
            >>> from graphcache import CachedModule
            >>> CachedModule(nn.Dropout()).try_capture(torch.zeros(2)).reason.value
            'random'
        """
        try:
            call = self._graphcache.dispatcher.target.describe(args, kwargs)
        except Refusal as refusal:
            return refusal.cause
        return self._graphcache.dispatcher.prepare(call)

    def advise_buckets(self, trace: Any = None, most: int | Mapping[int, int] = 8, *, argument: str | int = 0) -> Any:
        """Buckets for one argument that would have served its shapes with the least padding.

        Args:
            trace: Shapes with how often each was seen; ``None`` for those of the calls so far (of the last 4096
                keys).
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
        return features.advise_buckets(self._graphcache.dispatcher, trace, most, argument=argument)

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call ``subscriber`` with every capture, eviction and eager call from now on, in the thread of the call.

        Returns:
            A function that ends it.
        """
        subscribers = self._graphcache.dispatcher.ledger.subscribers
        subscribers.append(subscriber)

        def end() -> None:
            with suppress(ValueError):
                subscribers.remove(subscriber)

        return end

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Tell an observer before and after every eager run, capture and replay of the module and of its submodules.

        While somebody observes, hits take the longer way, which costs some 10 µs; without anybody they cost what they
        did. A session's ``run()`` is not observed. See :class:`graphcache.Observer`.

        Returns:
            A function that ends it.

        Raises:
            ConfigError: For what has no ``before`` and ``after``.
        """
        return self._graphcache.dispatcher.ledger.observers.add(observer)

    def clear(self, *, wait: bool = True) -> None:
        """Drop every graph, and forget what could not be captured; the next call of each key captures anew.

        Args:
            wait: Wait for the last replays, so that all memory is given back. Otherwise what they use goes when they
                have finished, at the latest with the next capture.
        """
        # Its options may have been refused when it was made, and an engine still know it.
        if (state := self.__dict__.get("_graphcache")) is not None:
            state.clear(wait=wait)

    def close(self) -> None:
        """Drop every graph and refuse further calls; the module itself stays usable. Twice does nothing."""
        self._graphcache.close()

    def extra_repr(self) -> str:
        state = self._graphcache
        return f"{state.name}, {len(state.graphs)} graphs, strategy={state.config.strategy!r}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._graphcache.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy has the module and the options, and captures its own graphs.
        state = self._graphcache
        state.dispatcher.check_open()
        return again, (state.module, state.config, state.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedModule:
        state = self._graphcache
        state.dispatcher.check_open()
        memo[id(self)] = copied = again(copy.deepcopy(state.module, memo), state.config, state.name)
        return copied

    def _calling(self) -> AbstractContextManager[object]:
        """While a method of the module runs, calls of the module and of its submodules use their graphs."""
        state = self._graphcache
        if state.dispatcher.closed or isinstance(state.module, EngineLike) or is_compiling():
            return nullcontext()
        return Routes(lambda: (self, *state.submodules.active())).active()


def again(module: Any, config: Any, name: str) -> CachedModule:
    """What copies and pickles of wrapped modules call."""
    return CachedModule(module, config, name=name)


def ends_with(fast: CachedModule, function: Callable[[], object]) -> None:
    """Call a function after a wrapped module was closed, or when nobody holds it any more."""
    # Once, whichever comes first.
    state_of(fast).ends.append(weakref.finalize(fast, function))


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or global_hooks or global_pre_hooks)


def _name_of(module: nn.Module) -> str:
    try:
        name = getattr(module, "name", "")
    except Exception:
        name = ""
    return name if isinstance(name, str) and name else type(module).__name__
