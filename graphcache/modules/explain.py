"""Which calls of a wrapped module replay, which don't and why, what that costs, and what would change it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from graphcache import native
from graphcache.cache.key_table import KeyState
from graphcache.dispatch.background import PENDING
from graphcache.dispatch.dispatcher import Dispatcher
from graphcache.dispatch.targets import arguments_of
from graphcache.errors import Cause, ConfigError, Reason, Refusal
from graphcache.keys.call_spec import CallSpec
from graphcache.modules.transparent import TransparentModule, controls, dispatcher_of
from graphcache.modules.wrapped import CacheInfo

_SHOWN = 20
_PASSING = frozenset(
    {Reason.UNSETTLED, Reason.COLD, Reason.PENDING, Reason.NOT_PREPARED, Reason.OVER_BUDGET, Reason.GRAD}
)
"""Reasons that say nothing of the operations, so that another call may well have a graph."""
_RETRIES = {None: "", 0: "it is looked at again at its next call", 1: "another capture is tried after 1 call"}
"""What is said of a denied key, by the number of calls until a capture is tried again."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What a call without a graph, a replay and the capture of a key took, in seconds; ``None`` if not measured."""

    eager: float | None = None
    replay: float | None = None
    capture: float | None = None

    @property
    def break_even(self) -> float | None:
        """Replays after which the capture is paid for; ``inf`` if never, ``None`` if that is not known."""
        if self.eager is None or self.replay is None or self.capture is None:
            return None
        saving = self.eager - self.replay
        return math.ceil(self.capture / saving) if saving > 0 else math.inf

    def __str__(self) -> str:
        known = {name: value for name, value in asdict(self).items() if value is not None}
        text, calls = ", ".join(f"{name} {_duration(value)}" for name, value in known.items()), self.break_even
        if calls is None:
            return text
        return f"{text}: " + ("a replay saves nothing" if math.isinf(calls) else f"paid for after {calls} replays")


