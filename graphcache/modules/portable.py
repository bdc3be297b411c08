"""A wrapped module in another place: copied, pickled, sent to another process. Graphs stay behind."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphcache.modules.cached import CachedModule


class Portable:
    """What :class:`~graphcache.modules.cached.CachedModule` does when it is copied or pickled.

    A copy has the module, copied as it copies itself, and the options. Graphs, counters, subscribers and hooks of the
    wrapper are not part of it: the copy captures its own graphs. ``copy.copy`` is a second wrapper of the same module.
    """

    def __reduce_ex__(self: CachedModule, protocol: Any) -> Any:  # type: ignore[misc]
        self._misses.check_open()
        return again, (self.module, self.config, self.ledger.name)

    def __deepcopy__(self: CachedModule, memo: dict[int, Any]) -> CachedModule:  # type: ignore[misc]
        self._misses.check_open()
        memo[id(self)] = copied = again(copy.deepcopy(self.module, memo), self.config, self.ledger.name)
        return copied


def again(module: Any, config: Any, name: str) -> CachedModule:
    """What pickles of wrapped modules call."""
    from graphcache.modules.cached import CachedModule

    return CachedModule(module, config, name=name)
