"""Named ranges in Nsight Systems: captures and eager calls, and hits where they are asked for.

The ranges lie in the domain ``graphcache`` of the package ``nvtx``, or where that is not installed but CUDA is, in
PyTorch's own. Without :func:`nvtx_ranges` they cost nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from graphcache.errors import ConfigError, ExtraNotFoundError, shown
from graphcache.events import Tracer
from graphcache.modules.cached_module import CachedModule
from graphcache.modules.controls import controls
from graphcache.observe.counters import checked

Push = Callable[[str], object]


class Ranges:
    """Ranges that are drawn until :meth:`close`; a context manager, which closes them."""

    def __init__(self, undo: ExitStack) -> None:
        self._undo = undo

    def close(self) -> None:
        """Draw no more ranges; twice does nothing."""
        self._undo.close()

    def __enter__(self) -> Ranges:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def nvtx_ranges(module: CachedModule, *, hits: bool = False) -> Ranges:
    """Draw NVTX ranges around the captures and eager calls of a module and of its parts from now on.

    Args:
        module: A wrapped module.
        hits: Draw one around every call of the module as well. Calls take some microseconds longer then: with a hook,
            they go a longer way.

    Returns:
        What ends it.

    Raises:
        ConfigError: If ``module`` is not wrapped.
        ExtraNotFoundError: If there is neither ``nvtx`` nor CUDA.

    Example:
        >>> import graphcache
        >>> fast = graphcache.wrap(torch.nn.ReLU())
        >>> with nvtx_ranges(fast):
        ...     _ = fast(torch.zeros(2))
    """
    checked(module)
    if not isinstance(hits, bool):
        raise ConfigError(f"hits={shown(hits)}: expected True or False")
    push, pop = _functions()

    @contextmanager
    def traced(label: str) -> Iterator[None]:
        push(label)
        try:
            yield
        finally:
            pop()

    undo = ExitStack()
    for each in (module, *controls(module).parts.values()):
        undo.callback(_draw(each, traced))
    if hits:
        label = f"call {controls(module).ledger.name}"
        for handle in (
            module.register_forward_pre_hook(lambda *_: _nothing(push(label))),
            module.register_forward_hook(lambda *_: _nothing(pop()), always_call=True),
        ):
            undo.callback(handle.remove)
    return Ranges(undo)


def _draw(module: CachedModule, tracer: Tracer) -> Callable[[], None]:
    tracers = controls(module).ledger.tracers
    tracers.append(tracer)

    def end() -> None:
        # Not by equality: the same function may be there for somebody else.
        tracers[:] = [each for each in tracers if each is not tracer]

    return end


def _functions() -> tuple[Push, Callable[[], object]]:
    try:
        nvtx: Any = importlib.import_module("nvtx")
    except ModuleNotFoundError as error:
        if torch.cuda.is_available():
            return torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop
        raise ExtraNotFoundError(
            f'ranges in profiles need nvtx ({error}); pip install "graphcache[nvtx]"', name="nvtx"
        ) from error
    domain = nvtx.get_domain("graphcache")
    attributes: dict[str, Any] = {}

    def push(label: str) -> None:
        made = attributes.get(label)
        if made is None:
            made = attributes[label] = domain.get_event_attributes(message=label)
        domain.push_range(made)

    return push, domain.pop_range


def _nothing(_: object) -> None:
    """A hook's answer takes the place of the module's, unless it is ``None``."""
