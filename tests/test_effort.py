"""How much of the suite runs, and where tests keep what they compiled."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import effort
from tests.conftest import compiled_libraries
from tests.effort import deselected, share


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
def test_libraries_are_kept_where_nobody_else_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAPHCACHE_TEST_CACHE", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = compiled_libraries()
    assert folder.parent == tmp_path
    assert compiled_libraries() == folder
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="GRAPHCACHE_TEST_CACHE"):
        compiled_libraries()
    folder.chmod(0o700)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="GRAPHCACHE_TEST_CACHE"):
        compiled_libraries()
    monkeypatch.setenv("GRAPHCACHE_TEST_CACHE", str(tmp_path / "named"))
    assert compiled_libraries() == tmp_path / "named"
