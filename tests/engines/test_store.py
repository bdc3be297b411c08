"""Keeping what took long to make: one maker at a time, nothing half-written, within a bound."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.engines import store as room
from graphcache.engines.store import DEFAULT_MAX_BYTES, Store, user_store
from graphcache.errors import ConfigError
from graphcache.files import TEMPORARY, user_cache
from tests.helpers import in_threads

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "built", max_bytes=10_000)


def never() -> bytes:
    raise AssertionError("it was made again")


def path_of(store: Store, key: str) -> Path:
    return next(each.path for each in store.entries() if each.key == key)


def aged(store: Store, key: str, seconds: float) -> None:
    path = path_of(store, key)
    then = time.time() - seconds
    os.utime(path, (then, then))


@given(st.binary(max_size=300), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_what_was_made_comes_back(data: bytes, note: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        store = Store(Path(name) / "built", 10_000)
        assert store.get("engine", "a") is None
        assert store.get_or_make("engine", "a", lambda: data, note) == data
        assert store.get_or_make("engine", "a", never, note) == data
        (entry,) = store.entries()
        assert (entry.key, entry.kind, entry.note) == ("a", "engine", note)
        assert entry.nbytes == entry.path.stat().st_size


def test_what_raises_is_raised_and_nothing_is_kept(store: Store) -> None:
    def fail() -> bytes:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.get_or_make("engine", "a", fail, {})
    assert store.entries() == []
    assert store.get_or_make("engine", "a", lambda: b"1", {}) == b"1"


@given(st.data())
def test_an_entry_that_was_changed_is_made_again(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        store = Store(Path(name), 10_000)
        store.put("engine", "a", b"made" * 9, {"name": "n"})
        path = path_of(store, "a")
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        else:
            del content[place:]
        path.write_bytes(content)
        assert store.get("engine", "a") is None
        store.entries()
        assert store.get_or_make("engine", "a", lambda: b"again", {}) == b"again"
        assert store.get("engine", "a") == b"again"


def test_threads_that_want_the_same_make_it_once(store: Store) -> None:
    made: list[int] = []

    def make() -> bytes:
        made.append(1)
        return b"x" * 1000

    in_threads(lambda index: store.get_or_make("engine", "a", make, {}), 8)
    assert made == [1]


MAKE = """
import sys, pathlib
from graphcache.engines.store import Store
folder = pathlib.Path(sys.argv[1])
def make():
    with open(folder / "made", "a") as file:
        file.write("made\\n")
    print("making", flush=True)
    sys.stdin.readline()
    return b"an engine"
