"""One call that was served and what it cost, and which of many to capture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from graphcache.cache.spec import Spec
from graphcache.cache.tree import TreeError
from graphcache.errors import ConfigError, shown

_COUNTS = ("hits", "nbytes")
_SECONDS = ("eager_seconds", "replay_seconds", "capture_seconds")
_MOST_TEXT = 1000


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One call that was served.

    Args:
        spec: Its arguments, without the values of tensors.
        hits: How often it was seen.
        part: Name of the submodule that was called; empty for the module itself.
        nbytes: Bytes that its graph owned; 0 if that is not known.
        eager_seconds: What it took without a graph; ``None`` if it was not measured.
        replay_seconds: What it took with one.
        capture_seconds: What its capture took.

    Raises:
        ConfigError: For a number that is none, naming the field.
    """

    spec: Spec
    hits: int
    part: str = ""
    nbytes: int = 0
    eager_seconds: float | None = None
    replay_seconds: float | None = None
    capture_seconds: float | None = None

    def __post_init__(self) -> None:
        if type(self.spec) is not Spec:
            raise ConfigError(f"spec={shown(self.spec)}: expected what spec_of gives")
        if type(self.part) is not str or len(self.part) > _MOST_TEXT:
            raise ConfigError(f"part={shown(self.part)}: expected text of at most {_MOST_TEXT} characters")
        for name in _COUNTS:
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 2**63:
                raise ConfigError(f"{name}={shown(value)}: expected a whole number from 0 to 2**63 - 1")
        for name in _SECONDS:
            value = getattr(self, name)
            if value is not None and (type(value) not in (int, float) or not 0 <= value < 1e9):
                raise ConfigError(f"{name}={shown(value)}: expected seconds from 0 to 1e9, or None")

    @classmethod
    def of_tree(cls, tree: Any) -> ManifestEntry:
        """An entry from what its JSON holds.

        Raises:
            TreeError: If that is none.
            ConfigError: For a number in it that is none.
        """
        if type(tree) is not dict or tree.keys() != {*_FIELDS, "call"}:
            raise TreeError("an entry", tree, f"the fields call, {', '.join(_FIELDS)}")
        return cls(Spec.of_tree(tree["call"]), **{name: tree[name] for name in _FIELDS})

    @property
    def tree(self) -> dict[str, Any]:
        """What the JSON holds."""
        return {name: getattr(self, name) for name in _FIELDS} | {"call": self.spec.tree}

    @property
    def saved_seconds(self) -> float:
        """What replays have saved over eager execution; 0 if it is not known."""
        if self.eager_seconds is None or self.replay_seconds is None:
            return 0.0
        return max(self.eager_seconds - self.replay_seconds, 0.0) * self.hits


def plan(
    entries: Iterable[ManifestEntry],
    max_graphs: int,
    max_bytes: int | None = None,
    max_seconds: float | None = None,
) -> Iterator[ManifestEntry]:
    """The entries to capture, hottest first, as far as budgets reach; one too large for what is left is passed over.

    An entry's bytes are those its graph owned, or those of its inputs if they are more. An entry whose capture was
    never measured counts no seconds: whoever captures has to watch the clock, and stop asking.

    Args:
        entries: Of one module.
        max_graphs: How many graphs may be captured, at least 0.
        max_bytes: Bytes that they may own together; ``None`` for no bound.
        max_seconds: What capturing them may take; ``None`` for no bound.

    Raises:
        ConfigError: For a budget that is none, at once.

    Example:
        >>> import torch
        >>> from graphcache.cache.spec import spec_of
        >>> seen = [ManifestEntry(spec_of((torch.zeros(n),), {}), hits=n, nbytes=100 * n) for n in (1, 2, 3)]
        >>> [entry.hits for entry in plan(seen, 2, max_bytes=450)]
        [3, 1]
    """
    for name, value in (("max_graphs", max_graphs), ("max_bytes", max_bytes)):
        if (value is not None or name == "max_graphs") and (type(value) is not int or value < 0):
            raise ConfigError(f"{name}={shown(value)}: expected a whole number, 0 or more")
    if max_seconds is not None and (type(max_seconds) not in (int, float) or not max_seconds >= 0):
        raise ConfigError(f"max_seconds={shown(max_seconds)}: expected seconds, 0 or more")
    return _plan(sorted(entries, key=heat), max_graphs, max_bytes, max_seconds)


def _plan(
    entries: list[ManifestEntry], graphs: int, nbytes: int | None, seconds: float | None
) -> Iterator[ManifestEntry]:
    for entry in entries:
        if graphs == 0:
            return
        size, cost = max(entry.nbytes, entry.spec.nbytes), entry.capture_seconds or 0.0
        if (nbytes is not None and size > nbytes) or (seconds is not None and cost > seconds):
            continue
        graphs -= 1
        nbytes = None if nbytes is None else nbytes - size
        seconds = None if seconds is None else seconds - cost
        yield entry


_FIELDS = tuple(field.name for field in fields(ManifestEntry) if field.name != "spec")


def heat(entry: ManifestEntry) -> tuple[Any, ...]:
    """Sorts the hottest first, and equal ones always the same way."""
    return -entry.hits, -entry.saved_seconds, entry.part, entry.spec.text


def together(one: ManifestEntry, other: ManifestEntry) -> ManifestEntry:
    """Both, whichever came first. The least of what was measured is what disturbed it least."""
    seconds: dict[str, Any] = {}
    for name in _SECONDS:
        known = [value for value in (getattr(one, name), getattr(other, name)) if value is not None]
        seconds[name] = min(known, default=None)
    hits = min(one.hits + other.hits, 2**63 - 1)
    return replace(one, hits=hits, nbytes=max(one.nbytes, other.nbytes), **seconds)
