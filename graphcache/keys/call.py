"""One call of a module, with its key."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """One call of a module.

    Args:
        key: The call key.
        tensors: The tensors among the arguments, in the order of the key.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    key: tuple[Hashable, ...]
    tensors: Sequence[Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
