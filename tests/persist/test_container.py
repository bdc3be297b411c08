"""Parts in a file: written, read, and damaged in every way that could be thought of."""

from __future__ import annotations

import os
import struct
import tempfile
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.errors import PackageError
from graphcache.persist.package_file import HEADER, MOST_HEADER_BYTES, Container, Part, part_of, write_parts

PARTS = {HEADER: b'{"a": 1}', "engines/0.engine": bytes(range(256)) * 8, "manifest.json": b"{}"}


def written(folder: Path, parts: dict[str, bytes] = PARTS, name: str = "m.gcache") -> Path:
    write_parts(folder / name, parts)
    return folder / name


def everything(path: Path) -> dict[str, bytes]:
    with Container(path) as container:
        found = {HEADER: container.read(HEADER)}
        for name, data in PARTS.items():
            if name != HEADER:
                found[name] = container.read(name, part_of(data))
        return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def raw(path: Path, *parts: tuple[str, bytes], **options: Any) -> Path:
    """A zip as anybody may write one."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in parts:
            archive.writestr(zipfile.ZipInfo(name), data, compress_type=options.get("compression", zipfile.ZIP_STORED))
    return path


def test_parts_come_back_and_the_same_parts_are_the_same_bytes(folder: Path) -> None:
    path = written(folder)
    assert everything(path) == PARTS
    assert path.read_bytes() == written(folder, name="again").read_bytes()
    assert zipfile.ZipFile(path).testzip() is None
    assert sorted(each.name for each in folder.iterdir()) == ["again", "m.gcache"]


def test_what_was_there_stays_if_writing_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(folder)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(OSError, match="No space left"):
        written(folder, {**PARTS, "manifest.json": b"other"})
    assert path.read_bytes() == before
    assert [each.name for each in folder.iterdir()] == ["m.gcache"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its 0 bytes do not end as a package does"),
        (b"PK\x05\x06", "its 4 bytes do not end"),
        (b"vtrt" * 100, "its 400 bytes do not end"),
    ],
)
def test_what_is_no_zip(folder: Path, content: bytes, message: str) -> None:
    path = folder / "m.gcache"
    path.write_bytes(content)
    with pytest.raises(PackageError, match=message) as caught:
        Container(path)
    assert "copy the file again, or save the package again with module.save()" in str(caught.value)


@pytest.mark.parametrize("make", ["missing", "folder", "pipe"])
def test_what_is_no_file(folder: Path, make: str) -> None:
    path = folder / "m.gcache"
    if make == "folder":
        path.mkdir()
    if make == "pipe":
        os.mkfifo(path)
    with pytest.raises(PackageError, match=r"cannot be read: .*; expected a package that module.save"):
        Container(path)


NAMES = [
    "../outside",
    "/etc/passwd",
    "engines/../../outside.engine",
    "engines\\0.engine",
    "engines/",
    "engines/0.engine\0.txt",
    "C:\\windows",
    "header.json/",
    "weights.pt",
    "engines/99999.engine",
    "HEADER.JSON",
    "",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_none_of_a_package(folder: Path, name: str) -> None:
    inside = folder / "inside"
    inside.mkdir()
    path = raw(inside / "m.gcache", (HEADER, b"{}"), (name, b"x"))
    before = sorted(folder.rglob("*"))
    with pytest.raises(PackageError):
        everything(path)
    assert sorted(folder.rglob("*")) == before


def test_a_bomb_takes_no_memory(folder: Path) -> None:
    path = raw(folder / "m.gcache", (HEADER, b"\0" * 200_000_000), compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1_000_000
    tracemalloc.start()
    try:
        with pytest.raises(PackageError, match=r"part 'header.json': it is compressed or encrypted"):
            everything(path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_list_of_very_many_parts_is_refused(folder: Path) -> None:
    path = raw(folder / "m.gcache", *((f"engines/{index}.onnx", b"") for index in range(5000)))
    tracemalloc.start()
    try:
        with pytest.raises(PackageError, match=r"it has 5000 parts; expected at most 4096"):
            everything(path)
        # What zipfile makes of the list is a small multiple of the list.
        assert tracemalloc.get_traced_memory()[1] < 20 * path.stat().st_size
    finally:
        tracemalloc.stop()


def test_parts_that_lie_on_each_other(folder: Path) -> None:
    path = written(folder)
    data = bytearray(path.read_bytes())
    # Every part of the directory is said to be as long as all of the file.
    place = data.find(b"PK\x01\x02")
    while place >= 0:
        struct.pack_into("<LL", data, place + 20, len(data) - 50, len(data) - 50)
        place = data.find(b"PK\x01\x02", place + 1)
    path.write_bytes(data)
    with pytest.raises(PackageError, match=r"its parts have \d+ bytes together, and the file"):
        everything(path)


@pytest.mark.parametrize("offset", [20, 24])
def test_sizes_that_are_not_true(folder: Path, offset: int) -> None:
    data = bytearray(written(folder).read_bytes())
    struct.pack_into("<L", data, data.find(b"PK\x01\x02") + offset, 3)
    (folder / "m.gcache").write_bytes(data)
    with pytest.raises(PackageError, match=r"header\.json"):
        everything(folder / "m.gcache")


def test_an_encrypted_part(folder: Path) -> None:
    data = bytearray(written(folder).read_bytes())
    data[data.find(b"PK\x01\x02") + 8] |= 1
    (folder / "m.gcache").write_bytes(data)
    with pytest.raises(PackageError, match="it is compressed or encrypted"):
        everything(folder / "m.gcache")


def test_a_part_twice(folder: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = raw(folder / "m.gcache", (HEADER, b"{}"), (HEADER, b"{}"))
    with pytest.raises(PackageError, match=r"part 'header.json': it is in the list twice"):
        everything(path)


def test_a_comment_or_anything_else_behind_it(folder: Path) -> None:
    path = written(folder)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"hello"
    with pytest.raises(PackageError, match="do not end as a package does"):
        everything(path)
    path = written(folder)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(PackageError, match="do not end as a package does"):
        everything(path)


def test_a_header_that_is_missing_or_too_large(folder: Path) -> None:
    with pytest.raises(PackageError, match=r"part 'header.json': it is missing"):
        everything(written(folder, {"manifest.json": b"{}"}))
    with pytest.raises(PackageError, match=f"it has {MOST_HEADER_BYTES + 1} bytes; expected at most"):
        everything(written(folder, {HEADER: b" " * (MOST_HEADER_BYTES + 1)}))


def test_what_the_header_says_is_held_against_the_part(folder: Path) -> None:
    told = part_of(PARTS["engines/0.engine"])
    with Container(written(folder)) as container:
        with pytest.raises(PackageError, match=r"part 'engines/0.engine': it has 2048 bytes, and the header says 2047"):
            container.read("engines/0.engine", Part(2047, told.sha256))
        with pytest.raises(PackageError, match=r"its SHA-256 is"):
            container.read("engines/0.engine", Part(2048, "0" * 64))
        with pytest.raises(PackageError, match=r"part 'engines/1.engine': it is missing"):
            container.read("engines/1.engine", told)


def damaged(data: bytes, draw: Any) -> bytes:
    """The bytes after one of the things that happen to files."""
    what = draw(st.sampled_from(["flip", "cut", "drop", "insert", "double", "overwrite"]))
    place = draw(st.integers(0, len(data) - 1))
    length = draw(st.integers(1, 64))
    some = draw(st.binary(min_size=1, max_size=64))
    if what == "flip":
        return data[:place] + bytes([data[place] ^ (1 << draw(st.integers(0, 7)))]) + data[place + 1 :]
    return {
        "cut": data[:place],
        "drop": data[:place] + data[place + length :],
        "insert": data[:place] + some + data[place:],
        "double": data[:place] + data,
        "overwrite": data[:place] + some + data[place + len(some) :],
    }[what]


@given(st.data())
def test_damage_is_found_or_changes_nothing(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = written(Path(name))
        for _ in range(data.draw(st.integers(1, 3))):
            changed = damaged(path.read_bytes() or b"\0", data.draw)
            path.write_bytes(changed)
        tracemalloc.start()
        try:
            found, said = everything(path), ""
        except PackageError as error:
            found, said = PARTS, str(error)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert found == PARTS
        assert said.startswith(str(path) if said else "")
        assert peak < 1_000_000
        assert [each.name for each in Path(name).iterdir()] == ["m.gcache"]


@given(st.lists(st.tuples(st.one_of(st.sampled_from([*PARTS, *NAMES]), st.text(max_size=8)), st.binary(max_size=99))))
def test_any_zip_at_all(parts: list[tuple[str, bytes]]) -> None:
    parts = list(dict(parts).items())
    with tempfile.TemporaryDirectory() as name:
        try:
            path = raw(Path(name) / "m.gcache", *parts)
        except (ValueError, UnicodeEncodeError):
            return
        try:
            found = everything(path)
        except PackageError:
            return
        assert found.keys() == PARTS.keys()


def test_an_end_of_64_bits_that_is_not_true_takes_no_memory(folder: Path) -> None:
    data = written(folder).read_bytes()
    end = data[-22:]
    count, nbytes, place = struct.unpack("<HLL", end[10:20])

    def with_record(parts: int, size: int, where: int | None = None) -> bytes:
        record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, parts, parts, size, place)
        locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(data) - 22 if where is None else where, 1)
        short = end[:8] + struct.pack("<HHLL", count, count, nbytes, 0xFFFFFFFF) + end[20:]
        return data[:-22] + record + locator + short

    path = folder / "m.gcache"
    path.write_bytes(with_record(count, nbytes))
    assert everything(path) == PARTS
    # Which of these numbers zipfile looks at depends on the version of Python.
    for content in (with_record(10**9, nbytes), with_record(count, 2**40), with_record(count, nbytes, where=2**62)):
        path.write_bytes(content)
        tracemalloc.start()
        try:
            with suppress(PackageError):
                assert everything(path) == PARTS
            assert tracemalloc.get_traced_memory()[1] < 1_000_000
        finally:
            tracemalloc.stop()


@pytest.fixture(autouse=True)
def nothing_is_left_open(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    yield
    assert not [each for each in recwarn if issubclass(each.category, ResourceWarning)]
