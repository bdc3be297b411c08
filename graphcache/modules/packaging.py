"""The ONNX model that an engine was built from, as a package holds it. Pickles of 0.1 find ``Source`` here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Source:
    """What an engine was built from, to build it again elsewhere."""

    onnx: bytes
    """The model, without external data."""
    options: Mapping[str, Any]
    """Keyword arguments of ``graphcache.build``, as JSON has them."""
