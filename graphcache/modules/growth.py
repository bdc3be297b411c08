"""Says that an axis of a module's calls keeps coming in sizes that have no graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphcache.cache.growing import Growth
from graphcache.cache.wording import positional
from graphcache.events import log
from graphcache.modules.bucketed import arguments_of

if TYPE_CHECKING:
    from graphcache.modules.cached import CachedModule


def tell_growth(fast: CachedModule, growth: Growth) -> None:
    """Log what was seen and what would help, unless buckets are in use or graphs are off.

    Args:
        fast: Whose calls they are.
        growth: What was seen.
    """
    if fast._config.buckets is not None or fast._misses.forbidden() is not None:
        return
    names = positional(arguments_of(fast._module))
    place = growth.place
    name = place if isinstance(place, str) else names[place] if place < len(names) else f"args[{place}]"
    log.warning("%s: %s", fast._ledger.name, growth.advice(name, capture=fast._config.capture))
