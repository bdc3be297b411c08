"""Optional features that the core calls without importing them; ``import graphcache`` fills them in."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from torch import nn

from graphcache.errors import ExtraNotFoundError


class SavePackage(Protocol):
    """Writes a module as a package file: :func:`graphcache.persist.saving.save`."""

    def __call__(
        self, module: nn.Module, path: str | os.PathLike[str], *, onnx: Any, build: Any, manifest: bool = False
    ) -> None: ...


class Features:
    """Functions of layers above the core, by name. Using one that was not filled in raises an error.

    Example:
        >>> Features().save_package
        Traceback (most recent call last):
        graphcache.errors.ExtraNotFoundError: the feature save_package is not there; ...
    """

    save_package: SavePackage
    """Writes a module as a package file."""
    environment: Callable[[nn.Module], dict[str, str]]
    """Describes a module, its device and its libraries, by which a manifest tells whether it is of this environment."""

    def __getattr__(self, name: str) -> NoReturn:
        raise ExtraNotFoundError(
            f"the feature {name} is not there; expected that `import graphcache` fills it in; install graphcache as a "
            f"whole"
        )


features = Features()
"""The features of this process."""
