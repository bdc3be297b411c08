from __future__ import annotations

import hashlib
import json
import os
import stat
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.cache.sealed import MOST_BYTES, Damaged, read_sealed, unsealed, write_sealed

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=10,
)


def damage(path: Path, content: bytes) -> Damaged:
    path.write_bytes(content)
    with pytest.raises(Damaged) as caught:
        read_sealed(path, "kind", 1)
    return caught.value


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sealed") / "file.json"


@given(json_values)
def test_what_is_written_is_read(path, body):
    write_sealed(path, "kind", 1, body)
    again = read_sealed(path, "kind", 1)
    assert json.dumps(again, sort_keys=True) == json.dumps(body, sort_keys=True)
    assert os.listdir(path.parent) == [path.name]


@given(st.data())
def test_a_changed_file_is_damaged_or_says_the_same(path, data):
    body = {"a": [1, 2.5, "x\u20ac"], "b": {"c": None, "d": True}}
    write_sealed(path, "kind", 1, body)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
        place = data.draw(st.integers(0, max(len(content) - 1, 0)))
        if kind == "flip" and content:
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[place:]
        elif kind == "insert":
            content[place:place] = data.draw(st.binary(max_size=5))
        else:
            content[place:place] = content[: data.draw(st.integers(0, 40))]
    path.write_bytes(content)
    try:
        assert read_sealed(path, "kind", 1) == body
    except Damaged as error:
        said = str(error)
        assert said


@given(st.binary(max_size=200))
def test_whatever_bytes_there_are_they_are_damaged(path, content):
    assert str(damage(path, content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"^not as it was written: JSONDecodeError"),
        (b"\xff", r"^not as it was written: UnicodeDecodeError"),
        (b"[" * 100_000, r"^not as it was written: RecursionError"),
        (b'{"a":' * 100_000, r"^not as it was written: RecursionError"),
        (b"[NaN]", r"^not as it was written: ValueError: NaN is no number of JSON"),
        (b"[-Infinity]", r"^not as it was written: ValueError: -Infinity is no number"),
        (b"[1e999]", r"^not as it was written: ValueError: 1e999 is beyond all numbers"),
        (b"[" + b"9" * 100_000 + b"]", r"^not as it was written: ValueError: a number of 100000 digits"),
        (b'{"a": 1, "a": 1}', r"^not as it was written: ValueError: a key stands twice"),
        (b"[]", r"^format: a list in place of 'kind'"),
        (b"{}", r"^format: nothing in place of 'kind'"),
        (b'{"format": "other"}', r"^format: 'other' in place of 'kind'"),
        (b'{"format": "kind"}', r"^version: nothing; this is a reader of version 1"),
        (b'{"format": "kind", "version": 2}', r"^version: 2; this is a reader of version 1"),
        (b'{"format": "kind", "version": true}', r"^version: True;"),
        (b'{"format": "kind", "version": 1}', r"^the fields \['format', 'version'\]; expected format, version, digest"),
        (
            b'{"format": "kind", "version": 1, "digest": 5, "body": 5}',
            r"^digest: not that of the body: something changed after it was written",
        ),
        (b" " * (MOST_BYTES + 1), rf"^not as it was written: ValueError: more than {MOST_BYTES} bytes"),
    ],
)
def test_damage_is_named(path, content, message):
    with pytest.raises(Damaged, match=message):
        raise damage(path, content)


def test_a_body_that_is_deeper_than_can_be_checked_is_damaged(path):
    for depth in range(800, 1000):
        body = "[" * depth + "]" * depth
        digest = hashlib.sha256(f"kind\n1\n{body}".encode()).hexdigest()
        path.write_text(f'{{"format": "kind", "version": 1, "digest": "{digest}", "body": {body}}}', encoding="ascii")
        try:
            read_sealed(path, "kind", 1)
        except Damaged as error:
            said = str(error)
            assert "RecursionError" in said


@pytest.mark.full(every=3)
@pytest.mark.parametrize("part", [b"[],", b"{},", b"1,", b'"a",', b"1.5,", b'{"a":[]},'])
def test_the_largest_file_takes_a_bounded_memory(path, part):
    content = b"[" + part * (MOST_BYTES // len(part) - 10) + b"1]"
    tracemalloc.start()
    try:
        damage(path, content)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 * MOST_BYTES


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_file_that_is_not_there_and_things_that_are_no_files(tmp_path):
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    said = {}
    for name in ("missing", "directory", "pipe", "loop", "x" * 300):
        with pytest.raises(Damaged) as caught:
            read_sealed(tmp_path / name, "kind", 1)
        said[name[:9]] = str(caught.value)
    assert said["missing"] == "No such file or directory"
    assert "no regular file" in said["directory"]
    assert "no regular file" in said["pipe"]
    assert "symbolic links" in said["loop"]
    assert said["x" * 9] == "File name too long"


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files cannot be counted here")
def test_no_descriptor_is_left_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        write_sealed(tmp_path / "a", "kind", 1, [])
        read_sealed(tmp_path / "a", "kind", 1)
        with pytest.raises(Damaged):
            read_sealed(tmp_path, "kind", 1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_others_may_read_what_is_written_as_they_may_any_file(tmp_path):
    plain, sealed = tmp_path / "plain", tmp_path / "sealed"
    plain.write_text("", encoding="ascii")
    write_sealed(sealed, "kind", 1, [])
    assert stat.S_IMODE(sealed.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_symbolic_link_is_replaced_and_what_it_led_to_stays(tmp_path):
    target, link = tmp_path / "there" / "file", tmp_path / "link"
    target.parent.mkdir()
    target.write_bytes(b"somebody else's")
    link.symlink_to(target)
    write_sealed(link, "kind", 1, "body")
    assert not link.is_symlink()
    assert read_sealed(link, "kind", 1) == "body"
    assert target.read_bytes() == b"somebody else's"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    write_sealed(path, "kind", 1, "old")

    def fail(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="No space left"):
            write_sealed(path, "kind", 1, "new")
    assert read_sealed(path, "kind", 1) == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    steps = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: steps.append("sync") or real_sync(descriptor))
    monkeypatch.setattr(os, "replace", lambda *given: steps.append("replace") or real_replace(*given))
    write_sealed(tmp_path / "file", "kind", 1, [])
    assert steps == ["sync", "replace", "sync"]


@pytest.mark.parametrize("body", [float("nan"), "a" * MOST_BYTES])
def test_what_could_not_be_read_is_not_written(tmp_path, body):
    with pytest.raises(ValueError):
        write_sealed(tmp_path / "file", "kind", 1, body)
    assert os.listdir(tmp_path) == []


def test_a_directory_that_is_not_there_is_the_callers_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_sealed(tmp_path / "no" / "file", "kind", 1, [])


def test_more_than_a_file_may_hold_is_not_looked_into():
    with pytest.raises(Damaged, match=f"expected at most {MOST_BYTES}"):
        unsealed(b" " * (MOST_BYTES + 1), "kind", 1)
