"""Which graphs to keep, on a device: ``python -m bench.traffic --engines DIR [traces] [memory] [background]``.

- ``traces``: three traces over one engine, with room for fewer graphs than shapes, for real: always eager, a graph for
  every miss with the least recently used out (``capture="first"``), and ``capture="worthwhile"``. The offline optimum
  beside them is computed from what eager calls, replays and captures took in this run.
- ``memory``: 1000 captures of a torch module under a budget of 256 MiB; what the allocator and the device say.
- ``background``: the latency of calls while 32 shapes are captured beside them, or within them, against eager calls.

Every 50th answer of a trace is held against torch on the CPU; a wrong one fails the run.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import record, store, traces
from bench.optimum import Times, optimum

SEED = 0
SLOTS = 16
SHAPES = 60
MEMORY_BUDGET = 256 * 2**20
SHARE = 1.05
"""What ``capture="worthwhile"`` may take of always-eager, and memory of its budget."""
OVER_OPTIMUM = 1.25
BESIDE = 1.5
"""What the 99th percentile of calls beside captures may take of that of eager calls."""
PARTS = ("traces", "memory", "background")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, print a table for each, record everything."""
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--engines", type=Path, required=True, metavar="DIR", help="made by python -m bench.models")
    parser.add_argument("--engine", default="mlp8", help="which of them (default mlp8)")
    parser.add_argument("--calls", type=int, default=20000, help="of each trace (default 20000)")
    parser.add_argument("--captures", type=int, default=1000, help="under the budget in bytes (default 1000)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON; default: bench/results")
    options = parser.parse_args(arguments)
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    device = record.require_cuda("bench.traffic")
    bundle = store.load(options.engines, options.engine)
    payload: dict[str, Any] = {
        "benchmark": "traffic",
        "environment": record.environment(SEED),
        "engine": dict(bundle.facts),
        "settings": {"calls": options.calls, "slots": SLOTS, "captures": options.captures},
        "failures": [],
    }
    run: dict[str, Callable[[], dict[str, Any]]] = {
        "traces": lambda: on_traces(bundle, device, options.calls),
        "memory": lambda: under_a_budget(device, options.captures),
        "background": lambda: beside_captures(bundle, device),
    }
    with torch.inference_mode(), record.stream_scope(default_stream=False):
        for part in options.parts or PARTS:
            payload[part] = run[part]()
            payload["failures"] += payload[part].pop("failures")
            # What was measured is kept, whatever becomes of the rest.
            file = record.write("traffic", payload, options.out)
    for failure in payload["failures"]:
        print(f"FAILED: {failure}")
    print(f"written to {file}")
    return 1 if payload["failures"] else 0


