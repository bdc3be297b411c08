"""What is remembered of objects that hold values: tensors, arrays, generators and caches."""

from __future__ import annotations

from collections.abc import Callable
from operator import eq
from typing import Any, TypeVar

from torch import Tensor

from graphcache.keys.state_nodes import Change, State, StateNode
from graphcache.keys.values import array_state, hidden_state

_Answer = TypeVar("_Answer")
_PLACE = ("address", "shape", "strides", "dtype", "device", "requires_grad", "conjugation", "sign bit")


class TensorNode(StateNode):
    """A tensor: where its memory is and how it is laid out, and for the effects of a call what was written into it."""

    __slots__ = ("_written",)

    is_alike = staticmethod(eq)

    def renew(self) -> None:
        super().renew()
        self._written = self._version_and_gradient()

    def read(self) -> State:
        # Sparse tensors and uninitialised parameters have no address.
        return _PLACE, _asked(_place, self.target) or (id(self.target),) * len(_PLACE)

    def changes(self, now: State) -> list[Change]:
        what = [name for name, old, new in zip(_PLACE, self.state[1], now[1], strict=True) if old != new]
        return [Change(self.path, f"has another {', '.join(what)}")] if what else []

    @property
    def is_written(self) -> bool:
        """Whether an operation wrote into the tensor or a view of it, or a gradient was accumulated or assigned."""
        version, gradient = self._version_and_gradient()
        return version != self._written[0] or gradient is not self._written[1]

    def _version_and_gradient(self) -> tuple[int | None, Tensor | None]:
        # Inference tensors count no versions, and only leaves have a gradient.
        version = _asked(lambda x: None if x.is_inference() else x._version, self.target)
        return version, _asked(lambda x: x.grad if x.is_leaf else None, self.target)

    def guard(self, native: Any) -> None:
        native.add_tensor(self.target)
        if self.differs():
            # It was changed since it was read, and native code took it as it is now.
            raise ValueError


class GradientFlagsNode(StateNode):
    """Which tensors require gradients, for code that asks: a native guard does not compare that."""

    def read(self) -> State:
        return range(len(self.target)), tuple([node.target.requires_grad for node in self.target])

    def end(self, name: Any) -> str:
        return f"{self.target[name].path}.requires_grad"


class ArrayNode(StateNode):
    """A NumPy array or a buffer of Python's, with its contents."""

    is_alike = staticmethod(eq)
    whole = "has other contents or another layout"

    @property
    def nbytes(self) -> int:
        """How many bytes are compared."""
        return len(self.state[1][-1])

    def read(self) -> State:
        state = array_state(self.target) or ()
        return range(len(state)), state


class HiddenNode(StateNode):
    """An object that shows its state by no attribute, such as a generator; only the effects of a call compare it."""

    is_alike = staticmethod(eq)
    guarded = False
    whole = "it moved on"

    def read(self) -> State:
        # With the objects that it refers to, so that no id in the state is used twice.
        return ("", "refers to"), hidden_state(self.target) or (None, ())


class CacheNode(HiddenNode):
    """A function with a cache. A graph does not call it: the next call has to fill a cache that was cleared."""

    guarded = True


def _place(x: Tensor) -> tuple[Any, ...]:
    layout = (x.data_ptr(), x.shape, x.stride(), x.dtype, x.device)
    return (*layout, x.requires_grad, x.is_conj(), x.is_neg())


def _asked(question: Callable[[Tensor], _Answer], tensor: Tensor) -> _Answer | None:
    """What a tensor answers; ``None`` for one that cannot be asked."""
    try:
        return question(tensor)
    except (RuntimeError, ValueError, NotImplementedError, TypeError):
        return None
