"""Every operation of a call that prevents a graph, found by one observed eager call."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from graphcache.capture.effects import Watched, observe, snapshot_of
from graphcache.capture.host_activity import is_available
from graphcache.capture.persistent_state import PersistentState
from graphcache.config import graphs_off
from graphcache.errors import Cause, ConfigError, Reason, Refusal
from graphcache.graphs.buffers import static_copies
from graphcache.graphs.capture import compiled_runs_eagerly
from graphcache.keys.call_key import describe
from graphcache.keys.guards import ModuleGuard
from graphcache.keys.state_snapshot import StateSnapshot
from graphcache.keys.values import Unobservable
from graphcache.modules.cached_module import CachedModule
from graphcache.modules.transparent import controls, dispatcher_of
from graphcache.modules.wrapped import keeps_its_own_state
from graphcache.observe.findings import Break as Break
from graphcache.observe.findings import Findings, Place
from graphcache.observe.watching import Functions, Operations, Placement, tensors_in


def find_capture_breaks(module: nn.Module, *args: Any, **kwargs: Any) -> list[Break]:
    """Every operation of one call that prevents a graph of it, in the order of their first occurrence.

    The module is called once, eagerly, on copies of the tensors, and is observed as the first call of a wrapped module
    is; all effects are noted, not only the first. Random numbers are drawn from a copy of the generators; other effects
    on the module (running statistics, counters) happen as in any call. A branch that the call does not take is not
    looked into. Gradients are not an operation; ``explain`` tells about them.

    Args:
        module: Any module. A wrapped module is looked into without its graphs.
        args: Positional arguments of the call.
        kwargs: Keyword arguments.

    Returns:
        One :class:`Break` for each line, operation and reason; an empty list if nothing was found.

    Raises:
        ConfigError: If ``module`` is not a module, or a profiler uses the profile hook of the interpreter.
        Exception: Whatever the module raises for these arguments.

    Example:
        >>> class Scaled(nn.Module):
        ...     def forward(self, x):
        ...         return x * x.max().item()
        >>> [(found.reason.value, found.operation) for found in find_capture_breaks(Scaled(), torch.ones(3))]
        [('host_read', 'Tensor.item')]
    """
    ignore, root = list[str](), "self"
    if isinstance(module, CachedModule):
        root = getattr(dispatcher_of(module).target.guard, "root", root)
        ignore, module = controls(module).config.ignore, controls(module).module
    if not isinstance(module, nn.Module):
        raise ConfigError(f"expected an nn.Module, got {type(module).__name__}")
    if not is_available():
        raise ConfigError("a profiler uses sys.setprofile, which find_capture_breaks needs; stop the profiler first")
    try:
        key, tensors, *_ = describe(args, kwargs)
        inputs: Sequence[Tensor] = _copies(tensors)
        args, kwargs = key.arguments(inputs)
    except Refusal:
        # An argument cannot be copied; the call gets what was given.
        inputs = tensors_in((args, kwargs))
    findings, placement = Findings(module, find_capture_breaks.__code__), Placement([*inputs, *_state(module)])
    guard = ModuleGuard(module, ignore=ignore, skips=keeps_its_own_state, root=root)
    try:
        reached = guard.snapshot()
        state = reached, snapshot_of(args, kwargs, reached.mentioned)
    except Unobservable as error:
        # Calls of the module run eagerly for that. The operations are looked at all the same.
        findings.add(_unobserved("the state", error))
        state = StateSnapshot([]), StateSnapshot([])

    def call(*args: Any, **kwargs: Any) -> Any:
        with Functions(findings, placement), Operations(findings, placement):
            return module(*args, **kwargs)

    def effect(cause: Cause, operation: str) -> None:
        # Other tensors of the same kind in attributes are arguments of the next calls.
        if operation or cause.where not in {place.path for place in state[0].rebound()}:
            findings.effect(cause, operation)

    with ExitStack() as during:
        during.enter_context(torch.random.fork_rng({tensor.device.index or 0 for tensor in inputs if tensor.is_cuda}))
        during.enter_context(graphs_off())
        during.enter_context(compiled_runs_eagerly())
        # TorchScript optimises a module while it runs, and compares its constants for that.
        during.enter_context(torch.jit.optimized_execution(False))  # type: ignore[attr-defined]
        watched = Watched(*state, inputs, str, PersistentState([*state[0].tensors, *state[1].tensors]), effect)
        _observe(findings, call, args, kwargs, watched)
    return list(findings.found.values())


def _observe(findings: Findings, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], watched: Watched) -> None:
    try:
        observe(call, args, kwargs, watched)
    except Unobservable as error:
        findings.add(_unobserved("the call", error))


def _unobserved(what: str, error: Unobservable) -> Break:
    return Break(Reason.UNOBSERVED, what, Place(), str(error), Reason.UNOBSERVED.remedy)


def _state(module: nn.Module) -> list[Tensor]:
    """The tensors that ``module.cuda()`` moves."""
    scripts = [each for each in module.modules() if isinstance(each, torch.jit.ScriptModule)]
    constants = [tensor for each in scripts for tensor in script_constants(each)]
    return [*module.parameters(), *module.buffers(), *constants]


def script_constants(module: torch.jit.ScriptModule) -> list[Tensor]:
    """The tensors that the code of a TorchScript module holds; what ``freeze`` makes of its weights."""
    if "forward" not in module._c._method_names():
        return []
    _, constants = module.code_with_constants
    return [value for value in constants.const_mapping.values() if isinstance(value, Tensor)]


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the inputs, which require gradients where the inputs do."""
    copies = static_copies(tensors)
    for tensor, copy in zip(tensors, copies, strict=True):
        if tensor.requires_grad and torch.is_grad_enabled():
            copy.requires_grad_()
    return copies
