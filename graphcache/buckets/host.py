"""What padding needs from the dispatcher of one module."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from graphcache.capture.effects import Effects
from graphcache.errors import Cause
from graphcache.keys.call import KeyedCall

Key = tuple[Hashable, ...]
Run = Callable[..., Any]
"""Runs a module eagerly."""


class Host(Protocol):
    """The dispatcher of one module, as far as padding uses it."""

    @property
    def module(self) -> nn.Module:
        """The wrapped module."""

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held while a call is captured; a thread that holds it may take it again."""

    @property
    def version(self) -> int:
        """Version of the module's state."""

    @property
    def generation(self) -> int:
        """Goes up when all denials are forgotten."""

    @property
    def in_background(self) -> bool:
        """Whether captures are made in another thread."""

    def refuses(self, call: KeyedCall) -> Cause | None:
        """Renew what is stale, then tell why no graph may answer the call. The lock is held."""

    def alike(self, call: KeyedCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KeyedCall:
        """A call with these arguments, where those that have no buckets are the same as in ``call``."""

    def has_graph(self, key: Key) -> bool:
        """Whether there is a graph of the present version of the module."""

    def replay(self, call: KeyedCall) -> Any:
        """The answer of the graph to a padded call, or ``NO_ANSWER``. The caller's own call was counted already."""

    def capture(self, call: KeyedCall) -> Any:
        """Answer a padded call and capture it, without asking the admission policy. The lock is held."""

    def denied(self, key: Key) -> Cause | None:
        """Why a key is not to be captured this time."""

    def cold(self, call: KeyedCall) -> Cause | None:
        """Why a padded call is not to be captured now; an engine's may be captured in the background from here on."""

    def capture_later(self, call: KeyedCall, effects: Effects) -> None:
        """Capture a padded call of a PyTorch module in the background; the effects are those of the caller's call."""

    def eager(self, call: KeyedCall, cause: Cause, owed: Key | None = None) -> Any:
        """Answer a call eagerly for this reason. What it takes counts in favour of a graph of the key ``owed``."""

    def tell(self, cause: Cause) -> None:
        """Count an eager call."""

    def observe(self, call: KeyedCall) -> Effects:
        """Answer a call eagerly and tell what it did besides returning; an engine does nothing."""

    def runner(self, effects: Effects, *, alone: bool) -> Run:
        """What runs the module again after a call without effects. It raises ``Refusal`` when a run has effects.

        With ``alone``, no caller runs the module at the same time.
        """

    def submit(self, call: KeyedCall, job: Callable[[KeyedCall], None], done: Callable[[], None]) -> Cause | None:
        """Do a job with a copy of the call in the background, and call ``done`` in any case.

        Returns the reason for eager calls meanwhile; ``None`` if the call cannot be copied.
        """
