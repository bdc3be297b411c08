"""Optional features that the core calls without importing them; ``import graphcache`` fills them in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import nn

from graphcache.errors import ExtraNotFoundError


class Features:
    """Functions of layers above the core, by name. Using one that was not filled in raises an error.

    Example:
        >>> Features().save
        Traceback (most recent call last):
        graphcache.errors.ExtraNotFoundError: the feature save is not there; ...
    """

    save: Callable[..., None]
    """Writes a module as a package file: :func:`graphcache.persist.saving.save`."""
    environment: Callable[[nn.Module], dict[str, str]]
    """Describes a module, its device and its libraries, by which a manifest tells whether it is of this environment."""
    padding: Callable[..., Any]
    """Makes the padding of one module of the ``buckets`` option and the module's dispatcher."""
    advise_buckets: Callable[..., Any]
    """Says which buckets would have served the calls of a module best."""
    manifest_of: Callable[..., Any]
    """Lists the calls that a module has served, and counts those that cannot be told in text."""

    def __getattr__(self, name: str) -> NoReturn:
        if name not in Features.__annotations__:
            raise AttributeError(name)
        raise ExtraNotFoundError(
            f"the feature {name} is not there; expected that `import graphcache` fills it in; install graphcache as a "
            f"whole"
        )


features = Features()
"""The features of this process."""
