"""A wrapped module in another place: copied, pickled, sent to another process. Graphs stay behind."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graphcache.errors import ConfigError, shown
from graphcache.modules.packaging import save
from graphcache.modules.served_calls import served

if TYPE_CHECKING:
    from graphcache.modules.cached import CachedModule


class Portable:
    """What :class:`~graphcache.modules.cached.CachedModule` does when it is copied or pickled.

    A copy has the module, copied as it copies itself, and the options. Graphs, counters, subscribers and hooks of the
    wrapper are not part of it: the copy captures its own graphs. ``copy.copy`` is a second wrapper of the same module.
    """

    def __reduce_ex__(self: CachedModule, protocol: Any) -> Any:  # type: ignore[misc]
        self._misses.check_open()
        return again, (self._module, self._config, self._ledger.name)

    def __deepcopy__(self: CachedModule, memo: dict[int, Any]) -> CachedModule:  # type: ignore[misc]
        self._misses.check_open()
        memo[id(self)] = copied = again(copy.deepcopy(self._module, memo), self._config, self._ledger.name)
        return copied

    def save(  # type: ignore[misc]
        self: CachedModule,
        path: str | os.PathLike[str],
        *,
        onnx: Any = None,
        build: Mapping[str, Any] | None = None,
        manifest: bool = True,
    ) -> None:
        """Write the module as a package, for :func:`graphcache.load` of another process or machine.

        The file holds engines, weights, these options, and the calls that were served, as :meth:`save_manifest` writes
        them. It is written in one step. It holds no code and nothing is pickled: a model that is more than one engine
        is loaded ``into`` a model of the same make.

        Args:
            path: Of the file, in a directory that exists; ``.gcache`` is the usual ending.
            onnx: As :meth:`EngineModule.save` takes it, for a wrapped engine.
            build: Likewise.
            manifest: Whether the calls that were served are part of it.

        Raises:
            ConfigError: If the file cannot be written, the state holds more than tensors, or for a bad option.
            EngineError: If an engine was refitted, and TensorRT cannot serialise it again.

        Example:
            >>> import tempfile
            >>> import torch
            >>> import graphcache
            >>> fast = graphcache.wrap(torch.nn.Linear(4, 2).requires_grad_(False), max_graphs=8)
            >>> y = fast(torch.ones(3, 4))
            >>> other = torch.nn.Linear(4, 2).requires_grad_(False)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     fast.save(f"{folder}/linear.gcache")
            ...     again = graphcache.load(f"{folder}/linear.gcache", into=other, prepare=True)
            >>> torch.equal(again(torch.ones(3, 4)), y), again.cache_info().hits, again.config.max_graphs
            (True, 1, 8)
        """
        self._misses.check_open()
        if type(manifest) is not bool:
            raise ConfigError(f"manifest={shown(manifest)}: expected True or False")
        found = served(self)[0] if manifest else None
        save(self._module, path, onnx=onnx, build=build, config=self._config, name=self._ledger.name, manifest=found)


def again(module: Any, config: Any, name: str) -> CachedModule:
    """What pickles of wrapped modules call."""
    from graphcache.modules.cached import CachedModule

    return CachedModule(module, config, name=name)
