"""The header of a TensorRT-RTX engine, read without TensorRT and without a GPU.

TensorRT-RTX deserialises nothing where there is no device, and its own validity check reads only the header. So the
header is read here, and a truncated or foreign file is refused on any machine. The layout was read off files of
versions 1.4 and 1.5 (``engine_header_size`` says 64 bytes); a header of another kind is left to TensorRT.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from graphcache.errors import EngineFormatError, EngineVersionError

_LAYOUT = struct.Struct("<4sIQQ4B")
_MAGIC = b"vtrt"


@dataclass(frozen=True, slots=True)
class EngineHeader:
    """The length of a TensorRT-RTX engine file in bytes, and the version that built it, such as ``"1.5.0.114"``."""

    nbytes: int
    version: str


def read_header(serialized: bytes) -> EngineHeader | None:
    """The header, or ``None`` if the bytes do not begin with one.

    Example:
        >>> read_header(b"not an engine") is None
        True
    """
    if len(serialized) < _LAYOUT.size:
        return None
    magic, _, _, nbytes, *version = _LAYOUT.unpack_from(serialized)
    return EngineHeader(nbytes, ".".join(map(str, version))) if magic == _MAGIC else None


def check_header(serialized: bytes, *, flavour: str, version: str, label: str) -> None:
    """Refuse bytes that this flavour and version of TensorRT cannot run, before it sees them."""
    if len(serialized) == 0:
        raise EngineFormatError(f"{label}: expected the bytes of an engine, got none; was the file written completely?")
    if flavour != "tensorrt_rtx":
        return
    header = read_header(serialized)
    if header is None:
        raise EngineFormatError(
            f"{label} is not a TensorRT-RTX engine: its {len(serialized)} bytes begin with {serialized[:8]!r}, an "
            f"engine's with {_MAGIC!r}; an ONNX model goes through graphcache.build first, an engine of another "
            f"flavour of TensorRT runs with GRAPHCACHE_TENSORRT=tensorrt"
        )
    if header.nbytes != len(serialized):
        raise EngineFormatError(
            f"{label} has {len(serialized)} bytes, its header says {header.nbytes}; it was truncated or something was "
            f"appended, so copy the file again or build it with graphcache.build"
        )
    if header.version != version:
        raise EngineVersionError(
            f"{label} was built by TensorRT-RTX {header.version}, and {version} is installed; an engine runs only "
            f"under the version that built it, so build it again, or pip install tensorrt-rtx=={header.version}"
        )
