"""A module with the attributes of another one, and what graphcache adds to it whatever names that one has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import cache, wraps
from inspect import getattr_static, isfunction
from types import MethodType
from typing import Any, Self

from torch import nn

from graphcache.dispatch.dispatcher import Dispatcher
from graphcache.errors import ConfigError

_KEPT = frozenset({"forward", "forward_into", "load_state_dict", "state_dict", "train", "training"})
"""Public names that are not overridden: they do what the other module's do, or are called at every hit."""
_OWN = frozenset({"_is_full_backward_hook"})
"""Attributes that hooks of this object set."""
_SPECIAL = (
    *("__len__", "__iter__", "__getitem__", "__setitem__", "__delitem__", "__contains__", "__reversed__"),
    *("__add__", "__mul__", "__rmul__"),
)
_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class Overridable:
    """A public function or property of a transparent class; an attribute of that name of the other module hides it."""

    def __init__(self, name: str, value: Any) -> None:
        self.value = value
        self._name = name
        self.__doc__ = value.__doc__

    def __get__(self, instance: TransparentModule | None, owner: type[TransparentModule]) -> Any:
        if instance is not None and self._is_hidden(instance._graphcache_module):
            with suppress(AttributeError):
                return instance._graphcache_get(self._name)
        return self.value.__get__(instance, owner)

    def _is_hidden(self, module: nn.Module) -> bool:
        definer = next((each for each in type(module).__mro__ if self._name in vars(each)), None)
        # A name that no class defines may be made up by __getattr__.
        if definer is None or self._name in vars(module):
            return True
        return definer is not nn.Module and not definer.__module__.startswith("graphcache.")


def _table(name: str) -> property:
    """A table of the other module, also after it has replaced it. That of ``nn.Module.__init__`` is not taken."""
    return property(lambda self: getattr(self._graphcache_module, name), lambda self, value: None)


def _forwarded(name: str) -> Any:
    """A method that is the other module's."""

    def run(self: TransparentModule, *args: Any, **kwargs: Any) -> Any:
        module = self._graphcache_module
        answer = getattr(module, name)(*args, **kwargs)
        return self if answer is module else answer

    return wraps(getattr(nn.Module, name))(run) if hasattr(nn.Module, name) else run


class TransparentModule(nn.Module):
    """Parameters, buffers, submodules, ``state_dict``, training flag and attributes are those of the other module.

    There is no level in between: ``named_modules()`` gives the names that the other module gives. What is set or
    deleted here is set or deleted there, except ``forward``: one that is set here replaces that of this object. Private
    names of this object begin with ``_graphcache``, so that they hide none of the other module.
    """

    _graphcache_module: nn.Module
    _graphcache_context: Callable[[], AbstractContextManager[object]]
    """Makes what a method of the other module that is reached through this one runs inside."""

    def __init_subclass__(cls) -> None:
        for name in dir(cls):
            value = getattr_static(cls, name)
            if not name.startswith("_") and name not in _KEPT and (isinstance(value, property) or isfunction(value)):
                setattr(cls, name, Overridable(name, value))

    def __new__(cls, module: nn.Module, *args: Any, **kwargs: Any) -> Self:
        kind: Any = cls
        made: Self = super().__new__(_with_special(kind, tuple(n for n in _SPECIAL if hasattr(type(module), n))))
        return made

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # For code that reads tables past the attributes, as torch.compile does.
        tables = {name: getattr(module, name) for name in _TABLES}
        self.__dict__.update(tables, _graphcache_module=module, _graphcache_methods={})

    _parameters = _table("_parameters")
    _buffers = _table("_buffers")
    _modules = _table("_modules")
    _non_persistent_buffers_set = _table("_non_persistent_buffers_set")
    _state_dict_hooks = _table("_state_dict_hooks")
    _state_dict_pre_hooks = _table("_state_dict_pre_hooks")
    _load_state_dict_pre_hooks = _table("_load_state_dict_pre_hooks")
    _load_state_dict_post_hooks = _table("_load_state_dict_post_hooks")

    @property
    def module(self) -> nn.Module:
        """The other module."""
        return self._graphcache_module

    def __getattr__(self, name: str) -> Any:
        if name == "_graphcache_module":
            raise AttributeError(f"{type(self).__name__} was not initialised")
        return self._graphcache_get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            # With a hook, calls take the way on which they meet it.
            if name not in self.__dict__:
                self.__dict__["_graphcache_hook"] = self.register_forward_pre_hook(lambda *_: None)
            self.__dict__[name] = value
        elif name.startswith("__") or name in _OWN or "_graphcache_module" not in self.__dict__:
            object.__setattr__(self, name, value)
        else:
            setattr(self._graphcache_module, name, value)

    def __delattr__(self, name: str) -> None:
        if name == "forward" and name in self.__dict__:
            del self.__dict__[name]
            self.__dict__.pop("_graphcache_hook").remove()
        else:
            delattr(self._graphcache_module, name)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self._graphcache_module)})

    def _graphcache_get(self, name: str) -> Any:
        """An attribute of the other module; its methods run inside of the context, and return this in its place."""
        module = self._graphcache_module
        value = getattr(module, name)
        if not isinstance(value, MethodType) or value.__self__ is not module:
            return value
        methods = self.__dict__["_graphcache_methods"]
        if value.__func__ not in methods:
            methods[value.__func__] = _in_context(value.__func__)
        return MethodType(methods[value.__func__], self)

    apply = _forwarded("apply")
    train = _forwarded("train")
    compile = _forwarded("compile")
    state_dict = _forwarded("state_dict")
    load_state_dict = _forwarded("load_state_dict")
    _apply = _forwarded("_apply")
    _load_from_state_dict = _forwarded("_load_from_state_dict")

    @property
    def training(self) -> bool:
        """The module's training flag."""
        # TorchScript's frozen modules have no flag, and are in evaluation.
        return bool(getattr(self._graphcache_module, "training", False))

    @training.setter
    def training(self, mode: bool) -> None:
        """``nn.Module.__init__`` sets a flag of its own."""


@cache
def _with_special(kind: Any, names: tuple[str, ...]) -> Any:
    """A transparent class for modules whose class has some special methods, which Python looks up there alone."""
    own = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), own | {name: _forwarded(name) for name in names}) if names else kind


def _in_context(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a module, for a transparent one."""

    @wraps(method)
    def run(transparent: TransparentModule, /, *args: Any, **kwargs: Any) -> Any:
        module = transparent._graphcache_module
        with transparent._graphcache_context():
            answer = method(module, *args, **kwargs)
        return transparent if answer is module else answer

    return run


class Controls:
    """The public names of :class:`CachedModule`, none of them hidden by the module's."""

    __slots__ = ("_fast",)

    def __init__(self, fast: TransparentModule) -> None:
        self._fast = fast

    def __getattr__(self, name: str) -> Any:
        found = None if name.startswith("_") else getattr_static(type(self._fast), name, None)
        if found is None:
            raise AttributeError(f"graphcache has nothing that is called {name!r} for a wrapped module")
        value = found.value if isinstance(found, Overridable) else found
        return value.__get__(self._fast, type(self._fast))

    def __dir__(self) -> list[str]:
        return [name for name in dir(type(self._fast)) if not name.startswith("_")]


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


def dispatcher_of(fast: nn.Module) -> Dispatcher:
    """What answers the calls of a wrapped module."""
    found: Dispatcher = fast.__dict__["_graphcache"]
    return found
