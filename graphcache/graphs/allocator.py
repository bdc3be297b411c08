"""Tensors from torch's caching allocator, as native code makes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

_empty_like: Callable[[Tensor], Tensor] = torch.empty_like


def allocator(buffer: Tensor) -> Callable[[], Tensor]:
    """Allocates tensors like one on a device, from torch's caching allocator, for the current stream."""
    direct = _direct_allocator()
    if direct is None or torch.cuda.device_count() != 1:
        return partial(_empty_like, buffer)
    return partial(direct, tuple(buffer.shape), tuple(buffer.stride()), buffer.dtype)


@cache
def _direct_allocator() -> Callable[..., Tensor] | None:
    """What ``torch.compile`` allocates with: the allocator without the dispatcher, 1.6 µs less; on the current device.

    It is no public interface, so it has to show first that it makes what is asked of it; otherwise ``None``.
    """
    try:
        function: Callable[..., Tensor] = getattr(torch._C._dynamo.guards, "_empty_strided_cuda")  # noqa: B009
        for inference in (False, True):
            with torch.inference_mode(inference):
                made: Any = function((2, 3), (3, 1), torch.float16)
                wanted = (torch.Size((2, 3)), (3, 1), torch.float16, "cuda", inference, False)
                found = (
                    made.shape,
                    made.stride(),
                    made.dtype,
                    made.device.type,
                    made.is_inference(),
                    made.requires_grad,
                )
                if found != wanted or type(made) is not Tensor or made.data_ptr() % 256:
                    return None
    except Exception:
        return None
    return function
