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
from contextlib import ExitStack
from typing import Self

from graphcache.errors import PackageError, shown
from graphcache.files import open_regular, replacing
from graphcache.persist.header import HEADER, PackageHeader, Part, damaged, read_header

MOST_HEADER_BYTES = 4 * 2**20
_MOST_PARTS = 4096
_NAME = re.compile(r"header\.json|manifest\.json|weights\.safetensors|engines/\d{1,4}\.(?:engine|onnx)")
_END = b"PK\x05\x06"
_END_BYTES = 22


def part_of(data: bytes) -> Part:
    """The size and the digest that the header has of a part."""
    return Part(len(data), hashlib.sha256(data).hexdigest())


def write_parts(path: str | os.PathLike[str], parts: Mapping[str, bytes]) -> None:
    """Write a container in one step: what was at ``path`` stays until the new one is complete.

    The same parts give the same bytes.
    """
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in parts.items():
            assert _NAME.fullmatch(name), name
            archive.writestr(zipfile.ZipInfo(name), data)


class Container:
    """The parts of a file.

    Args:
        path: The file.

    Raises:
        PackageError: If there is no such file, or it is no container, or not all of one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)
        with ExitStack() as opened:
            try:
                file = opened.enter_context(open_regular(path))
            except (OSError, ValueError) as error:
                why = getattr(error, "strerror", None) or str(error)
                raise PackageError(
                    f"{self.path} cannot be read: {why}; expected a package that module.save() wrote"
                ) from error
            nbytes = os.fstat(file.fileno()).st_size
            file.seek(max(nbytes - _END_BYTES, 0))
            # zipfile would look for the end before a comment or anything else.
            if not file.read(_END_BYTES).startswith(_END) or nbytes < _END_BYTES:
                raise damaged(self.path, "", f"its {nbytes} bytes do not end as a package does")
            try:
                self._archive = opened.enter_context(zipfile.ZipFile(file))
            except Exception as error:  # a dozen kinds, for damaged files
                raise damaged(self.path, "", shown(error)) from error
            self._parts = self._checked(nbytes)
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @property
    def names(self) -> list[str]:
        """The names of all parts."""
        return list(self._parts)

    def header(self) -> PackageHeader:
        """The header, checked."""
        return read_header(self.read(HEADER), self.path)

    def read(self, name: str, expected: Part | None = None) -> bytes:
        """The contents of a part."""
        if name not in self._parts:
            raise damaged(self.path, name, "it is missing")
        nbytes = self._parts[name].file_size
        if expected is not None and nbytes != expected.nbytes:
            raise damaged(self.path, name, f"it has {nbytes} bytes, and the header says {expected.nbytes}")
        if expected is None and nbytes > MOST_HEADER_BYTES:
            raise damaged(self.path, name, f"it has {nbytes} bytes; expected at most {MOST_HEADER_BYTES}")
        try:
            data = self._archive.read(self._parts[name])
        except Exception as error:  # as above
            raise damaged(self.path, name, f"it cannot be read ({shown(error)})") from error
        seen = part_of(data)
        if seen.nbytes != nbytes:
            raise damaged(self.path, name, f"it has {seen.nbytes} bytes, and the list of parts says {nbytes}")
        if expected is not None and seen != expected:
            text = f"its SHA-256 is {seen.sha256[:16]}…, and the header says {expected.sha256[:16]}…"
            raise damaged(self.path, name, text)
        return data

    def _checked(self, nbytes: int) -> dict[str, zipfile.ZipInfo]:
        """The list of parts, each with a name of a package's, and as it is on disk."""
        listed = self._archive.infolist()
        if len(listed) > _MOST_PARTS:
            raise damaged(self.path, "", f"it has {len(listed)} parts; expected at most {_MOST_PARTS}")
        found: dict[str, zipfile.ZipInfo] = {}
        for part in listed:
            if not _NAME.fullmatch(part.filename):
                raise damaged(self.path, "", f"it has a part {shown(part.filename)}, which no package has")
            if part.filename in found:
                raise damaged(self.path, part.filename, "it is in the list twice")
            if part.compress_type != zipfile.ZIP_STORED or part.flag_bits & 0x1 or part.compress_size != part.file_size:
                raise damaged(self.path, part.filename, "it is compressed or encrypted, which no part of a package is")
            found[part.filename] = part
        if (total := sum(part.file_size for part in listed)) > nbytes:
            raise damaged(self.path, "", f"its parts have {total} bytes together, and the file {nbytes}")
        return found
