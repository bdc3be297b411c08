"""Named parts in one file: a zip in which nothing is compressed, read with suspicion.

As nothing is compressed, a part takes no more memory than the file takes on disk. Names are those of a fixed list, and
nothing is ever written where a name says. What the format allows and this does not use is refused: compression,
encryption, comments, folders, names that stand twice, parts that overlap, and anything that is not named in the header.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import IO, Any

from graphcache.errors import PackageError, shown
from graphcache.files import open_regular, replacing

HEADER = "header.json"
MOST_HEADER_BYTES = 4 * 2**20
_MOST_PARTS = 4096
_MOST_DIRECTORY_BYTES = 2**20
_NAME = re.compile(r"header\.json|manifest\.json|weights\.safetensors|engines/\d{1,4}\.(?:engine|onnx)")
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_AGAIN = "copy the file again, or save the package again with module.save()"


def sha256(data: bytes | memoryview) -> str:
    """The digest that the header has of a part."""
    return hashlib.sha256(data).hexdigest()


def write_parts(path: str | os.PathLike[str], parts: Mapping[str, bytes | memoryview]) -> None:
    """Write a container in one step: what was at ``path`` stays until the new one is complete.

    The same parts give the same bytes.

    Args:
        path: Of the file, in a directory that exists.
        parts: Contents by name, the header first.

    Raises:
        OSError: If it cannot be written.
    """
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in parts.items():
            assert _NAME.fullmatch(name), name
            archive.writestr(zipfile.ZipInfo(name), bytes(data))


class Container:
    """The parts of a file.

    Args:
        path: Of the file.

    Raises:
        PackageError: If there is no such file, or it is no container, or not all of one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)
        try:
            self._file: IO[bytes] = open_regular(path)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise PackageError(
                f"{self.path} cannot be read: {why}; expected a package that module.save() wrote"
            ) from error
        try:
            self._nbytes = os.fstat(self._file.fileno()).st_size
            self._parts = self._directory()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Container:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._archive.close()
        self._file.close()

    @property
    def names(self) -> list[str]:
        """Of all parts."""
        return list(self._parts)

    def header(self) -> bytes:
        """The part that describes the others.

        Raises:
            PackageError: If it is missing, too large or damaged.
        """
        if HEADER not in self._parts:
            raise self.wrong(HEADER, "it is missing")
        if (nbytes := self._parts[HEADER].file_size) > MOST_HEADER_BYTES:
            raise self.wrong(HEADER, f"it has {nbytes} bytes; expected at most {MOST_HEADER_BYTES}")
        return self._read(HEADER)

    def read(self, name: str, nbytes: int, digest: str) -> bytes:
        """The contents of a part.

        Args:
            name: Of the part.
            nbytes: How many bytes the header says that it has.
            digest: The SHA-256 that the header has of it.

        Raises:
            PackageError: If it is missing or not what the header says.
        """
        if name not in self._parts:
            raise self.wrong(name, "it is missing")
        if (found := self._parts[name].file_size) != nbytes:
            raise self.wrong(name, f"it has {found} bytes, and the header says {nbytes}")
        data = self._read(name)
        if sha256(data) != digest:
            raise self.wrong(name, f"its SHA-256 is {sha256(data)[:16]}…, and the header says {digest[:16]}…")
        return data

    def wrong(self, part: str, what: str) -> PackageError:
        """The error for a part."""
        return PackageError(f"{self.path}: part {part!r}: {what}; {_AGAIN}")

    def _damaged(self, what: str) -> PackageError:
        return PackageError(f"{self.path} is no package, or not all of one: {what}; {_AGAIN}")

    def _read(self, name: str) -> bytes:
        def read() -> bytes:
            with self._archive.open(self._parts[name]) as part:
                return part.read()

        try:
            data: bytes = _guarded(read)
        except _Unreadable as error:
            raise self.wrong(name, f"it cannot be read ({error})") from error
        if len(data) != self._parts[name].file_size:
            raise self.wrong(name, f"it has {len(data)} bytes, and the directory says {self._parts[name].file_size}")
        return data

    def _directory(self) -> dict[str, zipfile.ZipInfo]:
        # First, as zipfile takes some 20 times the memory that a directory has.
        self._check_end()
        try:
            self._archive: zipfile.ZipFile = _guarded(lambda: zipfile.ZipFile(self._file))
        except _Unreadable as error:
            raise self._damaged(str(error)) from error
        found: dict[str, zipfile.ZipInfo] = {}
        total = 0
        for part in self._archive.infolist():
            if not _NAME.fullmatch(part.filename):
                raise self._damaged(f"it has a part {shown(part.filename)}, which is no name of one")
            if part.filename in found:
                raise self.wrong(part.filename, "it stands there twice")
            if part.compress_type != zipfile.ZIP_STORED or part.flag_bits & 0x1 or part.compress_size != part.file_size:
                raise self.wrong(part.filename, "it is compressed or encrypted, which no part of a package is")
            total += part.file_size
            found[part.filename] = part
        if total > self._nbytes:
            raise self._damaged(f"its parts have {total} bytes together, and the file {self._nbytes}")
        return found

    def _check_end(self) -> None:
        """Refuse a directory that is larger than that of any package, wherever it is said to be."""
        # A locator of the 64-bit record, if there is one, then the end itself.
        length = min(self._nbytes, _LOCATOR.size + _END.size)
        self._file.seek(self._nbytes - length)
        tail = self._file.read(length)
        if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\x05\x06":
            raise self._damaged(f"its {self._nbytes} bytes do not end as a package does")
        _, _, _, _, count, nbytes, _, comment = _END.unpack(tail[-_END.size :])
        told = [(count, nbytes)]
        if comment:
            raise self._damaged("it has a comment")
        if tail[:4] == b"PK\x06\x07" and len(tail) == _LOCATOR.size + _END.size:
            _, _, place, _ = _LOCATOR.unpack(tail[: _LOCATOR.size])
            with suppress(OSError, OverflowError, ValueError):
                self._file.seek(place)
                record = self._file.read(_END64.size)
                if len(record) == _END64.size:
                    told.append(_END64.unpack(record)[7:9])
            if len(told) == 1:
                raise self._damaged("its directory is not where it says")
        for count, nbytes in told:
            if count > _MOST_PARTS or nbytes > _MOST_DIRECTORY_BYTES:
                raise self._damaged(f"its directory has {count} parts in {nbytes} bytes")


class _Unreadable(Exception):
    """What zipfile makes of a damaged file."""


def _guarded(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except (zipfile.BadZipFile, zipfile.LargeZipFile, OSError, EOFError, ValueError, ArithmeticError) as error:
        raise _Unreadable(" ".join(str(error).split()) or type(error).__name__) from error
    except (NotImplementedError, RuntimeError, struct.error, LookupError, TypeError, AttributeError) as error:
        raise _Unreadable(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
