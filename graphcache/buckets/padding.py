"""One tensor at the start of a larger one, and back; and one with other values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graphcache.buckets.spec import Number
from graphcache.graphs.buffers import is_dense


def padded(tensor: Tensor, shape: Sequence[int], fills: Mapping[int, Number]) -> Tensor:
    """A tensor at the start of a larger one: one allocation, every element written once.

    The dimensions lie in memory in the order of those of ``tensor``. Where the margins of two axes meet, the later axis
    has its fill. ``fills`` has what the margin holds for every axis that grows, counted from the front.
    """
    if tensor.is_contiguous():
        larger = torch.empty(tuple(shape), dtype=tensor.dtype, device=tensor.device)
    else:
        larger = torch.empty_permuted(tuple(shape), _order(tensor), dtype=tensor.dtype, device=tensor.device)
    real = [slice(0, size) for size in tensor.shape]
    larger[tuple(real)].copy_(tensor)
    for axis, fill in fills.items():
        before = [slice(0, size) for size in shape[:axis]]
        margin = slice(tensor.shape[axis], shape[axis])
        larger[(*before, margin, *real[axis + 1 :])].fill_(fill)
    return larger


def cropped(tensor: Tensor, sizes: Mapping[int, int]) -> Tensor:
    """The start of a tensor on some axes: the same memory where that is without gaps, a copy otherwise."""
    result = tensor
    for axis, size in sizes.items():
        result = result.narrow(axis, 0, size)
    if result.is_contiguous():
        return result
    # A caller may ask for a view() of what eager execution would have answered.
    return result.clone() if is_dense(tensor) and not is_dense(result) else result


def varied(tensor: Tensor) -> Tensor:
    """Values of the same kind that differ from each other, always the same ones, for a tensor of any layout.

    Floating values are 0.25 to 1.25 times the mean magnitude of those that are given, and 1 where that says nothing.
    They have either sign, unless all that is given is positive: then a logarithm or a root may follow. Booleans are
    mixed. Integers may be indices: of equal ones above 0, every other one becomes smaller by 1; all others stay.
    """
    tensor = tensor.detach()
    generator = torch.Generator().manual_seed(0)
    odd = torch.arange(tensor.numel(), device=tensor.device).remainder_(2).reshape(tensor.shape)
    if tensor.dtype is torch.bool:
        values = torch.rand(tensor.shape, generator=generator) < 0.5
    elif not (tensor.is_floating_point() or tensor.is_complex()):
        whole = tensor.to(torch.int64)
        equal = tensor.numel() > 0 and bool((whole == whole.flatten()[0]).all() & (whole > 0).all())
        values = whole - odd if equal else whole
    else:
        magnitudes = (tensor if tensor.is_complex() else tensor.double()).abs().double()
        finite = magnitudes[magnitudes.isfinite()]
        mean = float(finite.mean()) if finite.numel() else 0.0
        values = (torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.25) * (mean or 1.0)
        if tensor.is_complex() or not bool((tensor.double() > 0).all()):
            values *= torch.randint(2, tensor.shape, generator=generator) * 2 - 1
    return torch.empty_like(tensor).copy_(values)


def holds(dtype: torch.dtype, number: Number) -> bool:
    """Whether a dtype has a number, roundings aside."""
    if dtype.is_complex or number == 0:
        return True
    if dtype.is_floating_point:
        return number != number or abs(number) == float("inf") or abs(number) <= torch.finfo(dtype).max
    if dtype is torch.bool:
        return number == 1
    info = torch.iinfo(dtype)
    return info.min <= number <= info.max and number == int(number)


def _order(tensor: Tensor) -> list[int]:
    """The axes from the outermost in memory to the innermost; those of size 1, whose strides say nothing, outermost."""
    # Torch's own rule for strides of 0 and for gaps, without memory.
    strides = torch.empty_like(tensor, device="meta").stride()
    return sorted(range(tensor.dim()), key=lambda axis: (tensor.shape[axis] > 1, -strides[axis]))
