"""Calls measured in turns, eagerly and through graphs, every answer held against the eager one."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import click

from graphcache import CachedModule, CacheInfo, Reason
from graphcache.cli.targets import Target, TargetCall
from graphcache.cli.timing import difference, timed, timed_apart
from graphcache.cli.verdict import verdict
from graphcache.errors import GraphCacheError
from graphcache.modules.transparent import controls
from graphcache.observe.result import Measured
from graphcache.serving.factories import raised


@dataclass(frozen=True, slots=True)
class Turn:
    """One call in both ways; times in nanoseconds.

    Args:
        eager: Without graphs.
        enqueue: What of that it took the host to enqueue it.
        graph: Through graphs.
        outcome: ``"hit"``, ``"capture"``, or the reason why it ran eagerly.
        replayed: Whether a graph took part, of the whole or of a part.
        wrong: How the answer differed; empty if it did not.
    """

    eager: int
    enqueue: int
    graph: int
    outcome: str
    replayed: bool
    wrong: str

    def measured(self, inputs: int) -> Measured:
        """The same for a result."""
        return Measured(inputs, self.outcome, self.graph / 1000, self.eager / 1000)


@dataclass
class Turns:
    """What the calls of one set of inputs gave.

    Args:
        call: The call.
        first: What the first one through graphs took, in nanoseconds, and its outcome.
        turns: Those that were measured.
        answer: The last one's.
    """

    call: TargetCall
    first: Turn
    turns: list[Turn] = field(default_factory=list)
    answer: Any = None

    @property
    def wrong(self) -> list[str]:
        """How answers differed."""
        return [turn.wrong for turn in (self.first, *self.turns) if turn.wrong]

    @property
    def reasons(self) -> list[str]:
        """Why measured calls ran eagerly."""
        return list(dict.fromkeys(turn.outcome for turn in self.turns if turn.outcome not in ("hit", "capture")))


def turn(found: Target, fast: CachedModule, call: TargetCall, *, graph_first: bool = False) -> tuple[Turn, Any]:
    """Make a call in both ways."""
    eagerly = functools.partial(found.module, *call.args, **call.kwargs)
    through = functools.partial(fast, *call.args, **call.kwargs)
    if not graph_first:
        expected, eager, enqueue = timed_apart(eagerly, found.device)
    before = controls(fast).cache_info()
    answer, graph = timed(through, found.device)
    after = controls(fast).cache_info()
    if graph_first:
        expected, eager, enqueue = timed_apart(eagerly, found.device)
    replayed = after.hits > before.hits
    wrong = (difference(answer, expected) or "") if replayed else ""
    return Turn(eager, enqueue, graph, outcome(before, after), replayed, wrong), answer


def measure(
    found: Target,
    fast: CachedModule,
    call: TargetCall,
    *,
    iterations: int,
    duration: float,
    warm_up: int,
) -> Turns:
    """Make one call again and again."""
    with refused(found, call):
        first, answer = turn(found, fast, call, graph_first=True)
        gathered = Turns(call, first, answer=answer)
        for _ in range(warm_up):
            turn(found, fast, call)
        end = time.monotonic() + duration
        while len(gathered.turns) < iterations or time.monotonic() < end:
            each, gathered.answer = turn(found, fast, call)
            gathered.turns.append(each)
    return gathered


def judge(found: Target, turns: Sequence[Turn]) -> dict[str, str]:
    """What the medians of some turns mean; of those in which graphs took part, if there are any."""
    hits = [each for each in turns if each.replayed]
    eager, enqueue, graph = (
        median([getattr(each, name) / 1000 for each in hits or turns]) for name in ("eager", "enqueue", "graph")
    )
    judged = verdict(eager=eager, enqueue=enqueue, graph=graph if hits else None, on_cuda=found.device.type == "cuda")
    return {"kind": judged.kind, "text": judged.text}


@contextmanager
def refused(found: Target, call: TargetCall) -> Iterator[None]:
    """Inside, what the module raises becomes one line."""
    try:
        yield
    except (GraphCacheError, click.ClickException):
        raise
    except Exception as error:
        raise click.ClickException(
            f"{found.name} refused {call.label or 'a call without inputs'}: {raised(error)}"
        ) from error


def outcome(before: CacheInfo, after: CacheInfo) -> str:
    """What became of the one call between two accounts. Parts may have had hits of their own in an eager one."""
    for reason, count in after.eager.items():
        if count > before.eager.get(reason, 0):
            return str(reason.value)
    if after.captures > before.captures:
        return "capture"
    return "hit" if after.hits > before.hits else str(Reason.DISABLED.value)


def nbytes_of(fast: CachedModule, call: TargetCall) -> int:
    """What the graph of a call owns, in bytes; 0 if there is none."""
    graph = controls(fast).graph_for(*call.args, **call.kwargs)
    return 0 if graph is None else int(graph.nbytes)
