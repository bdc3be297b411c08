"""Files as a whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graphcache.files import TEMPORARY, open_regular, replacing
from tests.helpers import in_threads


def test_a_file_is_there_when_the_block_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
def test_what_was_there_stays_if_the_block_raises(tmp_path: Path, raised: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(raised), replacing(path) as file:
        file.write(b"half")
        raise raised
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_is_full_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), replacing(tmp_path / "file") as file:
        file.write(b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_followed_and_the_mode_is_the_users(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    with replacing(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "folder" / "file").read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink()
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "folder" / "file").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink(os.devnull, path)])
def test_what_is_no_file_is_not_replaced(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "odd")
    before = (tmp_path / "odd").stat().st_mode
    with pytest.raises(OSError, match="Not a regular file"), replacing(tmp_path / "odd") as file:
        file.write(b"new")
    assert (tmp_path / "odd").stat().st_mode == before
    assert [each.name for each in tmp_path.iterdir()] == ["odd"]


def test_a_folder_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with replacing(tmp_path / "link" / "file") as file:
        file.write(b"new")
    assert (tmp_path / "folder" / "file").read_bytes() == b"new"


def test_the_mode_is_the_users(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as file:
        file.write(b"new")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_a_name_that_is_taken_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda _: "guessed")
    (tmp_path / "victim").write_bytes(b"somebody else's")
    (tmp_path / f"{TEMPORARY}guessed.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError), replacing(tmp_path / "file"):
        pytest.fail("it was opened")
    assert (tmp_path / "victim").read_bytes() == b"somebody else's"


def test_writers_at_once_leave_the_file_of_one_of_them(tmp_path: Path) -> None:
    def write(index: int) -> None:
        with replacing(tmp_path / "file") as file:
            for _ in range(100):
                file.write(bytes([index]) * 100)

    in_threads(write, 4)
    data = (tmp_path / "file").read_bytes()
    assert data == data[:1] * 10_000
    assert len(list(tmp_path.iterdir())) == 1


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "missing" / "file"):
        pass
    with pytest.raises(OSError), replacing(tmp_path) as file:
        file.write(b"new")
    assert list(tmp_path.iterdir()) == []


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"content"
    os.mkfifo(tmp_path / "pipe")
    wrong: list[tuple[Any, type[Exception]]] = [
        (tmp_path / "pipe", ValueError),
        (tmp_path, ValueError),
        (tmp_path / "missing", FileNotFoundError),
        ("\0", ValueError),
    ]
    for path, kind in wrong:
        with pytest.raises(kind):
            open_regular(path)
