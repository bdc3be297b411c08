"""A trace of the calls of one module, hits included, while it is recorded."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphcache.cache.trace import Input, TraceWriter
from graphcache.errors import GraphCacheError, Refusal
from graphcache.modules.conditions import is_compiling
from graphcache.modules.described import described

if TYPE_CHECKING:
    from graphcache.modules.cached import CachedModule


class TraceRecording:
    """Records every call of a wrapped module until it is closed; a context manager, which closes it.

    Hits tell nobody that they happen, so that they cost nothing. Hence this is a hook of the wrapped module: while it
    is there, every call goes the longer way and is described once more, which takes some 30 µs. Afterwards calls
    are as fast as before. Calls of a module that is a part of another, made by that other, are not seen.

    Args:
        fast: The wrapped module.
        path: Of the file, which must not exist.
        max_calls: How many calls are recorded at most; the others are left out.

    Raises:
        TraceError: If the file exists or cannot be made.
        ConfigError: If ``max_calls`` is not a whole number, 1 or more.
    """

    def __init__(self, fast: CachedModule, path: str | os.PathLike[str], *, max_calls: int = 10_000_000) -> None:
        self._fast = fast
        self._writer = TraceWriter(path, module=fast._ledger.name, max_calls=max_calls)
        self._known: set[Any] = set()
        self._hook = fast.register_forward_pre_hook(self._notice, with_kwargs=True)

    def close(self) -> None:
        """Write what calls were measured to take, and close the file; twice does nothing."""
        self._hook.remove()
        known, self._known = self._known, set()
        for signature, each in self._fast._misses.admission.known().items():
            if signature in known and each.eager is not None and each.replay is not None and each.capture is not None:
                self._writer.costs(signature, eager=each.eager, replay=each.replay, capture=each.capture)
        self._writer.close()

    def __enter__(self) -> TraceRecording:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _notice(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_compiling():
            return
        try:
            args, kwargs, signature, _inputs = described(self._fast, args, kwargs)
        except (Refusal, GraphCacheError):
            # No signature, so no graph; or a call that the module will refuse.
            return
        inputs = {} if signature in self._known else named_inputs(self._fast._module, args, kwargs)
        self._known.add(signature)
        self._writer.call(signature, inputs)


def named_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Input]:
    """The tensors of a call by name: an engine's inputs, or the parameters of ``forward``, with the place inside them.

    Example:
        >>> import torch
        >>> list(named_inputs(nn.Linear(2, 3), (torch.zeros(1, 2),), {}))
        ['input']
        >>> list(named_inputs(nn.Sequential(), ({"a": torch.zeros(1)},), {}))
        ["input['a']"]
    """
    names = getattr(module, "input_binding_names", None)
    try:
        arguments = (
            dict(zip(names, args, strict=True))
            if isinstance(names, list)
            else inspect.signature(module.forward).bind(*args, **kwargs).arguments
        )
    except (TypeError, ValueError):
        # Not to be bound: the module will say so itself.
        arguments = {"args": args, **kwargs}
    found = {}
    for name, value in arguments.items():
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            if isinstance(leaf, Tensor):
                found[name + pytree.keystr(path)] = Input(tuple(leaf.shape), str(leaf.dtype).removeprefix("torch."))
    return found
