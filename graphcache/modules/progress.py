"""A bar on stderr, where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(title: str, steps: int, wanted: bool | None = None) -> Iterator[Callable[[], None]]:
    """Shows how many of some steps are done while a block runs, if stderr is a terminal; otherwise nothing.

    It is drawn at the steps alone: a thread that draws would run beside captures.

    Args:
        title: What it says beside the bar.
        steps: How many there are.
        wanted: ``False`` for no bar at all.

    Yields:
        A function to call after each step.

    Example:
        >>> with bar("Preparing", 2) as step:
        ...     step()
    """
    if wanted is False or not steps or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as shown:
        task = shown.add_task(title, total=steps)
        shown.refresh()

        def step() -> None:
            shown.advance(task)
            shown.refresh()

        yield step
