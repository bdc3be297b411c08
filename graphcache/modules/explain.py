"""Which calls of a wrapped module replay, which don't and why, what that costs, and what would change it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from graphcache.cache.wording import Words, differences, distance, words_of
from graphcache.config import graphs_off
from graphcache.errors import Cause, ClosedError, ConfigError, Reason, Refusal
from graphcache.modules.arguments import arguments_of
from graphcache.modules.controls import controls
from graphcache.modules.described import described, on_device
from graphcache.modules.info import CacheInfo

if TYPE_CHECKING:
    from graphcache.cache.lru import Entry
    from graphcache.cache.signature import Signature
    from graphcache.modules.cached import CachedModule
    from graphcache.modules.record import Recorded

Outcome = Literal["hit", "capture", "eager"]

_SAMPLES = 7
_SHOWN = 20
_PASSING = frozenset({Reason.COLD, Reason.PENDING, Reason.NOT_PREPARED, Reason.OVER_BUDGET, Reason.GRAD})
"""Reasons that say nothing of the operations, so that another call may well have a graph."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What a signature was measured to take, in seconds; ``None`` where it was not.

    Args:
        eager: A call without a graph.
        replay: A call with one.
        capture: Making the graph.
    """

    eager: float | None = None
    replay: float | None = None
    capture: float | None = None

    @property
    def break_even(self) -> float | None:
        """Replays after which the capture is paid for; ``inf`` if never, ``None`` if that is not known.

        Example:
            >>> Costs(eager=180e-6, replay=50e-6, capture=5e-3).break_even
            39
        """
        if self.eager is None or self.replay is None or self.capture is None:
            return None
        saving = self.eager - self.replay
        return math.ceil(self.capture / saving) if saving > 0 else math.inf

    def __str__(self) -> str:
        known = {name: value for name in ("eager", "replay", "capture") if (value := getattr(self, name)) is not None}
        if not known:
            return ""
        text = ", ".join(f"{name} {_duration(value)}" for name, value in known.items())
        calls = self.break_even
        if calls is None:
            return text
        return f"{text}: " + ("a replay saves nothing" if math.isinf(calls) else f"paid for after {calls} replays")


@dataclass(frozen=True, slots=True)
class Explained:
    """What becomes of the calls of one signature.

    Args:
        call: Its arguments in words.
        outcome: Of the next call: ``"hit"``, ``"capture"`` or ``"eager"``.
        cause: Why it runs eagerly.
        calls: How many there were, as far as is remembered.
        hits: How many the graph that there is now has answered.
        nbytes: Bytes that the graph owns.
        costs: What they take.
        nearest: The most similar call that has a graph, in words; empty if none is worth a look.
        differs: What differs from that one to this one, one line each.
        note: What else is to be known.
    """

    call: str
    outcome: Outcome
    cause: Cause | None = None
    calls: int = 0
    hits: int = 0
    nbytes: int = 0
    costs: Costs = field(default_factory=Costs)
    nearest: str = ""
    differs: tuple[str, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        what = {"hit": f"replays ({self.hits} so far)", "capture": "is captured at its next call"}
        lines = [f"{self.call}: {what.get(self.outcome, 'runs eagerly')}"]
        if self.cause is not None:
            lines.append(f"  {self.cause}")
        if self.nearest:
            lines.append(f"  the nearest with a graph is {self.nearest}; {', '.join(self.differs)}")
        lines += [f"  {text}" for text in (str(self.costs), self.note) if text]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a wrapped module does with its calls; ``print`` it.

    Args:
        module: Its name.
        calls: By signature; those with a graph first, then those called most.
        account: The account so far.
        parts: The same for the parts that are captured one by one.
    """

    module: str
    calls: tuple[Explained, ...]
    account: CacheInfo
    parts: tuple[Explanation, ...] = ()

    def __str__(self) -> str:
        info = self.account
        eager = sum(info.eager.values())
        counts = f"{info.hits} hits, {info.captures} captures, {eager} eager calls"
        lines = [f"{self.module}: {counts}; {info.graphs} graphs, {info.nbytes} bytes"]
        for each in self.calls[:_SHOWN]:
            lines += str(each).split("\n")
        if len(self.calls) > _SHOWN:
            lines.append(f"and {len(self.calls) - _SHOWN} more signatures")
        told = {each.cause.reason for each in self.calls[:_SHOWN] if each.cause is not None}
        for reason, count in info.eager.items():
            if reason not in told and not self.parts:
                lines.append(f"{count} eager calls, {Cause(reason)}")
        for part in self.parts:
            lines += str(part).split("\n")
        return "\n".join([lines[0], *(f"  {line}" for line in lines[1:])])

    def tree(self) -> dict[str, Any]:
        """The same for JSON; times in seconds, memory in bytes."""
        return {
            "module": self.module,
            "calls": [_tree(each) for each in self.calls],
            "eager": {reason.value: count for reason, count in self.account.eager.items()},
            "parts": [part.tree() for part in self.parts],
        }


