"""Measures one system: how it starts, what it keeps per shape, whether it is right, and what its calls cost."""

from __future__ import annotations

import gc
import sys
import time
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from bench import calls as calls_of
from bench import cores, record, store

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from bench.systems import Peer

FEWEST_CALLS = 50
"""Timed calls of a system, however slow it is."""
FEWEST_BURSTS = 10
"""Bursts in which its processor time is taken, likewise."""
MOST_PASSES = 30
"""Passes over all shapes after which a system that counts no misses is said not to become steady."""
MOST_SECONDS = 20.0
"""The same for any system: one that counts them may capture late on purpose, when a shape has been called often."""

_ALIKE = 3
_SPREAD = 2.0
_QUIET_SHARE = 0.1


@dataclass(frozen=True)
class Work:
    """What every system of one row of the table does.

    Args:
        bundle: The engine.
        sizes: That take turns.
        pool: The calls, some of each size.
        device: Where they run.
        calls: Timed calls of each system.
        seconds: About how long the timed calls of a system may take; slow ones make fewer.
        seed: Of the order in which two systems take turns.
    """

    bundle: store.Bundle
    sizes: Sequence[int]
    pool: Sequence[calls_of.Call]
    device: torch.device
    calls: int = 1000
    seconds: float = 5.0
    seed: int = 0

    def first(self, size: int) -> calls_of.Call:
        """The first call of a size."""
        return next(call for call in self.pool if call.size == size)


class Absent(Exception):
    """A system is not here; the message is the reason."""


class Wrong(Exception):
    """Answers were wrong; the message says how many."""


def measure(peer: Peer, work: Work, floor: Sequence[Callable[[], object]] | None = None) -> dict[str, Any]:
    """Load a system, measure it, close it.

    Args:
        peer: The system; closed afterwards, unless it is the floor itself.
        work: What to do.
        floor: One launch for each call of the pool, which takes turns with the system; ``None`` if it is the floor.

    Returns:
        Figures; or a ``reason`` in their place, with ``failed`` unless the system is just not here. Whatever it raises
        is a reason.
    """
    what = about(peer)
    try:
        # What packages print when they are loaded is no part of the table.
        with redirect_stdout(sys.stderr):
            if (reason := peer.available()) is not None:
                raise Absent(reason)
            what |= _measured(peer, work, floor)
    except (Absent, SystemExit) as absent:
        what["reason"] = str(absent)
    except Wrong as wrong:
        what |= {"reason": str(wrong), "failed": True}
    except Exception as error:
        what |= {"reason": first_line(error), "failed": True}
    if floor is not None or "reason" in what:
        what |= close(peer)
    return what


def about(peer: Peer) -> dict[str, Any]:
    """What is recorded of a system whether or not it could be measured."""
    return {"kind": peer.kind, "rival": peer.rival, "also": list(peer.also), "exact": peer.exact}


def close(peer: Peer) -> dict[str, str]:
    """Close a system; what it raises is noted under ``closing`` and stops nobody."""
    try:
        peer.close()
    except Exception as error:
        return {"closing": first_line(error)}
    finally:
        gc.collect()
    return {}


