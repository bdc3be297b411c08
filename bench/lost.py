"""Going on when a system has cost this process its device."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from bench.processes import NothingRecordedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench import store

    Apart = Callable[[store.Bundle, int, Sequence[str], float | None], Mapping[str, Any]]


class LostDevice:
    """Whether the device serves this process no longer, and who measures then.

    After an illegal access every call of every system fails, until the process ends. Other processes are not harmed.

    Args:
        lost: Asks the device.
        apart: Measures systems in another process. It takes an engine, how many of its shapes, their names and how many
            seconds are left (``None`` for any number), returns what the suite records of such a row, and raises
            :class:`bench.processes.NothingRecordedError`. ``None`` if there can be no other process.
        always: Let other processes measure everything from the start, so that one that dies takes one row with it.
    """

    def __init__(self, lost: Callable[[], bool], apart: Apart | None = None, *, always: bool = False) -> None:
        self.known = always
        self._always = always
        self.measured = 0
        """Systems of this process so far; the first of them finds the device as it will in any other."""
        self._lost = lost
        self._apart = apart

    def noticed(self) -> bool:
        """Ask, unless it is known."""
        self.known = self.known or self._lost()
        return self.known

    def before_this(self) -> bool:
        """Whether a system that was measured before may have lost it; otherwise another process would lose it too."""
        return self.measured > 0 and self.noticed()

    def measure(
        self, bundle: store.Bundle, count: int, names: Sequence[str], seconds: float | None
    ) -> Mapping[str, Any]:
        """Measure systems of one row elsewhere: all in one process; what it does not live to record, in another one.

        If it records none of them, each is measured in its own.

        Args:
            bundle: The engine.
            count: Of its shapes.
            names: Of the systems; they take turns with a floor of that process.
            seconds: That are left.

        Returns:
            What is recorded of a row. A system that no process recorded has a ``reason`` and nothing else.
        """
        if self._apart is None:
            return _unmeasured(names, "the device was lost before")
        why = "" if self._always else "the device is lost to this process; "
        print(f"{why}measured by another process: {', '.join(names)}", file=sys.stderr)
        try:
            row = self._apart(bundle, count, names, seconds)
        except NothingRecordedError as error:
            row, why = {"systems": {}}, str(error)
        else:
            why = "a process of its own ended before it had recorded this"
        left = [name for name in names if name not in row["systems"]]
        if not left:
            return row
        if len(left) < len(names):
            rows = [row, self.measure(bundle, count, left, seconds)]
        elif len(names) == 1:
            return _unmeasured(names, why)
        else:
            rows = [self.measure(bundle, count, [name], seconds) for name in names]
        # Of what several processes recorded, such as the floor, the first counts.
        systems = {name: figures for row in reversed(rows) for name, figures in row["systems"].items()}
        return {**rows[0], "systems": systems}


def _unmeasured(names: Sequence[str], reason: str) -> dict[str, Any]:
    return {"systems": {name: {"reason": reason, "failed": True} for name in names}}
