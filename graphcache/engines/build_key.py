"""A digest of everything that a built engine depends on."""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from graphcache.engines.library import Library
from graphcache.engines.plugins import loaded_plugins

_VERSION = 1
# A protobuf message of external data in an ONNX tensor: the key "location", then a value of less than 16384 bytes.
_EXTERNAL = re.compile(rb"\x0a\x08location\x12([\x00-\x7f]|[\x80-\xff][\x00-\x7f])")


class NotKeyed(Exception):
    """A file that cannot be read, or a bad option. Building raises an error that says what is wrong."""


def build_key(found: Library, onnx: str | os.PathLike[str] | bytes, options: Mapping[str, Any]) -> str:
    """A digest of the model, its external weights, all options, TensorRT and its plugins, and the device."""
    try:
        data = onnx if isinstance(onnx, bytes) else Path(onnx).read_bytes()
        files: list[list[str]] = []
        if not isinstance(onnx, bytes):
            files = [[name, _digest(Path(onnx).parent / name)] for name in external_files(data)]
        plain = {name: _plain(value) for name, value in options.items()}
        plugins = [[path, _digest(Path(path))] for path in loaded_plugins(found.flavour)]
        model = [hashlib.sha256(data).hexdigest(), files, plain]
        told = json.dumps([_VERSION, found.flavour, found.version, plugins, _device(), model], sort_keys=True)
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise NotKeyed(str(error)) from error
    return hashlib.sha256(told.encode()).hexdigest()


def external_files(data: bytes) -> list[str]:
    """The names of files that an ONNX model keeps weights in, as its tensors give them.

    It searches for the bytes of such an entry, since reading the model would need the ``onnx`` package. It may find a
    name of no file.
    """
    names = []
    for match in _EXTERNAL.finditer(data):
        size = match[1]
        length = size[0] if len(size) == 1 else (size[0] & 0x7F) | size[1] << 7
        names.append(data[match.end() : match.end() + length].decode("utf-8", "surrogateescape"))
    return list(dict.fromkeys(names))


def _digest(path: Path) -> str:
    """The digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _device() -> list[Any]:
    """The device that kernels are chosen for; empty without a GPU."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(), list(torch.cuda.get_device_capability())]


def _plain(value: Any) -> Any:
    """An option as JSON has it."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, Sequence):
        return [_plain(each) for each in value]
    return operator.index(value)
