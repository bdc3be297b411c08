"""Which graphs to keep, on a device: ``python -m bench.traffic --engines DIR [traces] [memory] [background]``.

- ``traces``: three traces over one engine, with room for fewer graphs than shapes, for real and in turn: always eager,
  a graph for every miss with the least recently used out (``capture="first"``), and ``capture="worthwhile"``. The
  offline optimum beside them is computed from what eager calls and replays of each shape, and captures, took on average
  in this run; what replays take is seen where every shape is held. Every shape has run twice before.
  A trace should take ten times what capturing a full cache takes: 5 % over always-eager mean nothing where a single
  capture takes more than that. The default is as long as a minute at 800 calls a second; over shorter ones, what it
  takes to learn what is hot counts for more.
- ``memory``: 1000 captures of a torch module under a budget of 256 MiB; what the allocator and the device say.
- ``background``: the latency of calls while 32 shapes are captured beside them, or within them, against eager calls.

Every 50th answer of a trace is held against torch on the CPU; a wrong one fails the run.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import record, store, traces
from bench.optimum import Times, optimum

SEED = 0
SLOTS = 16
MEMORY_BUDGET = 256 * 2**20
SHARE = 1.05
"""What ``capture="worthwhile"`` may take of always-eager, and memory of its budget."""
OVER_OPTIMUM = 1.25
BESIDE = 1.5
"""What the 99th percentile of calls beside captures may take of that of eager calls."""
SLICE = 250
SYSTEMS: dict[str, dict[str, Any] | None] = {
    "always eager": None,
    "worthwhile": {"capture": "worthwhile", "max_graphs": SLOTS},
    "every miss": {"capture": "first", "max_graphs": SLOTS},
    "every shape held": {"capture": "prepared", "max_graphs": 1000},
}
"""Options of ``wrap``; the last one has more room than the others, and shows what replays take."""
_SHOWN = ("per_call_us", "over_eager", "over_optimum", "captures", "hits")
PARTS = ("traces", "memory", "background")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, print a table for each, record everything."""
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--engines", type=Path, required=True, metavar="DIR", help="made by python -m bench.models")
    parser.add_argument("--engine", default="mlp8", help="which of them (default mlp8)")
    parser.add_argument("--calls", type=int, default=48000, help="of each trace (default 48000)")
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
    """Always eager, every miss captured, what is worth it, and every shape held, on three traces."""
    cases = {size: bundle.cases(size, 1)[0] for size in bundle.sizes()}
    chosen = [
        traces.zipf(1.0, calls, shapes=len(cases), seed=SEED),
        traces.phases(calls, count=3, shapes=len(cases) // 3, seed=SEED),
        traces.loop(calls, shapes=3 * SLOTS),
    ]
    inputs = {size: tuple(value.to(device) for value in case.inputs) for size, case in cases.items()}
    rows, results, failures = [], [], []
    for traffic in chosen:
        # Sizes of inputs in any order, so that what is hot is not what is small.
        sizes = [list(cases)[signature] for signature in traffic.calls]
        walks = {name: _Walk(bundle, options, inputs, cases) for name, options in SYSTEMS.items()}
        # Slice by slice in turn, so that a host that slows down does so for all of them.
        for begin in range(0, len(sizes), SLICE):
            for name, walk in walks.items():
                # Enough was seen of one that takes several times as long.
                if name != "every miss" or walk.seconds <= walks["always eager"].seconds / 4 + 2:
                    walk.go(sizes[begin : begin + SLICE])
        systems = {name: walk.close() for name, walk in walks.items()}
        failures += [
            f"{traffic.name}, {name}: {system['wrong']} answers were wrong"
            for name, system in systems.items()
            if system["wrong"]
        ]
        costs = _costs(systems)
        best = optimum(sizes, costs, SLOTS)
        for name, system in systems.items():
            system["over_eager"] = round(system["per_call_us"] / systems["always eager"]["per_call_us"], 4)
            system["over_optimum"] = round(system["per_call_us"] * len(sizes) / 1e6 / best, 4)
            shown = (system[key] for key in _SHOWN)
            rows.append([traffic.name, name, *shown])
        ours = systems["worthwhile"]
        if ours["over_eager"] > SHARE:
            failures.append(f"{traffic.name}: worthwhile took {ours['over_eager']} times always-eager")
        if traffic.favourites and ours["over_optimum"] > OVER_OPTIMUM:
            failures.append(f"{traffic.name}: worthwhile took {ours['over_optimum']} times the optimum")
        told = {size: each._asdict() for size, each in costs.items()}
        results.append(
            {
                "trace": traffic.name,
                "optimum_seconds": best,
                "costs": told,
                "systems": systems,
            }
        )
    columns = ["µs per call", "over eager", "over optimum", "captures", "hits"]
    record.table("traces", ["trace", "system", *columns], rows)
    return {"results": results, "failures": failures}


class _Walk:
    """One system on its way through a trace."""

    def __init__(
        self,
        bundle: store.Bundle,
        options: dict[str, Any] | None,
        inputs: dict[int, tuple[Tensor, ...]],
        cases: dict[int, store.Case],
    ) -> None:
        import graphcache

        self._inputs, self._cases = inputs, cases
        self._engine = graphcache.load(bundle.engine)
        self._module: Any = self._engine if options is None else graphcache.wrap(self._engine, **options)
        # The first calls of a shape take tens of milliseconds, in a new process, whoever makes them.
        with graphcache.config.graphs_off():
            for values in (*inputs.values(), *inputs.values()):
                self._engine(*values)
        if options is not None and options["max_graphs"] >= len(inputs):
            self._module.prepare(*inputs.values(), progress=False)
        self._taken: list[int] = []
        self._sizes: list[int] = []
        self._wrong = 0
        self.seconds = 0.0

    def go(self, sizes: Sequence[int]) -> None:
        """Make some more calls; every 50th answer is held against torch."""
        # To wait for the whole context takes longer the more graphs and contexts there are: 280 µs with a few hundred.
        wait = torch.cuda.current_stream().synchronize
        for size in sizes:
            start = time.perf_counter_ns()
            answer = self._module(*self._inputs[size])
            wait()
            self._taken.append(time.perf_counter_ns() - start)
            self._sizes.append(size)
            if len(self._taken) % 50 == 1:
                self._wrong += not record.relative_error(answer, self._cases[size].answer) < store.TOLERANCE
        self.seconds = sum(self._taken) / 1e9

    def close(self) -> dict[str, Any]:
        """What came of it."""
        found: dict[str, Any] = {
            "calls": len(self._taken),
            "seconds": self.seconds,
            "per_call_us": round(self.seconds / len(self._taken) * 1e6, 2),
            "call_us": record.summarise(self._taken),
            "mean_seconds": self._means(),
            "wrong": self._wrong,
            "captures": 0,
            "hits": 0,
        }
        if self._module is not self._engine:
            info = self._module.cache_info()
            found |= {"captures": info.captures, "hits": info.hits, "evictions": info.evictions}
            found["capture_seconds"] = info.capture_seconds
            found["eager"] = {str(reason): count for reason, count in info.eager.items()}
            self._module.close()
        self._engine.close()
        return found

    def _means(self) -> dict[int, float]:
        sums: Counter[int] = Counter()
        for size, nanoseconds in zip(self._sizes, self._taken, strict=True):
            sums[size] += nanoseconds
        return {size: sums[size] / count / 1e9 for size, count in Counter(self._sizes).items()}


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


def _costs(systems: dict[str, Any]) -> dict[int, Times]:
    """What calls of each size took in this run on average: eagerly, replayed; and captures of any size.

    An eager call of a size that is rare takes longer than one of a size that comes again and again.
    """
    ours = systems["worthwhile"]
    eager, replay = (systems[name]["mean_seconds"] for name in ("always eager", "every shape held"))
    capture = ours["capture_seconds"] / max(ours["captures"], 1)
    return {size: Times(eager[size], replay[size], capture) for size in eager}


def _at_rest() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


if __name__ == "__main__":
    raise SystemExit(main())
