"""Modes that notice what a CUDA capture refuses: reads by the host, pageable copies, shapes that depend on values.

On the CPU the tensors of the call, and the module's own, stand for tensors of a device, and all others lie on the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._device import _device_constructors

from graphcache.errors import Reason, Refusal
from graphcache.graphs.operations import (
    DispatchMode,
    is_checked_on_the_host,
    is_higher_order,
    puts_by_mask,
    refuse_by_tag,
    storage_of,
)
from graphcache.observe.findings import Findings

STAY = "keep the value on the device, or graph the parts around it (include=[…])"
COPY = "make it once and register_buffer it, or pass it as an argument"
ON_DEVICE = "give it device=… of a tensor of the call, or make it once and register_buffer it"
FIXED = "keep the shape fixed, such as with torch.where or a mask that is multiplied in; or move it out of the module"
_TO_HOST = "a copy to the host, which waits for it"
_FROM_HOST = "a copy from pageable host memory"
_READS = frozenset({"numpy", "tolist", "__array__", "__dlpack__"})
_MOVES = frozenset({"to", "cpu", "cuda"})
_INDEXING = frozenset({"__getitem__", "__setitem__"})
_FROM_DATA = frozenset({"tensor", "as_tensor", "asarray"})
_CONSTRUCTORS = frozenset({*_device_constructors(), torch.from_numpy})


class Placement:
    """Which tensors lie on the host, or would with CUDA."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.on_cpu = not any(tensor.is_cuda for tensor in tensors)
        # References, so that no memory is freed and its identity used again.
        self._on_device = {storage_of(tensor): tensor for tensor in tensors}

    def is_host(self, tensor: Tensor) -> bool:
        """Whether a tensor lies on the host. ``module.cuda()`` does not move one that is not registered."""
        return storage_of(tensor) not in self._on_device if self.on_cpu else tensor.device.type == "cpu"

    def put(self, tensors: Iterable[Tensor], *, on_host: bool) -> None:
        """Remember where the memory of tensors lies."""
        for tensor in tensors:
            if on_host:
                self._on_device.pop(storage_of(tensor), None)
            else:
                self._on_device[storage_of(tensor)] = tensor


class Operations(DispatchMode):
    """Looks at operations, below autograd."""

    def __init__(self, findings: Findings, placement: Placement) -> None:
        super().__init__()
        self._findings, self._placement = findings, placement

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        placement, given = self._placement, tensors_in((args, kwargs))
        on_host = [tensor for tensor in given if placement.is_host(tensor)]
        if not given or len(on_host) < len(given):
            self._look(func, args, kwargs, on_host)
        out = self.higher_order(func, args, kwargs) if is_higher_order(func) else func(*args, **kwargs)
        results, taken = tensors_in(out), set(map(storage_of, given))
        fresh = [tensor for tensor in results if storage_of(tensor) not in taken]
        placement.put(fresh, on_host=bool(given) and len(on_host) == len(given))
        if not placement.on_cpu and func is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking"):
            for old, new in zip(given, results, strict=False):
                if old.device.type != new.device.type and old.numel():
                    remedy, detail = (STAY, _TO_HOST) if old.is_cuda else (COPY, _FROM_HOST)
                    self._findings.note(Reason.HOST_READ, "aten._to_copy", remedy, detail)
        return out

    def _look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], on_host: Sequence[Tensor]) -> None:
        """Note why no capture holds an operation, before it runs."""
        findings, placement = self._findings, self._placement
        try:
            refuse_by_tag(func, args, kwargs)
        except Refusal as refusal:
            reason = refusal.cause.reason
            findings.note(reason, str(func), FIXED if reason is Reason.DATA_DEPENDENT else STAY, refusal.cause.detail)
        else:
            if not is_higher_order(func) and puts_by_mask(func, args) and not placement.is_host(args[2]):
                findings.note(Reason.DATA_DEPENDENT, str(func), FIXED, "the mask says how many elements are written")
        if func is torch.ops.aten.copy_.default:
            pinned = not placement.on_cpu and args[1].is_pinned()
            if on_host and args[0].numel() and not pinned:
                findings.note(Reason.HOST_READ, str(func), COPY, "a copy between pageable host memory and the device")
        elif any(tensor.dim() and tensor.numel() for tensor in on_host):
            # A tensor without dimensions is read where it lies, as a number.
            findings.note(Reason.HOST_READ, str(func), ON_DEVICE, "an operand lies on the host")


