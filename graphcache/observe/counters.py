"""Expectations for users' own tests: how many captures, hits, evictions and eager calls a block makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from graphcache.dispatch.targets import arguments_of
from graphcache.errors import ConfigError, shown
from graphcache.events import Captured, Event
from graphcache.keys.call_spec import CallSpec
from graphcache.modules.cached_module import CachedModule
from graphcache.modules.controls import controls

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
        self._module = module

    def read(self) -> dict[str, int]:
        """``hits``, ``captures``, ``evictions``, ``eager`` and ``padded`` so far."""
        info = self._controls.cache_info()
        return {name: sum(info.eager.values()) if name == "eager" else getattr(info, name) for name in _COUNTED}

    @contextmanager
    def expect(self, **counts: int) -> Iterator[None]:
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
        before = self.read()
        with _captures(self._module) as captured:
            yield
        after = self.read()
        seen = {name: after[name] - before[name] for name in counts}
        if seen != counts:
            wanted, got = (", ".join(f"{name}={count}" for name, count in each.items()) for each in (counts, seen))
            raise AssertionError(f"{self._controls.ledger.name}: expected {wanted}; saw {got}{_told(captured)}")


@contextmanager
def assert_max_captures(module: CachedModule, most: int) -> Iterator[None]:
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
    before = counters.read()["captures"]
    with _captures(module) as captured:
        yield
    seen = counters.read()["captures"] - before
    if seen > most:
        name = controls(module).ledger.name
        raise AssertionError(f"{name}: expected at most {most} captures; saw {seen}{_told(captured)}")


def _check_count(name: str, count: object) -> None:
    """Raise for anything but a whole number from 0 on."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ConfigError(f"{name}={shown(count)}: expected a whole number, 0 or more")


@contextmanager
def _captures(module: CachedModule) -> Iterator[list[str]]:
    """A list to which every captured call of a module and of its parts is added, in words."""
    captured: list[str] = []

    def listen_to(each: CachedModule) -> None:
        names = arguments_of(controls(each).module)

        def hear(event: Event) -> None:
            if isinstance(event, Captured) and isinstance(event.key, tuple):
                captured.append(str(CallSpec(event.key, names)))

        listening.callback(controls(each).subscribe(hear))

    with ExitStack() as listening:
        for each in (module, *controls(module).parts.values()):
            listen_to(each)
        yield captured


def _told(captured: list[str]) -> str:
    """The captured calls, as the end of a message."""
    if not captured:
        return ""
    more = f"; and {len(captured) - _MAX_TOLD} more" if len(captured) > _MAX_TOLD else ""
    return f". Captured: {'; '.join(captured[:_MAX_TOLD])}{more}"
