"""A call as the cache sees it, for whoever stands beside the hot path."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphcache.keys.call_key import Signature, describe

if TYPE_CHECKING:
    from graphcache.modules.cached import CachedModule


def described(
    fast: CachedModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Signature, Sequence[Tensor]]:
    """A call as :meth:`CachedModule.forward` sees it: its arguments, its signature, and the tensors in it.

    Raises:
        Refusal: If no signature describes it.
        InputCountError: If an engine takes no such arguments.
    """
    if fast._engine is not None:
        args, kwargs = fast._for_engine(fast._engine, args, kwargs)
    signature, inputs = describe(args, kwargs)
    if fast._host_inputs:
        signature = (*signature, *fast._host_values(args))
    return args, kwargs, signature, inputs


def on_device(fast: CachedModule, inputs: Sequence[Tensor]) -> AbstractContextManager[object]:
    """Inside, the device of a call is the current one."""
    index = fast._device_index(inputs) if fast._misses.cuda else None
    return nullcontext() if index is None else torch.cuda.device(index)
