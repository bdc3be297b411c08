"""What is remembered of objects that hold values: tensors, arrays, generators and caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor

from graphcache.keys.state_nodes import Change, StateNode
from graphcache.keys.values import array_state, hidden_state, is_generator_of_randomness

_Answer = TypeVar("_Answer")
_PLACE = ("address", "shape", "strides", "dtype", "device", "requires_grad", "conjugation", "sign bit")


class TensorNode(StateNode):
    """A tensor: where its memory is and how it is laid out, and for the effects of a call its version counter."""

    __slots__ = ("gradient", "version")

    def read(self) -> tuple[Any, ...]:
        self.version = version_of(self.target)
        self.gradient = gradient_of(self.target)
        return place_of(self.target)

    def differs(self) -> bool:
        return bool(place_of(self.target) != self.state)

    def changes(self) -> list[Change]:
        # Without a look at the version counter, which tells of the call before.
        return list(self.compare(self.state, place_of(self.target)))

    def compare(self, old: Any, new: Any) -> Iterator[Change]:
        if old != new:
            what = [name for name, before, now in zip(_PLACE, old, new, strict=False) if before != now]
            yield Change(self.path, f"has another {', '.join(what)}")

    @property
    def is_written(self) -> bool:
        """Whether an operation wrote into the tensor or a view of it, or a gradient was accumulated."""
        return version_of(self.target) != self.version or gradient_of(self.target) is not self.gradient

    def guard(self, native: Any) -> None:
        native.add_tensor(self.target)


class GradientFlagsNode(StateNode):
    """Which tensors require gradients, for code that asks: a native guard does not compare that."""

    def read(self) -> Any:
        return [node.target.requires_grad for node in self.target]

    def differs(self) -> bool:
        return bool(self.read() != self.state)

    def compare(self, old: Any, new: Any) -> Iterator[Change]:
        for node, before, now in zip(self.target, old, new, strict=True):
            if before != now:
                yield Change(f"{node.path}.requires_grad", f"{before} became {now}")


class ArrayNode(StateNode):
    """A NumPy array or a buffer of Python's, with its contents."""

    @property
    def nbytes(self) -> int:
        """How many bytes are compared."""
        return len(self.state[-1])

    def read(self) -> Any:
        return array_state(self.target)

    def differs(self) -> bool:
        return bool(self.read() != self.state)

    def compare(self, old: Any, new: Any) -> Iterator[Change]:
        if old != new:
            yield Change(self.path, "has other contents or another layout")


class HiddenNode(StateNode):
    """An object that shows its state by no attribute, such as a generator; only the effects of a call compare it."""

    guarded = False

    def read(self) -> Any:
        # With the objects that it refers to, so that no id in the state is used twice.
        return hidden_state(self.target) or (None, ())

    def differs(self) -> bool:
        return bool(self.read()[0] != self.state[0])

    def compare(self, old: Any, new: Any) -> Iterator[Change]:
        if old[0] != new[0]:
            what = f"the {type(self.target).__name__} moved on"
            yield Change(self.path, what, is_generator_of_randomness(self.target))


class CacheNode(HiddenNode):
    """A function with a cache. A graph does not call it: the next call has to fill a cache that was cleared."""

    guarded = True


def place_of(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor's memory is and how it is read; the object itself where that cannot be told."""
    # Sparse tensors and uninitialised parameters have no address.
    return _asked(_place, tensor) or (id(tensor),)


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written in place; ``None`` where that is not counted, as of inference tensors."""
    return _asked(lambda each: None if each.is_inference() else each._version, tensor)


def gradient_of(tensor: Tensor) -> Tensor | None:
    """The gradient of a leaf: accumulated, or assigned."""
    return _asked(lambda each: each.grad if each.is_leaf else None, tensor)


def memory_of(tensor: Tensor) -> int:
    """Identifies the memory of a tensor, for as long as the tensor lives; 0 for a tensor without any."""
    return _asked(lambda each: int(each.untyped_storage()._cdata), tensor) or 0


def _place(x: Tensor) -> tuple[Any, ...]:
    layout = (x.data_ptr(), x.shape, x.stride(), x.dtype, x.device)
    return (*layout, x.requires_grad, x.is_conj(), x.is_neg())


def _asked(question: Callable[[Tensor], _Answer], tensor: Tensor) -> _Answer | None:
    """What a tensor answers; ``None`` for one that cannot be asked."""
    try:
        return question(tensor)
    except (RuntimeError, ValueError, NotImplementedError, TypeError):
        return None
