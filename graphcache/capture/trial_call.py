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

from graphcache.capture.persistent_state import PersistentState
from graphcache.errors import Reason, Refusal
from graphcache.graphs.buffers import extent_of, is_dense, static_copies
from graphcache.graphs.verify import check_repeats
from graphcache.keys.call_key import KeyedCall
from graphcache.keys.values import Held, is_rebuilt

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


class TrialCall:
    """One call of a module that returned ``value``, repeatable on static inputs; ``state`` outlives the call.

    Tensors of the call whose memory ``updates`` has are used where they are.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        call: KeyedCall,
        value: Any,
        state: Sequence[Tensor],
        updates: PersistentState | None = None,
    ) -> None:
        self._run = run
        self._key = call.key
        self.state = state
        self.answer = OutputLayout(value, call.tensors, state, call.key.held)
        detached = {id(tensor): _detached(tensor) for tensor in call.tensors}
        self._tensors = [detached[id(tensor)] for tensor in call.tensors]
        storages = [] if updates is None else list(map(_storage, self._tensors))
        self.in_place = tuple([place for place, storage in enumerate(storages) if updates and storage in updates])
        """Which tensors of the call are used where they are."""
        self.inputs = [tensor for place, tensor in enumerate(self._tensors) if place not in self.in_place]
        """The others."""
        self.static: list[Tensor] = []
        """What every repetition reads in their place, after :meth:`make_static`."""
        self.updates = updates
        """State that a repetition updates in place; it begins with :meth:`rewind`."""

    def make_static(self) -> None:
        """Copy the inputs."""
        self.static = static_copies(self.inputs)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the call, the inputs by their static copies."""
        copies = iter(self.static)
        return [each if place in self.in_place else next(copies) for place, each in enumerate(self._tensors)]

    def repeat(self) -> Any:
        """What the module returns for the static inputs."""
        args, kwargs = self._key.arguments(self.tensors)
        return self._run(*args, **kwargs)

    def run(self) -> list[Tensor]:
        """The tensors that the module makes of the static inputs; the answer must have the layout of the first one."""
        answer = OutputLayout(self.repeat(), self.tensors, self.state, self._key.held)
        if answer.layout != self.answer.layout:
            raise Refusal(Reason.DATA_DEPENDENT, detail="the answer had another structure or other shapes")
        return answer.tensors

    def compare(self, outputs: Sequence[Tensor]) -> None:
        """Refuse outputs of a second run that differ from the first one's."""
        if list(map(_strides, outputs)) != list(map(_strides, self.answer.tensors)):
            raise Refusal(Reason.NONDETERMINISTIC, detail="the outputs had other strides when run again")
        check_repeats(outputs, [tensor.detach() for tensor in self.answer.tensors])
        if self.updates is not None:
            check_repeats(self.updates.now(), self.updates.updated)

    def rewind(self) -> None:
        """Put the state back to where it was before the call."""
        if self.updates is not None:
            self.updates.rewind()

    def with_state(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs, and after them the state that was updated beside them."""
        return [*outputs, *(() if self.updates is None else self.updates.now())]

    def let_go(self) -> None:
        """Drop the caller's tensors: what was captured refers to this call for as long as it lives."""
        self.inputs, self.updates, self._tensors, self.in_place = [], None, [], ()
        self.answer.let_go()


def _detached(tensor: Tensor) -> Tensor:
    """The same tensor without gradients, with what Python code gave it."""
    own = tensor.detach()
    if type(tensor) is torch.nn.Parameter:
        own = torch.nn.Parameter(own, requires_grad=False)
    own.__dict__.update(tensor.__dict__)
    return own


def _strides(tensor: Tensor) -> list[int]:
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
    containers = found.copy()
    # PyTorch leaves `look` in a cycle of references, and the arguments of a call must not wait for its collection.
    found.clear()
    return containers


@dataclass(frozen=True)
class TensorLeaf:
    """A tensor of the answer: an output of the graph, an input of the caller's, or a view of either."""

    of_input: bool
    index: int
    view: tuple[torch.Size, tuple[int, ...], int] | None = None
    """Shape, strides, and how many elements behind the beginning; ``None`` for the output or input itself."""
    is_detached: bool = False
    """Whether it is no view to PyTorch, though it lies in the same memory, such as ``x.detach()``."""

    def of(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """This leaf of another call."""
        given = (inputs if self.of_input else outputs)[self.index]
        if self.view is None:
            return given
        shape, strides, offset = self.view
        found = given.as_strided(shape, strides, given.storage_offset() + offset)
        return found.detach() if self.is_detached else found


@dataclass(frozen=True)
class PlainLeaf:
    """A plain value, which the key determines or verification finds changing."""

    value: Any

    def of(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Any:
        return self.value


@dataclass(frozen=True)
class ObjectLeaf:
    """An object among the arguments."""

    held: Held
    index: int

    def of(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Any:
        return self.held.ref()


class OutputLayout:
    """The structure of an answer, and where each of its leaves comes from.

    Leaves are tensors that the call made (each handed out once, however often it appears), inputs and views of
    ``inputs``, objects that the call was given, and plain values. An answer that a replay could not give is refused,
    such as one that shares memory with ``lasting``: parameters, buffers and whatever else outlives the call.
    """

    def __init__(
        self, value: Any, inputs: Sequence[Tensor], lasting: Sequence[Tensor] = (), held: Sequence[Held] = ()
    ) -> None:
        # A size is a tuple to pytree, which would give back a tuple.
        leaves, self._tree = pytree.tree_flatten(value, is_leaf=lambda each: isinstance(each, torch.Size))
        if not is_rebuilt(value, pytree.tree_unflatten(leaves, self._tree)):
            raise Refusal(Reason.OUTPUT, detail="pytree leaves out a part of it")
        self._inputs = inputs
        self._held = held
        self._lasting = set(map(_storage, lasting))
        self._owners = {_storage(tensor): index for index, tensor in reversed(list(enumerate(inputs)))}
        self._made: dict[int, int] = {}
        self.tensors: list[Tensor] = []
        """The tensors that the call made."""
        found = [self._leaf(leaf) for leaf in leaves]
        # Of tensors that lie within another output, views of that: a CUDA graph writes each output into memory of its
        # own, where a change of one would not show in the other.
        made, holders = self.tensors, _holders(self.tensors)
        kept = sorted(set(holders))
        self.tensors = [made[index] for index in kept]
        outputs = [
            TensorLeaf(False, kept.index(holder), _view_of(made[holder], tensor))
            for tensor, holder in zip(made, holders, strict=True)
        ]
        self._leaves = [outputs[leaf] if isinstance(leaf, int) else leaf for leaf in found]
        self.is_whole = self._leaves == [TensorLeaf(False, index) for index in range(len(self.tensors))]
        """Whether its leaves are the tensors that the call made, each once and in their order."""
        self.is_inference = any(tensor.is_inference() for tensor in self.tensors)
        """Whether the call made inference tensors."""
        if self.is_inference and not all(tensor.is_inference() for tensor in self.tensors):
            raise Refusal(Reason.OUTPUT, detail="some tensors of it are inference tensors and others are not")

    @property
    def layout(self) -> object:
        """What must be the same whatever the values of the inputs: structure, shapes, dtypes, views, plain values."""
        tensors = [(tensor.shape, tensor.dtype, tensor.device) for tensor in self.tensors]
        return self._tree, tensors, list(map(repr, self._leaves))

    def let_go(self) -> None:
        """Drop the tensors; what :meth:`builder` made needs none of them."""
        self.tensors, self._inputs = [], ()

    def builder(self) -> Callable[[list[Tensor], Sequence[Tensor]], Any]:
        """A function of fresh outputs and of the caller's inputs that gives the whole answer."""
        own, tree = self._leaves, self._tree
        if self.is_whole:
            if tree.is_leaf():
                return lambda outputs, _: outputs[0]
            if tree == pytree.tree_structure(list(own)):
                return lambda outputs, _: outputs
            if tree == pytree.tree_structure(tuple(own)):
                return lambda outputs, _: tuple(outputs)

        def build(outputs: list[Tensor], inputs: Sequence[Tensor]) -> Any:
            return pytree.tree_unflatten([leaf.of(outputs, inputs) for leaf in own], tree)

        return build

    def _leaf(self, leaf: Any) -> TensorLeaf | PlainLeaf | ObjectLeaf | int:
        """Where a leaf comes from; a number is that of a tensor that the call made, added to :attr:`tensors`."""
        # An object of a subclass may have attributes.
        if type(leaf) in _PLAIN or isinstance(leaf, (Enum, np.generic)):
            return PlainLeaf(leaf)
        for index, held in enumerate(self._held):
            if held.ref() is leaf:
                return ObjectLeaf(held, index)
        if not isinstance(leaf, Tensor):
            raise Refusal(Reason.OUTPUT, detail=f"an object of type {type(leaf).__module__}.{type(leaf).__qualname__}")
        if type(leaf) not in (Tensor, torch.nn.Parameter) or leaf.layout is not torch.strided:
            raise Refusal(Reason.OUTPUT, detail=f"a tensor of type {type(leaf).__name__}, layout {leaf.layout}")
        itself = next((index for index, tensor in enumerate(self._inputs) if tensor is leaf), None)
        # Hints of Dynamo for what may be compiled later change no answer.
        attributes = [name for name in leaf.__dict__ if not name.startswith("_dynamo_")]
        if attributes and itself is None:
            raise Refusal(Reason.OUTPUT, detail=f"a tensor with attributes: {', '.join(attributes)}")
        if leaf.requires_grad and itself is None:
            raise Refusal(Reason.GRAD, detail="an output requires gradients")
        memory = _storage(leaf)
        if memory in self._lasting:
            raise Refusal(Reason.ALIASES_STATE, detail="an output shares memory with a parameter or buffer")
        if not leaf.numel() or memory not in self._owners:
            index = self._made.setdefault(id(leaf), len(self.tensors))
            if index == len(self.tensors):
                self.tensors.append(leaf)
            return index
        if len(self._owners) < len({id(tensor) for tensor in self._inputs}):
            raise Refusal(Reason.ALIASES_STATE, detail="an output is a view of inputs that overlap")
        if itself is not None:
            return TensorLeaf(True, itself)
        index = self._owners[memory]
        if _reinterprets(leaf, self._inputs[index]):
            raise Refusal(Reason.ALIASES_STATE, f"args[{index}]", "an output reinterprets the memory of an input")
        return TensorLeaf(True, index, _view_of(self._inputs[index], leaf), not leaf._is_view())


def _view_of(given: Tensor, leaf: Tensor) -> tuple[torch.Size, tuple[int, ...], int] | None:
    if leaf is given:
        return None
    return leaf.shape, leaf.stride(), int(leaf.storage_offset() - given.storage_offset())


def _reinterprets(leaf: Tensor, given: Tensor) -> bool:
    return leaf.dtype is not given.dtype or leaf.is_conj() != given.is_conj() or leaf.is_neg() != given.is_neg()


def _holders(tensors: Sequence[Tensor]) -> list[int]:
    """For each of some outputs the index of the one that holds its elements: its own where it shares none."""
    found = list(range(len(tensors)))
    memories: dict[int, list[int]] = {}
    for index in sorted(found, key=lambda index: _rank_of(tensors[index])):
        others = memories.setdefault(_storage(tensors[index]), [])
        shares = {other: _share(tensors[index], tensors[other]) for other in others}
        holders = [other for other in others if shares[other]]
        if not holders:
            others.append(index)
            continue
        found[index] = holder = holders[0]
        if len(holders) > 1 or not is_dense(tensors[holder]) or shares[holder] < 1:
            raise Refusal(Reason.OUTPUT, detail="tensors in it overlap, and none of them holds the others")
    return found


def _rank_of(tensor: Tensor) -> tuple[bool, int, bool]:
    """What comes first may hold the others: one that was made as it is before its views."""
    return not is_dense(tensor), -tensor.numel(), tensor._is_view()


def _share(tensor: Tensor, other: Tensor) -> float:
    """What share of the elements of a tensor are elements of another one in the same memory, too."""
    size, offset = tensor.element_size(), other.storage_offset() * other.element_size()
    distance = offset - tensor.storage_offset() * size
    if distance >= extent_of(tensor) or -distance >= extent_of(other):
        return 0.0
    if _reinterprets(tensor, other):
        raise Refusal(Reason.OUTPUT, detail="a tensor in it reinterprets the memory of another one")
    # Not with PyTorch, whose modes may be recording.
    start = min(tensor.storage_offset(), other.storage_offset())
    ends = [each.storage_offset() + extent_of(each) // size for each in (tensor, other)]
    masks = np.zeros((2, max(ends) - start), dtype=bool)
    for mask, each in zip(masks, (tensor, other), strict=True):
        first = mask[each.storage_offset() - start :]
        np.lib.stride_tricks.as_strided(first, tuple(each.shape), each.stride())[...] = True
    return float(masks.all(0).sum() / max(masks[0].sum(), 1))
