"""Steps of a module whose outputs are the next step's inputs: one launch for all of them where the device can loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from inspect import Signature
from typing import Any, Self

import torch
from torch import Tensor, nn

from graphcache.dispatch.fast_path import launcher
from graphcache.dispatch.targets import arguments_of
from graphcache.errors import ClosedError, ConfigError, CudaError, shown
from graphcache.graphs.buffers import is_dense, is_plain_copy
from graphcache.graphs.cuda import CudaGraph
from graphcache.graphs.graph import Graph
from graphcache.graphs.while_loop import Move, while_loop
from graphcache.modules.cached_module import CachedModule
from graphcache.modules.session import Session, open_session
from graphcache.modules.transparent import dispatcher_of
from graphcache.modules.wrapping import wrap

MAX_STEPS = 2**31 - 1


class Loop:
    """A module that is run again and again on what it returned: see :func:`loop`, which makes one.

    As in a session, nothing of the module is looked at between steps: a weight that is replaced after the loop was made
    is not seen.
    """

    def __init__(
        self, session: Session, moves: Sequence[Move], until: Tensor | None, steps: int, end: Callable[[], object]
    ) -> None:
        self._session, self._moves, self._until, self._end = session, moves, until, end
        self._graph: Graph | None = None
        self.inputs = session.inputs
        """The static inputs, where each step reads; write the values of the first one here. They move on."""
        self.outputs = session.outputs
        """What the module returned in the last step, in static buffers."""
        self.steps = steps
        """How many steps a run makes at most."""
        self.fallback = ""
        """Why the host launches each step; empty where one launch is enough."""
        self.taken: Tensor
        """How many steps the last run made: a tensor of type ``int32``, on the device if that counts."""
        self._launch = self._run_from_host
        graph = session.recorded.graph
        if not isinstance(graph, CudaGraph):
            self._on_host("the module is on the CPU")
        elif rows := [move for move in moves if not _is_of_bytes(move)]:
            self._on_host(f"an output of shape {tuple(rows[0].source.shape)} lies in another order than it is kept in")
        else:
            try:
                self._graph, self.taken = while_loop(graph, moves, until, steps)
                self._launch = launcher(self._graph)
            except CudaError as error:
                self._on_host(str(error))

    def _on_host(self, why: str) -> None:
        self.fallback = why
        with torch.inference_mode(False):
            self.taken = torch.zeros((), dtype=torch.int32)

    def run(self) -> None:
        """Make the steps, on the current stream. Only where ``until`` is read on the host does this wait for them."""
        if not self.inputs:
            raise ClosedError("the loop was closed; make a new one")
        self._launch()

    def _run_from_host(self) -> None:
        with torch.no_grad():
            self.taken.zero_()
            for step in range(self.steps):
                self._session.run()
                ends = self._until is not None and bool(self._until)
                for source, target, by_step in self._moves:
                    (target[step] if by_step else target).copy_(source)
                self.taken += 1
                if ends:
                    return

    def close(self) -> None:
        """Release the graph and its buffers; twice does nothing."""
        if self._graph is not None:
            self._graph.close()
        self._session.close()
        self.inputs, self.outputs = (), None
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def loop(
    module: nn.Module,
    inputs: Any,
    *,
    feed: Mapping[str | int, str | int],
    steps: int,
    until: str | int | None = None,
    collect: Mapping[str | int, Tensor] | None = None,
) -> Loop:
    """Make a loop over a module: each step is one replay, whose outputs become the inputs of the next one.

    On a CUDA device the steps run in a WHILE node of a CUDA graph: one launch, whatever the number of steps, and the
    condition is read there. What the body of such a node cannot hold (see the CUDA driver API, conditional nodes) is
    launched by the host step by step; :attr:`Loop.fallback` then says why. Several modules in a row are one module that
    calls them.

    Args:
        module: What :func:`graphcache.wrap` returned, or a module, which is then wrapped for the loop.
        inputs: The arguments of the first step: a tensor, a tuple of positional ones, or a mapping of named ones.
        feed: For outputs the inputs that they become, of the same shape, dtype and device. An output is known by its
            place or key in the answer, or by its binding in an engine; the only one is 0. An input is known by its
            place among positional arguments or by its name, and is a tensor itself.
        steps: How many there are at most, from 1 to 2**31 - 1.
        until: The output that ends the loop after a step in which it is not zero: one ``bool`` or integer.
        collect: For outputs the tensors that keep them, with a row for each step, of the same dtype and device. What a
            run that ends early does not reach stays as it was.

    Raises:
        ConfigError: For names that the module does not have, and for tensors that do not fit; nothing is left behind.
        CaptureError: If the call cannot be captured, with the cause.

    Example:
        >>> import torch, graphcache
        >>> class Halve(torch.nn.Module):
        ...     def forward(self, x):
        ...         half = x / 2
        ...         return {"half": half, "done": half.sum() < 1}
        >>> kept = torch.zeros(100, 2)
        >>> options = {"feed": {"half": "x"}, "collect": {"half": kept}, "until": "done"}
        >>> with graphcache.loop(Halve(), torch.full((2,), 8.0), steps=100, **options) as halving:
        ...     halving.run()
        ...     int(halving.taken), kept[:5, 0].tolist()
        (5, [4.0, 2.0, 1.0, 0.5, 0.25])
    """
    if type(steps) is not int or not 1 <= steps <= MAX_STEPS:
        raise ConfigError(f"expected steps from 1 to {MAX_STEPS}, got {shown(steps)}")
    for option, given in (("feed", feed), ("collect", collect or {})):
        if not isinstance(given, Mapping):
            raise ConfigError(f"{option}={shown(given)}: expected a mapping by output")
    args, kwargs = _arguments(inputs)
    fast = module if isinstance(module, CachedModule) else wrap(module)
    end: Callable[[], object] = (lambda: None) if fast is module else fast.close
    try:
        session = open_session(dispatcher_of(fast), args, kwargs)
        try:
            places = _Places(fast, session, args, kwargs)
            moves = _moves(places, feed, collect or {}, steps)
            return Loop(session, moves, None if until is None else _condition(places, until), steps, end)
        except BaseException:
            session.close()
            raise
    except BaseException:
        end()
        raise


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


class _Places:
    """The static tensors of a session by what users call them."""

    def __init__(self, fast: CachedModule, session: Session, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        target = dispatcher_of(fast).target
        call = target.describe(args, kwargs)
        given = target.graph_inputs(call.tensors)
        self._shared = {each for each, times in Counter(map(id, given)).items() if times > 1}
        self._static = {id(tensor): static for tensor, static in zip(given, session.inputs, strict=True)}
        names = arguments_of(fast.module)
        if isinstance(names, Signature):
            self._named = {**names.bind(*args, **kwargs).arguments, **kwargs}
        else:
            self._named = dict(zip(names, call.args, strict=True))
        self._args = args
        self.inputs = session.inputs
        self._outputs = _by_name(session.outputs, getattr(fast.module, "output_binding_names", ()))

    def input(self, name: str | int) -> Tensor:
        """The static input of an argument."""
        value = self._named.get(name) if isinstance(name, str) else None
        if type(name) is int and 0 <= name < len(self._args):
            value = self._args[name]
        if id(value) in self._shared:
            raise ConfigError(f"input {shown(name)} is given more than once; feed a copy of it: x.clone()")
        static = self._static.get(id(value))
        if static is None:
            tensors = [each for each, value in self._named.items() if id(value) in self._static]
            raise ConfigError(f"no tensor is given as argument {shown(name)}; there are {', '.join(tensors) or 'none'}")
        return static

    def output(self, name: str | int) -> Tensor:
        """The static output of a name, which is no input."""
        found = self._outputs.get(name) if type(name) in (str, int) else None
        if not isinstance(found, Tensor):
            known = ", ".join(shown(each) for each, value in self._outputs.items() if isinstance(value, Tensor))
            raise ConfigError(f"the module returns no tensor {shown(name)}; there are {known or 'none'}")
        if any(_memory_of(found) == _memory_of(each) for each in self.inputs):
            raise ConfigError(f"output {shown(name)} is an input of the module itself")
        return found


def _by_name(answer: Any, names: Sequence[str]) -> dict[str | int, Any]:
    if isinstance(answer, Mapping):
        return dict(answer)
    outputs = tuple(answer) if isinstance(answer, (tuple, list)) else (answer,)
    fields = names or getattr(answer, "_fields", ())
    return {**dict(enumerate(outputs)), **dict(zip(fields, outputs, strict=False))}


def _moves(
    places: _Places, feed: Mapping[str | int, str | int], collect: Mapping[str | int, Tensor], steps: int
) -> list[Move]:
    """What is copied after each step, collected outputs first."""
    found = list[Move]()
    taken = list(places.inputs)
    for output, kept in collect.items():
        source, what = places.output(output), f"what collects output {shown(output)}"
        if not isinstance(kept, Tensor) or not kept.dim() or not kept.is_contiguous() or kept.requires_grad:
            raise ConfigError(f"{what}: expected a contiguous tensor with a row for each step, without gradients")
        _check_fits(what, source, kept[:steps], (steps, *source.shape))
        if any(_memory_of(kept) == _memory_of(other) for other in (*taken, source)):
            raise ConfigError(f"{what} shares memory with another tensor of the loop")
        taken.append(kept)
        found.append(Move(source, kept, by_step=True))
    fed: set[int] = set()
    for output, name in feed.items():
        source, target = places.output(output), places.input(name)
        _check_fits(f"input {shown(name)}, which output {shown(output)} becomes", source, target, tuple(source.shape))
        if id(target) in fed:
            raise ConfigError(f"two outputs become input {shown(name)}")
        fed.add(id(target))
        found.append(Move(source, target, by_step=False))
    return found


def _check_fits(what: str, source: Tensor, target: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(target.shape) != shape or target.dtype != source.dtype or target.device != source.device:
        raise ConfigError(
            f"{what}: expected shape {shape}, {source.dtype} on {source.device}; got {tuple(target.shape)}, "
            f"{target.dtype} on {target.device}"
        )


def _memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _condition(places: _Places, name: str | int) -> Tensor:
    found = places.output(name)
    if found.numel() != 1 or found.is_floating_point() or found.is_complex():
        raise ConfigError(
            f"expected one bool or integer as the output that ends the loop, got {shown(name)} of shape "
            f"{tuple(found.shape)} and {found.dtype}"
        )
    return found


def _is_of_bytes(move: Move) -> bool:
    """Whether the bytes of the source are those of the target, in their order."""
    row = move.target[0] if move.by_step else move.target
    source = move.source
    return is_dense(source) and is_plain_copy(source, row) and not row.is_conj() and not row.is_neg()
