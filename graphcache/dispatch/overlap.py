"""Whether tensors lie in the same memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def overlap(tensors: Sequence[Tensor]) -> bool:
    """Whether two elements of dense tensors lie upon each other.

    Example:
        >>> whole = torch.zeros(4, 4)
        >>> overlap([whole[:, :2], whole[:, 2:]]), overlap([whole[0], whole]), overlap([torch.zeros(1).expand(4)])
        (False, True, True)
    """
    dense = [each for each in tensors if has_address(each) and each.numel()]
    spans = sorted(
        (str(each.device), each.data_ptr(), each.data_ptr() + span(each), index) for index, each in enumerate(dense)
    )
    group: list[int] = []
    end = ("", 0)
    for device, first, last, index in spans:
        if not group or (device, first) >= end:
            if _collide([dense[each] for each in group]):
                return True
            group = []
        group.append(index)
        end = (device, max(last, end[1] if device == end[0] else 0))
    return _collide([dense[each] for each in group])


def _collide(tensors: list[Tensor]) -> bool:
    """Whether elements of tensors whose memory begins within that of each other lie upon each other."""
    if len(tensors) <= 1 and all(each.is_contiguous() or _is_spread(each) for each in tensors):
        return False
    start = min(each.data_ptr() for each in tensors)
    unit = math.gcd(*(value for each in tensors for value in (each.data_ptr() - start, each.element_size())))
    taken = torch.zeros(max(each.data_ptr() + span(each) - start for each in tensors) // unit, dtype=torch.bool)
    count = 0
    for each in tensors:
        wide = each.element_size() // unit
        shape, strides = (*each.shape, wide), (*(stride * wide for stride in each.stride()), 1)
        taken.as_strided(shape, strides, (each.data_ptr() - start) // unit).fill_(True)
        count += each.numel() * wide
    return int(taken.sum()) < count


def _is_spread(tensor: Tensor) -> bool:
    """Whether every stride steps over all that smaller strides reach, so that no two elements meet."""
    reach = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride < reach:
            return False
        reach = stride * (size - 1) + reach
    return True


def has_address(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own that strides describe; fake, sparse and wrapped tensors have not."""
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return False
    try:
        tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def is_cut_short(tensor: Tensor) -> bool:
    """Whether the storage of a tensor ends before its last element."""
    if not has_address(tensor) or not tensor.numel():
        return False
    end = tensor.storage_offset() * tensor.element_size() + span(tensor)
    return end > tensor.untyped_storage().nbytes()


def span(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last one."""
    reach = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return int(reach + 1) * tensor.element_size() if tensor.numel() else 0


def touches(leaf: Tensor, targets: Sequence[Tensor]) -> bool:
    """Whether a tensor lies in memory of the targets."""
    if not has_address(leaf):
        return False
    first, last = leaf.data_ptr(), leaf.data_ptr() + span(leaf)
    return any(
        has_address(each)
        and each.device == leaf.device
        and first < each.data_ptr() + span(each)
        and each.data_ptr() < last
        for each in targets
    )
