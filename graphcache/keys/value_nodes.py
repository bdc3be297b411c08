"""What is remembered of objects that hold values: tensors, arrays, generators, caches and TorchScript modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from graphcache.keys.script_state import script_state
from graphcache.keys.state_nodes import MISSING, Change, ItemsNode, Node, difference
from graphcache.keys.values import array_state, hidden_state, is_generator_of_randomness, same

_PLACE = ("address", "shape", "strides", "dtype", "device", "requires_grad", "conjugation", "sign bit")


class TensorNode(Node):
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

    def guard(self, native: Any) -> bool:
        try:
            native.add_tensor(self.target)
        except TypeError:
            return False
        return True


class ArrayNode(Node):
    """A NumPy array or a buffer of Python's, with its contents."""

    __slots__ = ()

    @property
    def nbytes(self) -> int:
        """How many bytes are compared."""
        return len(self.state[-1])

    def read(self) -> Any:
        return array_state(self.target)

    def compare(self, old: Any, new: Any) -> Iterator[Change]:
        if old != new:
            yield Change(self.path, "has other contents or another layout")


class ObjectArrayNode(ItemsNode):
    """The objects in a NumPy array."""

    __slots__ = ()

    def read(self) -> tuple[Any, ...]:
        return tuple(self.target.ravel().tolist())

    def guard(self, native: Any) -> bool:
        return False


class HiddenNode(Node):
    """An object that shows its state by no attribute, such as a generator; only the effects of a call compare it."""

    __slots__ = ()

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

    __slots__ = ()

    guarded = True


class ScriptNode(Node):
    """A TorchScript module: what C++ holds of it."""

    __slots__ = ()

    def read(self) -> dict[str, Any]:
        return script_state(self.target)

    def differs(self) -> bool:
        now = self.read()
        return now.keys() != self.state.keys() or not all(map(same, now.values(), self.state.values()))

    def compare(self, old: Any, new: Any) -> Iterator[Change]:
        for name in {**old, **new}:
            if change := difference(old.get(name, MISSING), new.get(name, MISSING)):
                yield Change(f"{self.path}{name}", change)


def place_of(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor's memory is and how it is read; the object itself where that cannot be told."""
    try:
        return (
            tensor.data_ptr(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor.device,
            tensor.requires_grad,
            tensor.is_conj(),
            tensor.is_neg(),
        )
    except (RuntimeError, ValueError, NotImplementedError, TypeError):
        # Sparse tensors and uninitialised parameters have no address.
        return (id(tensor),)


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written in place; ``None`` where that is not counted, as of inference tensors."""
    try:
        return None if tensor.is_inference() else tensor._version
    except (RuntimeError, ValueError, NotImplementedError, TypeError):
        return None


def gradient_of(tensor: Tensor) -> Tensor | None:
    """The gradient of a leaf: accumulated, or assigned."""
    try:
        return tensor.grad if tensor.is_leaf else None
    except (RuntimeError, ValueError, NotImplementedError, TypeError):
        return None
