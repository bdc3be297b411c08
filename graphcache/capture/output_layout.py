"""What a module returned: taken apart once at capture, put together again after every replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphcache.errors import Reason, Refusal

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, Enum)


@dataclass(frozen=True)
class View:
    """An output that is an input, or a view of one: handed out as that view of the caller's own tensor."""

    index: int
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int
    itself: bool

    def of(self, inputs: Sequence[Tensor]) -> Tensor:
        """This view of the inputs of another call."""
        given = inputs[self.index]
        if self.itself:
            return given
        return given.as_strided(self.shape, self.strides, given.storage_offset() + self.offset)


class Answer:
    """The structure of an answer, and where each of its leaves comes from.

    Leaves are tensors that the call made (each handed out once, however often it appears), inputs and views of
    inputs, and plain values, which the signature determines or verification finds changing.
    """

    def __init__(self, value: Any, inputs: Sequence[Tensor], lasting: Sequence[Tensor] = ()) -> None:
        leaves, self._tree = pytree.tree_flatten(value, is_leaf=_is_size)
        kept = {_storage(tensor) for tensor in lasting}
        owners = {_storage(tensor): index for index, tensor in reversed(list(enumerate(inputs)))}
        self.tensors: list[Tensor] = []
        self._places: list[int | View | _Plain] = []
        self.plain: list[Any] = []
        made: dict[int, int] = {}
        overlapping = len(owners) < len({id(tensor) for tensor in inputs})
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if type(leaf) not in (Tensor, torch.nn.Parameter) or leaf.layout is not torch.strided:
                    raise Refusal(Reason.OUTPUT, detail=f"a tensor of type {type(leaf).__name__}, layout {leaf.layout}")
                if leaf.requires_grad and not any(leaf is tensor for tensor in inputs):
                    raise Refusal(Reason.GRAD, detail="an output requires gradients")
                if _storage(leaf) in kept:
                    raise Refusal(Reason.ALIASES_STATE, detail="an output shares memory with a parameter or buffer")
                if leaf.numel() and _storage(leaf) in owners:
                    if overlapping:
                        raise Refusal(Reason.ALIASES_STATE, detail="an output is a view of inputs that overlap")
                    self._places.append(self._view(leaf, inputs, owners[_storage(leaf)]))
                else:
                    if id(leaf) not in made:
                        made[id(leaf)] = len(self.tensors)
                        self.tensors.append(leaf)
                    self._places.append(made[id(leaf)])
            elif isinstance(leaf, _PLAIN):
                self._places.append(_Plain(leaf))
                self.plain.append(leaf)
            else:
                raise Refusal(
                    Reason.OUTPUT, detail=f"an object of type {type(leaf).__module__}.{type(leaf).__qualname__}"
                )

    @property
    def layout(self) -> object:
        """What must be the same whatever the values of the inputs: structure, shapes, dtypes, views, plain values."""
        tensors = [(tensor.shape, tensor.dtype, tensor.device) for tensor in self.tensors]
        places = [
            ("input", place.index) if isinstance(place, View) and place.itself else repr(place)
            for place in self._places
        ]
        return (self._tree, tensors, places)

    @property
    def is_whole(self) -> bool:
        """Whether its leaves are the tensors that the call made, each once and in their order."""
        return self._places == list(range(len(self.tensors)))

    def let_go(self) -> None:
        """Drop the tensors; what :meth:`builder` made needs none of them."""
        self.tensors = []

    def builder(self) -> Callable[[list[Tensor], Sequence[Tensor]], Any]:
        """A function of fresh outputs and of the caller's inputs that gives the whole answer."""
        places, tree = self._places, self._tree
        if self.is_whole:
            if tree.is_leaf():
                return lambda outputs, _: outputs[0]
            if tree == pytree.tree_flatten([0] * len(places))[1]:
                return lambda outputs, _: outputs
            if tree == pytree.tree_flatten((0,) * len(places))[1]:
                return lambda outputs, _: tuple(outputs)

        def build(outputs: list[Tensor], inputs: Sequence[Tensor]) -> Any:
            leaves = [outputs[place] if isinstance(place, int) else place.of(inputs) for place in places]
            return pytree.tree_unflatten(leaves, tree)

        return build

    def _view(self, leaf: Tensor, inputs: Sequence[Tensor], index: int) -> View:
        same = next((place for place, tensor in enumerate(inputs) if tensor is leaf), None)
        if same is not None:
            return View(same, leaf.shape, leaf.stride(), 0, itself=True)
        given = inputs[index]
        if leaf.dtype is not given.dtype or leaf.is_conj() != given.is_conj() or leaf.is_neg() != given.is_neg():
            raise Refusal(Reason.ALIASES_STATE, f"args[{index}]", "an output reinterprets the memory of an input")
        return View(index, leaf.shape, leaf.stride(), int(leaf.storage_offset() - given.storage_offset()), itself=False)


@dataclass(frozen=True)
class _Plain:
    value: Any

    def of(self, inputs: Sequence[Tensor]) -> Any:
        return self.value


def _is_size(value: Any) -> bool:
    # A tuple to pytree, which would give back a tuple.
    return isinstance(value, torch.Size)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
