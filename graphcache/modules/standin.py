"""A module that stands for another one, under its names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class StandIn(nn.Module):
    """Parameters, buffers, submodules, ``state_dict``, training flag and attributes are those of the other module.

    There is no level in between: ``named_modules()`` gives the names that the other module gives.

    Args:
        module: The other module; left as it is.
    """

    module: nn.Module

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # Past nn.Module's __setattr__, which would refuse names that the module's own children have. The tables are the
        # module's, not copies.
        self.__dict__.update(
            _parameters=module._parameters, _buffers=module._buffers, _modules=module._modules, module=module
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)

    def train(self, mode: bool = True) -> Any:
        """Set the module's training flag, and those of all its submodules."""
        self.module.train(mode)
        return self

    @property
    def training(self) -> bool:
        """The module's training flag."""
        return "module" in self.__dict__ and self.module.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "module" in self.__dict__:
            self.module.training = mode

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self.module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own state, under its own names."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the module."""
        return self.module.load_state_dict(*args, **kwargs)
