"""Any module behind a cache of graphs."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Self

from torch import nn

from graphcache.capture.run_gate import RunGate
from graphcache.config import GraphConfig, check_bool
from graphcache.dispatch.dispatcher import Dispatcher
from graphcache.dispatch.fast_path import global_hooks, global_pre_hooks, has_hooks, is_compiling, open_to
from graphcache.dispatch.forward_into import copy_into
from graphcache.errors import Cause, ConfigError, Refusal
from graphcache.events import Ledger, Observer, Subscriber, log
from graphcache.features import features
from graphcache.graphs.graph import Graph
from graphcache.modules.explain import Explanation, explain
from graphcache.modules.forward_patch import graphs_of_parts
from graphcache.modules.portable import again
from graphcache.modules.prepare import Prepared, prepare
from graphcache.modules.session import Session, open_session
from graphcache.modules.submodules import Submodules
from graphcache.modules.transparent import TransparentModule, controls, dispatcher_of
from graphcache.modules.wrapped import CacheInfo, account_of, name_of, target_of


class CachedModule(TransparentModule):
    """A module that replays a CUDA graph (on the CPU: a host graph) for each call key.

    Parameters, ``state_dict`` and all other attributes are the module's own, which is left as it was; an attribute that
    is set here is set there. Where both have a name (``config``, ``save``), it is the module's;
    :func:`graphcache.controls` gives that of this class. Methods of the module that call ``forward`` or a submodule
    (``generate``) use the graphs, unless it has hooks, or they are generators or coroutines.

    Args:
        module: An engine, or any other module.
        config: Options; see :class:`~graphcache.config.GraphConfig`.
        name: What messages call it; the module's own ``name`` or that of its class if empty.
        part_of: For a submodule that is captured by itself, the ledger and the gate of the whole.
        manifest: What :attr:`manifest` gives.
        on_close: Called once, when this is closed or when nobody holds it any more.

    Raises:
        ConfigError: If ``module`` is not a module, is wrapped already, or has nothing for the strategy to capture.

    Example:
        >>> import torch, graphcache
        >>> fast = graphcache.wrap(torch.nn.Linear(4, 2).requires_grad_(False))
        >>> x = torch.ones(3, 4)
        >>> torch.equal(fast(x), fast(x)), fast.cache_info().hits
        (True, 1)
    """

    _graphcache: Dispatcher
    _graphcache_table: Any
    """The native table that answers calls, if there is one. Native code finds it by this name."""
    _graphcache_manifest: Any
    _graphcache_end: Callable[[], object] | None

    def __init__(
        self,
        module: nn.Module,
        config: GraphConfig | None = None,
        *,
        name: str = "",
        part_of: tuple[Ledger, RunGate] | None = None,
        manifest: Any = None,
        on_close: Callable[[], object] | None = None,
    ) -> None:
        if isinstance(module, CachedModule):
            what = dispatcher_of(module).ledger.name
            raise ConfigError(f"{what} is wrapped already; use it as it is, or wrap its .module")
        if not isinstance(module, nn.Module):
            what = type(module).__name__
            raise ConfigError(f"expected an nn.Module, got {what}; graphcache.load makes one of an engine")
        super().__init__(module)
        config, name = config or GraphConfig(), name or name_of(module)
        ledger, gate = Ledger(name), RunGate(module)
        if part_of is not None:
            ledger = Ledger(name, quiet=config.strategy == "auto", observers=part_of[0].observers)
            gate = part_of[1]
        target = target_of(self, module, name, config, is_part=part_of is not None)
        end = None if on_close is None else weakref.finalize(self, on_close)
        # Past __setattr__, which sets attributes of the module.
        self.__dict__.update(_graphcache_table=None, _graphcache_manifest=manifest, _graphcache_end=end)
        dispatcher = Dispatcher(target, config, ledger, gate, partial(_publish, weakref.ref(self)))
        dispatcher.submodules = Submodules(module, config, partial(_part, ledger, gate))
        if config.buckets is not None:
            dispatcher.padding = features.padding(config.buckets, dispatcher)
        self.__dict__["_graphcache"] = dispatcher

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # All that nn.Module.__call__ adds is hooks, at 0.9 µs.
        if self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks:
            return super().__call__(*args, **kwargs)
        # Those of all modules run where the module itself does. An engine runs by its forward.
        if (global_hooks or global_pre_hooks) and self._graphcache.target.is_engine:
            return super().__call__(*args, **kwargs)
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Answer a call: replay its graph, or capture one, or run eagerly. Tensors of the answer are the caller's.

        Raises:
            CaptureError: If the call cannot be captured and ``on_failure="raise"``.
            ClosedError: After :meth:`close`.
            Exception: Whatever the module raises for these arguments.
        """
        dispatcher = self._graphcache
        if is_compiling():
            # Nothing of what follows belongs into a compiled program.
            return dispatcher.target.run(*args, **kwargs)
        return dispatcher(args, kwargs)

    def forward_into(self, out: Any, *args: Any, **kwargs: Any) -> Any:
        """Answer a call into tensors of the caller's, which it returns.

        A hit on a device writes straight into them where they are laid out as the graph's own outputs (contiguous for
        an engine), begin at a multiple of 256 bytes and share no memory with an input or each other. Otherwise the
        answer is copied into them.

        Args:
            out: Tensors in the structure of the answer, of its shapes, dtypes and device, that require no gradients.
            args: What the module takes, likewise ``kwargs``.

        Raises:
            OutputMismatchError: If ``out`` does not fit the answer. It was not written into.
            Exception: As :meth:`forward`.

        Example:
            >>> import torch, graphcache
            >>> fast, y = graphcache.wrap(torch.nn.ReLU()), torch.empty(2)
            >>> fast.forward_into(y, torch.tensor([-1.0, 3.0]))
            tensor([0., 3.])
        """
        table = self._graphcache_table
        if table is not None and not (kwargs or is_compiling() or has_hooks(self)) and table.into(out, args):
            return out
        return self._graphcache_into(out, *args, **kwargs)

    def _graphcache_into(self, out: Any, *args: Any, **kwargs: Any) -> Any:
        """:meth:`forward_into`, where native code left it alone; native code finds it by this name."""
        straight = not (is_compiling() or has_hooks(self))
        if not (straight and self._graphcache.into(out, args, kwargs)):
            copy_into(out, self(*args, **kwargs), self._graphcache.ledger.name)
        return out

    @property
    def config(self) -> GraphConfig:
        """The options."""
        return self._graphcache.config

    @property
    def ledger(self) -> Ledger:
        """Counters, and the subscribers of events."""
        return self._graphcache.ledger

    @property
    def manifest(self) -> Any:
        """The calls that the package it was loaded from lists; ``None`` if there is no package or no list."""
        return self._graphcache_manifest

    @property
    def parts(self) -> dict[str, Any]:
        """The submodules that are captured one by one, and those taken apart on the way to them, by name.

        With ``strategy="auto"`` they are found when the whole is refused.
        """
        return dict[str, Any](self._graphcache.submodules.named())

    @property
    def captures_whole(self) -> bool:
        """Whether calls are to be captured as a whole, rather than by submodules from the start."""
        return bool(self._graphcache.submodules.whole)

    def session(self, *args: Any, **kwargs: Any) -> Session:
        """A graph of this call outside of the cache, with static inputs and outputs for the caller to use.

        Raises:
            CaptureError: If the call cannot be captured, with the cause.
            Exception: Whatever the module raises for these arguments.
        """
        return open_session(self._graphcache, args, kwargs)

    def prepare(
        self, *calls: Any, pin: bool = False, deadline: float | None = None, progress: bool | None = None
    ) -> Prepared:
        """Capture calls before serving: all of them run eagerly once, then all are captured.

        A call key holds the grad mode and autocast: prepare under those that will serve. (A manifest brings its own.)
        Given calls are prepared largest first, those of a manifest most-called first, as far as budgets reach. No graph
        evicts another one of the same preparation. Returns how many keys have a graph now, and what has none.

        Args:
            calls: Tuples of positional arguments, single tensors, :class:`graphcache.Call`, manifests, or their paths.
                For an engine also shapes: of its only input, or for each input, in a sequence or by name; the values
                are made up. For a host shape tensor these are its values.
            pin: Never evict these graphs.
            deadline: Seconds after which no further capture begins; half of them at most go to the eager calls.
            progress: Count the steps on stderr where that is a terminal; ``None`` means ``True``.

        Raises:
            ConfigError: For what is no call, or a bad option.
            ClosedError: After :meth:`close`.
            Exception: Whatever the module raises for a call that was given. Nothing was captured then.

        Example:
            >>> import torch, graphcache
            >>> fast = graphcache.wrap(torch.nn.ReLU(), capture="prepared")
            >>> fast.prepare((torch.zeros(2),), (torch.zeros(3),)).signatures
            2
        """
        return prepare(self, calls, pin=pin, deadline=deadline, progress=progress)

    def save_manifest(self, path: str | os.PathLike[str]) -> Any:
        """Write what was captured, and what was often called without a graph, for :meth:`prepare` of a later process.

        The file holds shapes, constants, counts and costs of calls, no values of tensors. It is replaced in one step.

        Raises:
            ConfigError: If it cannot be written; what was there stays.
        """
        manifest, left_out = features.manifest_of(self)
        left_out += manifest.save(path)
        if left_out:
            log.info("%s: %d calls were left out of the manifest", self._graphcache.ledger.name, left_out)
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

        The file holds engines, weights, these options, and the calls that were served. It holds no code and nothing is
        pickled: a model that is more than one engine is loaded ``into`` a model of the same class.

        Args:
            path: Of the file, in a directory that exists; ``.gcache`` is the usual ending.
            onnx: As :meth:`EngineModule.save` takes it, for a wrapped engine; likewise ``build``.
            manifest: Whether the calls that were served are part of it.

        Raises:
            ConfigError: If the file cannot be written, the state holds more than tensors, or for a bad option.
            EngineError: If an engine was refitted, and TensorRT cannot serialise it again.
        """
        dispatcher = self._graphcache
        dispatcher.check_open()
        about = {"config": dispatcher.config, "name": dispatcher.ledger.name}
        calls = features.manifest_of(self)[0] if check_bool("manifest", manifest) else None
        features.save(self._graphcache_module, path, onnx=onnx, build=build, manifest=calls, **about)

    def cache_info(self) -> CacheInfo:
        """The counters so far, of this module and of the submodules that it captured one by one."""
        return account_of(self._graphcache)

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """Say what becomes of such a call, or without arguments of all calls so far; see :func:`graphcache.explain`."""
        return explain(self, *args, **kwargs)

    def graph_for(self, *args: Any, **kwargs: Any) -> Graph | None:
        """The graph that answers such a call, or ``None``; without arguments the graph that was used last."""
        dispatcher = self._graphcache
        if args or kwargs:
            try:
                entry = dispatcher.entries.get(dispatcher.key_of(dispatcher.target.describe(args, kwargs)))
            except Refusal:
                return None
        else:
            entry = max(list(dispatcher.entries.values()), key=lambda each: each.used, default=None)
        return None if entry is None else entry.graph.graph

    def try_capture(self, *args: Any, **kwargs: Any) -> Cause | None:
        """Run a call eagerly and capture it; return why it has no graph, or ``None`` if it has one."""
        try:
            call = self._graphcache.target.describe(args, kwargs)
        except Refusal as refusal:
            return refusal.cause
        return self._graphcache.prepare(call)

    def advise_buckets(self, trace: Any = None, most: int | Mapping[int, int] = 8, *, argument: str | int = 0) -> Any:
        """The :class:`graphcache.Advice` of buckets for one argument: the least padding of the shapes that were seen.

        Args:
            trace: Shapes with how often each was seen; ``None`` for those of the last 4096 keys.
            most: How many buckets an axis may have, on every axis where the shapes differ; or axis -> how many.
            argument: Name or position of a tensor argument.

        Raises:
            ConfigError: Naming the field, or if no shape of the argument was seen.
        """
        return features.advise_buckets(self._graphcache, trace, most, argument=argument)

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call ``subscriber`` with every capture, eviction and eager call, until the function returned is called."""
        return self._graphcache.ledger.subscribe(subscriber)

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Tell an observer before and after every eager run, capture and replay of the module and of its submodules.

        Returns a function that ends it. Meanwhile hits cost some 10 µs more. A session's ``run()`` is not observed. See
        :class:`graphcache.Observer`.

        Raises:
            ConfigError: For what has no ``before`` and ``after``.
        """
        return self._graphcache.ledger.observers.add(observer)

    def clear(self, *, wait: bool = True) -> None:
        """Drop every graph, and forget what could not be captured; the next call of each key captures anew.

        Unless it waits for the last replays, memory that they use is released at the latest with the next capture.
        """
        dispatcher: Dispatcher | None = self.__dict__.get("_graphcache")
        if dispatcher is None:
            # Its options were refused when it was made, and an engine still knows it.
            return
        wait = wait or dispatcher.config.capture_in == "background"
        with dispatcher.captures.lock:
            dispatcher.clear(wait=wait)
            for part in dispatcher.submodules.parts.values():
                controls(part).clear(wait=wait)
        if wait:
            dispatcher.queue.finish()

    def close(self) -> None:
        """Drop every graph and refuse further calls; the module itself stays usable. Twice does nothing."""
        dispatcher = self._graphcache
        with dispatcher.captures.lock:
            dispatcher.captures.closed = True
            dispatcher.clear()
            for part in dispatcher.submodules.parts.values():
                controls(part).close()
        dispatcher.queue.finish()
        if self._graphcache_end is not None:
            self._graphcache_end()

    def extra_repr(self) -> str:
        dispatcher = self._graphcache
        return f"{dispatcher.ledger.name}, {len(dispatcher.entries)} graphs, strategy={dispatcher.config.strategy!r}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        controls(self).close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy has the module and the options, and captures its own graphs.
        dispatcher = self._graphcache
        dispatcher.check_open()
        return again, (self._graphcache_module, dispatcher.config, dispatcher.ledger.name), self._graphcache_own()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        make, (module, config, name), own = self.__reduce_ex__(2)
        memo[id(self)] = copied = make(copy.deepcopy(module, memo), config, name)
        copied.__setstate__(copy.deepcopy(own, memo))
        return copied

    def _graphcache_own(self) -> dict[str, Any]:
        """What was set on this object itself: hooks, and a ``forward``."""
        tables = {name: value for name, value in vars(self).items() if name.endswith("_hooks") or "_hooks_" in name}
        own = {name: value.copy() for name, value in tables.items() if value}
        names = ("forward", "_graphcache_hook", "_is_full_backward_hook")
        return {**own, **{name: vars(self)[name] for name in names if name in vars(self)}}

    def _graphcache_context(self) -> AbstractContextManager[object]:
        """While a method of the module runs, calls of the module and of its submodules use their graphs."""
        dispatcher = self._graphcache
        if dispatcher.captures.closed or dispatcher.target.is_engine or is_compiling():
            return nullcontext()
        return graphs_of_parts((self, *dispatcher.submodules.parts.values()))


def _publish(fast: weakref.ref[CachedModule], table: Any) -> None:
    """Let native code answer the calls of a wrapped module from a table, or from none."""
    if (found := fast()) is not None:
        found.__dict__["_graphcache_table"] = table
        if table is not None:
            open_to(CachedModule.__call__, CachedModule.forward_into)


def _part(ledger: Ledger, gate: RunGate, place: str, module: nn.Module, options: GraphConfig) -> CachedModule:
    """A submodule that is captured by itself; it is named after its place in the outermost module."""
    name = f"{ledger.name}.{place}" if ledger.quiet else place
    return CachedModule(module, options, name=name, part_of=(ledger, gate))
