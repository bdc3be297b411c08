"""Tensors that a call updates in place and that live longer than it: KV caches, recurrent state, running statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphcache.errors import Cause, Reason
from graphcache.graphs.operations import storage_of
from graphcache.keys.state_nodes import TensorNode
from graphcache.keys.state_snapshot import is_strided

MAX_BYTES = 1 << 30
"""Bytes of state whose contents are copied for a capture, which takes twice as much meanwhile."""


class PersistentState:
    """What an observed run updates in place, with its contents before and after.

    Each run of a recording begins with the contents of before. :meth:`advance` leaves those of after, so that a call
    updates its state once, whatever came of the recording.
    """

    def __init__(self, reached: Sequence[TensorNode]) -> None:
        self._reached: dict[int, list[TensorNode]] = {}
        for node in reached:
            if is_strided(node.target):
                self._reached.setdefault(storage_of(node.target), []).append(node)
        self._memory: dict[int, Tensor] = {}
        self._before: dict[int, Tensor] = {}
        self._after: dict[int, Tensor] = {}
        self.updated: list[Tensor] = []
        """The contents after the observed run, of each tensor in the memory that was written."""

    def __bool__(self) -> bool:
        return bool(self._memory)

    def __contains__(self, storage: object) -> bool:
        return storage in self._memory

    def keep(self, tensor: Tensor) -> bool:
        """Copy memory that is about to be written, unless that was done; whether it can be."""
        storage = storage_of(tensor)
        if storage in self._memory:
            return True
        nodes = self._reached.get(storage, ())
        memory = tensor.untyped_storage()
        taken = sum(each.numel() for each in self._memory.values())
        if not nodes or taken + memory.nbytes() > MAX_BYTES or not all(is_strided(node.target) for node in nodes):
            return False
        with torch.inference_mode(False), torch.no_grad():
            # A tensor of its own, whose version is not that of the state.
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(memory, 0, (memory.nbytes(),), (1,))
            try:
                self._before[storage] = whole.clone()
            except RuntimeError:
                # No memory: the allocator of the CPU says so with nothing more special.
                return False
        self._memory[storage] = whole
        for node in nodes:
            node.may_change = True
        return True

    def observed(self) -> Cause | None:
        """Copy the contents after the observed run; why that cannot be."""
        for storage, memory in self._memory.items():
            for node in self._reached[storage]:
                if not is_strided(node.target) or memory.untyped_storage().nbytes() != memory.numel():
                    return Cause(Reason.MUTATES, node.path, "its memory was resized")
        with torch.inference_mode(False), torch.no_grad():
            try:
                self._after = {storage: memory.clone() for storage, memory in self._memory.items()}
                self.updated = self.now()
            except RuntimeError:
                return Cause(Reason.OUT_OF_MEMORY, detail="no memory for copies of the state that the call updates")
        return None

    @property
    def is_inference(self) -> bool:
        """Whether any of it was made in inference mode."""
        return any(node.target.is_inference() for storage in self._memory for node in self._reached[storage])

    @property
    def devices(self) -> set[torch.device]:
        """Where the state is."""
        return {memory.device for memory in self._memory.values()}

    def ranges(self, tensors: Sequence[Tensor]) -> dict[int, tuple[int, int]]:
        """Where memory begins and ends that something else than these tensors holds, by its storage."""
        given = set(map(id, tensors))
        memories = {
            storage: memory
            for storage, memory in self._memory.items()
            if not all(id(node.target) in given for node in self._reached[storage])
        }
        return {storage: (each.data_ptr(), each.data_ptr() + each.numel()) for storage, each in memories.items()}

    @property
    def is_as_observed(self) -> bool:
        """Whether nobody has written it since the observed run."""
        return all(torch.equal(self._memory[storage], after) for storage, after in self._after.items())

    def rewind(self) -> None:
        """Put back the contents from before the observed run."""
        self._put(self._before)

    def advance(self) -> None:
        """Put back the contents from after it."""
        self._put(self._after)

    def now(self) -> list[Tensor]:
        """The contents of this moment, as :attr:`updated`."""
        return [node.target.detach().clone() for storage in self._memory for node in self._reached[storage]]

    def _put(self, contents: dict[int, Tensor]) -> None:
        for storage, memory in contents.items():
            self._memory[storage].copy_(memory)
