"""One call of a module: its key, its tensors and its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from graphcache.keys.call_key import CallKey, describe


class KeyedCall(NamedTuple):
    """One call of a module.

    Args:
        key: What tells it apart from calls that need another graph.
        tensors: The tensors among its arguments, in the order of the key.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    key: CallKey
    tensors: Sequence[Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def records_gradients(self) -> bool:
        """Whether the grad mode was on."""
        return self.key[0] is not False

    def with_key_end(self, *values: Any) -> KeyedCall:
        """The same call with something more in its key."""
        return self._replace(key=(*self.key, *values))


def call_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> KeyedCall:
    """Describe a call."""
    key, tensors = describe(args, kwargs)
    return KeyedCall(key, tensors, args, kwargs)
