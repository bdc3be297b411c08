"""How much device memory the weights of a module's engines may take."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Self

from torch import nn

from graphcache.errors import ConfigError, EngineError, shown
from graphcache.events import log
from graphcache.runtime.engines import engines_of


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
