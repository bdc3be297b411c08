"""Hooks of modules and the current device, asked of PyTorch without its wrappers: each of these costs some 40 ns."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from torch.nn.modules import module as _hooks

is_compiling = torch.compiler.is_compiling
raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", int)
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", int)
# Torch fills and empties these two dictionaries and never replaces them.
global_hooks, global_pre_hooks = _hooks._global_forward_hooks, _hooks._global_forward_pre_hooks


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run around a call of a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or global_hooks or global_pre_hooks)


@cache
def several_devices() -> bool:
    """Whether there is more than one CUDA device, so that the current one may be another than a graph's."""
    return torch.cuda.device_count() > 1
