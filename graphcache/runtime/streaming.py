"""How much device memory the weights of a module's engines may take."""

from __future__ import annotations

from typing import Self

from torch import nn

from graphcache.errors import ConfigError, EngineError, shown
from graphcache.events import log
from graphcache.runtime.engines import engines_of


class weight_streaming:
    """Sets and restores the weight budget of all engines in a module together.

    Below the full budget engines run eagerly, with the reason ``weight_streaming``; each change drops their graphs. At
    the end of a ``with`` block every engine has the budget that it had before.

    Args:
        module: An engine or a module with engines at any depth.

    Raises:
        ConfigError: For what is no module.

    Example::

        with graphcache.runtime.weight_streaming(module) as weights:
            weights.device_budget = weights.total_device_budget // 2
            y = module(x)
    """

    def __init__(self, module: nn.Module) -> None:
        self._engines = engines_of(module)
        self._streamable = [engine.get_streamable_device_memory_budget() for _, engine in self._engines]
        self._before = [engine.get_device_memory_budget() for _, engine in self._engines]

    @property
    def total_device_budget(self) -> int:
        """Bytes of weights that may be streamed, of all engines together; the largest budget."""
        return sum(self._streamable)

    @property
    def device_budget(self) -> int:
        """Bytes of the streamable weights that are kept on the device now."""
        return sum(engine.get_device_memory_budget() for _, engine in self._engines)

    @device_budget.setter
    def device_budget(self, nbytes: int) -> None:
        """Divide a budget among the engines, in proportion to what they may stream.

        Raises:
            EngineError: If no engine streams weights, for a negative budget, or while sessions use an engine. Those
                that were changed before have their budgets again.
            ConfigError: For anything but a whole number.
        """
        total = self.total_device_budget
        if isinstance(nbytes, bool) or not isinstance(nbytes, int):
            raise ConfigError(f"device_budget={shown(nbytes)}: expected a whole number of bytes")
        if not total:
            raise EngineError(
                "there is nothing to stream: no engine here was built for it; build engines with weight_streaming=True"
            )
        if nbytes < 0:
            raise EngineError(f"device_budget={nbytes}: a budget cannot be negative; expected 0 to {total} bytes")
        if nbytes > total:
            log.error("a budget of %d bytes is more than the %d that can be streamed, which is taken", nbytes, total)
            nbytes = total
        # Whole numbers throughout, since a budget may be larger than what a float tells apart.
        self._set([streamable * nbytes // total for streamable in self._streamable])

    def get_automatic_weight_streaming_budget(self) -> int:
        """What TensorRT would choose for the memory that is free now, in bytes, of all engines together."""
        return sum(engine.get_automatic_device_memory_budget() for _, engine in self._engines)

    def __enter__(self) -> Self:
        self._before = [engine.get_device_memory_budget() for _, engine in self._engines]
        return self

    def __exit__(self, *exc: object) -> None:
        self._set(self._before)

    def _set(self, budgets: list[int]) -> None:
        done: list[tuple[int, int]] = []
        for place, ((_, engine), budget) in enumerate(zip(self._engines, budgets, strict=True)):
            before = engine.get_device_memory_budget()
            if before == budget:
                continue
            try:
                engine.set_device_memory_budget(budget)
            except EngineError:
                for other, earlier in reversed(done):
                    self._engines[other][1].set_device_memory_budget(earlier)
                raise
            done.append((place, before))