def explain(module: CachedModule, *args: Any, **kwargs: Any) -> Explanation:
    """Say what becomes of a call, or of all calls so far.

    With arguments it says what the next such call would do, under the modes of this moment, without making it. Where
    there is a graph for it whose times nobody measured, both ways are measured now: the module runs eagerly and the
    graph is replayed, each some seven times; no counter shows it. Without arguments it
    goes through every signature that is remembered.

    Args:
        module: A wrapped module.
        args: Arguments of a call, which is not made.
        kwargs: Likewise.

    Raises:
        ConfigError: If ``module`` is not a wrapped module.
        ClosedError: After its ``close()``.
        Exception: Whatever an engine says of arguments that it does not take.

    Example:
        >>> import graphcache
        >>> fast = graphcache.wrap(torch.nn.ReLU())
        >>> _ = fast(torch.zeros(1, 77))
        >>> [call] = explain(fast, torch.zeros(1, 78)).calls
        >>> call.outcome, call.differs
        ('capture', ('`input` dim 1: 77 → 78',))
    """
    if not hasattr(module, "ledger") or not hasattr(module, "_misses"):
        raise ConfigError(f"expected a wrapped module, got {type(module).__name__}; wrap it with graphcache.wrap")
    module._misses.check_open()
    found = [_asked(module, args, kwargs)] if args or kwargs else _remembered(module)
    parts = tuple(explain(part) for part in module._parts.named().values())
    return Explanation(module._ledger.name, tuple(found), controls(module).cache_info(), parts)


