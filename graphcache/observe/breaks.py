"""What in a module forbids a graph, with the line that does it; found by one eager call, on the CPU as well.

On the CPU the tensors of the call, and the module's own, are taken for tensors of a device: what the call makes without
saying where lies on the host then, as it would with CUDA, and moving from one to the other is a copy.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from graphcache.config import graphs_off
from graphcache.errors import ConfigError, Refusal
from graphcache.graphs.buffers import static_copies
from graphcache.graphs.higher_order import compiled_runs_eagerly
from graphcache.keys.call_key import describe, substitute
from graphcache.modules.cached_module import CachedModule
from graphcache.observe.findings import Break as Break
from graphcache.observe.findings import Findings, tensors_in
from graphcache.observe.watching import Functions, Operations


def find_capture_breaks(module: nn.Module, *args: Any, **kwargs: Any) -> list[Break]:
    """Every operation of one call that forbids a graph of it, in the order of their first occurrence.

    The module is called once, eagerly, on copies of the tensors; each find is noted and the call goes on. What it does
    to itself (running statistics, counters) happens as in any call; random numbers are drawn from a copy of the
    generators. Found is what this call does: a branch that it does not take is not looked into. Gradients, which are no
    operation, are for ``explain`` to tell.

    Args:
        module: Any module; a wrapped one is looked into without its graphs.
        args: Positional arguments of the call.
        kwargs: Keyword arguments.

    Returns:
        One :class:`Break` for each line, operation and reason; nothing if the call can be captured as far as it shows.

    Raises:
        ConfigError: If ``module`` is no module.
        Exception: Whatever the module raises for these arguments.

    Example:
        >>> class Scaled(nn.Module):
        ...     def forward(self, x):
        ...         return x * x.max().item()
        >>> [(found.reason.value, found.operation) for found in find_capture_breaks(Scaled(), torch.ones(3))]
        [('host_read', 'Tensor.item')]
    """
    if isinstance(module, CachedModule):
        module = module._module
    if not isinstance(module, nn.Module):
        raise ConfigError(f"expected an nn.Module, got {type(module).__name__}")
    try:
        _, inputs = describe(args, kwargs)
        inputs = _copies(inputs)
        args, kwargs = substitute(args, kwargs, inputs)
    except Refusal:
        # Something that cannot be copied; then the call is made with what was given.
        inputs = tensors_in((args, kwargs))
    findings = Findings(module, inputs, sys._getframe())
    before = findings.attributes()
    devices = sorted({tensor.device.index or 0 for tensor in inputs if tensor.is_cuda})
    with ExitStack() as during:
        during.enter_context(torch.random.fork_rng(devices))
        during.enter_context(graphs_off())
        during.enter_context(compiled_runs_eagerly())
        # What TorchScript does to optimise a module is no part of the call: it compares the constants.
        during.enter_context(torch.jit.optimized_execution(False))  # type: ignore[attr-defined]
        during.enter_context(Functions(findings))
        during.enter_context(Operations(findings))
        module(*args, **kwargs)
    findings.compare(before)
    return list(findings.found.values())


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    copies = static_copies(tensors)
    for tensor, copy in zip(tensors, copies, strict=True):
        if tensor.requires_grad and torch.is_grad_enabled():
            copy.requires_grad_()
    return copies
