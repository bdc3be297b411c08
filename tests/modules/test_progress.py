"""Steps are counted where somebody watches, and nothing anywhere else."""

from __future__ import annotations

import sys
import threading
from io import StringIO

import pytest

from graphcache.modules.prepare import counting


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("wanted", [None, True])
def test_on_a_terminal_it_counts_the_steps(monkeypatch: pytest.MonkeyPatch, wanted: bool | None) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    threads = threading.active_count()
    with counting("Preparing [net]", 3, wanted) as step:
        for _ in range(3):
            step()
        assert threading.active_count() == threads, "nothing is drawn beside a capture"
    text = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "Preparing [net]" in text
    assert all(f"{done}/3" in text for done in range(4))
    assert text.endswith("\r\x1b[K"), "the line is left empty"


@pytest.mark.parametrize(
    ("terminal", "steps", "wanted"), [(False, 3, True), (False, 3, None), (True, 0, True), (True, 3, False)]
)
def test_otherwise_nothing(monkeypatch: pytest.MonkeyPatch, terminal: bool, steps: int, wanted: bool | None) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else StringIO())
    with counting("Preparing", steps, wanted) as step:
        step()
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_it_ends_with_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(LookupError), counting("Preparing", 3):
        raise LookupError
    with counting("Preparing", 1) as step:
        step()
