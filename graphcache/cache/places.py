"""Where an argument stands in a call, given by its name or its position, whichever way the caller passes it."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any

from graphcache.errors import ConfigError, shown


@dataclass(frozen=True, slots=True)
class Place:
    """One argument of a function.

    Args:
        index: Its position; ``None`` if it has none.
        name: The name under which it can be passed; ``None`` if there is none.
    """

    index: int | None
    name: str | None

    def of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The argument in a call, ``None`` where it is absent."""
        if self.index is not None and self.index < len(args):
            return args[self.index]
        return None if self.name is None else kwargs.get(self.name)

    def put(self, value: Any, args: MutableSequence[Any], kwargs: MutableMapping[str, Any]) -> None:
        """Exchange the argument of a call, or pass it by its name where it is absent."""
        if self.index is not None and self.index < len(args):
            args[self.index] = value
        elif self.name is not None:
            kwargs[self.name] = value


def place_of(key: str | int, signature: Signature | Sequence[str], where: str) -> Place:
    """The place of an argument.

    Args:
        key: Its name, or its position from 0 on.
        signature: Of the function; or the names of its arguments, which need not be identifiers.
        where: What gave the key, for the message.

    Raises:
        ConfigError: If the function has no such argument.

    Example:
        >>> import inspect
        >>> place_of("y", inspect.signature(lambda x, y=0: x), "option")
        Place(index=1, name='y')
    """
    ordered: list[str] = []
    named: set[str] = set()
    more = open_ended = False
    if not isinstance(signature, Signature):
        ordered, named = list(signature), set(signature)
    for each in signature.parameters.values() if isinstance(signature, Signature) else ():
        if each.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD):
            ordered.append(each.name)
        if each.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY):
            named.add(each.name)
        more = more or each.kind is Parameter.VAR_POSITIONAL
        open_ended = open_ended or each.kind is Parameter.VAR_KEYWORD
    if isinstance(key, int):
        if key < len(ordered):
            return Place(key, ordered[key] if ordered[key] in named else None)
        if more:
            return Place(key, None)
        raise ConfigError(f"{where}: there are {len(ordered)} positional arguments; expected the position of one")
    if key in ordered:
        return Place(ordered.index(key), key if key in named else None)
    if key in named or open_ended:
        return Place(None, key)
    raise ConfigError(f"{where}: no argument has this name; expected one of {shown([*ordered, *named - {*ordered}])}")
