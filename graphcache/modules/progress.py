"""A bar on stderr, where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(title: str, steps: int, wanted: bool | None = None) -> Iterator[Callable[[], None]]:
    """Draws how many of some steps are done while a block runs, if stderr is a terminal and a bar is wanted.

    Gives a function to call after each step. It is drawn by these: a thread that draws would run beside captures.
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
