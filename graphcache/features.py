"""Optional features that the core calls. ``import graphcache`` fills them in; the core imports none of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from graphcache.errors import ExtraNotFoundError

NO_ANSWER: Any = object()
"""Returned where a feature leaves a call to the core."""


class Padding(Protocol):
    """Pads the calls of one module: :class:`graphcache.buckets.bucketed.Bucketed`."""

    padded: int

    def answer(self, call: Any) -> Any:
        """The answer of a call through its bucket, or :data:`NO_ANSWER`. Graphs may be used at this moment."""

    def target(self, call: Any) -> Any:
        """The key that a call is padded to; ``None`` if it is not padded."""


class Features:
    """What is there. A feature that is not raises :class:`~graphcache.errors.ExtraNotFoundError`.

    Example:
        >>> Features().padding
        Traceback (most recent call last):
        graphcache.errors.ExtraNotFoundError: the feature padding is not there; ...
    """

    padding: Callable[..., Padding]
    """Makes the padding of one module from the ``buckets`` option and what captures and runs its calls."""
    advise_buckets: Callable[..., Any]
    """Says which buckets would have served some calls best."""

    def __getattr__(self, name: str) -> NoReturn:
        if name not in Features.__annotations__:
            raise AttributeError(name)
        raise ExtraNotFoundError(
            f"the feature {name} is not there; expected that `import graphcache` fills it in; install graphcache as a "
            f"whole"
        )


features = Features()
"""The features of this process."""
