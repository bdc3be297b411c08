"""Compression of bodies: a stream unpacked within a bound, and what an answer may be packed with."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from graphcache.errors import shown
from graphcache.serving.protocol.problems import RequestError

# "deflate" is zlib's format in HTTP: https://www.rfc-editor.org/rfc/rfc9110#name-deflate-coding.
_WINDOW = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
_STEP = 2**20
_LEVEL = 1
"""Tensors hardly get smaller at higher levels, which take up to ten times as long."""
_LEAST = 1024
"""An answer of fewer bytes is sent as it is."""


class Unpacker:
    """Undoes the ``Content-Encoding`` of a body, piece by piece."""

    def __init__(self, encoding: str | None) -> None:
        name = (encoding or "identity").strip().lower()
        if name != "identity" and name not in _WINDOW:
            raise RequestError(
                f"Content-Encoding: {shown(encoding)}; expected gzip, deflate or identity",
                415,
                {"Accept-Encoding": "gzip, deflate"},
            )
        self._packed = None if name == "identity" else zlib.decompressobj(_WINDOW[name])
        self._name = name

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What some more bytes unpack to, in pieces of at most 1 MiB, so that the caller can stop at any of them."""
        if self._packed is None:
            yield data
            return
        while data:
            if self._packed.eof:
                raise RequestError(f"the body goes on after the end of its {self._name} data")
            try:
                yield self._packed.decompress(data, _STEP)
            except zlib.error as error:
                raise RequestError(f"the body is no {self._name} data: {error}") from error
            data = self._packed.unconsumed_tail or self._packed.unused_data
        # What zlib holds back once all is consumed fits into less than its window, and comes with the next piece.

    def finish(self) -> None:
        """Raise if the body ended too early."""
        if self._packed is not None and not self._packed.eof:
            raise RequestError(f"the body ends before its {self._name} data does")


def pack(body: bytes, accepted: str | None) -> tuple[bytes, str | None]:
    """Compress an answer, if its receiver wants that and it is worth it."""
    name = chosen(accepted)
    if name is None or len(body) < _LEAST:
        return body, None
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW[name])
    return packer.compress(body) + packer.flush(), name


def chosen(accepted: str | None) -> str | None:
    """The encoding to answer with: the first of ``gzip`` and ``deflate`` that is named and not forbidden."""
    wanted = set()
    for each in (accepted or "").lower().split(","):
        name, _, weight = (part.strip() for part in each.partition(";"))
        if not weight.startswith("q=") or weight[2:].strip("0.") != "":
            wanted.add(name)
    return next((name for name in _WINDOW if name in wanted), None)
