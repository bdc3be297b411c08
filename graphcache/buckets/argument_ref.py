"""Where an argument is in a call, given by its name or its position, whichever way the caller passes it."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any

from graphcache.errors import ConfigError, shown


@dataclass(frozen=True, slots=True)
class ArgumentRef:
    """An argument of a function: its position and the name under which it can be passed, ``None`` for what it lacks."""

    index: int | None
    name: str | None

    def get(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The argument in a call, ``None`` where it is absent."""
        if self.index is not None and self.index < len(args):
            return args[self.index]
        return None if self.name is None else kwargs.get(self.name)

    def put(self, value: Any, args: MutableSequence[Any], kwargs: MutableMapping[str, Any]) -> None:
        """Replace the argument of a call, or pass it by its name where it is absent."""
        if self.index is not None and self.index < len(args):
            args[self.index] = value
        elif self.name is not None:
            kwargs[self.name] = value


def find_argument(key: str | int, signature: Signature | Sequence[str], where: str) -> ArgumentRef:
    """The argument that a name or a position stands for.

    Names of arguments in place of a signature need not be identifiers.

    Example:
        >>> import inspect
        >>> find_argument("y", inspect.signature(lambda x, y=0: x), "option")
        ArgumentRef(index=1, name='y')
    """
    kinds = Parameter
    if isinstance(signature, Signature):
        parameters = [(each.name, each.kind) for each in signature.parameters.values()]
    else:
        parameters = [(name, kinds.POSITIONAL_OR_KEYWORD) for name in signature]
    ordered = [name for name, kind in parameters if kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    named = [name for name, kind in parameters if kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    found = {kind for _, kind in parameters}
    if isinstance(key, int):
        if key < len(ordered):
            return ArgumentRef(key, ordered[key] if ordered[key] in named else None)
        if kinds.VAR_POSITIONAL in found:
            return ArgumentRef(key, None)
        raise ConfigError(f"{where}: there are {len(ordered)} positional arguments; expected the position of one")
    if key in ordered:
        return ArgumentRef(ordered.index(key), key if key in named else None)
    if key in named or kinds.VAR_KEYWORD in found:
        return ArgumentRef(None, key)
    known = list(dict.fromkeys([*ordered, *named]))
    raise ConfigError(f"{where}: no argument has this name; expected one of {shown(known)}")
