"""Which compiled library is the one for this torch, this Python and this source."""

from __future__ import annotations

from pathlib import Path

import torch

from graphcache import compiled_library

SOURCE = Path(__file__).with_name("hit.cpp")


def key() -> str:
    """What a library has to agree with: the source, how it is compiled, torch, Python, the machine; 16 hex digits."""
    return compiled_library.key_of(
        [SOURCE, SOURCE.with_name("build.py"), *sorted(SOURCE.parent.glob("*.h"))],
        torch.__version__,
        str(torch.version.git_version),
        str(torch.compiled_with_cxx11_abi()),
    )


def find() -> Path:
    """The library for this torch, Python and source, unchanged since it was compiled.

    Raises:
        NotUsable: If there is none, with what was found instead.
    """
    return compiled_library.find(key())
