"""What in a module forbids a graph, with the line that does it; found by one eager call, on the CPU as well.

On the CPU the tensors of the call, and the module's own, are taken for tensors of a device: what the call makes without
saying where lies on the host then, as it would with CUDA, and moving from one to the other is a copy.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graphcache.cache.signature import describe, substitute
from graphcache.config import graphs_off
from graphcache.errors import ConfigError, Reason, Refusal
from graphcache.graphs.buffers import static_copy
from graphcache.graphs.operations import refuse_by_tag, storage_of, written
from graphcache.modules.cached import CachedModule
from graphcache.observe.places import Place, Places, assignment

_READS = frozenset({"numpy", "tolist", "__array__", "__dlpack__"})
_MOVES = frozenset({"to", "cpu", "cuda"})
_FROM_DATA = frozenset({"tensor", "as_tensor", "asarray"})
_MASKS = (torch.bool, torch.uint8)
_PLAIN = (bool, int, float, complex, str, bytes)
_PUTS = (torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)

_ON_DEVICE = "give it device=… of a tensor of the call, or make it once and register_buffer it"
_STAY = "keep the value on the device, or graph the parts around it (include=[…])"
_COPY = "make it once and register_buffer it, or pass it as an argument"
_VALUES = "its values are copied from pageable host memory"
_FIXED = "keep the shape fixed, such as with torch.where or a mask that is multiplied in; or move it out of the module"


@dataclass(frozen=True, slots=True)
class Break:
    """An operation that no graph can hold.

    Args:
        reason: What a call of the module would run eagerly for.
        operation: What was called, such as ``"Tensor.item"``.
        place: The line, and the submodule whose code it is.
        detail: What about it; empty where the reason says it all.
        remedy: What would change it.
        times: How often the call did it at this line.
    """

    reason: Reason
    operation: str
    place: Place
    detail: str
    remedy: str
    times: int = 1

    def __str__(self) -> str:
        place = self.place
        where = f"{place.file}:{place.line}" if place.file else "(no source)"
        inside = f" in {place.module}" if place.module else ""
        detail = f", {self.detail}" if self.detail else ""
        often = f" ({self.times} times)" if self.times > 1 else ""
        code = f"\n    {place.code}" if place.code else ""
        return (
            f"{where}{inside}: {self.operation}{often}: {self.reason.value}, {self.reason.sentence}{detail}."
            f"{code}\n    To change that: {self.remedy}."
        )


def find_capture_breaks(module: nn.Module, *args: Any, **kwargs: Any) -> list[Break]:
    """Every operation of one call that forbids a graph of it, in the order of their first occurrence.

    The module is called once, eagerly, on copies of the tensors; each find is noted and the call goes on. What it does
    to itself (running statistics, counters) happens as in any call; random numbers are drawn from a copy of the
    generators. Found is what this call does: a branch that it does not take is not looked into. Gradients, which are no
    operation, are for ``explain`` to tell.

    Args:
        module: Any module; a wrapped one is looked into without its graphs.
        args: Positional arguments of the call.
        kwargs: Keyword arguments.

    Returns:
        One :class:`Break` for each line, operation and reason; nothing if the call can be captured as far as it shows.

    Raises:
        ConfigError: If ``module`` is no module.
        Exception: Whatever the module raises for these arguments.

    Example:
        >>> class Scaled(nn.Module):
        ...     def forward(self, x):
        ...         return x * x.max().item()
        >>> [(found.reason.value, found.operation) for found in find_capture_breaks(Scaled(), torch.ones(3))]
        [('host_read', 'Tensor.item')]
    """
    if isinstance(module, CachedModule):
        module = module.module
    if not isinstance(module, nn.Module):
        raise ConfigError(f"expected an nn.Module, got {type(module).__name__}")
    try:
        _, inputs = describe(args, kwargs)
        inputs = [_copy(tensor) for tensor in inputs]
        args, kwargs = substitute(args, kwargs, inputs)
    except Refusal:
        # Something that cannot be copied; then the call is made with what was given.
        inputs = _tensors((args, kwargs))
    doctor = _Doctor(module, inputs, sys._getframe())
    before = doctor.attributes()
    devices = sorted({tensor.device.index or 0 for tensor in inputs if tensor.is_cuda})
    with torch.random.fork_rng(devices), graphs_off(), _Functions(doctor), _Operations(doctor):
        module(*args, **kwargs)
    doctor.compare(before)
    return list(doctor.found.values())


class _Doctor:
    """What was found, and what is known of tensors."""

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor], frame: FrameType) -> None:
        state = [*module.parameters(), *module.buffers()]
        self.on_cpu = not any(tensor.is_cuda for tensor in (*inputs, *state))
        self.found: dict[tuple[Any, ...], Break] = {}
        # References, so that no storage is freed and its identity used again.
        self._host: dict[int, Tensor] = {}
        self._made: dict[int, Tensor] = {}
        self._given = {storage_of(tensor): tensor for tensor in (*inputs, *state)}
        self._module = module
        self._places = Places(module)
        self._frame = frame

    def note(self, reason: Reason, operation: str, remedy: str, detail: str = "") -> None:
        """Write down what the innermost operation does, unless an operation around it was found already."""
        if _quiet.get():
            return
        called = _called.get()
        self._add(reason, called or operation, self._places.here(self._frame), detail, remedy)

    def attributes(self) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
        """The plain attributes of every submodule."""
        return {
            name: (each, {key: value for key, value in each.__dict__.items() if not key.startswith("_")})
            for name, each in self._module.named_modules()
        }

    def compare(self, before: Mapping[str, tuple[nn.Module, dict[str, Any]]]) -> None:
        """Note the attributes that the call has changed."""
        for name, (each, old) in before.items():
            for key in old.keys() | each.__dict__.keys():
                new = each.__dict__.get(key)
                if key.startswith("_") or new is old.get(key) or (isinstance(new, _PLAIN) and new == old.get(key)):
                    continue
                place = assignment(each, key, name)
                self._add(Reason.MUTATES, f"attribute {key!r}", place, "a replay would leave it as it is", _STATE)

    def is_host(self, tensor: Tensor) -> bool:
        """Whether a tensor lies on the host, or would with CUDA.

        What is neither of the call, nor registered, nor made by an operation stays there: ``module.cuda()`` does not
        move it.
        """
        if not self.on_cpu:
            return tensor.device.type == "cpu"
        key = storage_of(tensor)
        return key in self._host or (key not in self._made and key not in self._given)

    def is_foreign(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory was there before the call."""
        return storage_of(tensor) not in self._made

    def made(self, tensors: Iterable[Tensor], taken: set[int]) -> None:
        """Remember what the call made; ``taken`` are storages that its operation was given."""
        for tensor in tensors:
            if (key := storage_of(tensor)) not in taken:
                self._made[key] = tensor

    def put(self, tensors: Iterable[Tensor], *, on_host: bool) -> None:
        """Remember where tensors lie."""
        for tensor in tensors:
            if on_host:
                self._host[storage_of(tensor)] = tensor
            else:
                self._host.pop(storage_of(tensor), None)

    def _add(self, reason: Reason, operation: str, place: Place, detail: str, remedy: str) -> None:
        key = (reason, operation, place)
        known = self.found.get(key)
        self.found[key] = (
            Break(reason, operation, place, detail, remedy) if known is None else replace(known, times=known.times + 1)
        )


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at operations, below autograd."""

    def __init__(self, doctor: _Doctor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._doctor = doctor

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, doctor = kwargs or {}, self._doctor
        given = _tensors((args, kwargs))
        on_host = [tensor for tensor in given if doctor.is_host(tensor)]
        drawn = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        before = _generators(given) if drawn else []
        if not given or len(on_host) < len(given):
            self._look(func, args, kwargs, on_host, given)
        out = func(*args, **kwargs)
        if drawn and not all(map(torch.equal, before, _generators(given))):
            doctor.note(Reason.RANDOM, str(func), Reason.RANDOM.remedy)
        results = _tensors(out)
        doctor.made(results, set() if func is torch.ops.aten.lift_fresh.default else set(map(storage_of, given)))
        if doctor.on_cpu and given and len(on_host) == len(given):
            doctor.put(results, on_host=True)
        elif not doctor.on_cpu and func is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking"):
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
        doctor = self._doctor
        try:
            refuse_by_tag(func, args)
        except Refusal as refusal:
            reason = refusal.cause.reason
            doctor.note(reason, str(func), _FIXED if reason is Reason.DATA_DEPENDENT else _STAY, refusal.cause.detail)
        if func in _PUTS and args[2].numel() != 1 and any(each.dtype in _MASKS for each in _tensors(args[1])):
            doctor.note(Reason.DATA_DEPENDENT, str(func), _FIXED, "how many elements are written depends on the mask")
        if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
            doctor.note(Reason.RANDOM, str(func), Reason.RANDOM.remedy, "from a generator of its own")
        if any(doctor.is_foreign(tensor) for tensor in written(func, args, kwargs)):
            doctor.note(Reason.MUTATES, str(func), Reason.MUTATES.remedy)
        if func is torch.ops.aten.copy_.default:
            if on_host and not (given[1:] and given[1].is_pinned() if not doctor.on_cpu else False):
                doctor.note(Reason.HOST_READ, str(func), _COPY, "a copy between pageable host memory and the device")
        elif any(tensor.dim() for tensor in on_host):
            # One without dimensions is read where it lies, and is no more than a number.
            doctor.note(Reason.HOST_READ, str(func), _ON_DEVICE, "a tensor that lies on the host takes part")

    def _moved(self, given: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        for old, new in zip(given, results, strict=False):
            if old.device.type == new.device.type:
                continue
            if old.is_cuda:
                self._doctor.note(Reason.HOST_READ, "aten._to_copy", _STAY, "a copy to the host, which waits for it")
            else:
                self._doctor.note(Reason.HOST_READ, "aten._to_copy", _COPY, "a copy from pageable host memory")


class _Functions(TorchFunctionMode):
    """Looks at what is called of PyTorch by name: what the host learns past the dispatcher, and where tensors go."""

    def __init__(self, doctor: _Doctor) -> None:
        super().__init__()
        self._doctor = doctor

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, doctor = kwargs or {}, self._doctor
        name = getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], Tensor) else None
        with _inside(_name_of(func, name)):
            if first is not None and name in _READS and not doctor.is_host(first):
                doctor.note(Reason.HOST_READ, f"Tensor.{name}", _STAY)
                with _unheard():
                    return func(*args, **kwargs)
            if first is not None and name in ("__getitem__", "__setitem__") and _has_list(args[1]):
                detail = "indices in a Python list are copied from the host"
                doctor.note(Reason.HOST_READ, f"Tensor.{name}", _COPY, detail)
                with _unheard():
                    return func(*args, **kwargs)
            if name == "new_tensor" and len(args) > 1 and not isinstance(args[1], Tensor):
                doctor.note(
                    Reason.HOST_READ, f"Tensor.{name}", _COPY, "its values are copied from pageable host memory"
                )
            if func in _CONSTRUCTORS:
                return self._constructed(func, name, args, kwargs)
            if first is not None and name in _MOVES and doctor.on_cpu:
                return self._moved(func, name, first, args, kwargs)
            return func(*args, **kwargs)

    def _constructed(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        doctor, device = self._doctor, kwargs.get("device")
        on_host = device is None or torch.device(device).type == "cpu"
        if doctor.on_cpu:
            # An object was taken from a tensor of the call; a name was written there.
            on_host = device is None or (isinstance(device, str) and device == "cpu")
        if not on_host and name in _FROM_DATA and not isinstance(args[0] if args else None, Tensor):
            doctor.note(Reason.HOST_READ, f"torch.{name}", _COPY, _VALUES)
        out = func(*args, **kwargs)
        if doctor.on_cpu and not (name in ("as_tensor", "asarray") and args and isinstance(args[0], Tensor)):
            doctor.put(_tensors(out), on_host=on_host)
        return out

    def _moved(self, func: Any, name: str, first: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """On the CPU, where nothing is copied: do as if."""
        doctor = self._doctor
        to_host = _to_host(doctor, name, args[1:], kwargs)
        if to_host is None or to_host == doctor.is_host(first):
            return func(*args, **kwargs)
        if not (to_host and kwargs.get("non_blocking")):
            detail = "a copy to the host, which waits for it" if to_host else "a copy from pageable host memory"
            doctor.note(Reason.HOST_READ, f"Tensor.{name}", _STAY if to_host else _COPY, detail)
        with _unheard():
            out = first.clone() if name == "cuda" else func(*args, **kwargs).clone()
        doctor.put([out], on_host=to_host)
        return out


def _to_host(doctor: _Doctor, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool | None:
    """Whether ``to``, ``cpu`` or ``cuda`` would move a tensor to the host; ``None`` if it stays where it is."""
    if name != "to":
        return name == "cpu"
    for value in (*args, kwargs.get("device"), kwargs.get("other")):
        if isinstance(value, str):
            return value == "cpu"
        if isinstance(value, Tensor):
            return doctor.is_host(value)
        if isinstance(value, torch.device):
            # As of a tensor of the call.
            return False
    return None


def _copy(tensor: Tensor) -> Tensor:
    copy = static_copy(tensor.detach())
    return copy.requires_grad_() if tensor.requires_grad and torch.is_grad_enabled() else copy


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _has_list(index: Any) -> bool:
    return any(isinstance(each, list) for each in (index if isinstance(index, tuple) else (index,)))


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


@contextmanager
def _inside(name: str) -> Iterator[None]:
    """Inside, operations are called by this name, unless they are by another one already."""
    if not name or _called.get():
        yield
        return
    token = _called.set(name)
    try:
        yield
    finally:
        _called.reset(token)


@contextmanager
def _unheard() -> Iterator[None]:
    """Inside, nothing is noted: it has been."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


_called: ContextVar[str] = ContextVar("graphcache_called", default="")
_quiet: ContextVar[bool] = ContextVar("graphcache_quiet", default=False)
_STATE = "keep the state outside the module, or in a tensor that is passed and returned"


def _constructors() -> frozenset[Any]:
    from torch.utils._device import _device_constructors

    return frozenset({*_device_constructors(), torch.from_numpy})


_CONSTRUCTORS = _constructors()
