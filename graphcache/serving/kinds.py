"""What requests must share to go together, and how one process names it to another."""

from __future__ import annotations

import json

import torch

from graphcache.errors import ServingError, shown

Kind = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
"""Name, dtype and padded sizes but for the rows, of each tensor in the order of the names."""


def written_kind(kind: Kind) -> str:
    """A kind as text, the same in every process; :func:`read_kind` reads it."""
    each = [[name, str(dtype).removeprefix("torch."), list(shape)] for name, dtype, shape in kind]
    return json.dumps(each, separators=(",", ":"))


def read_kind(text: str) -> Kind:
    """A kind from its text."""
    try:
        found = []
        for name, dtype, shape in json.loads(text):
            real = getattr(torch, dtype)
            if type(name) is not str or type(real) is not torch.dtype or not all(type(size) is int for size in shape):
                raise ValueError(text)
            found.append((name, real, tuple(shape)))
        return tuple(found)
    except (ValueError, TypeError, AttributeError) as error:
        raise ServingError(f"{shown(text)} is no kind of requests; expected what written_kind() gives") from error
