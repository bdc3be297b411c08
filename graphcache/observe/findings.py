"""What was found in a module that forbids a graph, and what is known of its tensors while it is looked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphcache.errors import Reason
from graphcache.graphs.operations import storage_of
from graphcache.keys.script_state import script_constants, script_state
from graphcache.observe.places import Place, Places, assignment

STAY = "keep the value on the device, or graph the parts around it (include=[…])"
COPY = "make it once and register_buffer it, or pass it as an argument"
ON_DEVICE = "give it device=… of a tensor of the call, or make it once and register_buffer it"
FIXED = "keep the shape fixed, such as with torch.where or a mask that is multiplied in; or move it out of the module"
STATE = "keep the state outside the module, or in a tensor that is passed and returned"
_PLAIN = (bool, int, float, complex, str, bytes)


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


class Findings:
    """What was found, and what is known of tensors."""

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor], frame: FrameType) -> None:
        state = [*module.parameters(), *module.buffers()]
        for each in module.modules():
            if isinstance(each, torch.jit.ScriptModule):
                state += script_constants(each)
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
        return {name: (each, _attributes_of(each)) for name, each in self._module.named_modules()}

    def compare(self, before: Mapping[str, tuple[nn.Module, dict[str, Any]]]) -> None:
        """Note the attributes that the call has changed."""
        for name, (each, old) in before.items():
            now = _attributes_of(each)
            for key in old.keys() | now.keys():
                new = now.get(key)
                if new is old.get(key) or (isinstance(new, _PLAIN) and new == old.get(key)):
                    continue
                place = assignment(each, key, name)
                self._add(Reason.MUTATES, f"attribute {key!r}", place, "a replay would leave it as it is", STATE)

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


def _attributes_of(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, torch.jit.ScriptModule):
        return {name.removeprefix("."): value for name, value in script_state(module).items()}
    return {name: value for name, value in module.__dict__.items() if not name.startswith("_")}


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors anywhere in a value."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


@contextmanager
def inside(name: str) -> Iterator[None]:
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
def unheard() -> Iterator[None]:
    """Inside, nothing is noted: it has been."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


_called: ContextVar[str] = ContextVar("graphcache_called", default="")
_quiet: ContextVar[bool] = ContextVar("graphcache_quiet", default=False)
