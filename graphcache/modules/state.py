"""What a PyTorch module depends on besides its arguments, and whether a call changed it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from graphcache.errors import Reason, Refusal

Fingerprint = list[int]


class Dependencies:
    """The tensors and flags of a module that a graph bakes: addresses of weights, the submodules, training flags.

    Args:
        module: The module; its structure is read anew whenever it is asked for.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        self._children = [m._modules for m in self._modules if m._modules]
        self._tables = [table for m in self._modules for table in (m._parameters, m._buffers) if table]
        self._empty_tables = [table for m in self._modules for table in (m._parameters, m._buffers) if not table]

    @property
    def is_empty(self) -> bool:
        """Whether there are no tensors at all, as in an engine."""
        return not self._tables

    def tensors(self) -> list[Tensor]:
        """Every parameter and buffer, once per place it stands in."""
        return [tensor for table in self._tables for tensor in table.values() if tensor is not None]

    def requires_grad(self) -> bool:
        """Whether any parameter wants gradients."""
        return any(tensor.requires_grad for tensor in self.tensors())

    def fingerprint(self) -> Fingerprint:
        """Changes whenever a weight is replaced, moved or converted, a submodule exchanged, a training flag set.

        In-place changes of a weight's values do not show, and need not: a replay reads the weights where they are.
        It costs about 0.1 µs per tensor and per submodule.
        """
        found = [t.data_ptr() for table in self._tables for t in table.values() if t is not None]
        found += [id(child) for children in self._children for child in children.values()]
        found += [m.training for m in self._modules]
        found += [len(table) for table in self._empty_tables]
        return found


class Watch:
    """Notices what a call changes: its inputs, the module's tensors, the random number generators.

    Made before the call, asked after it.

    Args:
        inputs: The tensors of the call.
        state: The module's tensors.
        devices: CUDA devices whose generators count; the CPU's always does.
    """

    def __init__(self, inputs: Sequence[Tensor], state: Sequence[Tensor], devices: Sequence[int] = ()) -> None:
        self._devices = devices
        self._seeds = generators(devices)
        self._marks = [(f"args[{index}]", tensor, _mark(tensor)) for index, tensor in enumerate(inputs)]
        self._marks += [("its own state", tensor, _mark(tensor)) for tensor in state]

    def check(self) -> None:
        """Raise if the call changed a tensor, which a replay would do behind the caller's back, or not at all.

        Raises:
            Refusal: With :attr:`Reason.MUTATES`.
        """
        for where, tensor, mark in self._marks:
            changed = tensor._version != mark if isinstance(mark, int) else not torch.equal(_raw(tensor), mark)
            if changed:
                raise Refusal(Reason.MUTATES, where)

    @property
    def numbers_were_drawn(self) -> bool:
        """Whether any generator has moved, by this call or by another thread."""
        now = generators(self._devices)
        return any(not torch.equal(before, after) for before, after in zip(self._seeds, now, strict=True))


class SeededOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, notices whether this thread runs an operation that may draw random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: bool = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.found = self.found or torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        return func(*args, **(kwargs or {}))


def generators(devices: Sequence[int]) -> list[Tensor]:
    """The states of the default generators: the CPU's, then those of CUDA devices."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in devices)]


@contextmanager
def kept_generators() -> Iterator[None]:
    """Afterwards the default generators are where they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


def _mark(tensor: Tensor) -> Any:
    # Tensors made under inference_mode have no version counter.
    return _raw(tensor).clone() if tensor.is_inference() else tensor._version


def _raw(tensor: Tensor) -> Tensor:
    return (
        tensor.detach().contiguous().flatten().view(torch.uint8) if tensor.dtype is not torch.bool else tensor.detach()
    )
