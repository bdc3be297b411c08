"""Static inputs and outputs: memory that stays where it is, as a graph has baked its address."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def static_copy(tensor: Tensor) -> Tensor:
    """A buffer of the same shape, strides, dtype and device, holding the same values.

    The strides are kept because an operation's result may depend on them. Elements that overlap (an expanded tensor)
    cannot be written one by one, so such a tensor becomes a contiguous one.

    Args:
        tensor: A strided tensor on any device, of any shape, 0-d and empty ones too.

    Returns:
        A tensor that is not part of any autograd graph and that may be written in any grad mode.

    Example:
        >>> static_copy(torch.zeros(3, 4).t()).stride()
        (1, 4)
    """
    with torch.inference_mode(False), torch.no_grad():
        buffer = torch.empty_strided(tensor.shape, _writable_strides(tensor), dtype=tensor.dtype, device=tensor.device)
        buffer.copy_(tensor)
        return buffer


def fill_bytes(tensors: Sequence[Tensor], byte: int = 0xFF) -> None:
    """Overwrite every element of the tensors with a byte pattern; ``0xFF`` is NaN in floating dtypes, -1 in integers.

    Args:
        tensors: Dense tensors; ``bool`` ones get the byte's truth value.
        byte: 0 to 255.
    """
    with torch.inference_mode(False), torch.no_grad():
        for tensor in tensors:
            if tensor.numel() == 0:
                continue
            if tensor.dtype is torch.bool:
                tensor.fill_(bool(byte))
            else:
                flat = tensor.untyped_storage()
                whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(flat)
                start = tensor.storage_offset() * tensor.element_size()
                span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
                whole[start : start + span * tensor.element_size()].fill_(byte)


def nbytes_of(tensors: Sequence[Tensor]) -> int:
    """Bytes that the storages of these tensors hold, each storage once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _writable_strides(tensor: Tensor) -> Sequence[int]:
    dense = [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    dense.sort()
    reach = 0
    for stride, size in dense:
        if stride <= reach:
            return torch.empty(tensor.shape, device="meta").stride()
        reach += stride * (size - 1)
    return tensor.stride()