print(Store(folder / "built", 10_000).get_or_make("engine", "a", make, {}).decode(), flush=True)
"""


def process(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAKE, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def said(each: subprocess.Popen[str]) -> str:
    assert each.stdout is not None
    return each.stdout.readline().strip()


def go_on(each: subprocess.Popen[str]) -> None:
    assert each.stdin is not None
    each.stdin.write("\n")
    each.stdin.flush()


def test_two_processes_make_one_and_both_get_it(tmp_path: Path) -> None:
    first = process(tmp_path)
    assert said(first) == "making"
    second = process(tmp_path)
    go_on(first)
    for each in (first, second):
        assert said(each) == "an engine"
        each.communicate()
        assert each.returncode == 0
    assert (tmp_path / "made").read_text() == "made\n"


def test_a_process_that_is_killed_leaves_nothing_and_the_next_one_makes_it(tmp_path: Path) -> None:
    first = process(tmp_path)
    assert said(first) == "making"
    second = process(tmp_path)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert said(second) == "making"
    assert Store(tmp_path / "built", 10_000).entries() == []
    go_on(second)
    assert said(second) == "an engine"
    second.communicate()
    assert [each.key for each in Store(tmp_path / "built", 10_000).entries()] == ["a"]


def test_the_least_recently_used_goes_first(store: Store) -> None:
    for index, key in enumerate("abc"):
        store.put("engine", key, bytes(3000), {})
        aged(store, key, 100 - index)
    assert store.get("engine", "a") is not None
    store.put("engine", "d", bytes(3000), {})
    assert {each.key for each in store.entries()} == {"a", "c", "d"}
    assert sum(each.nbytes for each in store.entries()) <= store.max_bytes


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 4000)), max_size=12), st.integers(0, 9000))
def test_the_bound_holds(puts: list[tuple[str, int]], bound: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        store = Store(Path(name), bound)
        for key, nbytes in puts:
            store.put("engine", key, bytes(nbytes), {})
            assert sum(each.nbytes for each in store.entries()) <= bound


def test_what_is_larger_than_the_bound_is_given_and_not_kept(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.put("engine", "small", b"1", {})
    assert len(store.get_or_make("engine", "a", lambda: bytes(20_000), {})) == 20_000
    assert [each.key for each in store.entries()] == ["small"]
    assert "20000 bytes are more than the cache's bound of 10000; they are not kept" in caplog.text


def test_pruning(store: Store) -> None:
    for index, key in enumerate("abc"):
        store.put("kernels", key, bytes(1000), {})
        os.utime(path_of(store, key), (index, index))
    old, young = (store.folder / f"{TEMPORARY}{name}.tmp" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half of an engine")
    os.utime(old, (1, 1))
    assert len(store.entries()) == 3
    removed, nbytes = store.prune(1500)
    assert (removed, nbytes > 2000) == (2, True)
    assert [each.key for each in store.entries()] == ["c"]
    assert (old.exists(), young.exists()) == (False, True)
    assert store.prune(0)[0] == 1
    assert store.prune(0) == (0, 0)
    assert Store(store.folder / "missing", 1).prune(0) == (0, 0)


def test_a_folder_that_cannot_be_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = Store(tmp_path / "file" / "built", 1000)
    assert store.get_or_make("engine", "a", lambda: b"made", {}) == b"made"
    assert "cannot be used as a cache" in caplog.text
    store.put("engine", "a", b"made", {})
    assert "cannot be written" in caplog.text


def test_what_else_lies_there_is_left_alone(store: Store) -> None:
    store.put("engine", "a", b"1", {})
    (store.folder / "notes.txt").write_text("mine")
    (store.folder / "sub.d").mkdir()
    os.mkfifo(store.folder / "pipe.engine")
    assert store.get("engine", "pipe") is None
    keys = {each.key for each in store.entries()}
    assert "a" in keys
    assert "pipe" not in keys
    assert stat.S_ISFIFO((store.folder / "pipe.engine").stat().st_mode)


def test_the_users_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHCACHE_CACHE_DIR", str(tmp_path))
    assert user_store().folder == tmp_path / "built"
    assert user_store().max_bytes == DEFAULT_MAX_BYTES
    monkeypatch.setenv("GRAPHCACHE_CACHE_MAX_BYTES", "5000")
    assert user_store().max_bytes == 5000
    for wrong in ("5k", "-1", "9" * 31, "²"):
        monkeypatch.setenv("GRAPHCACHE_CACHE_MAX_BYTES", wrong)
        with pytest.raises(ConfigError, match=r"GRAPHCACHE_CACHE_MAX_BYTES=.*: expected a whole number of bytes"):
            user_store()


def test_where_the_users_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "graphcache"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache() == tmp_path / ".cache" / "graphcache"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert user_cache() == tmp_path / "Library" / "Caches" / "graphcache"
    monkeypatch.setenv("GRAPHCACHE_CACHE_DIR", "~/mine")
    assert user_cache() == tmp_path / "mine"


def test_a_note_of_any_kind_is_harmless(store: Store) -> None:
    store.put("engine", "a", b"data", {})
    path = path_of(store, "a")
    for note in (b"[1]", b"{", b"\xff"):
        data = bytearray(path.read_bytes()[: room._HEAD.size])
        data[-4:] = len(note).to_bytes(4, "little")
        path.write_bytes(bytes(data) + note)
        (entry,) = store.entries()
        assert entry.note == {}
    assert json.dumps(dict(entry.note)) == "{}"


def test_all_files_are_readable_by_whom_the_user_lets(store: Store) -> None:
    store.put("engine", "a", b"data", {})
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path_of(store, "a").stat().st_mode) == 0o644 & ~mask


def ignored(*_: Any) -> None:
    raise OSError("read-only")


def test_a_time_that_cannot_be_set_changes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("engine", "a", b"data", {})
    monkeypatch.setattr(os, "utime", ignored)
    assert store.get("engine", "a") == b"data"


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_others_may_write_is_not_loaded(store: Store, caplog: pytest.LogCaptureFixture, what: str) -> None:
    store.put("engine", "a", b"data", {})
    (path_of(store, "a") if what == "file" else store.folder).chmod(0o777)
    assert store.get("engine", "a") is None
    assert "may be written by others, and engines are trusted" in caplog.text
    assert store.get_or_make("engine", "a", lambda: b"made", {}) == b"made"


def test_what_belongs_to_somebody_else_is_not_loaded(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("engine", "a", b"data", {})
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert store.get("engine", "a") is None
    assert f"belongs to user {os.getuid()}" in caplog.text


def test_a_mask_that_lets_a_group_write_leaves_entries_usable(store: Store) -> None:
    mask = os.umask(0o002)
    try:
        with store.lock("a"):
            store.put("engine", "a", b"data", {})
    finally:
        os.umask(mask)
    assert store.get("engine", "a") == b"data"


def test_an_entry_larger_than_the_bound_is_not_read(store: Store) -> None:
    store.put("engine", "a", b"data" * 100, {})
    assert Store(store.folder, 100).get("engine", "a") is None
