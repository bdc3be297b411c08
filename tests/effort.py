"""How much of the suite runs: a fixed share by default, everything with ``pytest --full``."""

from __future__ import annotations

from typing import TypeVar

import pytest

T = TypeVar("T")

_full = False


def run_everything() -> None:
    """Run everything from now on, in nested runs of pytest too."""
    global _full
    _full = True


def share(everything: T, usual: T) -> T:
    """The first value with ``--full``, the second one without it."""
    return everything if _full else usual


def deselected(items: list[pytest.Item]) -> list[pytest.Item]:
    """Items that run with ``--full`` only.

    ``@pytest.mark.full`` marks a test that takes long. ``@pytest.mark.full(every=n)`` keeps every n-th case of a
    parametrised test.
    """
    if _full:
        return []
    seen: dict[str, int] = {}
    found = []
    for item in items:
        if (mark := item.get_closest_marker("full")) is None:
            continue
        name = item.nodeid.partition("[")[0]
        index = seen[name] = seen.get(name, -1) + 1
        every = mark.kwargs.get("every")
        if every is None or index % every:
            found.append(item)
    return found
