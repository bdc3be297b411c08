"""What a PyTorch module depends on besides its arguments, and whether a call changed it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy

from graphcache.errors import Reason, Refusal
from graphcache.graphs.dispatch_mode import DispatchMode
from graphcache.graphs.operations import flatten, is_unwatched, storage_of, written
from graphcache.graphs.verify import difference
from graphcache.modules.culprit import path_here
from graphcache.modules.foreign import is_foreign
from graphcache.modules.routes import Route

_PLAIN = (bool, int, float, complex, str, bytes)


class Dependencies:
    """What a graph bakes of a module: where its weights lie and how, its submodules, their hooks and training flags.

    Args:
        module: The module; its structure is read anew whenever a new object is made.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        named = list(module.named_modules())
        self._modules = [each for _, each in named]
        self._watched = [(name, each) for name, each in named if not _keeps_its_own_state(each)]
        self._children = [m._modules for m in self._modules]
        self._tables = [table for m in self._modules for table in (m._parameters, m._buffers)]
        self._hooks = [table for m in self._modules for table in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]

    def tensors(self) -> list[Tensor]:
        """Every parameter and buffer, once per place it stands in."""
        return [tensor for table in self._tables for tensor in table.values() if tensor is not None]

    def buffers(self) -> list[Tensor]:
        """Every strided buffer."""
        found = [tensor for m in self._modules for tensor in m._buffers.values() if tensor is not None]
        return [tensor for tensor in found if not is_lazy(tensor) and tensor.layout is torch.strided]

    def requires_grad(self) -> bool:
        """Whether any parameter wants gradients."""
        return any(tensor.requires_grad for tensor in self.tensors())

    def fingerprint(self) -> list[Hashable]:
        """Changes whenever a weight is replaced, moved, converted or laid out anew, a submodule or hook exchanged, a
        training flag set.

        In-place changes of a weight's values do not show, and need not: a replay reads the weights where they are. It
        costs about 0.3 µs per tensor and 0.2 µs per submodule.
        """
        found: list[Hashable] = [_place(t) for table in self._tables for t in table.values() if t is not None]
        # The objects themselves: an id may come back once its object is gone.
        found += [child for table in self._children for child in table.values()]
        found += [hook for table in self._hooks for hook in table.values()]
        found += [m.training for m in self._modules]
        return found

    def attributes(self) -> list[tuple[str, dict[str, Any]]]:
        """The attributes and tables of every submodule, as they are now, with its name."""
        found = [(name, {**m.__dict__, **m._parameters, **m._buffers, **m._modules}) for name, m in self._watched]
        for _, each in found:
            # Laid by a call in another thread, for as long as that lasts.
            if isinstance(route := each.get("forward"), Route):
                each.update(route.own or {"forward": None})
        return found


class Watch(DispatchMode):
    """Notices what a call does besides answering: writes into memory that it did not make, random numbers, attributes.

    The call runs inside, once. Then :meth:`check` says whether a replay would leave something out, or do it twice.

    Args:
        inputs: The tensors of the call.
        dependencies: The module's.
    """

    def __init__(self, inputs: Sequence[Tensor], dependencies: Dependencies) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dependencies = dependencies
        self._inputs = {storage_of(tensor): f"args[{index}]" for index, tensor in enumerate(inputs)}
        # References, so that no storage of the call is freed and its identity used again.
        self._made: dict[int, Tensor] = {}
        self._before = dependencies.attributes()
        # Writes through numpy pass by the dispatcher and by version counters. Buffers are what is written so.
        self._buffers = [(tensor, tensor.clone()) for tensor in dependencies.buffers() if tensor.device.type == "cpu"]
        self._seen: tuple[Reason, str] | None = None
        self.path = ""
        """The submodule that was at work when something was noticed."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        drawn = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
            self._note(Reason.RANDOM, str(func))
        for tensor in written(func, args, kwargs):
            if storage_of(tensor) not in self._made:
                self._note(Reason.MUTATES, self._inputs.get(storage_of(tensor), str(func)))
        before = _generators(args, kwargs) if drawn else ()
        out = func(*args, **kwargs)
        if drawn and not all(torch.equal(*pair) for pair in zip(before, _generators(args, kwargs), strict=True)):
            self._note(Reason.RANDOM, str(func))
        taken = {storage_of(t) for t in flatten([*args, *kwargs.values()]) if isinstance(t, Tensor)}
        for tensor in flatten(out):
            if isinstance(tensor, Tensor):
                key = storage_of(tensor)
                # A constant made by torch.tensor() arrives here by no other operation.
                if key not in taken or func is torch.ops.aten.lift_fresh.default:
                    self._made[key] = tensor
        return out

    def check(self) -> None:
        """Raise if a replay would not do what the call did.

        Raises:
            Refusal: With :attr:`Reason.RANDOM` or :attr:`Reason.MUTATES`, naming the operation or the attribute.
        """
        self._made.clear()
        if self._seen is not None:
            raise Refusal(*self._seen)
        if any(difference(tensor, before) != 0.0 for tensor, before in self._buffers):
            raise Refusal(Reason.MUTATES, "a buffer")
        for (path, before), (_, after) in zip(self._before, self._dependencies.attributes(), strict=True):
            for name in before.keys() | after.keys():
                if not _same(before.get(name), after.get(name)):
                    self.path = path
                    raise Refusal(Reason.MUTATES, f"attribute {name!r}")

    def _note(self, reason: Reason, where: str) -> None:
        # What an engine does with memory of its own is no change that a replay would leave out.
        if self._seen is None and not is_unwatched.get():
            self._seen = reason, where
            self.path = path_here(self._dependencies.module)


def _keeps_its_own_state(module: nn.Module) -> bool:
    """Whether what a call changes in a module (contexts, buffers) is no state that a replay would leave out."""
    return getattr(module, "keeps_its_own_state", False) or is_foreign(module)


def _place(tensor: Tensor) -> Hashable:
    try:
        return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
    except (RuntimeError, ValueError, NotImplementedError):
        # Sparse tensors and uninitialised parameters have no address.
        return id(tensor)


def _same(left: Any, right: Any) -> bool:
    return left is right or (type(left) is type(right) and isinstance(left, _PLAIN) and left == right)


def _generators(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    devices = {value.device for value in flatten([*args, *kwargs.values()]) if isinstance(value, Tensor)}
    devices |= {value for value in kwargs.values() if isinstance(value, torch.device)}
    cuda = sorted(
        {d.index if d.index is not None else torch.cuda.current_device() for d in devices if d.type == "cuda"}
    )
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in cuda)]
