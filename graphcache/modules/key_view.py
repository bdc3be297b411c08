"""What is known of the keys of one wrapped module, for whoever explains or saves it; this reads the core's tables."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal

from graphcache.dispatch.argument_names import arguments_of
from graphcache.errors import Cause
from graphcache.keys.call_spec import CallSpec
from graphcache.modules.transparent import StandIn
from graphcache.modules.wrapped import state_of

Status = Literal["captured", "changed", "evicted", "denied", "new"]

OFTEN = 8
"""Eager calls of a key after which it is saved although it has no graph."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What a signature was measured to take by its calls and its capture, in seconds; ``None`` where it was not.

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
class KeyView:
    """What is known of one key.

    Args:
        spec: The call.
        status: ``"captured"``, or why it is not: the module has ``"changed"`` since, the graph was ``"evicted"``, a
            capture was ``"denied"``, or the key is ``"new"``.
        cause: Why its next call runs eagerly; ``None`` if it does not.
        retry_after: How many calls of a denied key run eagerly before another capture is tried; ``None`` for all.
        calls: How many calls of it there were, as far as is remembered.
        answered: Likewise, with those that were padded to it, and without those that were captured.
        hits: How many calls its graph has answered.
        nbytes: Bytes that its graph owns.
        costs: What its calls and its capture have taken.
        is_worth_saving: Whether it had a graph, or was called often without one.
    """

    spec: CallSpec
    status: Status
    cause: Cause | None
    retry_after: int | None
    calls: int
    answered: int
    hits: int
    nbytes: int
    costs: Costs
    is_worth_saving: bool


@dataclass(frozen=True, slots=True)
class CallView:
    """What the next call with some arguments would do.

    Args:
        key: What is known of its key, or of the one that it is padded to.
        forbidden: Why it runs eagerly, whatever is known of the key; ``None`` if it does not.
        unpadded: The call itself, if it is padded.
        by_parts: Whether the parts of the module are captured instead of the whole.
    """

    key: KeyView
    forbidden: Cause | None
    unpadded: CallSpec | None
    by_parts: bool


def views_of(fast: StandIn, keys: list[Hashable] | None = None) -> list[KeyView]:
    """What is known of each key of a wrapped module.

    Args:
        fast: The module.
        keys: Which keys; ``None`` for all that are remembered.
    """
    captures, names = state_of(fast).dispatcher.captures, arguments_of(state_of(fast).module)
    entries, seen = captures.graphs.entries, captures.keys
    changed = captures.target.guard.has_changed()
    if keys is None:
        keys = list(dict.fromkeys([*list(entries), *seen.keys()]))
    found = []
    for key in keys:
        entry, account = entries.get(key), captures.admission.known(key)
        status: Status = "new" if account.capture is None else "evicted"
        cause = retry_after = None
        if entry is not None:
            status = "changed" if changed or entry.graph.version != captures.version else "captured"
        elif (denial := captures.keys.look(key, captures.version + changed)) is not None:
            status, (cause, retry_after) = "denied", denial
        else:
            cause = captures.admission.ask(key)
        hits = 0 if entry is None else entry.hits
        had_graph = entry is not None or account.capture is not None
        found.append(
            KeyView(
                CallSpec(key, names),
                status,
                cause,
                retry_after,
                calls=seen.calls(key, hits),
                answered=account.calls,
                hits=hits,
                nbytes=0 if entry is None else entry.nbytes,
                costs=Costs(account.eager, account.replay, account.capture),
                is_worth_saving=had_graph or account.calls - account.hits >= OFTEN,
            )
        )
    return found


def view_of_call(fast: StandIn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallView:
    """What the next call of a wrapped module with these arguments would do.

    Raises:
        Refusal: If no key describes them.
        Exception: Whatever an engine says of arguments that it does not take.
    """
    dispatcher = state_of(fast).dispatcher
    call = dispatcher.target.describe(args, kwargs)
    padded = None if dispatcher.padding is None else dispatcher.padding.target(call)
    reason = dispatcher.forbidden()
    [view] = views_of(fast, [padded or call.key])
    return CallView(
        view,
        Cause(reason) if reason is not None else dispatcher.captures.needs_grad(call.tensors),
        CallSpec(call.key, view.spec.names) if padded is not None else None,
        by_parts=dispatcher.config.strategy == "per_submodule",
    )


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
