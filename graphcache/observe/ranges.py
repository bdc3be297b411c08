"""Named ranges in Nsight Systems: captures and eager calls, and on request every call.

The ranges are in the domain ``graphcache`` of the package ``nvtx``. If that is not installed they are PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from graphcache.errors import ConfigError, ExtraNotFoundError, shown
from graphcache.events import Kind
from graphcache.extras import optional
from graphcache.modules.cached_module import CachedModule
from graphcache.modules.transparent import controls


def nvtx_ranges(module: CachedModule, *, hits: bool = False) -> ExitStack:
    """Draw NVTX ranges around the captures and eager calls of a module and of its parts from now on.

    Args:
        module: A wrapped module.
        hits: Also draw a range around every call of the module. A call takes some microseconds longer then, since
            hooks keep it from the fast path.

    Returns:
        A context manager that ends it; so does its method ``close``.

    Raises:
        ConfigError: If ``module`` is not wrapped.
        ExtraNotFoundError: If there is neither ``nvtx`` nor CUDA.

    Example:
        >>> import graphcache
        >>> fast = graphcache.wrap(torch.nn.ReLU())
        >>> with nvtx_ranges(fast):
        ...     _ = fast(torch.zeros(2))
    """
    ledger = controls(module).ledger
    if not isinstance(hits, bool):
        raise ConfigError(f"hits={shown(hits)}: expected True or False")
    push, pop = _functions()

    undo = ExitStack()
    undo.callback(ledger.observers.add(_Ranges(push, pop), replays=False))
    if hits:
        # What a hook returns would take the place of the arguments or the answer.
        def begin(*_: Any) -> None:
            push(f"call {ledger.name}")

        def end(*_: Any) -> None:
            pop()

        undo.callback(module.register_forward_pre_hook(begin).remove)
        undo.callback(module.register_forward_hook(end, always_call=True).remove)
    return undo


class _Ranges:
    """Draws a range around each capture and eager run."""

    def __init__(self, push: Callable[[str], object], pop: Callable[[], object]) -> None:
        self._push = push
        self._pop = pop

    def before(self, kind: Kind, module: str) -> None:
        self._push(f"{kind} {module}")

    def after(self, kind: Kind, module: str, seconds: float, done: bool) -> None:
        self._pop()


def _functions() -> tuple[Callable[[str], object], Callable[[], object]]:
    """What begins a range with a label, and what ends it."""
    try:
        domain = optional("nvtx", "drawing ranges in profiles").get_domain("graphcache")
    except ExtraNotFoundError:
        if torch.cuda.is_available():
            return torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop
        raise
    attributes: dict[str, Any] = {}

    def push(label: str) -> None:
        if label not in attributes:
            attributes[label] = domain.get_event_attributes(message=label)
        domain.push_range(attributes[label])

    return push, domain.pop_range
