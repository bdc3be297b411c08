"""Static inputs and outputs: memory that stays where it is, as a graph has baked its address."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def static_copy(tensor: Tensor) -> Tensor:
    """A tensor of the same values, attributes and strides, overlapping elements included (see :func:`packed`)."""
    with torch.inference_mode(False), torch.no_grad():
        buffer = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        put(packed(buffer), tensor)
        if type(tensor) is torch.nn.Parameter:
            # A module may ask for it.
            buffer = torch.nn.Parameter(buffer, requires_grad=False)
        buffer.__dict__.update(tensor.__dict__)
        return buffer


def static_copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A :func:`static_copy` of each tensor; one tensor given several times has one buffer, several times."""
    made = {id(tensor): static_copy(tensor) for tensor in {id(each): each for each in tensors}.values()}
    return [made[id(tensor)] for tensor in tensors]


def packed(tensor: Tensor) -> Tensor:
    """A tensor's memory, to be written: where elements overlap, with expanded axes of size 1, or as one block."""
    if tensor.is_contiguous() or not _overlaps(tensor):
        return tensor
    with torch.no_grad():
        for axis, stride in enumerate(tensor.stride()):
            if stride == 0:
                tensor = tensor.narrow(axis, 0, 1)
        return tensor.as_strided((extent_of(tensor) // tensor.element_size(),), (1,)) if _overlaps(tensor) else tensor


def put(buffer: Tensor, tensor: Tensor) -> None:
    """Copy a tensor into a static buffer of the same layout, which may be :func:`packed`."""
    buffer.copy_(tensor if tensor.shape == buffer.shape else packed(tensor))


def poison(outputs: Sequence[Tensor], inputs: Sequence[Tensor] = ()) -> None:
    """Overwrite outputs with NaN or -1, and inputs with NaN or 0, which is a valid index almost everywhere."""
    for tensor, whole in (*((each, -1) for each in outputs), *((each, 0) for each in inputs)):
        # Of a call that enters inference mode by itself, outputs can be written only there.
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            if tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point:
                tensor.view(torch.uint8).fill_(0xFF)
            elif tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(float("nan"))
            else:
                tensor.fill_(whole % 256 if tensor.dtype is torch.uint8 else whole)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill one block of memory, so that one plain copy moves them all."""
    return tensor.numel() > 0 and bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def is_plain_copy(tensor: Tensor, buffer: Tensor) -> bool:
    """Whether the bytes of ``tensor`` are the bytes of ``buffer``: same strides, no pending conjugation or negation."""
    return tensor.stride() == buffer.stride() and not tensor.is_conj() and not tensor.is_neg()


def extent_of(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last one."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def nbytes_of(tensors: Sequence[Tensor]) -> int:
    """Bytes that the storages of these tensors hold, each storage once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements may share memory; also true of some interleaved layouts that share none."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return tensor.numel() > 0
        reach += stride * (size - 1)
    return False
