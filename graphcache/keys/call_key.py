"""The call key: what tells arguments, modes and settings of one call from those of another; and what forbids graphs.

Two calls with equal keys run the same operations on tensors of the same layout, so one graph answers both.
:class:`graphcache.keys.call_spec.CallSpec` describes a key to people.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from enum import EnumType
from operator import call
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils._device import DeviceContext

from graphcache.config import modes
from graphcache.errors import CudaError, Reason, Refusal, shown
from graphcache.keys.user_code import is_library
from graphcache.keys.values import Held, is_holdable, is_plain, is_rebuilt, text_of

State = tuple[Hashable, ...]
Part = tuple[Any, ...]
"""One argument, item or constant in a key:

* a tensor: dtype, shape, strides, device; of an unusual one also whether a conjugation and a negation are pending, and
  the part of its attributes or ``None``;
* a container: its type, the part of its context (a dictionary's keys) or ``None``, and the parts of its items;
* a constant: its type and what identifies the value;
* any other object: :class:`Held` and the object, held weakly.
"""

_MAX_VALUES = 20_000
_MAX_DEPTH = 32
_CONTAINERS = frozenset({list, tuple, dict})
_QUANTIZED = frozenset({torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4})
CONSTANTS = frozenset({type(None), bool, int, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format})
OPEN_CONSTANTS: dict[type, Callable[[Any], Sequence[Any]]] = {
    torch.Size: tuple,
    slice: lambda value: (value.start, value.stop, value.step),
    range: lambda value: (value.start, value.stop, value.step),
}
"""Constants made of other constants: their type given these is the constant again."""


class CallKey(NamedTuple):
    """What tells one call from another."""

    grad: bool | tuple[bool, ...]
    """Whether gradients are recorded; if they are, which tensors require them."""
    inference: bool
    autocast: tuple[tuple[str, torch.dtype], ...]
    """Kinds of devices, with the dtype that autocast casts to."""
    settings: State | None
    """The ambient state of PyTorch, if it is an unusual one."""
    repeats: tuple[int, ...]
    """For each tensor the place of the first that is the same object; empty if none is given twice."""
    args: tuple[Part, ...]
    kwargs: tuple[tuple[str, Part], ...]
    host_values: tuple[Hashable, ...] = ()
    """For each input that an engine reads on the host, its values."""
    held: tuple[Held, ...] = ()
    """The objects among the arguments that are told apart by identity."""
    written: tuple[tuple[int, int], ...] = ()
    """Tensors that the call updates in place, by place, with their addresses: a graph updates them where they are."""

    def arguments(self, tensors: Iterable[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of this key, in new containers, with these tensors in the order of :func:`describe`."""
        remaining = iter(tensors)
        args = tuple([value_of(part, remaining) for part in self.args])
        return args, {name: value_of(part, remaining) for name, part in self.kwargs}

    def classes(self) -> set[type]:
        """The user's classes of the arguments, such as those of named tuples and enumerations."""
        return {kind for part in (*self.args, *(part for _, part in self.kwargs)) for kind in _classes_in(part)}


def _classes_in(part: Part) -> Iterator[type]:
    """The user's classes of what a part describes."""
    kind, *rest = part
    if isinstance(kind, type) and kind is not Held and not is_library(kind.__module__):
        yield kind
    for each in rest:
        if type(each) is tuple and each and isinstance(each[0], type):
            yield from _classes_in(each)


NO_KEY = CallKey(grad=False, inference=False, autocast=(), settings=None, repeats=(), args=(), kwargs=())
"""Stands for the key of a call that has none; nothing is looked up by it."""


class StateName(str):
    """The name of an argument that holds what attributes of the module hold: no caller gives it."""

    __slots__ = ()


class KeyedCall(NamedTuple):
    """One call of a module."""

    key: CallKey
    tensors: Sequence[Tensor]
    """Those among its arguments, in the order of the key."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: str = ""
    """The keyword argument that holds what the module's attributes hold now, where the call rebinds them."""

    @property
    def is_flat(self) -> bool:
        """Whether the key says no more than how plain positional tensors lie, inference mode and settings."""
        key = self.key
        if key.grad is not False or key.autocast or key.repeats or key.kwargs or key.host_values or key.written:
            return False
        # The part of an unusual tensor has more entries.
        return all(type(value) is Tensor and len(part) == 4 for value, part in zip(self.args, key.args, strict=True))


def describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> KeyedCall:
    """A call with its key and the tensors in it, depth first; a :class:`~graphcache.errors.Refusal` if it has no key.

    Told apart are structure, dtype, shape, strides and device of every tensor, every constant with its type (``True``,
    ``1`` and ``1.0`` are three constants, ``0.0`` and ``-0.0`` two, every ``nan`` is the same), pending conjugations
    and negations, one tensor given twice from two, the grad mode, which tensors require gradients while it is on,
    attributes that Python code gave a tensor, inference mode, autocast, the ambient state of PyTorch, and the order of
    keyword arguments. Not told apart are values of tensors, and different tensors that overlap from ones that don't.
    """
    reader = _Reader()
    try:
        positional = tuple([reader.part(value, f"args[{index}]") for index, value in enumerate(args)])
        by_name = tuple([(name, reader.part(value, f"kwargs[{shown(name)}]")) for name, value in kwargs.items()])
    except Refusal:
        raise
    except Exception as error:
        # An object that cannot be looked at, such as a nested tensor, which has no shape to ask for.
        raise Refusal(Reason.ARGUMENT, detail=f"looking at it raised {type(error).__name__}") from error
    tensors, settings = reader.tensors, ambient_state()
    key = CallKey(
        grad=tuple([tensor.requires_grad for tensor in tensors]) if torch.is_grad_enabled() else False,
        inference=torch.is_inference_mode_enabled(),
        autocast=_autocast() if torch._C._is_any_autocast_enabled() else (),
        settings=None if settings == USUAL else settings,
        repeats=_repeats(tensors) if len(tensors) > 1 else (),
        args=positional,
        kwargs=by_name,
        held=tuple(reader.held),
    )
    return KeyedCall(key, tensors, args, kwargs)


def item_ends(kind: Any, names: Any, count: int) -> list[str]:
    """What follows the path of a container in the paths of its items; ``names`` are a dictionary's keys."""
    if kind is dict:
        return [f"[{shown(name)}]" for name in names]
    return [f".{name}" for name in kind._fields] if is_named_tuple(kind) else [f"[{index}]" for index in range(count)]


def is_named_tuple(kind: type) -> bool:
    """Whether a type is a named tuple, and none that was derived from it, which may have attributes of its own."""
    return kind.__bases__ == (tuple,) and hasattr(kind, "_fields")


class _Reader:
    """Reads the arguments of one call, depth first."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.held: list[Held] = []
        self._values = 0

    def part(self, value: Any, where: str, depth: int = 0) -> Part:
        """The part of one argument or item; its tensors are noted."""
        self._values += 1
        if self._values > _MAX_VALUES:
            raise Refusal(Reason.ARGUMENT, where.partition("[")[0], f"more than {_MAX_VALUES} values")
        if depth > _MAX_DEPTH:
            raise Refusal(Reason.ARGUMENT, where, f"more than {_MAX_DEPTH} containers in one another")
        kind = type(value)
        if kind is Tensor or kind is torch.nn.Parameter:
            return self._tensor(value, where, depth)
        if kind is float:
            return float, value.hex()
        if kind is complex:
            return complex, value.real.hex(), value.imag.hex()
        if kind in CONSTANTS or (kind is type and is_library(value.__module__)):
            # Of a class of the user's, attributes may change.
            return kind, value
        if isinstance(kind, EnumType):
            # By name, as members may be equal to other things. Combined flags have none.
            return kind, value._name_, None if value._name_ else int(value._value_), *_of_member(value, where)
        if kind in OPEN_CONSTANTS:
            return kind, *[self._constant(item, where, depth) for item in OPEN_CONSTANTS[kind](value)]
        if (node := node_of(kind)) is None:
            if is_holdable(value):
                self.held.append(Held(value))
                return Held, self.held[-1]
            raise Refusal(Reason.ARGUMENT, where, f"an object of type {kind.__module__}.{kind.__qualname__}")
        items, context = node.flatten_fn(value)
        if kind not in _CONTAINERS and not is_rebuilt(value, node.unflatten_fn(items, context)):
            raise Refusal(Reason.ARGUMENT, where, f"pytree leaves out a part of a {kind.__qualname__}")
        if context is None or is_named_tuple(kind):
            about = None
        else:
            about = (type, kind) if context is kind else self._constant(context, f"the keys of {where}", depth)
        ends = item_ends(kind, context, len(items))
        return kind, about, *[self.part(item, where + end, depth + 1) for end, item in zip(ends, items, strict=True)]

    def _tensor(self, value: Tensor, where: str, depth: int) -> Part:
        if value.layout is not torch.strided:
            raise Refusal(Reason.ARGUMENT, where, f"a tensor of layout {value.layout}")
        if value.dtype in _QUANTIZED:
            raise Refusal(Reason.ARGUMENT, where, "a quantized tensor")
        self.tensors.append(value)
        part = value.dtype, value.shape, value.stride(), value.device
        conjugate, negative, attributes = value.is_conj(), value.is_neg(), value.__dict__
        if type(value) is not Tensor:
            # A module may ask whether it is a parameter, and for attributes that somebody gave it.
            attributes = {**attributes, "__class__": type(value).__name__}
        if not (conjugate or negative or attributes):
            return part
        about = self._constant(dict(attributes), f"an attribute of {where}", depth) if attributes else None
        return *part, conjugate, negative, about

    def _constant(self, value: Any, where: str, depth: int) -> Part:
        """A part that :meth:`CallKey.arguments` makes without tensors, so that none may be there."""
        count = len(self.tensors)
        part = self.part(value, where, depth + 1)
        if len(self.tensors) > count:
            raise Refusal(Reason.ARGUMENT, where, "a tensor where only a constant can stand")
        return part


def _of_member(member: Any, where: str) -> Iterator[Hashable]:
    """The value of a member of an enumeration, and attributes that it was given, which may change."""
    for name, value in vars(member).items():
        if name == "_value_" or not name.startswith("_"):
            items = value if type(value) is tuple else (value,)
            if not all(map(is_plain, items)):
                raise Refusal(Reason.ARGUMENT, where, f"{shown(member)}, whose {name} may change")
            yield name, tuple(map(text_of, items))


def node_of(kind: type) -> Any:
    """What takes a container of some type apart and puts it together; ``None`` for what is no container."""
    return pytree.SUPPORTED_NODES.get(namedtuple if is_named_tuple(kind) else kind)  # type: ignore[arg-type]


def value_of(part: Part, tensors: Iterator[Any] = iter(())) -> Any:  # noqa: B008 - it is never advanced
    """The argument behind a part, with the next of ``tensors`` where a tensor was."""
    kind, *rest = part
    if type(kind) is torch.dtype:
        return next(tensors)
    if kind is float:
        return float.fromhex(*rest)
    if kind is complex:
        return complex(*map(float.fromhex, rest))
    if kind in CONSTANTS or kind is type:
        return rest[0]
    if kind is Held:
        return rest[0].ref()
    if isinstance(kind, EnumType):
        return kind[rest[0]] if rest[0] else kind(rest[1])
    if kind in OPEN_CONSTANTS:
        found = map(value_of, rest)
        return torch.Size(found) if kind is torch.Size else kind(*found)
    about, *parts = rest
    context = kind if is_named_tuple(kind) else None if about is None else value_of(about)
    return node_of(kind).unflatten_fn([value_of(each, tensors) for each in parts], context)


def _repeats(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    places: dict[int, int] = {}
    first = tuple([places.setdefault(id(value), index) for index, value in enumerate(tensors)])
    return first if len(places) < len(tensors) else ()


def autocast_dtypes() -> dict[str, torch.dtype]:
    """What autocast casts to where it is switched on, by the kind of the device."""
    return {kind: torch.get_autocast_dtype(kind) for kind in ("cuda", "cpu")}


def _autocast() -> tuple[tuple[str, torch.dtype], ...]:
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in ("cuda", "cpu") if torch.is_autocast_enabled(kind))


# ---- what PyTorch is set to, and what it does, around a call

_FLAGS = (
    *("float32_matmul_precision", "cublas_allow_tf32", "cublas_allow_fp16_accumulation"),
    *("cublas_allow_fp16_reduced_precision_reduction", "cublas_allow_bf16_reduced_precision_reduction"),
    *("cpu_allow_fp16_reduced_precision_reduction", "cudnn_allow_tf32", "cudnn_enabled", "cudnn_benchmark"),
    *("cudnn_deterministic", "mkldnn_enabled", "mkldnn_deterministic", "onednn_allow_tf32", "flash_sdp_enabled"),
    *("mem_efficient_sdp_enabled", "math_sdp_enabled", "cudnn_sdp_enabled", "overrideable_sdp_enabled"),
    *("math_sdp_allow_fp16_bf16_reduction", "deterministic_algorithms", "deterministic_algorithms_warn_only"),
    "deterministic_fill_uninitialized_memory",
)
"""``torch._C`` has a function for each, but for some in some versions."""
_PRECISIONS = tuple((backend, kind) for backend in ("cuda", "mkldnn") for kind in ("matmul", "conv", "rnn"))
_GETTERS: dict[str, Callable[[], Hashable]] = {
    "default_dtype": torch.get_default_dtype,
    "mha_fastpath": torch.backends.mha.get_fastpath_enabled,
    "forward_ad_level": lambda: forward_ad._current_level,
    **{name: getattr(torch._C, f"_get_{name}") for name in _FLAGS if hasattr(torch._C, f"_get_{name}")},
}
_VARIABLES = {
    "mha_fastpath": (torch.backends.mha, "_is_fastpath_enabled"),
    "forward_ad_level": (forward_ad, "_current_level"),
}
"""What no built-in function tells: variables of modules of PyTorch."""
SETTINGS = len(_GETTERS)
"""How many entries of :func:`ambient_state` are set for the process. The others are those of a thread."""
_stack_length: Callable[[], int] = torch._C._len_torch_function_stack
_stack_at: Callable[[int], Any] = torch._C._get_function_stack_at
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
is_tracing: Callable[[], bool] = torch._C._is_tracing
is_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", bool)
_transforms: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack


def ambient_state() -> State:
    """What PyTorch is set to, as far as it changes results: flags of the process, and the function modes of the thread.

    The number of threads is not in it: it differs from thread to thread, and a graph of the CPU runs with that of the
    replay.
    """
    try:
        flags: State = tuple(map(call, _GETTERS.values()))
    except RuntimeError:
        flags = tuple(map(_flag, _GETTERS.values()))
    return (*flags, *(function_modes() if _stack_length() else ()))


def _flag(getter: Callable[[], Hashable]) -> Hashable:
    try:
        return getter()
    except RuntimeError:
        # Precisions were set in the newer way of PyTorch.
        return tuple(torch._C._get_fp32_precision_getter(*each) for each in _PRECISIONS)


def unusual_settings(state: State) -> str:
    """In what a state differs from the usual one, in words, such as ``mode meta``."""
    found = [f"{name} {now}" for name, now, usual in zip(_GETTERS, state, USUAL, strict=False) if now != usual]
    modes = [f"mode {mode}" for mode in state[SETTINGS:]] if state[SETTINGS:] != USUAL[SETTINGS:] else []
    return ", ".join(found + modes) or "no mode"


def function_modes() -> list[Hashable]:
    """The function modes of this thread: the device of a default device, and ``"other"`` for any other mode."""
    found = [_stack_at(index) for index in range(_stack_length())]
    return [mode.device if type(mode) is DeviceContext else "other" for mode in found]


def has_function_modes() -> bool:
    """Whether a mode may change what any function of PyTorch does here, which forbids graphs."""
    return "other" in function_modes()


def forbidden(*, cuda: bool) -> Reason | None:
    """What forbids graphs at this moment, in this context, whatever the arguments; ``cuda`` if it is a device's."""
    if modes.get().off:
        return Reason.DISABLED
    if dispatch_modes() or (_stack_length() and has_function_modes()) or _transforms() is not None or is_tracing():
        return Reason.TRACING
    if forward_ad._current_level >= 0:
        # A replay would leave out derivatives that are computed in forward mode.
        return Reason.GRAD
    try:
        return Reason.OUTER_CAPTURE if cuda and is_capturing() else None
    except RuntimeError as error:
        if "initialization error" in str(error):
            raise CudaError(
                "CUDA does not work in this process, which was forked after CUDA had been used; start processes with "
                "multiprocessing's 'spawn' method"
            ) from error
        raise


def guard_ambient(native: Any, state: State) -> bool:
    """Have a native guard compare :func:`ambient_state`; whether it can compare this state."""
    try:
        for (name, getter), value in zip(_GETTERS.items(), state, strict=False):
            if name in _VARIABLES:
                module, variable = _VARIABLES[name]
                native.add_names(vars(module), (variable,), (value,), ())
            else:
                native.add_answer(getter, value)
        native.add_answer(_stack_length, 0)
    except TypeError:
        return False
    return len(state) == SETTINGS


USUAL = ambient_state()
"""The state when graphcache was imported, which keys leave out."""
