"""Any module behind a cache of graphs. ``forward`` is the hot path."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphcache.cache.lru import Entry, GraphCache, clock
from graphcache.cache.seen import Seen
from graphcache.cache.signature import Signature, describe, describe_layout, is_flat
from graphcache.capture.run_gate import RunGate
from graphcache.config import GraphConfig, modes
from graphcache.errors import ClosedError, ConfigError, Refusal
from graphcache.events import Evicted, Ledger
from graphcache.features import NO_ANSWER, features
from graphcache.graphs.cuda import CudaGraph
from graphcache.keys.ambient import ambient_state
from graphcache.keys.call import Call
from graphcache.modules.accounted import Accounted
from graphcache.modules.conditions import (
    current_device,
    dispatch_modes,
    global_hooks,
    global_pre_hooks,
    is_any_autocast_enabled,
    is_capturing,
    is_compiling,
    is_grad_enabled,
    is_inference,
    is_tracing,
    raw_stream,
    several_devices,
    transforms,
)
from graphcache.modules.engine import EngineModule
from graphcache.modules.into import copy_into, has_hooks, shortly_into, straight_into
from graphcache.modules.misses import STALE, Misses
from graphcache.modules.module_guards import guard_of
from graphcache.modules.observers import Observers
from graphcache.modules.parts import Parts
from graphcache.modules.portable import Portable
from graphcache.modules.record import Recorded
from graphcache.modules.shortcuts import Shortcut, Shortcuts, open_to
from graphcache.modules.standin import gives_way


@gives_way
class CachedModule(Portable, Accounted):
    """A module that replays a CUDA graph (on the CPU: a host graph) for every signature it has seen.

    It takes what the module takes and returns what the module returns. Names, parameters, ``state_dict`` and every
    other attribute are the module's own, which is left exactly as it was; an attribute that is set here is set there.
    Where both have a name (``config``, ``save``), it is the module's; :func:`graphcache.controls` gives that of this
    class. Methods of it that call ``forward`` or a part (``generate``) use the graphs, unless it has hooks, or they are
    generators or coroutines. A call that cannot be captured is answered eagerly, counted and logged once.

    A graph freezes what the host did while it was recorded: Python attributes of the module that the signature does not
    show (a number kept in ``self.scale``, say) are read once per signature. Call :meth:`clear` after changing one.

    Args:
        module: An engine, or any other module.
        config: Options; see :class:`~graphcache.config.GraphConfig`.
        name: What messages call it; the class's name if empty.
        run: What a call of this object calls; the module itself if ``None``.
        within: The name of the module that it was found in as a part, if it was found.
        observers: Those of the module that it is a part of.
        gate: Likewise, what keeps background captures and callers apart.

    Raises:
        ConfigError: If ``module`` is not a module, is wrapped already, or has nothing for the strategy to capture.

    Example:
        >>> fast = CachedModule(nn.Linear(4, 2).requires_grad_(False))
        >>> x = torch.ones(3, 4)
        >>> torch.equal(fast(x), fast(x)), fast.cache_info().hits
        (True, 1)
    """

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
            raise ConfigError(f"{module._ledger.name} is wrapped already; use it as it is, or wrap its .module")
        if not isinstance(module, nn.Module):
            raise ConfigError(
                f"expected an nn.Module, got {type(module).__name__}; graphcache.load makes one of an engine"
            )
        super().__init__(module)
        config = config or GraphConfig()
        try:
            given_name = getattr(module, "name", "")
        except Exception:
            given_name = ""
        own_name = name or (given_name if isinstance(given_name, str) else "") or type(module).__name__
        engine = module if isinstance(module, EngineModule) else None
        ledger = Ledger(own_name, quiet=bool(within))
        guard = guard_of(module, self, config.ignore, hooks=run is None)
        shortcuts = Shortcuts(engine, guard)
        seen = Seen()

        def evicted(key: Hashable, entry: Entry[Recorded]) -> None:
            shortcuts.clear()
            misses.admission.evicted(key, entry)
            seen.retire(key, entry.hits)
            ledger.evicted(Evicted(key, entry.hits))

        # A share of the device's memory is known when the first call has told which device it is.
        max_bytes = None if config.max_bytes == "auto" else config.max_bytes
        cache: GraphCache[Recorded] = GraphCache(max_graphs=config.max_graphs, max_bytes=max_bytes, on_evict=evicted)

        everybody = Observers() if observers is None else observers
        gate = gate or RunGate(module)

        def part(name: str, child: nn.Module, options: GraphConfig) -> CachedModule:
            full = f"{own_name}.{name}" if within else name
            found_in = own_name if options.strategy == "auto" else ""
            return CachedModule(
                child, options, name=full, run=child.forward, within=found_in, observers=everybody, gate=gate
            )

        parts = Parts(module, config, part)
        misses = Misses(module, run or module, config, ledger, cache, parts, guard, gate)
        misses.forget_shortcuts = shortcuts.clear
        binds = engine is not None and (bool(engine.host_inputs) or engine.takes_numbers)
        bucketed = (
            None if config.buckets is None else features.padding(config.buckets, misses, cache.entries, seen, self._hit)
        )
        # Past nn.Module's __setattr__, which would make submodules of modules.
        self.__dict__.update(
            _config=config,
            _ledger=ledger,
            _parts=parts,
            _observers=everybody,
            _engine=engine,
            _host_inputs=engine.host_inputs if engine is not None else (),
            # Whether the arguments of a call are not simply the engine's inputs.
            _binds=binds,
            _cache=cache,
            _entries=cache.entries,
            # By layout alone, for calls of plain tensors on a device; emptied whenever a graph goes.
            _shortcuts=shortcuts,
            # The same, compiled; None until a graph is known there.
            _table=None,
            _misses=misses,
            _seen=seen,
            _bucketed=bucketed,
            _guard=guard,
            _is_stale=guard.is_stale,
            # On a device it is asked after the launch, while the device works; on the host, before the replay.
            _checks_early=True,
        )
        everybody.join(self)

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
        if is_compiling():
            # Nothing of what follows belongs into a compiled program.
            return self._misses.run(*args, **kwargs)
        if self._engine is not None and (kwargs or self._binds or modes.get().multi_device_safe):
            args, kwargs = self._for_engine(self._engine, args, kwargs)
        try:
            signature, inputs = describe(args, kwargs)
        except Refusal as refusal:
            return self._misses.undescribed(refusal.cause, args, kwargs)
        if self._misses.cuda and several_devices():
            index = self._device_index(inputs)
            if index is not None and index != current_device():
                # What torch and the driver say of the current stream is said of the current device's.
                with torch.cuda.device(index):
                    return CachedModule.forward(self, *args, **kwargs)
        if self._host_inputs:
            signature = (*signature, *self._host_values(args))
        entry = self._entries.get(signature)
        if entry is None or entry.graph.version != self._guard.version or self._misses.forbidden() is not None:
            return self._miss(signature, inputs, args, kwargs)
        answer = self._hit(entry, inputs, signature[0] is not False)
        if answer is STALE:
            return self._miss(signature, inputs, args, kwargs)
        self._remember(signature, args, kwargs, entry)
        return answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # What nn.Module.__call__ adds is hooks, at 0.9 µs; it is asked only if there are any.
        if self._forward_hooks or self._forward_pre_hooks or global_hooks or global_pre_hooks:
            return super().__call__(*args, **kwargs)
        if kwargs or is_compiling():
            return self.forward(*args, **kwargs)
        # A short way to the graph of a call that hit before. Before the launch stands what makes it safe (memory is
        # read as it is laid out, nothing is launched into a capture); while the device works, what makes it right.
        # Everything else finds its way in forward().
        shortcut = self._shortcut(args)
        if shortcut is None:
            return self.forward(*args)
        entry, fire, _, index, epoch = shortcut
        if modes.get().off or dispatch_modes() or transforms() is not None:
            return self.forward(*args)
        stream = raw_stream(index)
        if (stream and is_capturing()) or (several_devices() and index != current_device()):
            return self.forward(*args)
        answer = None if fire is None else fire(args[0], stream)
        if answer is None:
            recorded = entry.graph
            try:
                answer = recorded.build(recorded.replay(args), args)
            except ClosedError:
                # Evicted by another thread since the look-up.
                return self.forward(*args)
        if not self._holds(epoch, args):
            return self.forward(*args)
        entry.hits += 1
        entry.used = clock()
        return answer

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
        table = self._table
        if table is not None and not (kwargs or is_compiling() or has_hooks(self)) and table.into(out, args):
            return out
        return self._into(out, *args, **kwargs)

    def _into(self, out: Any, *args: Any, **kwargs: Any) -> Any:
        """:meth:`forward_into`, where the compiled short way left it alone."""
        if not shortly_into(self, out, args, kwargs) and not straight_into(self, out, args, kwargs):
            copy_into(out, self(*args, **kwargs), self._ledger.name)
        return out

    def _remember(
        self, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any], entry: Entry[Recorded]
    ) -> None:
        """Find the graph of such calls by their layout from now on."""
        graph = entry.graph.graph
        if not kwargs and isinstance(graph, CudaGraph) and entry.graph.has_shortcut and is_flat(signature, args):
            fire, into = entry.graph.single or (None, None)
            # That of the graphs, not the engine's of this moment: another thread may have raised it since the replay.
            epoch = self._guard.epoch if self._engine is not None else entry.graph.version
            self._shortcuts.remember(describe_layout(args), args, (entry, fire, into, graph.index, epoch))
            if (table := self._shortcuts.table()) is not None:
                open_to(CachedModule.__call__, CachedModule.forward_into)
                self.__dict__.update(_table=table)

    def _shortcut(self, args: tuple[Any, ...]) -> Shortcut | None:
        try:
            (x,) = args
            # What describe_layout() says of it. A layout without strides raises; only devices have shortcuts, and there
            # is no other layout on them.
            found: Shortcut | None = self._shortcuts.get(
                (is_inference(), type(x), x.dtype, x.shape, x.stride(), x.device)
            )
            return found
        except Exception:
            # Several arguments, or something that is no tensor.
            return self._shortcuts.get(describe_layout(args)) if len(args) > 1 else None

    def _device_only(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        if not self._host_inputs:
            return inputs
        return [value for index, value in enumerate(inputs) if index not in self._host_inputs]

    def _for_engine(
        self, engine: EngineModule, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if kwargs or self._binds:
            args, kwargs = tuple(engine.bind(args, kwargs)), {}
        return (tuple(engine.moved(args)) if modes.get().multi_device_safe else args), kwargs

    def _holds(self, epoch: int | None, args: tuple[Any, ...]) -> bool:
        """Whether an answer is that of a call's full signature, after a launch that only the layout was asked for."""
        if self._engine is None:
            if self._guard.version != epoch or ambient_state() != self._shortcuts.ambient or self._is_stale(False):
                return False
        elif self._engine.epoch != epoch:
            return False
        if is_grad_enabled() or is_any_autocast_enabled() or is_tracing():
            return False
        for value in args:  # noqa: SIM110 - a generator costs 0.3 µs more
            if value.is_neg() or value.is_conj() or value.__dict__:
                return False
        return True

    def _hit(self, entry: Entry[Recorded], inputs: Sequence[Tensor], grad: bool) -> Any:
        """Replay, or ``STALE``. What a stale graph wrote is dropped; what it read, it kept alive."""
        if self._checks_early and self._is_stale(grad):
            return STALE
        given = self._device_only(inputs) if self._host_inputs else inputs
        recorded = entry.graph
        try:
            answer = recorded.build(recorded.replay(given), given)
        except ClosedError:
            # Evicted by another thread since the look-up.
            return STALE
        if not self._checks_early and self._is_stale(grad):
            return STALE
        entry.hits += 1
        entry.used = clock()
        return answer

    def _miss(
        self, signature: Signature, inputs: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._notice_device(inputs)
        self._seen.note(signature, args, kwargs)
        if self._bucketed is not None and not self._misses.closed and self._misses.forbidden() is None:
            answer = self._bucketed.answer(Call(signature, inputs, args, kwargs))
            if answer is not NO_ANSWER:
                return answer
        return self._misses.answer(signature, inputs, args, kwargs, self._hit)

    def _notice_device(self, inputs: Sequence[Tensor]) -> None:
        if not self._misses.cuda and any(tensor.is_cuda for tensor in inputs):
            self._misses.cuda = True
            self.__dict__.update(_checks_early=False)

    def _device_index(self, inputs: Sequence[Tensor]) -> int | None:
        if self._engine is not None:
            index: int = self._engine.device.index
            return index
        return next((tensor.device.index for tensor in inputs if tensor.is_cuda), None)

    def _host_values(self, args: tuple[Any, ...]) -> list[Hashable]:
        given = [args[index] for index in self._host_inputs if index < len(args)]
        return [tuple(value.flatten().tolist()) if isinstance(value, Tensor) else None for value in given]
