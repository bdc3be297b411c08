"""What can be told of a PyTorch operation from outside: what it writes, reads on the host, or makes up as it goes."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from graphcache.errors import Reason, Refusal

_READS = frozenset({"numpy", "tolist", "__array__", "__dlpack__", "data_ptr"})
_ASKS = frozenset({"storage_offset", "as_strided", "untyped_storage", "requires_grad", "is_leaf", "grad", "_base"})
_MASKS = (torch.bool, torch.uint8)


class HostReads(TorchFunctionMode):
    """Inside, notices what the host learns of tensors past the dispatcher.

    Some operations take another path while such a mode is active, so it is for looking only, never for recording.

    Args:
        inputs: Whose standing (where their memory begins, whether they require gradients) no signature shows, so that
            who asks for it may take another path for the next caller's.
    """

    def __init__(self, inputs: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.read = ""
        """The first read of any tensor's memory, such as ``tolist`` or ``numpy``."""
        self.asked = ""
        """The first question after the standing of an input, or of a view of one."""
        self._inputs = {storage_of(tensor) for tensor in inputs}

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_unwatched.get():
            return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _READS:
            self.read = self.read or f"Tensor.{name}"
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name in _ASKS and args and isinstance(args[0], Tensor) and storage_of(args[0]) in self._inputs:
            self.asked = self.asked or f"Tensor.{name}"
        return func(*args, **(kwargs or {}))


class unwatched:
    """Inside, :class:`HostReads` notices nothing: for code of this package that a watched module calls.

    Every eager call of an engine enters it; a generator would take twice as long.
    """

    __slots__ = ("_token",)

    def __enter__(self) -> None:
        self._token = is_unwatched.set(True)

    def __exit__(self, *_: object) -> None:
        is_unwatched.reset(self._token)


is_unwatched: ContextVar[bool] = ContextVar("graphcache_unwatched", default=False)


def refuse_by_tag(func: Any, args: Sequence[Any]) -> None:
    """Raise for an operation that no capture can hold.

    Raises:
        Refusal: With :attr:`Reason.HOST_READ` or :attr:`Reason.DATA_DEPENDENT`, naming it.
    """
    tags = getattr(func, "tags", None)
    if tags is None:
        raise Refusal(Reason.CAPTURE_FAILED, str(func), "a higher-order operator cannot be recorded")
    if torch.Tag.data_dependent_output in tags:
        raise Refusal(Reason.HOST_READ, str(func))
    if torch.Tag.dynamic_output_shape in tags:
        # Indexing carries the tag for the sake of masks alone.
        indices = flatten(args[1:]) if func is torch.ops.aten.index.Tensor else None
        if indices is None or any(isinstance(index, Tensor) and index.dtype in _MASKS for index in indices):
            raise Refusal(Reason.DATA_DEPENDENT, str(func))


def written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes into, by its schema."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    found: list[Tensor] = []
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += [item for item in flatten(value) if isinstance(item, Tensor)]
    return found


def flatten(value: Any) -> list[Any]:
    """The leaves of nested lists and tuples."""
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in flatten(item)]
    return [value]


def storage_of(tensor: Tensor) -> int:
    """Identifies the memory of a tensor, for as long as the tensor lives; 0 for a tensor without any."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return 0
