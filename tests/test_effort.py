"""How much of the suite runs, and what its processes share."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock, Timeout

from tests import effort
from tests.effort import deselected, share
from tests.helpers import in_threads
from tests.shared import alone, folder


def item(nodeid: str, mark: Any = None) -> Any:
    return SimpleNamespace(nodeid=nodeid, get_closest_marker=lambda name: mark and mark.mark)


@pytest.mark.parametrize("full", [False, True])
def test_a_share_or_everything(monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    monkeypatch.setattr(effort, "_full", full)
    items = [item("a.py::plain"), item("a.py::long", pytest.mark.full)]
    items += [item(f"a.py::{name}[{n}]", pytest.mark.full(every=3)) for n in range(7) for name in ("one", "two")]
    left_out = Counter(each.nodeid.partition("[")[0] for each in deselected(items))
    assert left_out == ({} if full else {"a.py::long": 1, "a.py::one": 4, "a.py::two": 4})
    assert share(100, 10) == (100 if full else 10)


@pytest.mark.full
@pytest.mark.parametrize("number", range(3))
def test_a_marked_test_runs(pytestconfig: pytest.Config, number: int) -> None:
    named = any("::" in arg for arg in pytestconfig.args)
    assert pytestconfig.getoption("full") or named


@pytest.mark.skipif(os.name != "posix", reason="owners and modes of files are those of POSIX")
def test_what_is_shared_is_where_nobody_else_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAPHCACHE_TEST_CACHE", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = folder()
    assert own.parent == tmp_path
    assert folder() == own
    own.chmod(0o777)
    with pytest.raises(PermissionError, match="GRAPHCACHE_TEST_CACHE"):
        folder()
    own.chmod(0o700)
    own.rename(tmp_path / "elsewhere")
    own.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="GRAPHCACHE_TEST_CACHE"):
        folder()
    monkeypatch.setenv("GRAPHCACHE_TEST_CACHE", str(tmp_path / "named"))
    assert folder() == tmp_path / "named"


def test_what_is_done_alone_waits_for_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHCACHE_TEST_CACHE", str(tmp_path))
    inside: list[int] = []

    def enter(index: int) -> None:
        with alone("something"):
            inside.append(index)
            assert inside == [index]
            inside.remove(index)

    in_threads(enter, 8)
    with alone("something"), pytest.raises(Timeout), FileLock(tmp_path / "something.lock", timeout=0):
        pass
