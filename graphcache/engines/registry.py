"""The engine modules of this process, for traced programs that hold an engine's bytes as a constant."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

alive: WeakValueDictionary[str, Any] = WeakValueDictionary()
"""By their identity. Each has ``lies_at``, which compares the address of its bytes."""


def traced_engines(module: nn.Module) -> list[Any]:
    """The modules of this process whose engines a traced program runs, which it holds as constants."""
    engines = list(alive.values())
    if not engines:
        return []
    own = {id(each) for each in engines}
    # An engine's module refers to its bytes itself, which its deep copies share.
    places = {
        (tensor.data_ptr(), tensor.numel())
        for each in module.modules()
        if id(each) not in own
        for tensor in (*each.__dict__.values(), *each._buffers.values())
        if type(tensor) is Tensor and tensor.dtype is torch.uint8 and tensor.device.type == "cpu"
    }
    return [each for each in engines if any(each.lies_at(place) for place in places)]
