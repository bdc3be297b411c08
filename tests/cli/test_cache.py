"""``graphcache cache``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from graphcache.cli import main
from graphcache.cli.cache import Bytes
from graphcache.engines.store import user_store


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAPHCACHE_CACHE_DIR", str(tmp_path))
    for index, key in enumerate(("aaaa", "bbbb")):
        user_store().put("engine", key, bytes(2_000_000), {"name": f"{key}.onnx", "tensorrt_rtx": "1.5.0.114"})
        (path,) = (each.path for each in user_store().entries() if each.key == key)
        os.utime(path, (index, index))
    return tmp_path


def run(*arguments: str, code: int = 0) -> str:
    ran = CliRunner().invoke(main, ["cache", *arguments])
    assert ran.exit_code == code, ran.output
    return ran.output


def test_listing(folder: Path) -> None:
    printed = run("ls")
    lines = printed.splitlines()
    assert lines[0].split() == ["key", "kind", "MB", "hours", "ago", "made", "from"]
    assert lines[1].split()[:3] == ["bbbb", "engine", "2.0"]
    assert lines[1].endswith("bbbb.onnx, tensorrt_rtx 1.5.0.114")
    assert lines[-1] == f"2 entries, 4.0 of 10737 MB, in {folder / 'built'}"


def test_listing_for_programs(folder: Path) -> None:
    found = json.loads(run("ls", "--json"))
    assert found["folder"] == str(folder / "built")
    assert [each["key"] for each in found["entries"]] == ["bbbb", "aaaa"]
    assert found["entries"][0]["note"] == {"name": "bbbb.onnx", "tensorrt_rtx": "1.5.0.114"}


def test_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHCACHE_CACHE_DIR", str(tmp_path / "empty"))
    assert run("ls") == f"0 entries, 0.0 of 10737 MB, in {tmp_path / 'empty' / 'built'}\n"
    assert run("prune").startswith("removed 0 entries")
    assert not (tmp_path / "empty").exists()


def test_pruning(folder: Path) -> None:
    assert run("prune").startswith("removed 0 entries")
    assert run("prune", "--max-bytes", "3M") == f"removed 1 entries, 2.0 MB, from {folder / 'built'}\n"
    assert [each.key for each in user_store().entries()] == ["bbbb"]
    assert run("prune", "--all").startswith("removed 1 entries")
    assert user_store().entries() == []


def test_bad_options(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "exclude each other" in run("prune", "--all", "--max-bytes", "1", code=2)
    assert "is no number of bytes; expected one such as 500M" in run("prune", "--max-bytes", "much", code=2)
    monkeypatch.setenv("GRAPHCACHE_CACHE_MAX_BYTES", "much")
    assert "GRAPHCACHE_CACHE_MAX_BYTES='much': expected a whole number of bytes" in run("ls", code=1)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0", 0),
        ("1000", 1000),
        ("1k", 1000),
        ("1KiB", 1024),
        ("1.5 GB", 1_500_000_000),
        ("2gi", 2**31),
        ("3mb", 3 * 10**6),
    ],
)
def test_sizes(text: str, wanted: int) -> None:
    assert Bytes().convert(text, None, None) == wanted


@given(st.text(max_size=8))
def test_any_text_as_a_size(text: str) -> None:
    try:
        assert Bytes().convert(text, None, None) >= 0
    except Exception as error:
        assert type(error).__name__ == "BadParameter"  # noqa: PT017 - click's own
