"""Which calls of a wrapped module replay, which don't and why, what that costs, and what would change it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from graphcache.errors import Cause, ConfigError, Reason, Refusal
from graphcache.keys.call_spec import CallSpec
from graphcache.modules.controls import controls
from graphcache.modules.info import CacheInfo
from graphcache.modules.key_view import Costs, KeyView, view_of_call, views_of
from graphcache.modules.transparent import StandIn
from graphcache.modules.wrapped import state_of

Outcome = Literal["hit", "capture", "eager"]

_SHOWN = 20
_PASSING = frozenset({Reason.COLD, Reason.PENDING, Reason.NOT_PREPARED, Reason.OVER_BUDGET, Reason.GRAD})
"""Reasons that say nothing of the operations, so that another call may well have a graph."""


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

    def tree(self) -> dict[str, Any]:
        """The same for JSON; times in seconds, memory in bytes."""
        cause, replays = self.cause, self.costs.break_even
        found = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("cause", "costs")}
        return found | {
            "reason": None if cause is None else cause.reason.value,
            "cause": None if cause is None else str(cause),
            "remedy": None if cause is None else cause.reason.remedy,
            "seconds": asdict(self.costs),
            "break_even": None if replays is None or math.isinf(replays) else replays,
            "differs": list(self.differs),
        }


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
            "calls": [each.tree() for each in self.calls],
            "eager": {reason.value: count for reason, count in self.account.eager.items()},
            "parts": [part.tree() for part in self.parts],
        }


def explain(module: StandIn, *args: Any, **kwargs: Any) -> Explanation:
    """Say what becomes of a call, or of all calls so far.

    With arguments it says what the next such call would do, under the modes of this moment. Without arguments it goes
    through every signature that is remembered. The module is not run. Times are those that its calls and captures have
    taken; with ``capture="worthwhile"`` all of them are measured, otherwise some.

    Args:
        module: A wrapped module.
        args: Arguments of a call, which is not made.
        kwargs: Likewise.

    Raises:
        ConfigError: If ``module`` is not a wrapped module.
        ClosedError: After its ``close()``.
        Exception: Whatever an engine says of arguments that it does not take.

    Example:
        >>> import torch
        >>> import graphcache
        >>> fast = graphcache.wrap(torch.nn.ReLU())
        >>> _ = fast(torch.zeros(1, 77))
        >>> [call] = explain(fast, torch.zeros(1, 78)).calls
        >>> call.outcome, call.differs
        ('capture', ('`input` dim 1: 77 → 78',))
    """
    if not isinstance(module, StandIn):
        raise ConfigError(f"expected a wrapped module, got {type(module).__name__}; wrap it with graphcache.wrap")
    state_of(module).dispatcher.check_open()
    control = controls(module)
    views = [view for view in views_of(module) if view.status != "new" or view.calls]
    graphs = [view.spec for view in views if view.status in ("captured", "changed")]
    if args or kwargs:
        found = [_of_call(module, args, kwargs, graphs)]
    else:
        found = [_of_key(view, graphs) for view in views]
        found.sort(key=lambda each: (each.outcome != "hit", -each.hits, -each.calls))
    parts = tuple(explain(part) for part in control.parts.values())
    return Explanation(control.ledger.name, tuple(found), control.cache_info(), parts)


def _of_call(module: StandIn, args: tuple[Any, ...], kwargs: dict[str, Any], graphs: Sequence[CallSpec]) -> Explained:
    """What the next call with these arguments would do."""
    try:
        call = view_of_call(module, args, kwargs)
    except Refusal as refusal:
        return Explained("a call that no signature describes", "eager", refusal.cause)
    found = _of_key(call.key, graphs)
    if call.forbidden is not None:
        found = replace(found, outcome="eager", cause=call.forbidden, nearest="", differs=())
    elif call.by_parts:
        found = replace(found, outcome="eager", cause=None, note="its parts are captured one by one")
    if call.unpadded is not None:
        note = f"it is padded: {', '.join(call.unpadded.diff(call.key.spec))}"
        found = replace(found, call=str(call.unpadded), note=note)
    return found


def _of_key(view: KeyView, graphs: Sequence[CallSpec]) -> Explained:
    """What becomes of the calls of one key, whatever the modes of this moment."""
    outcome: Outcome = "hit" if view.status == "captured" else "capture" if view.cause is None else "eager"
    note = {
        "changed": "the module has changed since its graph was captured",
        "evicted": "it had a graph, which was evicted",
    }.get(view.status, "")
    if view.status == "denied" and view.retry_after == 0:
        note = "it is looked at again at its next call"
    elif view.status == "denied" and view.retry_after is not None:
        note = f"another capture is tried after {view.retry_after} call{'s' * (view.retry_after != 1)}"
    nearest, differs = "", tuple[str, ...]()
    if view.status not in ("captured", "changed") and graphs and (view.cause is None or view.cause.reason in _PASSING):
        near = min(graphs, key=lambda spec: spec.distance(view.spec))
        nearest, differs = str(near), tuple(near.diff(view.spec))
    return Explained(
        str(view.spec) + "".join(f", {name} {value}" for name, value in view.spec.modes.items()),
        outcome,
        view.cause,
        view.calls,
        view.hits,
        view.nbytes,
        view.costs,
        nearest,
        differs,
        note,
    )
