"""The device of a module."""

from __future__ import annotations

import torch
from torch import nn

from graphcache.modules.engine import EngineModule


def device_of(module: nn.Module) -> torch.device:
    """Where a module's calls run: an engine's device, that of a parameter or buffer, or CUDA if there is one."""
    for each in module.modules():
        if isinstance(each, EngineModule):
            return torch.device(each.device)
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