def on_traces(bundle: store.Bundle, device: torch.device, calls: int) -> dict[str, Any]:
    """Always eager, every miss captured, and what is worth it, on three traces."""
    import graphcache

    chosen = [
        traces.zipf(1.0, calls, shapes=SHAPES, seed=SEED),
        traces.phases(calls, count=4, shapes=SHAPES // 4, seed=SEED),
        traces.loop(calls, shapes=48),
    ]
    cases = {size: bundle.cases(size, 1)[0] for size in range(1, SHAPES + 1)}
    inputs = {size: tuple(value.to(device) for value in case.inputs) for size, case in cases.items()}
    rows, results, failures = [], [], []
    for traffic in chosen:
        sizes = [1 + signature % SHAPES for signature in traffic.calls]
        systems: dict[str, Any] = {}
        for name, policy in (("always eager", None), ("worthwhile", "worthwhile"), ("every miss", "first")):
            engine = graphcache.load(bundle.engine)
            module = engine if policy is None else graphcache.wrap(engine, capture=policy, max_graphs=SLOTS)
            limit = None if policy != "first" else 2 * systems["always eager"]["seconds"]
            systems[name] = _timed(module, sizes, inputs, cases, limit)
            if systems[name]["wrong"]:
                failures.append(f"{traffic.name}, {name}: {systems[name]['wrong']} answers were wrong")
            if policy is not None:
                info = module.cache_info()
                systems[name] |= {"captures": info.captures, "hits": info.hits, "evictions": info.evictions}
                systems[name]["capture_seconds"] = info.capture_seconds
                systems[name]["eager"] = {str(reason): count for reason, count in info.eager.items()}
                module.close()
            engine.close()
        costs = _costs(systems)
        best = optimum(sizes, dict.fromkeys(cases, costs), SLOTS)
        for name, system in systems.items():
            system["over_eager"] = round(system["per_call_us"] / systems["always eager"]["per_call_us"], 4)
            system["over_optimum"] = round(system["per_call_us"] * len(sizes) / 1e6 / best, 4)
            rows.append(
                [
                    traffic.name,
                    name,
                    system["per_call_us"],
                    system["over_eager"],
                    system["over_optimum"],
                    system.get("captures", 0),
                    system.get("hits", 0),
                ]
            )
        ours = systems["worthwhile"]
        if ours["over_eager"] > SHARE:
            failures.append(f"{traffic.name}: worthwhile took {ours['over_eager']} times always-eager")
        if traffic.favourites and ours["over_optimum"] > OVER_OPTIMUM:
            failures.append(f"{traffic.name}: worthwhile took {ours['over_optimum']} times the optimum")
        results.append({"trace": traffic.name, "optimum_seconds": best, "costs": costs._asdict(), "systems": systems})
    record.table("traces", ["trace", "system", "µs per call", "over eager", "over optimum", "captures", "hits"], rows)
    return {"results": results, "failures": failures}


def under_a_budget(device: torch.device, captures: int) -> dict[str, Any]:
    """The peak of device memory over many captures, against the budget."""
    import graphcache

    module = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024)).to(device).eval()
    module.requires_grad_(False)
    module(torch.zeros(captures, 1024, device=device))
    with graphcache.wrap(module, max_graphs=10 * captures, max_bytes=MEMORY_BUDGET) as fast:
        # What a first capture of anything takes, once: kernels, workspaces.
        fast(torch.zeros(1, 1024, device=device))
        # And what eager calls take beside it: a capture gives the workspaces of cuBLAS back, on all streams.
        module(torch.zeros(captures, 1024, device=device))
        before, wrong, most_device, most_nbytes = _at_rest(), 0, 0, 0
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        for index in range(captures):
            x = torch.randn(1 + (index * 389) % captures, 1024, device=device)
            y = fast(x)
            if index % 50 == 0:
                wrong += not torch.allclose(y, module(x), rtol=1e-3, atol=1e-3)
                del x, y
                most_device = max(most_device, _at_rest() - before)
            most_nbytes = max(most_nbytes, fast.cache_info().nbytes)
        info = fast.cache_info()
        peak = torch.cuda.max_memory_allocated() - allocated
    figures = {
        "budget_bytes": MEMORY_BUDGET,
        "captures": info.captures,
        "evictions": info.evictions,
        "graphs": info.graphs,
        "account_peak_bytes": most_nbytes,
        "allocator_peak_bytes": peak,
        "device_at_rest_bytes": most_device,
        "wrong": wrong,
    }
    failures = [f"memory: {wrong} answers were wrong"] if wrong else []
    failures += [
        f"memory: {name} is {figures[name]}, the budget is {MEMORY_BUDGET}"
        for name in ("account_peak_bytes", "allocator_peak_bytes", "device_at_rest_bytes")
        if figures[name] > SHARE * MEMORY_BUDGET
    ]
    record.table("memory", ["figure", "value"], [[name, value] for name, value in figures.items()])
    return {**figures, "failures": failures}


