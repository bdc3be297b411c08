"""Whether an answer fits tensors of the caller's, for ``forward_into``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import le
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphcache.capture.recording import Recording
from graphcache.errors import OutputMismatchError
from graphcache.graphs.buffers import extent_of, packed
from graphcache.graphs.operations import storage_of


def targets_of(out: Any, recorded: Recording, inputs: Sequence[Tensor]) -> list[Tensor] | None:
    """The tensors in ``out``, if a graph can write its outputs straight into them; ``None`` if it cannot."""
    leaves, structure = _flat(out)
    if not recorded.whole or not all(type(leaf) is Tensor and leaf.layout is torch.strided for leaf in leaves):
        return None
    places = {storage_of(leaf) for leaf in leaves}
    if len(places) < len(leaves) or any(leaf.requires_grad for leaf in leaves):
        return None
    if any(storage_of(tensor) in places for tensor in inputs) or not recorded.graph.accepts(leaves):
        return None
    same = pytree.tree_structure(recorded.build(leaves, inputs)) == structure
    return leaves if same else None


def copy_into(out: Any, answer: Any, name: str) -> None:
    """Copy an answer into tensors of the same structure, all of it or nothing."""
    targets, structure = _flat(out)
    leaves, wanted = pytree.tree_flatten(answer)
    if structure != wanted:
        raise OutputMismatchError(f"{name} answers {_kind(answer)}; out is {_kind(out)}")
    for index, (target, leaf) in enumerate(zip(targets, leaves, strict=True)):
        _check(target, leaf, f"out[{index}]" if len(leaves) > 1 else "out", name)
    # One tensor may stand for one answer twice.
    pairs = {(id(target), id(leaf)): (target, leaf) for target, leaf in zip(targets, leaves, strict=True)}
    if overlap([target for target, _ in pairs.values()]):
        raise OutputMismatchError(f"elements of out share memory, so that it cannot hold what {name} answers")
    with torch.no_grad():
        # All is read before anything is written: the answer may lie in memory of the targets.
        for target, leaf in [(target, leaf.clone()) for target, leaf in pairs.values()]:
            with torch.inference_mode(target.is_inference()):
                target.copy_(leaf)


def _check(target: Any, leaf: Any, where: str, name: str) -> None:
    """Raise unless an answer can be written into a tensor."""
    if not isinstance(leaf, Tensor):
        found = f"{name} answers {type(leaf).__name__} in the place of {where}"
        raise OutputMismatchError(f"{found}; forward_into takes tensors alone: call the module itself")
    if not isinstance(target, Tensor):
        raise OutputMismatchError(f"{where} is of type {type(target).__name__}; expected a torch.Tensor")
    if any(getattr(target, each) != getattr(leaf, each) for each in ("shape", "dtype", "device", "layout")):
        text = f"{where} is {_text(target)}; {name} answers {_text(leaf)}, and nothing is cast or moved"
        raise OutputMismatchError(text)
    if target.requires_grad:
        raise OutputMismatchError(f"{where} requires gradients, which no answer is written into; give .detach()")
    end = target.storage_offset() * target.element_size() + extent_of(target) if _has_address(target) else 0
    if target.numel() and end > target.untyped_storage().nbytes():
        raise OutputMismatchError(f"{where} has less memory than its shape {list(target.shape)} needs; it was resized")


def _flat(out: Any) -> tuple[list[Any], Any]:
    try:
        return pytree.tree_flatten(out)
    except RecursionError as error:
        raise OutputMismatchError("out contains itself; expected tensors in the structure of the answer") from error


def _kind(value: Any) -> str:
    count = pytree.tree_structure(value).num_leaves
    return "a tensor" if isinstance(value, Tensor) else f"{count} values in a {type(value).__name__}"


def _text(tensor: Tensor) -> str:
    layout = "" if tensor.layout is torch.strided else f", {tensor.layout}"
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}{layout}"


def overlap(tensors: Sequence[Tensor]) -> bool:
    """Whether two elements of dense tensors share memory.

    Example:
        >>> whole = torch.zeros(4, 4)
        >>> overlap([whole[:, :2], whole[:, 2:]]), overlap([whole[0], whole]), overlap([torch.zeros(1).expand(4)])
        (False, True, True)
    """
    dense = sorted((each for each in tensors if _has_address(each) and each.numel()), key=Tensor.data_ptr)
    starts = [each.data_ptr() for each in dense]
    ends = [start + extent_of(each) for start, each in zip(starts, dense, strict=True)]
    if all(packed(each) is each for each in dense) and all(map(le, ends, starts[1:])):
        return False
    # Element by element, each as often as the smallest step between two of them goes into it.
    unit = math.gcd(*(start - starts[0] for start in starts), *(each.element_size() for each in dense))
    found = []
    for start, end, each in zip(starts, ends, dense, strict=True):
        wide = each.element_size() // unit
        shape, strides = (*each.shape, wide), (*(stride * wide for stride in each.stride()), 1)
        found.append(torch.arange(start // unit, end // unit).as_strided(shape, strides).flatten())
    return not bool(torch.cat(found).sort().values.diff().all())


def _has_address(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own that strides describe; fake, sparse and wrapped tensors have not."""
    try:
        return tensor.layout is torch.strided and tensor.device.type != "meta" and tensor.data_ptr() >= 0
    except (RuntimeError, NotImplementedError):
        return False