def _asked(fast: CachedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Explained:
    """What the next call with these arguments would do."""
    try:
        args, kwargs, signature, inputs = described(fast, args, kwargs)
    except Refusal as refusal:
        return Explained("a call that no signature describes", "eager", refusal.cause)
    misses = fast._misses
    target = fast._bucketed.target(signature, args, kwargs) if fast._bucketed is not None else None
    found = _look(fast, target or signature)
    if (reason := misses.forbidden()) is not None:
        found = replace(found, outcome="eager", cause=Cause(reason), nearest="", differs=())
    elif (needs := misses.needs_grad(inputs)) is not None:
        found = replace(found, outcome="eager", cause=needs)
    elif fast._config.strategy == "per_submodule":
        found = replace(found, outcome="eager", cause=None, note="its parts are captured one by one")
    if target is not None:
        names = arguments_of(fast._module)
        note = f"it is padded: {', '.join(differences(words_of(signature, names), words_of(target, names)))}"
        found = replace(found, call=str(words_of(signature, names)), note=note)
    entry = fast._entries.get(target or signature)
    costs = found.costs
    is_measured = costs.eager is not None and costs.replay is not None
    if found.outcome == "hit" and entry is not None and target is None and not is_measured:
        found = replace(found, costs=_measured(fast, entry, costs, inputs, args, kwargs))
    return found


def _remembered(fast: CachedModule) -> list[Explained]:
    """Every signature that has a graph, was called lately without one, or could not be captured."""
    keys: dict[Hashable, None] = dict.fromkeys([*list(fast._entries), *fast._seen.keys()])
    found = [_look(fast, key) for key in keys if isinstance(key, tuple)]
    return sorted(found, key=lambda each: (each.outcome != "hit", -each.hits, -each.calls))


def _look(fast: CachedModule, signature: Signature) -> Explained:
    """What is known of a signature, whatever the modes of this moment."""
    misses, names = fast._misses, arguments_of(fast._module)
    entry = fast._entries.get(signature)
    words = words_of(signature, names)
    known = misses.admission.known(signature)
    hits = entry.hits if entry is not None else 0
    found = Explained(
        str(words) + "".join(f", {name} {value}" for name, value in words.modes.items()),
        "hit",
        calls=fast._seen.calls(signature, hits),
        hits=hits,
        nbytes=entry.nbytes if entry is not None else 0,
        costs=Costs(known.eager, known.replay, known.capture),
    )
    has_changed = misses._guard.has_changed()
    if entry is not None and entry.graph.version == misses._guard.version and not has_changed:
        return found
    if entry is not None:
        return replace(found, outcome="capture", note="the module has changed since its graph was captured")
    cause, note = misses.admission.ask(signature), ""
    if (blocked := misses.blocks.look(signature, misses._guard.version + has_changed)) is not None:
        cause, wait = blocked
        if wait is not None:
            calls = "1 call" if wait == 1 else f"{wait} calls"
            note = f"another capture is tried after {calls}" if wait else "it is looked at again at its next call"
    elif known.capture is not None:
        note = "it had a graph, which was evicted"
    nearest: str = ""
    differs: tuple[str, ...] = ()
    if cause is None or cause.reason in _PASSING:
        nearest, differs = _nearest(fast, words)
    outcome: Outcome = "capture" if cause is None else "eager"
    return replace(found, outcome=outcome, cause=cause, nearest=nearest, differs=differs, note=note)


def _nearest(fast: CachedModule, words: Words) -> tuple[str, tuple[str, ...]]:
    names = arguments_of(fast._module)
    others = [words_of(key, names) for key in list(fast._entries) if isinstance(key, tuple)]
    if not others:
        return "", ()
    nearest = min(others, key=lambda other: distance(other, words))
    return str(nearest), tuple(differences(nearest, words))


def _measured(
    fast: CachedModule,
    entry: Entry[Recorded],
    costs: Costs,
    inputs: Sequence[Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Costs:
    """Costs with both ways of a call measured, from its beginning until the device has finished."""
    given = fast._device_only(inputs)
    wait: Callable[[], object] = torch.cuda.synchronize if fast._misses.cuda else _nothing
    # A graph was verified: its call changes nothing, so it may be made again.
    try:
        with on_device(fast, inputs), graphs_off():
            eager = _typical(lambda: fast._misses.run(*args, **kwargs), wait)
            replay = _typical(lambda: entry.graph.replay(given), wait)
    except ClosedError:
        # Evicted by another thread meanwhile.
        return costs
    return replace(costs, eager=eager, replay=replay)


def _typical(call: Callable[[], object], wait: Callable[[], object]) -> float:
    def times() -> Iterator[float]:
        for _ in range(_SAMPLES):
            wait()
            start = time.perf_counter()
            call()
            wait()
            yield time.perf_counter() - start

    return statistics.median(times())


def _tree(each: Explained) -> dict[str, Any]:
    cause, calls = each.cause, each.costs.break_even
    return {
        "call": each.call,
        "outcome": each.outcome,
        "reason": None if cause is None else cause.reason.value,
        "cause": None if cause is None else str(cause),
        "remedy": None if cause is None else cause.reason.remedy,
        "calls": each.calls,
        "hits": each.hits,
        "nbytes": each.nbytes,
        "seconds": asdict(each.costs),
        "break_even": None if calls is None or math.isinf(calls) else calls,
        "nearest": each.nearest,
        "differs": list(each.differs),
        "note": each.note,
    }


def _duration(seconds: float) -> str:
    """A time with three digits.

    Example:
        >>> _duration(0.00418), _duration(41.25e-6), _duration(2.0)
        ('4.18 ms', '41.2 µs', '2 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def _nothing() -> None:
    """The host has nothing to wait for."""
