"""Answers into tensors of the caller's: ``forward_into``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphcache.errors import OutputMismatchError
from graphcache.graphs.operations import storage_of
from graphcache.modules.record import Recorded


def targets_of(out: Any, recorded: Recorded, inputs: Sequence[Tensor]) -> list[Tensor] | None:
    """The tensors in ``out``, if a graph can write its outputs straight into them; ``None`` if it cannot.

    Args:
        out: Whatever the caller gave.
        recorded: The graph of the call.
        inputs: Of the call. A graph may read them after it began to write.
    """
    leaves = pytree.tree_leaves(out)
    if not recorded.whole or not all(type(leaf) is Tensor and leaf.layout is torch.strided for leaf in leaves):
        return None
    places = {storage_of(leaf) for leaf in leaves}
    if len(places) < len(leaves) or any(leaf.requires_grad for leaf in leaves):
        return None
    if any(storage_of(tensor) in places for tensor in inputs) or not recorded.graph.accepts(leaves):
        return None
    same = pytree.tree_structure(recorded.build(leaves, inputs)) == pytree.tree_structure(out)
    return leaves if same else None


def copy_into(out: Any, answer: Any, name: str) -> None:
    """Copy an answer into tensors of the same structure, all of it or nothing.

    Args:
        out: The tensors.
        answer: What the module returned.
        name: Of the module, for messages.

    Raises:
        OutputMismatchError: If they do not fit; nothing was copied.
    """
    targets, structure = pytree.tree_flatten(out)
    leaves, wanted = pytree.tree_flatten(answer)
    if structure != wanted:
        raise OutputMismatchError(f"{name} answers {_shape_of(answer)}; out is {_shape_of(out)}")
    for index, (target, leaf) in enumerate(zip(targets, leaves, strict=True)):
        where = f"out[{index}]" if len(leaves) > 1 else "out"
        if not isinstance(leaf, Tensor):
            raise OutputMismatchError(
                f"{name} answers {type(leaf).__name__} in the place of {where}; forward_into takes tensors alone: call "
                f"the module itself"
            )
        if not isinstance(target, Tensor):
            raise OutputMismatchError(f"{where} is of type {type(target).__name__}; expected a torch.Tensor")
        if (target.shape, target.dtype, target.device) != (leaf.shape, leaf.dtype, leaf.device):
            raise OutputMismatchError(
                f"{where} is {target.dtype} {list(target.shape)} on {target.device}; {name} answers {leaf.dtype} "
                f"{list(leaf.shape)} on {leaf.device}, and nothing is cast or moved"
            )
        if target.requires_grad:
            raise OutputMismatchError(f"{where} requires gradients, which no answer is written into; give .detach()")
    with torch.no_grad():
        for target, leaf in zip(targets, leaves, strict=True):
            target.copy_(leaf)


def _shape_of(value: Any) -> str:
    structure = pytree.tree_structure(value)
    return "a tensor" if isinstance(value, Tensor) else f"{structure.num_leaves} values in a {type(value).__name__}"
