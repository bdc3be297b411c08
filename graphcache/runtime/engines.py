"""Settings of all engines of a module, for the length of a ``with`` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, Self, TypeVar

from torch import nn

from graphcache.capture.engine_like import is_foreign
from graphcache.config import modes
from graphcache.errors import ConfigError, EngineError, ModeConflictError, shown
from graphcache.events import log
from graphcache.modules.cached_module import CachedModule
from graphcache.modules.engine import EngineModule
from graphcache.modules.transparent import controls

T = TypeVar("T")


@contextmanager
def enable_output_allocator(module: nn.Module, *, strict: bool = False) -> Iterator[nn.Module]:
    """Let TensorRT allocate the outputs of every engine in the module, for the length of a ``with`` block.

    Their calls run eagerly meanwhile, with the reason ``output_allocator``.

    Args:
        module: An engine or a module with engines at any depth.
        strict: Refuse while graphs are switched on, as Torch-TensorRT does.

    Yields:
        The module.

    Raises:
        ModeConflictError: If ``strict``, and graphs are on in this context.
        ConfigError: If ``module`` is not a module.
    """
    check_bool("enable_output_allocator(strict=...)", strict)
    if strict and modes.get().graphs in ("subgraph", "whole_graph"):
        raise ModeConflictError(
            "CUDA graphs and a dynamic output allocator are incompatible, and graphs are switched on here; leave "
            "strict=False to run the engines eagerly, or call set_cudagraphs_mode(False) first"
        )
    with swapped(engines_of(module), lambda engine, enable: engine.set_use_output_allocator(enable), True):
        yield module


@contextmanager
def enable_pre_allocated_outputs(module: nn.Module) -> Iterator[nn.Module]:
    """Allocate the outputs of each engine's next eager call at the end of the one before, for the length of a block.

    The caller owns what a call returns, and no two calls return the same memory.

    Args:
        module: An engine or a module with engines at any depth. A module without engines is left alone.

    Yields:
        The module.

    Raises:
        ConfigError: If ``module`` is not a module.

    Example:
        >>> with enable_pre_allocated_outputs(nn.ReLU()) as module:
        ...     module
        ReLU()
    """
    with swapped(engines_of(module), lambda engine, enable: engine.set_pre_allocated_outputs(enable), True):
        yield module


@contextmanager
def optimization_profile(module: nn.Module, profile: int | Literal["auto"] | None) -> Iterator[nn.Module]:
    """Let every engine of a module use one optimisation profile, for the length of a ``with`` block.

    A change drops the graphs of the engine. Outside of such blocks an engine uses any profile that fits, the current
    one first, and keeps graphs of different profiles side by side.

    Args:
        module: An engine or a module with engines at any depth.
        profile: The index of a profile; ``"auto"`` or ``None`` for any that fits.

    Yields:
        The module.

    Raises:
        ConfigError: If an engine has no such profile, or for any other value. No engine is changed then.
    """
    if profile != "auto" and profile is not None and (isinstance(profile, bool) or not isinstance(profile, int)):
        raise ConfigError(f"profile={shown(profile)}: expected the index of a profile, 'auto' or None")

    def swap(engine: EngineModule, chosen: int | None) -> int | None:
        before = engine.profile_choice
        engine.set_optimization_profile(chosen)
        return before

    with swapped(engines_of(module), swap, None if profile == "auto" else profile):
        yield module


class weight_streaming:
    """Sets and restores the weight budget of all engines in a module together.

    Below the full budget engines run eagerly, with the reason ``weight_streaming``; each change drops their graphs. At
    the end of a ``with`` block every engine has its previous budget again.

    Args:
        module: An engine or a module with engines at any depth.

    Raises:
        ConfigError: If ``module`` is not a module.

    Example::

        with graphcache.runtime.weight_streaming(module) as weights:
            weights.device_budget = weights.total_device_budget // 2
            y = module(x)
    """

    def __init__(self, module: nn.Module) -> None:
        self._engines = engines_of(module)
        self._streamable = [engine.get_streamable_device_memory_budget() for engine in self._engines]
        self._before = self._budgets()

    @property
    def total_device_budget(self) -> int:
        """Bytes of weights that can be streamed, of all engines together; the largest budget."""
        return sum(self._streamable)

    @property
    def device_budget(self) -> int:
        """Bytes of the streamable weights that are kept on the device now."""
        return sum(self._budgets())

    @device_budget.setter
    def device_budget(self, nbytes: int) -> None:
        """Divide a budget among the engines, in proportion to their streamable weights.

        Raises:
            EngineError: If no engine streams weights, for a negative budget, or while sessions use an engine. No
                budget has changed then.
            ConfigError: For anything but a whole number.
        """
        total = self.total_device_budget
        if isinstance(nbytes, bool) or not isinstance(nbytes, int):
            raise ConfigError(f"device_budget={shown(nbytes)}: expected a whole number of bytes")
        if not total:
            raise EngineError(
                "no engine here was built to stream its weights; build engines with weight_streaming=True"
            )
        if nbytes < 0:
            raise EngineError(f"device_budget={nbytes}: a budget cannot be negative; expected 0 to {total} bytes")
        if nbytes > total:
            log.error("weight budget reduced from %d to %d bytes, the size of all streamable weights", nbytes, total)
            nbytes = total
        # Integers throughout: a budget may be larger than the integers that a float can represent.
        self._set([streamable * nbytes // total for streamable in self._streamable])

    def get_automatic_weight_streaming_budget(self) -> int:
        """The budget that TensorRT would choose for the memory that is free now, in bytes, of all engines together."""
        return sum(engine.get_automatic_device_memory_budget() for engine in self._engines)

    def __enter__(self) -> Self:
        self._before = self._budgets()
        return self

    def __exit__(self, *exc: object) -> None:
        self._set(self._before)

    def _budgets(self) -> list[int]:
        """The budget of each engine."""
        return [engine.get_device_memory_budget() for engine in self._engines]

    def _set(self, budgets: Sequence[int]) -> None:
        """Set the budget of each engine, or of none if one refuses."""
        with ExitStack() as undo:
            for engine, before, budget in zip(self._engines, self._budgets(), budgets, strict=True):
                if before != budget:
                    engine.set_device_memory_budget(budget)
                    undo.callback(engine.set_device_memory_budget, before)
            undo.pop_all()


@contextmanager
def swapped(engines: Sequence[EngineModule], swap: Callable[[EngineModule, T], T], value: T) -> Iterator[None]:
    """Set something on several engines for the block; ``swap`` sets it on one and returns what was there before."""
    with ExitStack() as undo:
        for engine in engines:
            undo.callback(swap, engine, swap(engine, value))
        yield


def engines_of(module: nn.Module) -> list[EngineModule]:
    """The engines of a module, wrapped or not, at any depth, each once."""
    if not isinstance(module, nn.Module):
        raise ConfigError(f"expected an nn.Module, got {type(module).__name__}")
    found: dict[EngineModule, None] = {}
    for name, each in unwrapped(module).named_modules():
        engine = unwrapped(each)
        if isinstance(engine, EngineModule):
            found[engine] = None
        elif is_foreign(engine):
            raise ConfigError(
                f"{name or type(engine).__name__} is Torch-TensorRT's and nobody has adopted its engine; give the "
                f"module that graphcache.wrap or enable_cudagraphs returns, or use torch_tensorrt.runtime"
            )
    return list(found)


def engines_of_all(function: str, targets: nn.Module | Sequence[nn.Module]) -> list[EngineModule]:
    """The engines of one module or of several, each once and at least one; messages name the calling function."""
    if isinstance(targets, nn.Module):
        targets = [targets]
    if not isinstance(targets, (list, tuple)):
        raise ConfigError(f"{function}: {shown(targets)} is neither a module nor a list or tuple of modules")
    found = dict.fromkeys(engine for target in targets for engine in engines_of(target))
    if not found:
        raise ConfigError(f"{function}: there is no TensorRT engine in what was given; expected one or more")
    return list(found)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of a wrapped one; any other module itself."""
    inner: nn.Module = controls(module).module if isinstance(module, CachedModule) else module
    return inner


def check_bool(function: str, mode: object) -> None:
    """Raise for anything but ``True`` and ``False``."""
    if not isinstance(mode, bool):
        raise ConfigError(f"{function} takes True or False, not {shown(mode)}")
