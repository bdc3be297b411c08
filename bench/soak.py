"""A long run over more shapes than there is room for: ``python -m bench.soak --engines DIR [--calls N]``.

Traffic over the 64 batch sizes of mlp8 comes in phases. Each has a dozen favourites that arrive in bursts, and a few
strays; from phase to phase most favourites are others. The cache holds 16 graphs, so that graphs are evicted and
captured again all the time. Every hundredth answer is held against the bare engine and against torch on the CPU.

At ten points the device's memory, the process's, its file descriptors, graphs and contexts are counted. After the first
tenth, in which every size is seen, nothing may grow.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
from collections import Counter
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench import record, store

if TYPE_CHECKING:
    from collections.abc import Sequence

SEED = 0
MAX_GRAPHS = 16
POINTS = 10
CHECK_EVERY = 100

_FAVOURITES = 12
_KEPT = 4
_STRAYS = 3
_PHASE = 2_000
_VARIANTS = 4
_REPLAY_TOLERANCE = 1e-3
_SLACK = {
    # Other sizes are in the cache at each point, each with buffers of its own.
    "allocated_bytes": 4 << 20,
    "reserved_bytes": 32 << 20,
    "device_bytes": 64 << 20,
    "host_bytes": 64 << 20,
    "file_descriptors": 2,
}


def traffic(sizes: Sequence[int], calls: int, seed: int = SEED) -> list[int]:
    """The size of each call.

    Args:
        sizes: What there is; all of them come once, first.
        calls: How many calls, at least as many as there are sizes.
        seed: Of every choice.

    Returns:
        ``calls`` sizes, in bursts of 1 to 40.
    """
    draw = random.Random(seed)
    sequence = list(sizes)
    favourites = draw.sample(list(sizes), _FAVOURITES)
    while len(sequence) < calls:
        others = [size for size in sizes if size not in favourites]
        favourites = draw.sample(favourites, _KEPT) + draw.sample(others, _FAVOURITES - _KEPT)
        phase: list[int] = []
        while len(phase) < _PHASE:
            phase += [draw.choice(favourites)] * draw.randint(1, 40)
        for stray in draw.sample(list(sizes), _STRAYS):
            phase.insert(draw.randrange(len(phase)), stray)
        sequence += phase
    return sequence[:calls]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the traffic, print one row per point, record everything."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=Path, required=True, metavar="DIR", help="made by python -m bench.models")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON; default: bench/results")
    parser.add_argument("--calls", type=int, default=200_000, help="how many (default 200000)")
    parser.add_argument("--isolation", default="auto", choices=("auto", "full"), help="as in GraphConfig")
    parser.add_argument("--default-stream", action="store_true", help="call on torch's default stream")
    options = parser.parse_args(arguments)
    if options.calls < 1_000:
        parser.error(f"--calls {options.calls}: fewer than 1000 show nothing")
    device = record.require_cuda("bench.soak")
    bundle = store.load(options.engines, "mlp8")
    settings = {"isolation": options.isolation, "max_graphs": MAX_GRAPHS}
    with record.stream_scope(options.default_stream), torch.inference_mode():
        result, failures = _run(bundle, device, options.calls, settings)
    payload = {
        "benchmark": "soak",
        "environment": record.environment(SEED),
        "engine": dict(bundle.facts),
        "default_stream": options.default_stream,
        "settings": settings,
        "slack": _SLACK,
        **result,
        "failures": failures,
    }
    file = record.write("soak", payload, options.out)
    columns = ["calls", "captures", "allocated MiB", "reserved MiB", "device MiB", "host MiB", "files"]
    columns += ["graphs", "contexts"]
    record.table(f"{result['calls']} calls, {len(bundle.sizes())} sizes, {MAX_GRAPHS} graphs", columns, _rows(result))
    print(
        f"{result['checked']} answers checked, largest error {result['largest_error_to_eager']:.2g} (bare engine) and "
        f"{result['largest_error_to_torch']:.2g} (torch); {result['hits']} hits, {result['captures']} captures in "
        f"{result['capture_seconds']:.1f} s of {result['seconds']:.1f} s"
    )
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"written to {file}")
    return 1 if failures else 0


def _rows(result: dict[str, Any]) -> list[list[object]]:
    rows: list[list[object]] = []
    for point in result["points"]:
        sizes = [point[f"{name}_bytes"] / 2**20 for name in ("allocated", "reserved", "device", "host")]
        counts = [point[name] for name in ("file_descriptors", "graph_objects", "context_objects")]
        rows.append([point["calls"], point["captures"], *sizes, *counts])
    return rows


def _run(
    bundle: store.Bundle, device: torch.device, calls: int, settings: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    import graphcache

    engine = graphcache.load(bundle.engine)
    fast = graphcache.wrap(engine, **settings)
    inputs: dict[int, list[Tensor]] = {}
    answers: dict[int, list[Tensor]] = {}
    for size in bundle.sizes():
        cases = bundle.cases(size, _VARIANTS)
        inputs[size] = [case.inputs[0].to(device) for case in cases]
        answers[size] = [case.answer for case in cases]
        # The bare engine meets every size here, so that what it compiles for one does not count as growth.
        engine(inputs[size][0])
    sequence = traffic(bundle.sizes(), calls)
    failures: list[str] = []
    points: list[dict[str, int]] = []
    errors: dict[str, list[float]] = {"eager": [], "torch": []}
    start = perf_counter()
    for tenth in range(POINTS):
        begin, end = calls * tenth // POINTS, calls * (tenth + 1) // POINTS
        for number in range(begin, end):
            size = sequence[number]
            # Not always the same one where a call is checked.
            variant = (number + number // CHECK_EVERY) % _VARIANTS
            answer = fast(inputs[size][variant])
            if number % CHECK_EVERY == 0:
                to_eager = record.relative_error(answer, engine(inputs[size][variant]))
                to_torch = record.relative_error(answer, answers[size][variant])
                errors["eager"].append(to_eager)
                errors["torch"].append(to_torch)
                if not (to_eager <= _REPLAY_TOLERANCE and to_torch <= store.TOLERANCE):
                    failures.append(
                        f"call {number}, batch {size}: relative error {to_eager:.3g} to the bare engine "
                        f"(allowed {_REPLAY_TOLERANCE}), {to_torch:.3g} to torch (allowed {store.TOLERANCE})"
                    )
        del answer
        points.append({"calls": end, **_count(fast)})
        _tell(points[-1], perf_counter() - start)
    seconds = perf_counter() - start
    info = fast.cache_info()
    failures = failures[:20] + _grown(points) + _beyond_budget(points)
    if info.eager:
        failures.append(f"calls ran eagerly: { ({reason.value: count for reason, count in info.eager.items()}) }")
    if info.hits + info.captures != calls:
        failures.append(f"{info.hits} hits and {info.captures} captures for {calls} calls")
    fast.close()
    after = _count(fast)
    if after["graph_objects"]:
        failures.append(f"after closing, {after['graph_objects']} graphs are left")
    engine.close()
    if left := _count(fast)["context_objects"]:
        failures.append(f"after closing the engine, {left} contexts are left")
    return {
        "calls": calls,
        "seconds": seconds,
        "checked": len(errors["eager"]),
        "largest_error_to_eager": _largest(errors["eager"]),
        "largest_error_to_torch": _largest(errors["torch"]),
        "hits": info.hits,
        "captures": info.captures,
        "evictions": info.evictions,
        "capture_seconds": info.capture_seconds,
        "points": points,
        "after_closing": after,
    }, failures


def _count(fast: Any) -> dict[str, int]:
    from graphcache.engines.context import Context
    from graphcache.graphs.cuda import CudaGraph

    gc.collect()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    kinds = Counter(type(each) for each in gc.get_objects())
    info = fast.cache_info()
    return {
        "captures": info.captures,
        "cached_graphs": info.graphs,
        "allocated_bytes": torch.cuda.memory_allocated(),
        "reserved_bytes": torch.cuda.memory_reserved(),
        "device_bytes": total - free,
        "host_bytes": _host_bytes(),
        "file_descriptors": _file_descriptors(),
        "graph_objects": kinds[CudaGraph],
        "context_objects": kinds[Context],
    }


def _grown(points: Sequence[dict[str, int]]) -> list[str]:
    first = points[0]
    found = []
    for name, slack in _SLACK.items():
        worst = max(points[1:], key=lambda point: point[name])
        if worst[name] - first[name] > slack:
            found.append(
                f"{name} grew from {first[name]} after {first['calls']} calls to {worst[name]} after "
                f"{worst['calls']}, by more than {slack}"
            )
    return found


def _beyond_budget(points: Sequence[dict[str, int]]) -> list[str]:
    # One context per graph, one for the graph that is captured before another is evicted, and the bare engine's.
    limits = {"cached_graphs": MAX_GRAPHS, "graph_objects": MAX_GRAPHS, "context_objects": MAX_GRAPHS + 2}
    return [
        f"{point[name]} {name} after {point['calls']} calls, expected {limit} at most"
        for point in points
        for name, limit in limits.items()
        if point[name] > limit
    ]


def _largest(errors: Sequence[float]) -> float:
    # JSON has no infinity.
    return min(max(errors), 1e30)


def _host_bytes() -> int:
    resident = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(resident) * os.sysconf("SC_PAGE_SIZE")


def _file_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _tell(point: dict[str, int], seconds: float) -> None:
    print(
        f"{point['calls']} calls, {point['captures']} captures, {seconds:.0f} s, "
        f"device {point['device_bytes'] / 2**20:.0f} MiB, host {point['host_bytes'] / 2**20:.0f} MiB",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