class Functions(TorchFunctionMode):
    """Looks at functions of PyTorch by name: reads past the dispatcher, and where tensors go."""

    def __init__(self, findings: Findings, placement: Placement) -> None:
        super().__init__()
        self._findings, self._placement = findings, placement

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        findings, outer = self._findings, self._findings.called
        findings.called = outer or _name_of(func)
        try:
            return self._call(func, args, kwargs or {})
        finally:
            findings.called = outer

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function, and note what of it the dispatcher does not show."""
        findings, placement, name = self._findings, self._placement, getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and name in _READS and not placement.is_host(first):
            findings.note(Reason.HOST_READ, f"Tensor.{name}", STAY)
            return self._muted(func, args, kwargs)
        if is_checked_on_the_host(func, args, kwargs) and placement.on_cpu:
            return self._muted(func, args, kwargs)
        if first is not None and name in _INDEXING and not placement.is_host(first) and _has_list(args[1]):
            # PyTorch copies them past the dispatcher.
            findings.note(Reason.HOST_READ, f"Tensor.{name}", COPY, "indices in a Python list are copied from the host")
            return self._muted(func, args, kwargs)
        if func in _CONSTRUCTORS or name == "new_tensor":
            return self._construct(func, name, args, kwargs)
        if first is not None and name in _MOVES and placement.on_cpu:
            return self._move(func, name, args, kwargs)
        return func(*args, **kwargs)

    def _construct(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a tensor, and note the copy if its values come from Python and it lies on the device."""
        placement, device = self._placement, kwargs.get("device")
        if name == "new_tensor":
            on_host, from_data = placement.is_host(args[0]), not isinstance(args[1], Tensor)
        else:
            # On the CPU a device object was taken from a tensor of the call; a name was written there.
            on_host = device is None or device == "cpu" or (not placement.on_cpu and torch.device(device).type == "cpu")
            from_data = name in _FROM_DATA and not (args and isinstance(args[0], Tensor))
        out = func(*args, **kwargs)
        if from_data and not on_host and out.numel():
            detail = "its values are copied from pageable host memory"
            self._findings.note(Reason.HOST_READ, f"torch.{name}", COPY, detail)
        if placement.on_cpu and (from_data or name not in (*_FROM_DATA, "new_tensor")):
            placement.put(tensors_in(out), on_host=on_host)
        return out

    def _move(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Move a tensor on the CPU, where nothing is copied, as if it were copied."""
        first, to_host = args[0], _to_host(self._placement, name, args[1:], kwargs)
        if to_host is None or to_host == self._placement.is_host(first) or not first.numel():
            return func(*args, **kwargs)
        if not (to_host and kwargs.get("non_blocking")):
            remedy, detail = (STAY, _TO_HOST) if to_host else (COPY, _FROM_HOST)
            self._findings.note(Reason.HOST_READ, f"Tensor.{name}", remedy, detail)
        out = self._muted(lambda: (first if name == "cuda" else func(*args, **kwargs)).clone(), (), {})
        self._placement.put([out], on_host=to_host)
        return out

    def _muted(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function whose operations are not noted one by one."""
        outer, self._findings.muted = self._findings.muted, True
        try:
            return func(*args, **kwargs)
        finally:
            self._findings.muted = outer


def _has_list(index: Any) -> bool:
    """Whether a Python list stands among the indices of a tensor."""
    return any(isinstance(each, list) and each for each in (index if isinstance(index, tuple) else (index,)))


def _to_host(placement: Placement, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool | None:
    """Whether ``to``, ``cpu`` or ``cuda`` would move a tensor to the host; ``None`` if it stays where it is."""
    if name != "to":
        return name == "cpu"
    values = (*args, kwargs.get("device"), kwargs.get("other"))
    target = next((value for value in values if isinstance(value, (str, Tensor, torch.device))), None)
    # A device object was taken from a tensor of the call; it does not equal the name.
    return target if target is None else placement.is_host(target) if isinstance(target, Tensor) else target == "cpu"


def _name_of(func: Any) -> str:
    """The name by which users call a function of PyTorch; empty for an attribute."""
    name = getattr(func, "__name__", "")
    if not name or name == "__get__":
        return ""
    is_method = getattr(func, "__objclass__", None) is not None or hasattr(Tensor, name)
    return f"Tensor.{name}" if is_method else f"torch.{name}"


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors anywhere in a value."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
