"""Named parts in one file: a zip in which nothing is compressed.

A part takes no more memory than the file takes on disk. Names are those of a fixed list, and nothing is ever written
where a name says. Parts that are compressed, encrypted, named twice or longer than the file are refused.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Mapping
from types import TracebackType

from graphcache.errors import PackageError, shown
from graphcache.files import open_regular, replacing

HEADER = "header.json"
MOST_HEADER_BYTES = 4 * 2**20
_MOST_PARTS = 4096
_NAME = re.compile(r"header\.json|manifest\.json|weights\.safetensors|engines/\d{1,4}\.(?:engine|onnx)")
_END = b"PK\x05\x06"
_END_BYTES = 22
_AGAIN = "copy the file again, or save the package again with module.save()"


def sha256(data: bytes | memoryview) -> str:
    """The digest that the header has of a part."""
    return hashlib.sha256(data).hexdigest()


def write_parts(path: str | os.PathLike[str], parts: Mapping[str, bytes | memoryview]) -> None:
    """Write a container in one step: what was at ``path`` stays until the new one is complete.

    The same parts give the same bytes.

    Args:
        path: The file, in a directory that exists.
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
        path: The file.

    Raises:
        PackageError: If there is no such file, or it is no container, or not all of one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)
        try:
            self._file = open_regular(path)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise PackageError(
                f"{self.path} cannot be read: {why}; expected a package that module.save() wrote"
            ) from error
        try:
            self._parts = self._checked_parts()
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
        """The names of all parts."""
        return list(self._parts)

    def header(self) -> bytes:
        """The part that describes the others.

        Raises:
            PackageError: If it is missing, too large or damaged.
        """
        if (nbytes := self._size(HEADER)) > MOST_HEADER_BYTES:
            raise self.wrong(HEADER, f"it has {nbytes} bytes; expected at most {MOST_HEADER_BYTES}")
        return self._read(HEADER)

    def read(self, name: str, nbytes: int, digest: str) -> bytes:
        """The contents of a part.

        Args:
            name: The part.
            nbytes: Its size according to the header.
            digest: Its SHA-256 according to the header.

        Raises:
            PackageError: If it is missing or not what the header says.
        """
        if (found := self._size(name)) != nbytes:
            raise self.wrong(name, f"it has {found} bytes, and the header says {nbytes}")
        data = self._read(name)
        if sha256(data) != digest:
            raise self.wrong(name, f"its SHA-256 is {sha256(data)[:16]}…, and the header says {digest[:16]}…")
        return data

    def wrong(self, part: str, what: str) -> PackageError:
        """The error for a part."""
        return PackageError(f"{self.path}: part {part!r}: {what}; {_AGAIN}")

    def _damaged(self, what: str) -> PackageError:
        """The error for the file as a whole."""
        return PackageError(f"{self.path} is no package, or not all of one: {what}; {_AGAIN}")

    def _size(self, name: str) -> int:
        """The size of a part, which is there."""
        if name not in self._parts:
            raise self.wrong(name, "it is missing")
        return self._parts[name].file_size

    def _read(self, name: str) -> bytes:
        """The contents of a part, of the size that the list of parts says."""
        try:
            data = self._archive.read(self._parts[name])
        except Exception as error:  # zipfile raises a dozen kinds for damaged files
            raise self.wrong(name, f"it cannot be read ({shown(error)})") from error
        if len(data) != self._size(name):
            raise self.wrong(name, f"it has {len(data)} bytes, and the list of parts says {self._size(name)}")
        return data

    def _checked_parts(self) -> dict[str, zipfile.ZipInfo]:
        """The list of parts, each with a name of a package's, and as it is on disk."""
        nbytes = os.fstat(self._file.fileno()).st_size
        self._file.seek(max(nbytes - _END_BYTES, 0))
        # zipfile would look for the end before a comment or anything else.
        if not self._file.read(_END_BYTES).startswith(_END) or nbytes < _END_BYTES:
            raise self._damaged(f"its {nbytes} bytes do not end as a package does")
        try:
            self._archive = zipfile.ZipFile(self._file)
        except Exception as error:  # as above
            raise self._damaged(shown(error)) from error
        listed = self._archive.infolist()
        if len(listed) > _MOST_PARTS:
            raise self._damaged(f"it has {len(listed)} parts; expected at most {_MOST_PARTS}")
        found: dict[str, zipfile.ZipInfo] = {}
        for part in listed:
            if not _NAME.fullmatch(part.filename):
                raise self._damaged(f"it has a part {shown(part.filename)}, which is no name of one")
            if part.filename in found:
                raise self.wrong(part.filename, "it stands there twice")
            if part.compress_type != zipfile.ZIP_STORED or part.flag_bits & 0x1 or part.compress_size != part.file_size:
                raise self.wrong(part.filename, "it is compressed or encrypted, which no part of a package is")
            found[part.filename] = part
        if (total := sum(part.file_size for part in listed)) > nbytes:
            raise self._damaged(f"its parts have {total} bytes together, and the file {nbytes}")
        return found
