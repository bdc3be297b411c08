"""A live view of a module's cache, on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from graphcache import CachedModule
from graphcache.modules.controls import controls
from graphcache.modules.explain import Explained

_EVERY = 0.2
_MOST_ROWS = 16
_STYLES = {"hit": "green", "capture": "blue", "eager": "yellow"}


def view(fast: CachedModule) -> Group:
    """The cache as a table: its account above, a row for each signature."""
    control = controls(fast)
    explanation = control.explain()
    info = explanation.account
    title = (
        f"{explanation.module}: {info.hits} hits, {info.captures} captures, {info.evictions} evictions, "
        f"{sum(info.eager.values())} eager; {info.graphs} of {control.config.max_graphs} graphs, {info.nbytes} bytes"
    )
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column("signature", overflow="fold")
    made.add_column("next call", no_wrap=True)
    for name in ("hits", "bytes"):
        made.add_column(name, justify="right", no_wrap=True)
    for each in explanation.calls[:_MOST_ROWS]:
        made.add_row(Text(each.call), _next(each), str(each.hits), str(each.nbytes) if each.nbytes else "")
    if len(explanation.calls) > _MOST_ROWS:
        made.add_row(f"and {len(explanation.calls) - _MOST_ROWS} more", "", "", "")
    return Group(Text(title, style="bold"), made)


def _next(each: Explained) -> Text:
    what = {"hit": "replays", "capture": "is captured"}.get(each.outcome)
    if what is None:
        what = f"eager: {each.cause.reason.value}" if each.cause is not None else "eager"
    return Text(what, style=_STYLES[each.outcome])


class Watch:
    """Shows the cache while a block runs. What is not a terminal gets one table, at the end.

    It draws only between calls, when :meth:`update` is called, and has no thread of its own, which would show in what
    is measured.

    Args:
        fast: Whose cache.
        enabled: Whether anything is shown at all.
    """

    def __init__(self, fast: CachedModule, *, enabled: bool) -> None:
        self._fast = fast
        self._enabled = enabled
        self._console = Console(stderr=True, markup=False, highlight=False, emoji=False)
        self._live: Live | None = None
        self._drawn = 0.0

    def update(self) -> None:
        """Draw it anew, unless that was done less than a fifth of a second ago."""
        if self._live is not None and time.monotonic() - self._drawn >= _EVERY:
            self._live.update(view(self._fast), refresh=True)
            self._drawn = time.monotonic()

    def __enter__(self) -> Watch:
        if self._enabled and sys.stderr.isatty():
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            if error is None:
                self._live.update(view(self._fast), refresh=True)
            self._live.stop()
        elif self._enabled and error is None:
            self._console.print(view(self._fast))
