"""One call of a module, repeated on other tensors to record and verify it, and the layout of its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphcache.errors import Reason, Refusal
from graphcache.graphs.buffers import extent_of, is_dense
from graphcache.graphs.verify import check_repeats
from graphcache.keys.call_key import KeyedCall, substitute
from graphcache.keys.values import is_rebuilt

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, Enum)


class TrialCall:
    """One call of a module that returned ``value``, repeatable on other tensors; ``state`` outlives the call."""

    def __init__(self, run: Callable[..., Any], call: KeyedCall, value: Any, state: Sequence[Tensor]) -> None:
        self._run = run
        self.state = state
        """What outlives the call."""
        self.answer = OutputLayout(value, call.tensors, state)
        found: dict[int, int] = {}
        places = [found.setdefault(id(tensor), len(found)) for tensor in call.tensors]
        self.places = None if len(found) == len(places) else places
        """For each tensor of the call, which of ``inputs`` it is, if one was given several times."""
        self.inputs: list[Tensor] = []
        for place in range(len(found)):
            given = call.tensors[places.index(place)]
            self.inputs.append(given.detach())
            # What Python code gave it.
            self.inputs[-1].__dict__.update(given.__dict__)
        self._args, self._kwargs = substitute(call.args, call.kwargs, self._spread(self.inputs))

    def call(self, static: Sequence[Tensor]) -> Any:
        """What the module returns for other tensors."""
        args, kwargs = substitute(self._args, self._kwargs, self._spread(static))
        return self._run(*args, **kwargs)

    def run(self, static: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that the module makes of others; the answer has to have the layout of the first one."""
        answer = OutputLayout(self.call(static), self._spread(static), self.state)
        if answer.layout != self.answer.layout:
            raise Refusal(Reason.DATA_DEPENDENT, detail="the answer had another structure or other shapes")
        return answer.tensors

    def compare(self, outputs: Sequence[Tensor]) -> None:
        """Refuse outputs of a second run that differ from the first one's."""
        if list(map(_strides, outputs)) != list(map(_strides, self.answer.tensors)):
            raise Refusal(Reason.NONDETERMINISTIC, detail="the outputs had other strides when run again")
        check_repeats(outputs, [tensor.detach() for tensor in self.answer.tensors])

    def let_go(self) -> None:
        """Drop the caller's tensors: what was captured refers to this call for as long as it lives."""
        self._args, self._kwargs, self.inputs = (), {}, []
        self.answer.let_go()

    def _spread(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The inputs in the places of the tensors of the call."""
        return inputs if self.places is None else [inputs[place] for place in self.places]


def _strides(tensor: Tensor) -> list[int]:
    """The strides of the dimensions that have several elements."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _storage(tensor: Tensor) -> int:
    """Identifies the memory of a tensor; raises for one without any, such as a sparse one."""
    return int(tensor.untyped_storage()._cdata)


def containers_in(value: Any) -> list[Any]:
    """The containers in a value that can be changed, each as often as it is there."""
    found: list[Any] = []

    def look(each: Any) -> bool:
        if type(each) in pytree.SUPPORTED_NODES and not isinstance(each, tuple):
            found.append(each)
        return False

    pytree.tree_flatten(value, is_leaf=look)
    return found


@dataclass(frozen=True)
class View:
    """A leaf that is an input of the caller's or a view of one, or a view of another tensor of the answer."""

    of_input: bool
    index: int
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int
    itself: bool

    def of(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """This view of the tensors of another call."""
        given = (inputs if self.of_input else outputs)[self.index]
        if self.itself:
            return given
        return given.as_strided(self.shape, self.strides, given.storage_offset() + self.offset)


@dataclass(frozen=True)
class _PlainOutput:
    """A plain value, which the key determines or verification finds changing."""

    value: Any

    def of(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Any:
        return self.value


_Place = int | View | _PlainOutput
"""Where a leaf comes from; a number is that of a tensor that the call made."""


class OutputLayout:
    """The structure of an answer, and where each of its leaves comes from.

    Leaves are tensors that the call made (each handed out once, however often it appears), inputs and views of
    ``inputs``, and plain values. An answer that a replay could not give is refused, such as one that shares memory with
    ``lasting``: parameters, buffers and whatever else outlives the call.
    """

    def __init__(self, value: Any, inputs: Sequence[Tensor], lasting: Sequence[Tensor] = ()) -> None:
        # A size is a tuple to pytree, which would give back a tuple.
        leaves, self._tree = pytree.tree_flatten(value, is_leaf=lambda each: isinstance(each, torch.Size))
        if not is_rebuilt(value, pytree.tree_unflatten(leaves, self._tree)):
            raise Refusal(Reason.OUTPUT, detail="pytree leaves out a part of it")
        self._inputs = inputs
        self._lasting = set(map(_storage, lasting))
        self._owners = {_storage(tensor): index for index, tensor in reversed(list(enumerate(inputs)))}
        self._made: dict[int, int] = {}
        self.tensors: list[Tensor] = []
        """The tensors that the call made."""
        self._places = self._within_outputs([self._place(leaf) for leaf in leaves])
        self.is_whole = self._places == list(range(len(self.tensors)))
        """Whether its leaves are the tensors that the call made, each once and in their order."""
        self.is_inference = any(tensor.is_inference() for tensor in self.tensors)
        """Whether the call made inference tensors."""
        if self.is_inference and not all(tensor.is_inference() for tensor in self.tensors):
            raise Refusal(Reason.OUTPUT, detail="some tensors of it are inference tensors and others are not")

    @property
    def layout(self) -> object:
        """What must be the same whatever the values of the inputs: structure, shapes, dtypes, views, plain values."""
        tensors = [(tensor.shape, tensor.dtype, tensor.device) for tensor in self.tensors]
        places = [
            ("input", place.index) if isinstance(place, View) and place.itself else repr(place)
            for place in self._places
        ]
        return (self._tree, tensors, places)

    def let_go(self) -> None:
        """Drop the tensors; what :meth:`builder` made needs none of them."""
        self.tensors, self._inputs = [], ()

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
            leaves = [outputs[place] if isinstance(place, int) else place.of(outputs, inputs) for place in places]
            return pytree.tree_unflatten(leaves, tree)

        return build

    def _place(self, leaf: Any) -> _Place:
        """Where a leaf comes from; a tensor that the call made is added to :attr:`tensors`."""
        if isinstance(leaf, _PLAIN):
            return _PlainOutput(leaf)
        if not isinstance(leaf, Tensor):
            raise Refusal(Reason.OUTPUT, detail=f"an object of type {type(leaf).__module__}.{type(leaf).__qualname__}")
        if type(leaf) not in (Tensor, torch.nn.Parameter) or leaf.layout is not torch.strided:
            raise Refusal(Reason.OUTPUT, detail=f"a tensor of type {type(leaf).__name__}, layout {leaf.layout}")
        # Hints of Dynamo for what may be compiled later change no answer.
        attributes = [name for name in leaf.__dict__ if not name.startswith("_dynamo_")]
        if attributes and not any(leaf is tensor for tensor in self._inputs):
            raise Refusal(Reason.OUTPUT, detail=f"a tensor with attributes: {', '.join(attributes)}")
        if leaf.requires_grad and not any(leaf is tensor for tensor in self._inputs):
            raise Refusal(Reason.GRAD, detail="an output requires gradients")
        if _storage(leaf) in self._lasting:
            raise Refusal(Reason.ALIASES_STATE, detail="an output shares memory with a parameter or buffer")
        if leaf.numel() and _storage(leaf) in self._owners:
            return self._view(leaf, self._owners[_storage(leaf)])
        place = self._made.setdefault(id(leaf), len(self.tensors))
        if place == len(self.tensors):
            self.tensors.append(leaf)
        return place

    def _view(self, leaf: Tensor, index: int) -> View:
        """The view of an input that an output is."""
        if len(self._owners) < len({id(tensor) for tensor in self._inputs}):
            raise Refusal(Reason.ALIASES_STATE, detail="an output is a view of inputs that overlap")
        itself = next((place for place, tensor in enumerate(self._inputs) if tensor is leaf), None)
        if itself is not None:
            return View(True, itself, leaf.shape, leaf.stride(), 0, itself=True)
        given = self._inputs[index]
        if leaf.dtype is not given.dtype or leaf.is_conj() != given.is_conj() or leaf.is_neg() != given.is_neg():
            raise Refusal(Reason.ALIASES_STATE, f"args[{index}]", "an output reinterprets the memory of an input")
        return _view_of(given, leaf, True, index)

    def _within_outputs(self, places: list[_Place]) -> list[_Place]:
        """The same places, of which those of tensors that lie within another output are views of it.

        A CUDA graph writes each output into memory of its own, where a change of one would not show in the other.
        """
        holders = _holders(self.tensors)
        kept = [index for index, holder in enumerate(holders) if index == holder]
        made, self.tensors = self.tensors, [self.tensors[index] for index in kept]

        def moved(place: _Place) -> _Place:
            if not isinstance(place, int):
                return place
            holder, index = holders[place], kept.index(holders[place])
            return index if holder == place else _view_of(made[holder], made[place], False, index)

        return list(map(moved, places))


def _view_of(given: Tensor, leaf: Tensor, of_input: bool, index: int) -> View:
    """The view that ``leaf`` is of ``given``."""
    offset = int(leaf.storage_offset() - given.storage_offset())
    return View(of_input, index, leaf.shape, leaf.stride(), offset, itself=False)


def _holders(tensors: Sequence[Tensor]) -> list[int]:
    """For each of some outputs the index of the one that holds its elements: its own where it shares none."""
    found = list(range(len(tensors)))
    memories: dict[int, list[int]] = {}
    for index in sorted(found, key=lambda index: (not is_dense(tensors[index]), -tensors[index].numel())):
        others = memories.setdefault(_storage(tensors[index]), [])
        holders = [other for other in others if _shares(tensors[other], tensors[index])]
        if not holders:
            others.append(index)
            continue
        found[index] = holders[0]
        if len(holders) > 1 or not is_dense(tensors[holders[0]]) or not _holds(tensors[holders[0]], tensors[index]):
            raise Refusal(Reason.OUTPUT, detail="tensors in it overlap, and none of them holds the others")
    return found


def _shares(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors in one memory have an element in common."""
    (start, end), (begin, stop) = (
        (each.storage_offset() * each.element_size(), each.storage_offset() * each.element_size() + extent_of(each))
        for each in (one, other)
    )
    if end <= begin or stop <= start:
        return False
    if one.dtype is not other.dtype or one.is_conj() != other.is_conj() or one.is_neg() != other.is_neg():
        raise Refusal(Reason.OUTPUT, detail="a tensor in it reinterprets the memory of another one")
    mine, others = _elements(one, other)
    return bool((mine & others).any())


def _holds(one: Tensor, other: Tensor) -> bool:
    """Whether all elements of a tensor are elements of another one in the same memory."""
    mine, others = _elements(one, other)
    return not (others & ~mine).any()


def _elements(*tensors: Tensor) -> list[Any]:
    """For each of some tensors of one memory and dtype, which elements of the block around them it has."""
    # Not with PyTorch, whose modes may be recording.
    start = min(tensor.storage_offset() for tensor in tensors)
    ends = [tensor.storage_offset() + extent_of(tensor) // tensor.element_size() for tensor in tensors]
    found = [np.zeros(max(ends) - start, dtype=bool) for _ in tensors]
    for mask, tensor in zip(found, tensors, strict=True):
        first = mask[tensor.storage_offset() - start :]
        np.lib.stride_tricks.as_strided(first, tuple(tensor.shape), tensor.stride())[...] = True
    return found
