"""What graphcache adds to a wrapped module, whatever names the module itself has."""

from __future__ import annotations

from inspect import getattr_static
from typing import Any

from graphcache.errors import ConfigError
from graphcache.modules.transparent import Overridable, TransparentModule


class Controls:
    """The public names of :class:`CachedModule`, none of them hidden by the module's."""

    __slots__ = ("_fast",)

    def __init__(self, fast: TransparentModule) -> None:
        self._fast = fast

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value = getattr_static(type(self._fast), name, None)
        if isinstance(value, Overridable):
            value = value.value
        if value is None:
            raise AttributeError(f"graphcache has nothing that is called {name!r} for a wrapped module")
        return value.__get__(self._fast, type(self._fast))

    def __dir__(self) -> list[str]:
        return [name for name in dir(type(self._fast)) if not name.startswith("_")]

    def __repr__(self) -> str:
        return f"controls({self._fast!r})"


def controls(fast: TransparentModule) -> Controls:
    """What graphcache adds to a wrapped module: ``cache_info``, ``config``, ``clear``, ``save`` and so on.

    Each of these is also an attribute of the wrapped module, unless the module has an attribute of that name itself.

    Args:
        fast: What :func:`graphcache.wrap` returned.

    Raises:
        ConfigError: For anything else.

    Example:
        >>> import torch, graphcache
        >>> class Net(torch.nn.Module):
        ...     config = {"width": 4}
        ...     def forward(self, x):
        ...         return x + 1
        >>> fast = graphcache.wrap(Net(), max_graphs=8)
        >>> fast.config["width"], graphcache.controls(fast).config.max_graphs
        (4, 8)
    """
    if not isinstance(fast, TransparentModule):
        raise ConfigError(f"expected a wrapped module, got {type(fast).__name__}; graphcache.wrap makes one")
    return Controls(fast)
