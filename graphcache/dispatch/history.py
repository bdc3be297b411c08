"""What the calls of one module were like, noted at misses alone."""

from __future__ import annotations

from collections.abc import Hashable

from graphcache.cache.seen import Seen
from graphcache.dispatch.remembered import Remembered
from graphcache.keys.call import Call


class History:
    """Shapes of calls with how often each came, for explanations and advice; and what a manifest lists.

    Args:
        remembered: What becomes a manifest.
    """

    def __init__(self, remembered: Remembered) -> None:
        self.seen = Seen()
        self.remembered = remembered

    def missed(self, call: Call) -> None:
        """Note a call that no graph has answered so far."""
        self.seen.note(call.key, call.args, call.kwargs)

    def captured(self, call: Call) -> None:
        """Note a call that has a graph now, or ran eagerly often."""
        self.remembered.note(call.key, call.args, call.kwargs)

    def evicted(self, key: Hashable, hits: int) -> None:
        """Note that a graph is gone."""
        self.seen.retire(key, hits)