def first_line(error: BaseException) -> str:
    """What an exception says, in one line with its type."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    kind = type(error).__name__
    return f"{kind}: {text}" if text else kind


def become_steady(
    one_pass: Callable[[], object],
    misses: Callable[[], int | None],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float | None, int, float]:
    """Repeat a pass over all shapes until it costs no more than it ever will.

    Where calls that did more than a replay are counted, that is a pass without one. Where they are not, it is the first
    of three passes of which none took twice as long as the fastest of all.

    Args:
        one_pass: Calls every shape once and waits.
        misses: The count, or ``None``.
        clock: In seconds.

    Returns:
        Seconds until the first steady pass began, or ``None`` if there was none; how many passes were made; and the
        seconds that the last one took.
    """
    times: list[float] = []
    begun = clock()
    while not times or clock() - begun < MOST_SECONDS:
        before, start = misses(), clock()
        one_pass()
        times.append(clock() - start)
        after = misses()
        if before is None or after is None:
            alike = times[-_ALIKE:]
            if len(times) >= _ALIKE and max(alike) <= _SPREAD * min(times):
                return sum(times[:-_ALIKE]), len(times), times[-1]
            if len(times) == MOST_PASSES:
                break
        elif after == before:
            return sum(times[:-1]), len(times), times[-1]
    return None, len(times), times[-1]


def settle(
    limit: float = 10.0,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.perf_counter,
    used: Callable[[], float] = time.process_time,
) -> bool:
    """Wait until this process idles while it is not called: some compile kernels in the background.

    Args:
        limit: Seconds after which it is not waited any longer.
        sleep: Waits.
        clock: In seconds.
        used: Processor seconds of all threads so far.

    Returns:
        Whether it idles.
    """
    begun = clock()
    while clock() - begun < limit:
        start, busy = clock(), used()
        sleep(0.05)
        if used() - busy < _QUIET_SHARE * (clock() - start):
            return True
    return False


def device_lost(device: torch.device) -> bool:
    """Whether the device serves this process no longer.

    After an illegal access every further call fails, until the process has ended. Other errors are reported once.
    """
    if device.type != "cuda":
        return False
    for _ in range(2):
        with suppress(RuntimeError):
            torch.cuda.synchronize(device)
            return False
    return True


def at_rest(device: torch.device) -> tuple[int, int] | None:
    """Bytes in use on the device, and bytes that torch has handed out, after everything was waited for and given back.

    ``None`` on the host.
    """
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free, torch.cuda.memory_allocated(device)


def _measured(peer: Peer, work: Work, floor: Sequence[Callable[[], object]] | None) -> dict[str, Any]:
    wait = record.synchroniser()
    start = time.perf_counter()
    function = peer.load(work.bundle, work.device, work.sizes)
    wait()
    loaded = time.perf_counter()
    firsts = [work.first(size).inputs for size in work.sizes]
    function(*firsts[0])
    wait()
    first = time.perf_counter() - loaded

    def passing(inputs: Sequence[tuple[Tensor, ...]]) -> Callable[[], None]:
        def one_pass() -> None:
            for each in inputs:
                function(*each)
            wait()

        return one_pass

    one, passes, last = become_steady(passing(firsts[:1]), peer.misses)
    steady = one
    small = at_rest(work.device)
    if len(firsts) > 1:
        all_, passes, last = become_steady(passing(firsts), peer.misses)
        steady = None if one is None or all_ is None else one + all_
    large = at_rest(work.device)
    before = _errors(function, work.pool)
    _require_right(before, work.bundle.tolerance, "before timing")
    if work.device.type == "cuda":
        settle()

    timed = calls_of.in_turn([peer.timed(call.inputs) or partial(function, *call.inputs) for call in work.pool])
    per_call = last / len(firsts)
    count = min(work.calls, max(FEWEST_CALLS, int(work.seconds / max(per_call, 1e-9))))
    systems = {"system": timed} if floor is None else {"raw": calls_of.in_turn(floor), "system": timed}
    missed = peer.misses()
    # Enough for a median that a neighbour on the host does not move, within about the time of the calls.
    rounds = max(FEWEST_BURSTS, min(count // 10, int(work.seconds / max(per_call * peer.burst, 1e-9))))
    with cores.quietest():
        samples = record.interleave(systems, count, warmup=min(2 * len(work.pool), count), seed=work.seed)
        cpu = record.bursts(systems, rounds, peer.burst)
    now = peer.misses()
    after = _errors(function, work.pool)
    _require_right(after, work.bundle.tolerance, "after timing")
    ours, raw = samples["system"].summary(), samples["raw" if floor is not None else "system"].summary()
    return {
        "load_seconds": round(loaded - start, 4),
        "first_answer_seconds": round(first, 4),
        "steady_seconds": None if steady is None else round(first + steady, 4),
        "passes": passes,
        **ours,
        "cpu_burst_us": cpu["system"],
        "raw_cpu_burst_us": cpu["raw" if floor is not None else "system"],
        "raw_total_us": raw["total_us"],
        "total_over_raw": round(ours["total_us"]["p50"] / max(raw["total_us"]["p50"], 1e-3), 4),
        "memory_per_shape": _per_shape(small, large, len(firsts)),
        "largest_relative_error": max(before + after),
        "misses_while_timed": None if missed is None or now is None else now - missed,
    }


def _errors(function: Callable[..., Tensor], pool: Sequence[calls_of.Call]) -> list[float]:
    return [record.relative_error(function(*call.inputs), call.answer) for call in pool]


def _require_right(errors: Sequence[float], tolerance: float, when: str) -> None:
    if bad := [error for error in errors if not error < tolerance]:
        raise Wrong(f"{len(bad)} of {len(errors)} answers were wrong {when}, by up to {max(bad):.1e}")


def _per_shape(small: tuple[int, int] | None, large: tuple[int, int] | None, shapes: int) -> dict[str, int] | None:
    if small is None or large is None or shapes < 2:
        return None
    device, torch_ = ((after - before) // (shapes - 1) for before, after in zip(small, large, strict=True))
    return {"device_bytes": device, "torch_bytes": torch_}
