"""Expectations for users' own tests: how many captures, hits, evictions and eager calls a block makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from inspect import Signature

from graphcache.dispatch.targets import arguments_of
from graphcache.errors import ConfigError, shown
from graphcache.events import Captured, Event
from graphcache.keys.call_key import CallKey
from graphcache.keys.call_spec import CallSpec
from graphcache.modules.cached_module import CachedModule
from graphcache.modules.transparent import controls

_COUNTED = ("hits", "captures", "evictions", "eager", "padded")
_MAX_TOLD = 8


class Counters:
    """The counters of a wrapped module, and of the parts that it captures one by one.

    Args:
        module: The wrapped module.

    Raises:
        ConfigError: If ``module`` is not wrapped.

    Example:
        >>> import torch, graphcache
        >>> fast = graphcache.wrap(torch.nn.ReLU())
        >>> with Counters(fast).expect(captures=2, hits=1):
        ...     for size in (3, 4, 3):
        ...         _ = fast(torch.zeros(size))
    """

    def __init__(self, module: CachedModule) -> None:
        self._controls = controls(module)

    def read(self) -> dict[str, int]:
        """``hits``, ``captures``, ``evictions``, ``eager`` and ``padded`` so far."""
        info = self._controls.cache_info()
        return {name: sum(info.eager.values()) if name == "eager" else getattr(info, name) for name in _COUNTED}

    def expect(self, **counts: int) -> AbstractContextManager[None]:
        """Raise at the end of the block unless exactly so many were counted in it.

        Args:
            counts: ``hits``, ``captures``, ``evictions``, ``eager`` (all reasons together) or ``padded``. The others
                may be anything.

        Raises:
            ConfigError: For another name, or for what is not a count; before the block.
            AssertionError: If other numbers were counted, with the captured calls. An exception of the block has
                precedence.
        """
        for name, count in counts.items():
            if name not in _COUNTED:
                raise ConfigError(f"{name}: there is no such counter; expected some of {', '.join(_COUNTED)}")
            _check_count(name, count)
        if not counts:
            raise ConfigError("nothing is expected; name a counter, such as expect(captures=2)")
        return self._expect(_text(counts), counts, lambda seen: seen == counts)

    @contextmanager
    def _expect(self, wanted: str, names: Iterable[str], fits: Callable[[dict[str, int]], bool]) -> Iterator[None]:
        """Raise at the end of the block unless the counts of it fit."""
        before, captured = self.read(), list[str]()
        with ExitStack() as listening:
            for each in (self._controls, *map(controls, self._controls.parts.values())):
                hear = partial(_note_capture, captured, arguments_of(each.module))
                listening.callback(each.subscribe(hear))
            yield
        now = self.read()
        seen = {name: now[name] - before[name] for name in names}
        if not fits(seen):
            more = f"; and {len(captured) - _MAX_TOLD} more" if len(captured) > _MAX_TOLD else ""
            told = f". Captured: {'; '.join(captured[:_MAX_TOLD])}{more}" if captured else ""
            raise AssertionError(f"{self._controls.ledger.name}: expected {wanted}; saw {_text(seen)}{told}")


def assert_max_captures(module: CachedModule, most: int) -> AbstractContextManager[None]:
    """Raise at the end of the block if more graphs were captured in it, those of parts included.

    Args:
        module: A wrapped module.
        most: The largest number of captures.

    Raises:
        ConfigError: If ``module`` is not wrapped or ``most`` is not a count; before the block.
        AssertionError: If there were more, with the captured calls. An exception of the block has precedence.

    Example:
        >>> import torch, graphcache
        >>> fast = graphcache.wrap(torch.nn.ReLU())
        >>> with assert_max_captures(fast, 1):
        ...     _ = fast(torch.zeros(3)), fast(torch.ones(3))
    """
    counters = Counters(module)
    _check_count("most", most)
    return counters._expect(f"at most {most} captures", ["captures"], lambda seen: seen["captures"] <= most)


def _check_count(name: str, count: object) -> None:
    """Raise for anything but a whole number from 0 on."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ConfigError(f"{name}={shown(count)}: expected a whole number, 0 or more")


def _note_capture(captured: list[str], names: Signature | Sequence[str], event: Event) -> None:
    if isinstance(event, Captured) and isinstance(event.key, CallKey):
        captured.append(str(CallSpec(event.key, names)))


def _text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={count}" for name, count in counts.items())