@dataclass(frozen=True, slots=True)
class Explained:
    """What is known of one key, and what becomes of its calls."""

    call: str
    """Its arguments in words."""
    outcome: Literal["hit", "capture", "eager"]
    """Of the next call."""
    cause: Cause | None = None
    """Why it runs eagerly."""
    calls: int = 0
    """How many there were, as far as is remembered."""
    hits: int = 0
    """How many the graph that there is now has answered."""
    nbytes: int = 0
    costs: Costs = field(default_factory=Costs)
    nearest: str = ""
    """The most similar call that has a graph, in words; empty if none is worth a look."""
    differs: tuple[str, ...] = ()
    """What differs from that one to this one, one line each."""
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
        return {
            **{name: getattr(self, name) for name in ("call", "outcome", "calls", "hits", "nbytes", "nearest", "note")},
            "reason": None if cause is None else cause.reason.value,
            "cause": None if cause is None else str(cause),
            "remedy": None if cause is None else cause.reason.remedy,
            "seconds": asdict(self.costs),
            "break_even": None if replays is None or math.isinf(replays) else replays,
            "differs": list(self.differs),
        }


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a wrapped module does with its calls; ``print`` it."""

    module: str
    calls: tuple[Explained, ...]
    """By key; those with a graph first, then those called most."""
    account: CacheInfo
    parts: tuple[Explanation, ...] = ()
    """The same for the submodules that are captured one by one."""
    native_code: str = ""
    """``"active"``, or why Python answers hits and compares guards. Empty for a submodule."""

    def __str__(self) -> str:
        info = self.account
        eager = sum(info.eager.values())
        counts = f"{info.hits} hits, {info.captures} captures, {eager} eager calls"
        lines = [f"{self.module}: {counts}; {info.graphs} graphs, {info.nbytes} bytes"]
        if self.native_code not in ("", "active"):
            lines.append(f"native code is not active: {self.native_code}")
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
            "native_code": self.native_code,
        }


def explain(module: TransparentModule, *args: Any, **kwargs: Any) -> Explanation:
    """Say what becomes of a call, or of all calls so far.

    With arguments it says what the next such call would do, under the modes of this moment; the module is not run.
    With ``capture="worthwhile"`` the times of all calls are measured, otherwise those of some.

    Raises:
        ConfigError: If ``module`` is not a wrapped module.
        ClosedError: After its ``close()``.
        Exception: Whatever an engine says of arguments that it does not take.

    Example:
        >>> import torch, graphcache
        >>> fast = graphcache.wrap(torch.nn.ReLU())
        >>> _ = fast(torch.zeros(1, 77))
        >>> [call] = explain(fast, torch.zeros(1, 78)).calls
        >>> call.outcome, call.differs
        ('capture', ('`input` dim 1: 77 → 78',))
    """
    if not isinstance(module, TransparentModule):
        raise ConfigError(f"expected a wrapped module, got {type(module).__name__}; wrap it with graphcache.wrap")
    dispatcher, control = dispatcher_of(module), controls(module)
    dispatcher.check_open()
    if args or kwargs:
        calls = [_of_call(dispatcher, args, kwargs)]
    else:
        calls = _of_keys(dispatcher, dispatcher.captures.keys.known())
        calls.sort(key=lambda each: (each.outcome != "hit", -each.hits, -each.calls))
    parts = tuple(replace(explain(part), native_code="") for part in control.parts.values())
    return Explanation(dispatcher.ledger.name, tuple(calls), control.cache_info(), parts, native.status())


def _of_keys(dispatcher: Dispatcher, keys: Sequence[Any], cause: Cause | None = None) -> list[Explained]:
    """What is known of some keys. Their next calls run eagerly if a ``cause`` is given, whatever is known."""
    captures, names = dispatcher.captures, arguments_of(dispatcher.target.module)
    # No graph is of this version if the module has changed.
    version = captures.version + captures.target.guard.has_changed()
    graphs = [CallSpec(key, names) for key in list[Any](dispatcher.entries)]
    found = []
    for key in keys:
        entry, state = dispatcher.entries.get(key), captures.keys.states.get(key) or KeyState(0.0)
        is_current = entry is not None and entry.graph.version == version
        reason, note = None, "it had a graph, which was evicted" if state.capture.count else ""
        if entry is not None:
            note = "" if is_current else "the module has changed since its graph was captured"
            if not is_current and state.denial is not None and state.denial.wait(version):
                reason = state.denial.cause
        elif dispatcher.queue.is_pending(key):
            reason = PENDING
        elif (denial := state.denial) is not None:
            reason, retry_after = denial.cause, denial.wait(version)
            note = _RETRIES.get(retry_after, f"another capture is tried after {retry_after} calls")
        else:
            reason = captures.admission.ask(key)
        spec = CallSpec(key, names)
        has_near = cause is None and entry is None and (reason is None or reason.reason in _PASSING)
        near = min(graphs, key=spec.distance, default=None) if has_near else None
        found.append(
            Explained(
                str(spec) + "".join(f", {name} {value}" for name, value in spec.modes.items()),
                "eager" if cause or reason else "hit" if is_current else "capture",
                cause or reason,
                calls=captures.keys.calls(key),
                hits=0 if entry is None else entry.hits,
                nbytes=0 if entry is None else entry.nbytes,
                costs=Costs(state.eager.known, state.replay.known, state.capture.known),
                nearest="" if near is None else str(near),
                differs=() if near is None else tuple(near.diff(spec)),
                note=note,
            )
        )
    return found


def _of_call(dispatcher: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Explained:
    try:
        call = dispatcher.target.describe(args, kwargs)
    except Refusal as refusal:
        return Explained("a call that no signature describes", "eager", refusal.cause)
    key, names = dispatcher.key_of(call), arguments_of(dispatcher.target.module)
    cause = dispatcher.forbidden() or dispatcher.captures.needs_grad(call.tensors)
    [found] = _of_keys(dispatcher, [key], cause)
    if key is not call.key:
        own = CallSpec(call.key, names)
        found = replace(found, call=str(own), note=f"it is padded: {', '.join(own.diff(CallSpec(key, names)))}")
    if cause is None and dispatcher.config.strategy == "per_submodule":
        note = "its parts are captured one by one"
        return replace(found, outcome="eager", cause=None, nearest="", differs=(), note=note)
    return found


def _duration(seconds: float) -> str:
    size, unit = (1, "s") if seconds >= 1 else (1e-3, "ms") if seconds >= 1e-3 else (1e-6, "µs")
    return f"{seconds / size:.3g} {unit}"
