"""What captures leave behind in the host's memory: ``python -m bench.host_memory --engines DIR``.

A cache that evicts captures all the time; what each capture leaves behind decides how long a process lives. So the
same is done by hand, with TensorRT and the driver alone, and by graphcache:

- ``same-shape``: one context, one shape: enqueue, capture, instantiate, launch, destroy;
- ``changing-shapes``: the same, with another shape each time;
- ``new-contexts``: the same with a context for each capture, destroyed with its graph;
- ``graphcache-1``, ``graphcache-16``: ``graphcache.wrap`` with room for so many graphs, over more shapes than that.

Each runs in a process of its own, so that none finds what another has freed. The resident memory (RSS) of the process
is read at eleven points, after all shapes have come twice. The second half is given by itself, since what fills
something of a fixed size stops growing. Answers are held against torch's on the CPU at every point.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import calls as calls_of
from bench import processes, raw, record, store

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Step = Callable[[calls_of.Call], torch.Tensor]

SEED = 0
SHAPES = 64
"""How many shapes come in turn, if the engine has so many."""
POINTS = 10
"""Into how many parts the captures are divided that count."""
CASES = ("same-shape", "changing-shapes", "new-contexts", "graphcache-1", "graphcache-16")

_STATM = Path("/proc/self/statm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, record everything.

    Returns:
        0; 1 if a case could not be measured.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.host_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=Path, required=True, metavar="DIR", help="made by python -m bench.models")
    parser.add_argument("--only", nargs="+", default=["mlp8"], metavar="NAME", help="engines (default mlp8)")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, metavar="CASE", help="default: all")
    parser.add_argument("--captures", type=int, default=1000, metavar="N", help="that count, in each case (1000)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON; default: bench/results")
    options = parser.parse_args(arguments)
    if options.captures < POINTS:
        parser.error(f"--captures takes {POINTS} or more")
    if not _STATM.exists():
        raise SystemExit(f"the resident memory is read from {_STATM}, which Linux alone has")
    device = record.require_cuda("bench.host_memory")
    from graphcache.engines.library import library

    results = []
    bundles = {name: store.load(options.engines, name) for name in options.only}
    alone = len(bundles) == len(options.cases) == 1
    for name, bundle in bundles.items():
        for case in options.cases:
            result = here(bundle, case, options.captures, device) if alone else apart(options, name, case)
            print(f"{name}, {case}: {result.get('reason') or _said(result)}", file=sys.stderr, flush=True)
            results.append(result)
    library()  # or nothing of TensorRT would be in the environment, where every case has a process of its own
    payload = {
        "benchmark": "host_memory",
        "environment": record.environment(SEED),
        "engines": {name: dict(bundle.facts) for name, bundle in bundles.items()},
        "settings": {"captures": options.captures, "shapes": SHAPES},
        "results": results,
    }
    file = record.write("host_memory", payload, options.out)
    rows = [_row(result) for result in results if "reason" not in result]
    columns = ["engine", "case", "shapes", "captures", "KiB each", "second half", "MiB before", "MiB after"]
    record.table("resident memory of the host", columns, rows, 120)
    for result in results:
        if "reason" in result:
            print(f"not measured: {result['engine']}, {result['case']}: {result['reason']}")
    print(f"written to {file}")
    return int(any("reason" in result for result in results))


def apart(options: argparse.Namespace, name: str, case: str) -> dict[str, Any]:
    """Measure a case in a process of its own."""
    arguments = ["--engines", str(options.engines), "--only", name, "--cases", case]
    arguments += ["--captures", str(options.captures)]
    try:
        (result,) = processes.again("bench.host_memory", arguments, "host_memory")["results"]
    except processes.NothingRecordedError as error:
        return {"engine": name, "case": case, "reason": str(error)}
    found: dict[str, Any] = result
    return found


def here(bundle: store.Bundle, case: str, captures: int, device: torch.device) -> dict[str, Any]:
    """Measure a case in this process.

    Raises:
        SystemExit: If the engine has too few shapes for it, or an answer is wrong.
        RuntimeError: If TensorRT or the driver refuses something.
    """
    _, _, room = case.partition("graphcache-")
    sizes = calls_of.spread(bundle, 1 if case == "same-shape" else SHAPES)
    if case != "same-shape" and len(sizes) <= int(room or 1):
        raise SystemExit(f"{bundle.name} has {len(sizes)} shapes; {case} needs more than {room or 1}")
    pool = calls_of.pool(bundle, sizes, 1, device)
    with record.stream_scope(default_stream=False), torch.inference_mode():
        step, made = _graphcache(bundle, int(room)) if room else _by_hand(bundle, device, new=case == "new-contexts")
        found = watch(step, pool, captures, made)
    return {"engine": bundle.name, "case": case, "shapes": len(sizes), **found}


def watch(
    step: Step,
    pool: Sequence[calls_of.Call],
    captures: int,
    made: Callable[[], int],
    resident: Callable[[], int] | None = None,
) -> dict[str, Any]:
    """Read the resident memory while calls are captured.

    Args:
        step: Captures a call and gives its answer.
        pool: The calls, made in turn.
        captures: How many steps count, after two rounds that do not.
        made: How many captures there were so far.
        resident: In bytes; that of this process if ``None``.

    Returns:
        ``captures``, ``resident_bytes`` at each point, and ``kib_per_capture`` over all and over the second half.

    Raises:
        SystemExit: If an answer is wrong, or a step captured nothing.
    """
    turns = cycle(pool)
    points, counts = [], []
    for point in range(POINTS + 1):
        steps = captures * point // POINTS - captures * (point - 1) // POINTS if point else 2 * len(pool)
        for call in islice(turns, steps):
            answer = step(call)
        error = record.relative_error(answer, call.answer)
        if not error < store.TOLERANCE:
            raise SystemExit(f"the answer for size {call.size} was wrong by {error:.1e}")
        gc.collect()
        points.append((resident or resident_bytes)())
        counts.append(made())
    if counts[-1] - counts[0] != captures:
        raise SystemExit(f"{counts[-1] - counts[0]} captures were made in {captures} steps")
    half = POINTS // 2
    return {
        "captures": captures,
        "resident_bytes": points,
        "kib_per_capture": round((points[-1] - points[0]) / 1024 / captures, 3),
        "kib_per_capture_second_half": round((points[-1] - points[half]) / 1024 / (counts[-1] - counts[half]), 3),
    }


def resident_bytes() -> int:
    """The resident memory of this process."""
    return int(_STATM.read_text(encoding="ascii").split()[1]) * resource.getpagesize()


@dataclass(frozen=True)
class _Context:
    stream: torch.cuda.Stream
    context: Any

    def enqueue(self) -> None:
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise RuntimeError("TensorRT refused to run")


def _by_hand(bundle: store.Bundle, device: torch.device, *, new: bool) -> tuple[Step, Callable[[], int]]:
    from bench.peers.plain import PlainEngine

    engine = PlainEngine(bundle, device)
    stream = torch.cuda.Stream(device)
    kept = None if new else engine.new_context()
    count = 0

    def step(call: calls_of.Call) -> torch.Tensor:
        nonlocal count
        context = engine.new_context() if kept is None else kept
        engine.set_inputs(context, call.inputs)
        output = engine.new_output(context)
        work = _Context(stream, context)
        work.enqueue()
        stream.synchronize()
        # Only the launch may be what answers.
        output.fill_(float("nan"))
        raw.driver_graph(work).close()
        count += 1
        return output

    return step, lambda: count


def _graphcache(bundle: store.Bundle, room: int) -> tuple[Step, Callable[[], int]]:
    import graphcache

    module = graphcache.EngineModule(bundle.engine.read_bytes(), bundle.inputs, name=bundle.name)
    wrapped = graphcache.wrap(module, max_graphs=room)
    return lambda call: wrapped(*call.inputs), lambda: int(wrapped.cache_info().captures)


def _said(result: dict[str, Any]) -> str:
    each, half = result["kib_per_capture"], result["kib_per_capture_second_half"]
    return f"{each} KiB per capture, {half} in the second half"


def _row(result: dict[str, Any]) -> list[object]:
    before, *_, after = (size / 2**20 for size in result["resident_bytes"])
    rates = (result["kib_per_capture"], result["kib_per_capture_second_half"])
    return [result["engine"], result["case"], result["shapes"], result["captures"], *rates, before, after]


if __name__ == "__main__":
    raise SystemExit(main())
