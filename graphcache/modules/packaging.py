"""The ONNX model that an engine was built from, as a package holds it. Pickles of 0.1 find ``Source`` here."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphcache.errors import ConfigError, is_a, shown

BUILD_OPTIONS = ("shapes", "weight_streaming", "refittable", "workspace")
"""Keyword arguments of ``graphcache.build`` that a package may hold."""
_EXTERNAL_DATA = b"\x0a\x08location\x12"
"""The key of a reference to a file with weights, as protobuf encodes it."""


@dataclass(frozen=True, slots=True)
class Source:
    """What an engine was built from, to build it again elsewhere."""

    onnx: bytes
    """The model, without external data."""
    options: Mapping[str, Any]
    """Keyword arguments of ``graphcache.build``, as JSON has them."""

    @classmethod
    def of(cls, onnx: Any, options: Any) -> Source:
        """A source from what :meth:`EngineModule.save` was given, checked."""
        if is_a(onnx, str, os.PathLike):
            try:
                onnx = Path(onnx).read_bytes()
            except Exception as error:
                why = getattr(error, "strerror", None) or shown(error)
                raise ConfigError(f"onnx={shown(onnx)} cannot be read: {why}; expected the path of a model") from error
        if not is_a(onnx, bytes, bytearray) or not onnx:
            raise ConfigError(f"onnx={shown(onnx)}: expected the path of an ONNX model, or its bytes")
        if _EXTERNAL_DATA in onnx:
            raise ConfigError(
                "onnx: the model has its weights in other files, which a package does not hold; save it as one file "
                "(onnx.save(..., save_as_external_data=False)), or leave it out"
            )
        options = {} if options is None else options
        if not is_a(options, Mapping) or any(type(name) is not str or name not in BUILD_OPTIONS for name in options):
            raise ConfigError(
                f"build={shown(options)}: expected keyword arguments of graphcache.build, of {', '.join(BUILD_OPTIONS)}"
            )
        try:
            return cls(bytes(onnx), json.loads(json.dumps(dict(options), allow_nan=False)))
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"build={shown(options)}: expected what JSON can hold: {error}") from error