def beside_captures(bundle: store.Bundle, device: torch.device, shapes: int = 32) -> dict[str, Any]:
    """What calls take while shapes are captured, in the background and in the foreground."""
    import graphcache

    inputs = {size: tuple(v.to(device) for v in bundle.cases(size, 1)[0].inputs) for size in range(1, shapes + 1)}
    cases = {size: bundle.cases(size, 1)[0] for size in inputs}
    # Not the device: CUDA refuses to wait for all of it while any thread captures.
    wait = torch.cuda.current_stream().synchronize
    systems: dict[str, Any] = {}
    failures = []
    for name in ("eager", "background", "foreground"):
        engine = graphcache.load(bundle.engine)
        module = engine if name == "eager" else graphcache.wrap(engine, capture_in=name, max_graphs=shapes)
        bare = graphcache.load(bundle.engine)
        for each in (bare, engine):
            with graphcache.config.graphs_off():
                for size in inputs:
                    each(*inputs[size])
        wait()
        taken: list[int] = []
        begun = time.perf_counter()
        passes = 0
        # Until all are captured, as long as it takes; eager calls about as many.
        while passes < 40 if name == "eager" else module.cache_info().captures < shapes:
            for size in inputs:
                start = time.perf_counter_ns()
                module(*inputs[size])
                wait()
                taken.append(time.perf_counter_ns() - start)
            passes += 1
            if time.perf_counter() - begun > 60:
                failures.append(f"{name}: {module.cache_info().captures} of {shapes} captures in a minute")
                break
        systems[name] = record.summarise(taken) | {"most": max(taken) / 1000, "seconds": time.perf_counter() - begun}
        errors = [record.relative_error(module(*inputs[size]), cases[size].answer) for size in inputs]
        if bad := [error for error in errors if not error < store.TOLERANCE]:
            failures.append(f"{name}: {len(bad)} answers were wrong")
        for each in (module, engine, bare):
            if hasattr(each, "close"):
                each.close()
    ratio = round(systems["background"]["p99"] / systems["eager"]["p99"], 3)
    if ratio > BESIDE:
        failures.append(f"background: the 99th percentile is {ratio} times that of eager calls; the limit is {BESIDE}")
    columns = ["p50", "p90", "p99", "most", "n", "seconds"]
    rows = [[name, *(round(figures[key], 2) for key in columns)] for name, figures in systems.items()]
    record.table(f"calls while {shapes} shapes are captured, µs", ["system", *columns], rows)
    return {"systems": systems, "p99_over_eager": ratio, "failures": failures}


def _timed(
    module: Callable[..., Tensor],
    sizes: Sequence[int],
    inputs: dict[int, tuple[Tensor, ...]],
    cases: dict[int, store.Case],
    limit: float | None,
) -> dict[str, Any]:
    wait = record.synchroniser()
    taken: list[int] = []
    wrong = 0
    for index, size in enumerate(sizes):
        start = time.perf_counter_ns()
        answer = module(*inputs[size])
        wait()
        taken.append(time.perf_counter_ns() - start)
        if index % 50 == 0:
            wrong += not record.relative_error(answer, cases[size].answer) < store.TOLERANCE
        if limit is not None and index % 100 == 0 and sum(taken) / 1e9 > limit:
            break
    seconds = sum(taken) / 1e9
    return {
        "calls": len(taken),
        "seconds": seconds,
        "per_call_us": round(sum(taken) / len(taken) / 1000, 2),
        "call_us": record.summarise(taken),
        "wrong": wrong,
    }


def _costs(systems: dict[str, Any]) -> Times:
    """What calls took in this run on average: eagerly, replayed, and captured, as often as it was worth it."""
    ours = systems["worthwhile"]
    eager = systems["always eager"]["seconds"] / systems["always eager"]["calls"]
    replay = min(each["call_us"]["min"] for each in systems.values()) / 1e6
    capture = ours["capture_seconds"] / max(ours["captures"], 1)
    return Times(eager, replay, capture)


def _at_rest() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


if __name__ == "__main__":
    raise SystemExit(main())
