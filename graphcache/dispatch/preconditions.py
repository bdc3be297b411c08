"""What PyTorch is doing around a call, asked without its wrappers: each of these costs some 40 ns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _hooks

from graphcache.config import modes
from graphcache.errors import Reason
from graphcache.graphs import driver
from graphcache.keys.ambient import has_function_modes

is_compiling = torch.compiler.is_compiling
is_tracing: Callable[[], bool] = torch._C._is_tracing
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
transforms: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack
is_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", bool)
raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", int)
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", int)
_NOT_INITIALIZED = 3
"""CUDA_ERROR_NOT_INITIALIZED."""
AS_IT_IS: AbstractContextManager[object] = nullcontext()
# Torch fills and empties these two dictionaries and never replaces them.
global_hooks, global_pre_hooks = _hooks._global_forward_hooks, _hooks._global_forward_pre_hooks


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run around a call of a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or global_hooks or global_pre_hooks)


@cache
def several_devices() -> bool:
    """Whether there is more than one CUDA device, so that the current one may be another than a graph's."""
    return torch.cuda.device_count() > 1


def on_device(device: torch.device | None) -> AbstractContextManager[object]:
    """Inside, a device is the current one, unless it is so already."""
    return AS_IT_IS if device is None or device.index == current_device() else torch.cuda.device(device)


def forbidden(*, cuda: bool) -> Reason | None:
    """What forbids graphs at this moment, in this context, whatever the arguments."""
    if modes.get().off:
        return Reason.DISABLED
    if dispatch_modes() or has_function_modes() or transforms() is not None or is_tracing():
        return Reason.TRACING
    if forward_ad._current_level >= 0:
        # A replay would leave out derivatives that are computed in forward mode.
        return Reason.GRAD
    try:
        return Reason.OUTER_CAPTURE if cuda and is_capturing() else None
    except RuntimeError as error:
        if "initialization error" in str(error):
            # In a process that was forked after CUDA had started.
            raise driver.failure("cuStreamIsCapturing", _NOT_INITIALIZED) from error
        raise
