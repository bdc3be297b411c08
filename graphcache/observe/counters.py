"""Expectations for users' own tests: how many captures, hits, evictions and eager calls a block makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import Signature as Function

from graphcache.dispatch.argument_names import arguments_of
from graphcache.errors import ConfigError, shown
from graphcache.events import Captured, Event
from graphcache.keys.call_spec import CallSpec
from graphcache.modules.cached_module import CachedModule
from graphcache.modules.controls import controls
from graphcache.modules.info import CacheInfo

_COUNTED = ("hits", "captures", "evictions", "eager", "padded")
_TOLD = 8


class Counters:
    """The counters of one wrapped module, and of the parts that it captures one by one.

    Args:
        module: The wrapped module.

    Raises:
        ConfigError: If it is none.

    Example:
        >>> import torch, graphcache
        >>> fast = graphcache.wrap(torch.nn.ReLU())
        >>> with Counters(fast).expect(captures=2, hits=1):
        ...     for size in (3, 4, 3):
        ...         _ = fast(torch.zeros(size))
    """

    def __init__(self, module: CachedModule) -> None:
        self._module = checked(module)

    def read(self) -> dict[str, int]:
        """``hits``, ``captures``, ``evictions``, ``eager`` and ``padded`` so far."""
        return _counts(controls(self._module).cache_info())

    @contextmanager
    def expect(self, **counts: int) -> Iterator[None]:
        """Raise at the end of the block unless exactly so many were counted in it; what is not named may be anything.

        Args:
            counts: ``hits``, ``captures``, ``evictions``, ``eager`` (all reasons together) or ``padded``.

        Raises:
            ConfigError: For another name, or what is no count; at once.
            AssertionError: If it was otherwise, with what was counted and what the captures were of. An exception of
                the block goes through instead.
        """
        for name, count in counts.items():
            if name not in _COUNTED:
                raise ConfigError(f"{name}: there is no such counter; expected some of {', '.join(_COUNTED)}")
            _check_count(name, count)
        if not counts:
            raise ConfigError("nothing is expected; name a counter, such as expect(captures=2)")
        before = self.read()
        captured: list[str] = []
        with _heard(self._module, captured):
            yield
        after = self.read()
        seen = {name: after[name] - before[name] for name in counts}
        if seen != counts:
            wanted, got = (", ".join(f"{name}={count}" for name, count in each.items()) for each in (counts, seen))
            raise AssertionError(f"{controls(self._module).ledger.name}: expected {wanted}; saw {got}{_told(captured)}")


@contextmanager
def assert_max_captures(module: CachedModule, most: int) -> Iterator[None]:
    """Raise at the end of the block if it captured more graphs than it should, parts included.

    Args:
        module: A wrapped module.
        most: How many captures are right.

    Raises:
        ConfigError: If ``module`` is not wrapped or ``most`` is no count; at once.
        AssertionError: If there were more, naming the signatures. An exception of the block goes through instead.

    Example:
        >>> import torch, graphcache
        >>> fast = graphcache.wrap(torch.nn.ReLU())
        >>> with assert_max_captures(fast, 1):
        ...     _ = fast(torch.zeros(3)), fast(torch.ones(3))
    """
    checked(module)
    _check_count("most", most)
    before = controls(module).cache_info().captures
    captured: list[str] = []
    with _heard(module, captured):
        yield
    seen = controls(module).cache_info().captures - before
    if seen > most:
        raise AssertionError(
            f"{controls(module).ledger.name}: expected at most {most} captures; saw {seen}{_told(captured)}"
        )


def checked(module: CachedModule) -> CachedModule:
    """The module itself.

    Raises:
        ConfigError: If it is not wrapped.
    """
    if not isinstance(module, CachedModule):
        raise ConfigError(f"expected a wrapped module, got {type(module).__name__}; wrap it with graphcache.wrap")
    return module


def _counts(info: CacheInfo) -> dict[str, int]:
    return {name: sum(info.eager.values()) if name == "eager" else getattr(info, name) for name in _COUNTED}


def _check_count(name: str, count: object) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ConfigError(f"{name}={shown(count)}: expected a whole number, 0 or more")


@contextmanager
def _heard(module: CachedModule, captured: list[str]) -> Iterator[None]:
    """Inside, what is captured is written down in words."""

    def hearer(names: Function | Sequence[str]) -> Callable[[Event], None]:
        def hear(event: Event) -> None:
            if isinstance(event, Captured) and isinstance(event.key, tuple):
                captured.append(str(CallSpec(event.key, names)))

        return hear

    with ExitStack() as listening:
        for each in (module, *controls(module).parts.values()):
            listening.callback(controls(each).subscribe(hearer(arguments_of(controls(each).module))))
        yield


def _told(captured: list[str]) -> str:
    if not captured:
        return ""
    more = f"; and {len(captured) - _TOLD} more" if len(captured) > _TOLD else ""
    return f". Captured: {'; '.join(captured[:_TOLD])}{more}"
