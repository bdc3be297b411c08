"""An engine in the place of a module of Torch-TensorRT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from graphcache.integrations.torch_tensorrt.foreign import Foreign
from graphcache.modules.engine import EngineModule


class AdoptedEngine(EngineModule):
    """Runs the engine of another module, and stands for that module in everything else: its hooks, its state, its flag.

    Like that one it takes numbers in the place of inputs, which a compiled module passes for sizes.
    """

    original: nn.Module
    """The module of Torch-TensorRT."""
    holders: int
    """How many wrapped modules use it."""
    places: list[tuple[nn.Module, str]]
    """The modules that have it as a submodule, and under which name."""
    takes_numbers = True

    def __init__(self, original: nn.Module, found: Foreign) -> None:
        super().__init__(
            found.serialized,
            found.inputs or None,
            found.outputs or None,
            name=found.name,
            settings=found.settings,
            weight_name_map=found.weight_name_map,
            requires_output_allocator=found.requires_output_allocator,
        )
        # Past nn.Module's __setattr__, which would make a submodule of it.
        self.__dict__.update(
            original=original,
            holders=0,
            places=[],
            _as_list=found.as_list,
            _forward_hooks=original._forward_hooks,
            _forward_pre_hooks=original._forward_pre_hooks,
            _forward_hooks_with_kwargs=original._forward_hooks_with_kwargs,
            _forward_hooks_always_called=original._forward_hooks_always_called,
            _forward_pre_hooks_with_kwargs=original._forward_pre_hooks_with_kwargs,
        )
        self.training = original.training
        if self.engine.streamable_bytes and getattr(found.settings, "enable_weight_streaming", False):
            # As that one does when it is made.
            self.set_device_memory_budget(min(self.get_automatic_device_memory_budget(), self.engine.streamable_bytes))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the engine; several outputs come in the container that the other module returns them in."""
        answer = super().forward(*args, **kwargs)
        return list(answer) if self._as_list and isinstance(answer, tuple) else answer

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        """Inputs in the order of the bindings, with numbers made tensors of what the engine takes there."""
        given = super().bind(args, kwargs)
        for index, (binding, value) in enumerate(zip(self.engine.inputs, given, strict=False)):
            if isinstance(value, (bool, int, float)):
                device = torch.device("cpu") if binding.on_host else self.device
                shape = [1] * len(binding.shape)
                given[index] = torch.empty(shape, dtype=binding.dtype, device=device).fill_(value)
        return given

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The other module's own state."""
        return self.original.state_dict(*args, **kwargs)

    def give_back(self) -> nn.Module:
        """Close the engine; the other module, with the training flag that was set meanwhile."""
        self.original.training = self.training
        self.close()
        return self.original
