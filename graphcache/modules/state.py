"""What a PyTorch module depends on besides its arguments, and whether a call changed it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

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
        self._seeds = self._generators()
        self._marks = [(f"args[{index}]", tensor, _mark(tensor)) for index, tensor in enumerate(inputs)]
        self._marks += [("its own state", tensor, _mark(tensor)) for tensor in state]

    def check(self) -> None:
        """Raise if the call changed something that a replay would change behind the caller's back, or not at all.

        Raises:
            Refusal: With :attr:`Reason.RANDOM` or :attr:`Reason.MUTATES`.
        """
        for before, after in zip(self._seeds, self._generators(), strict=True):
            if not torch.equal(before, after):
                raise Refusal(Reason.RANDOM)
        for where, tensor, mark in self._marks:
            changed = tensor._version != mark if isinstance(mark, int) else not torch.equal(_raw(tensor), mark)
            if changed:
                raise Refusal(Reason.MUTATES, where)

    def _generators(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in self._devices)]


def _mark(tensor: Tensor) -> Any:
    # Tensors made under inference_mode have no version counter.
    return _raw(tensor).clone() if tensor.is_inference() else tensor._version


def _raw(tensor: Tensor) -> Tensor:
    return (
        tensor.detach().contiguous().flatten().view(torch.uint8) if tensor.dtype is not torch.bool else tensor.detach()
    )
