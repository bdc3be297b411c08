"""Looks at what a call does: at its operations below autograd, and at the functions of PyTorch by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from graphcache.errors import Reason, Refusal
from graphcache.graphs.dispatch_mode import DispatchMode
from graphcache.graphs.operations import (
    decompose_composite,
    is_checked_on_the_host,
    is_higher_order,
    puts_by_mask,
    refuse_by_tag,
    storage_of,
    written,
)
from graphcache.observe.findings import COPY, FIXED, ON_DEVICE, STAY, Findings, inside, tensors_in, unheard

_READS = frozenset({"numpy", "tolist", "__array__", "__dlpack__"})
_MOVES = frozenset({"to", "cpu", "cuda"})
_FROM_DATA = frozenset({"tensor", "as_tensor", "asarray"})
_VALUES = "its values are copied from pageable host memory"


class Operations(DispatchMode):
    """Looks at operations, below autograd."""

    def __init__(self, findings: Findings) -> None:
        super().__init__()
        self._findings = findings

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, findings = kwargs or {}, self._findings
        if (whole := decompose_composite(self, func, args, kwargs)) is not NotImplemented:
            return whole
        given = tensors_in((args, kwargs))
        on_host = [tensor for tensor in given if findings.is_host(tensor)]
        drawn = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        before = _generators(given) if drawn else []
        if not given or len(on_host) < len(given):
            self._look(func, args, kwargs, on_host, given)
        out = self.higher_order(func, args, kwargs) if is_higher_order(func) else func(*args, **kwargs)
        if drawn and not all(map(torch.equal, before, _generators(given))):
            findings.note(Reason.RANDOM, str(func), Reason.RANDOM.remedy)
        results = tensors_in(out)
        findings.made(results, set() if func is torch.ops.aten.lift_fresh.default else set(map(storage_of, given)))
        if findings.on_cpu and given and len(on_host) == len(given):
            findings.put(results, on_host=True)
        elif not findings.on_cpu and func is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking"):
            self._moved(given, results)
        return out

    def _look(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        on_host: Sequence[Tensor],
        given: Sequence[Tensor],
    ) -> None:
        findings = self._findings
        try:
            refuse_by_tag(func, args, kwargs)
        except Refusal as refusal:
            reason = refusal.cause.reason
            findings.note(reason, str(func), FIXED if reason is Reason.DATA_DEPENDENT else STAY, refusal.cause.detail)
        else:
            if not is_higher_order(func) and puts_by_mask(func, args) and not findings.is_host(args[2]):
                findings.note(Reason.DATA_DEPENDENT, str(func), FIXED, "the mask says how many elements are written")
        if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
            findings.note(Reason.RANDOM, str(func), Reason.RANDOM.remedy, "from a generator of its own")
        if any(findings.is_foreign(tensor) for tensor in written(func, args, kwargs)):
            findings.note(Reason.MUTATES, str(func), Reason.MUTATES.remedy)
        if func is torch.ops.aten.copy_.default:
            pinned = not findings.on_cpu and given[1:] and given[1].is_pinned()
            if on_host and args[0].numel() and not pinned:
                findings.note(Reason.HOST_READ, str(func), COPY, "a copy between pageable host memory and the device")
        elif any(tensor.dim() and tensor.numel() for tensor in on_host):
            # One without dimensions is read where it lies, and is no more than a number.
            findings.note(Reason.HOST_READ, str(func), ON_DEVICE, "a tensor that lies on the host takes part")

    def _moved(self, given: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        for old, new in zip(given, results, strict=False):
            if old.device.type == new.device.type or not old.numel():
                continue
            if old.is_cuda:
                self._findings.note(Reason.HOST_READ, "aten._to_copy", STAY, "a copy to the host, which waits for it")
            else:
                self._findings.note(Reason.HOST_READ, "aten._to_copy", COPY, "a copy from pageable host memory")


class Functions(TorchFunctionMode):
    """Looks at what is called of PyTorch by name: what the host learns past the dispatcher, and where tensors go."""

    def __init__(self, findings: Findings) -> None:
        super().__init__()
        self._findings = findings

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, findings = kwargs or {}, self._findings
        name = getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], Tensor) else None
        with inside(_name_of(func, name)):
            if first is not None and name in _READS and not findings.is_host(first):
                findings.note(Reason.HOST_READ, f"Tensor.{name}", STAY)
                with unheard():
                    return func(*args, **kwargs)
            if first is not None and name in ("__getitem__", "__setitem__") and _has_list(args[1]):
                detail = "indices in a Python list are copied from the host"
                findings.note(Reason.HOST_READ, f"Tensor.{name}", COPY, detail)
                with unheard():
                    return func(*args, **kwargs)
            if name == "new_tensor" and len(args) > 1 and not isinstance(args[1], Tensor):
                out = self._from_data(func, f"Tensor.{name}", args, kwargs)
                findings.put([out], on_host=False)
                return out
            if is_checked_on_the_host(func, args, kwargs) and findings.on_cpu:
                with unheard():
                    return func(*args, **kwargs)
            if func in _CONSTRUCTORS:
                return self._constructed(func, name, args, kwargs)
            if first is not None and name in _MOVES and findings.on_cpu:
                return self._moved(func, name, first, args, kwargs)
            return func(*args, **kwargs)

    def _constructed(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        findings, device = self._findings, kwargs.get("device")
        on_host = device is None or torch.device(device).type == "cpu"
        if findings.on_cpu:
            # An object was taken from a tensor of the call; a name was written there.
            on_host = device is None or (isinstance(device, str) and device == "cpu")
        if not on_host and name in _FROM_DATA and not isinstance(args[0] if args else None, Tensor):
            out = self._from_data(func, f"torch.{name}", args, kwargs)
        else:
            out = func(*args, **kwargs)
        if findings.on_cpu and not (name in ("as_tensor", "asarray") and args and isinstance(args[0], Tensor)):
            findings.put(tensors_in(out), on_host=on_host)
        return out

    def _from_data(self, func: Any, operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tensor of Python values: they are copied, if there are any."""
        out = func(*args, **kwargs)
        if out.numel():
            self._findings.note(Reason.HOST_READ, operation, COPY, _VALUES)
        return out

    def _moved(self, func: Any, name: str, first: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """On the CPU, where nothing is copied: do as if."""
        findings = self._findings
        to_host = _to_host(findings, name, args[1:], kwargs)
        if to_host is None or to_host == findings.is_host(first) or not first.numel():
            return func(*args, **kwargs)
        if not (to_host and kwargs.get("non_blocking")):
            detail = "a copy to the host, which waits for it" if to_host else "a copy from pageable host memory"
            findings.note(Reason.HOST_READ, f"Tensor.{name}", STAY if to_host else COPY, detail)
        with unheard():
            out = first.clone() if name == "cuda" else func(*args, **kwargs).clone()
        findings.put([out], on_host=to_host)
        return out


def _to_host(findings: Findings, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool | None:
    """Whether ``to``, ``cpu`` or ``cuda`` would move a tensor to the host; ``None`` if it stays where it is."""
    if name != "to":
        return name == "cpu"
    for value in (*args, kwargs.get("device"), kwargs.get("other")):
        if isinstance(value, str):
            return value == "cpu"
        if isinstance(value, Tensor):
            return findings.is_host(value)
        if isinstance(value, torch.device):
            # As of a tensor of the call.
            return False
    return None


def _has_list(index: Any) -> bool:
    return any(isinstance(each, list) and each for each in (index if isinstance(index, tuple) else (index,)))


def _generators(given: Sequence[Tensor]) -> list[Tensor]:
    indices = sorted({tensor.device.index for tensor in given if tensor.is_cuda})
    if not indices and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        indices = [torch.cuda.current_device()]
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in indices)]


def _name_of(func: Any, name: str) -> str:
    """What a user calls a function of PyTorch's; empty for what is no call of one."""
    if not name or name == "__get__":
        return ""
    kind = getattr(func, "__objclass__", None)
    return f"Tensor.{name}" if kind is not None or hasattr(Tensor, name) else f"torch.{name}"


def _constructors() -> frozenset[Any]:
    from torch.utils._device import _device_constructors

    return frozenset({*_device_constructors(), torch.from_numpy})


_CONSTRUCTORS = _constructors()
