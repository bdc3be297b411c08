"""What a call costs when there are more shapes than graphs: ``python -m bench.evictions --engines DIR [NAME ...]``.

Shapes take turns, and there is room for a third of them, so that with the least recently used out first every call is a
miss. Beside each other, pass by pass in turn:

- ``eager``: the bare engine;
- ``captured``: every miss is captured anew;
- ``held``: there is room for all of them, so that every call is a hit.

And where the time of a capture goes. Answers are held against torch on the CPU before and after.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest import mock

import torch

from bench import calls as calls_of
from bench import record, store

SEED = 0
PHASES = {
    "execution context": ("graphcache.engines.engine.Engine.new_context",),
    "eager runs and capture": ("graphcache.engines.context.Context.enqueue",),
    "addresses": ("graphcache.capture.engine_recorder.find_pointers",),
    "instantiate": ("graphcache.graphs.driver.instantiate",),
    "verification": ("graphcache.capture.engine_recorder.verify",),
    "look at others of the context": ("graphcache.capture.context_groups.SharedContexts._answers",),
    "close what was evicted": ("graphcache.graphs.cuda.CudaGraph.close",),
}
"""What is timed while a graph is made, and the functions that do it; they do not call each other."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure engine by engine, print the tables, record everything."""
    parser = argparse.ArgumentParser(prog="python -m bench.evictions", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["mlp8", "policy"], metavar="NAME", help="default: mlp8 policy")
    parser.add_argument("--engines", type=Path, required=True, metavar="DIR", help="made by python -m bench.models")
    parser.add_argument("--shapes", type=int, default=12, help="how many take turns (default 12)")
    parser.add_argument("--passes", type=int, default=40, help="over all of them (default 40)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON; default: bench/results")
    options = parser.parse_args(arguments)
    device = record.require_cuda("bench.evictions")
    payload: dict[str, Any] = {
        "benchmark": "evictions",
        "environment": record.environment(SEED),
        "engines": {},
        "settings": {"shapes": options.shapes, "passes": options.passes},
        "results": [],
        "failures": [],
    }
    with record.stream_scope(default_stream=False), torch.inference_mode():
        for name in options.names:
            bundle = store.load(options.engines, name)
            result, failures = measure(bundle, options.shapes, options.passes, device)
            payload["engines"][name] = dict(bundle.facts)
            payload["results"].append(result)
            payload["failures"] += failures
            file = record.write("evictions", payload, options.out)
    _print(payload["results"])
    for failure in payload["failures"]:
        print(f"FAILED: {failure}")
    print(f"written to {file}")
    return 1 if payload["failures"] else 0


def measure(bundle: store.Bundle, shapes: int, passes: int, device: torch.device) -> tuple[dict[str, Any], list[str]]:
    """The figures of one engine, and what went wrong."""
    import graphcache

    sizes = calls_of.spread(bundle, shapes)
    room = max(len(sizes) // 3, 1)
    engine = graphcache.load(bundle.engine)
    pool = calls_of.pool(bundle, sizes, 1, device, engine.input_binding_names)
    with graphcache.config.graphs_off():
        for call in (*pool, *pool):
            engine(*call.inputs)
    systems: dict[str, Any] = {
        "eager": engine,
        "captured": graphcache.wrap(engine, max_graphs=room),
        "held": graphcache.wrap(engine, max_graphs=len(sizes)),
    }
    failures = _wrong(bundle, pool, systems, "before timing")
    taken: dict[str, list[int]] = {name: [] for name in systems}
    phases: dict[str, dict[str, float]] = {name: {} for name in systems}
    begun = {name: _captures(module) for name, module in systems.items()}
    order = random.Random(SEED)
    wait = torch.cuda.current_stream().synchronize
    for _ in range(passes):
        for name in order.sample(list(systems), len(systems)):
            with timed(phases[name]):
                for call in pool:
                    wait()
                    start = time.perf_counter_ns()
                    systems[name](*call.inputs)
                    wait()
                    taken[name].append(time.perf_counter_ns() - start)
    made = {name: _captures(module) - begun[name] for name, module in systems.items()}
    calls = passes * len(pool)
    if made != {"eager": 0, "captured": calls, "held": 0}:
        failures.append(f"{bundle.name}: of {calls} calls so many were captured: {made}")
    failures += _wrong(bundle, pool, systems, "after timing")
    result = {
        "engine": bundle.name,
        "sizes": sizes,
        "room": room,
        "systems": {name: {"total_us": record.summarise(each), "made": made[name]} for name, each in taken.items()},
        "phases_us": {what: round(seconds / made["captured"] * 1e6, 1) for what, seconds in phases["captured"].items()},
    }
    for module in (*list(systems.values())[1:], engine):
        module.close()
    return result, failures


@contextmanager
def timed(into: dict[str, float]) -> Iterator[None]:
    """Inside, add up what the phases of captures take, in seconds."""
    with ExitStack() as patched:
        for what, functions in PHASES.items():
            for function in functions:
                owner, attribute = function.rsplit(".", 1)
                patched.enter_context(mock.patch(function, _timing(_found(owner, attribute), what, into)))
        yield


def _timing(function: Callable[..., Any], what: str, into: dict[str, float]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            into[what] = into.get(what, 0.0) + time.perf_counter() - start

    return run


def _found(owner: str, attribute: str) -> Any:
    """A function by the name that ``mock.patch`` takes."""
    return getattr(resolve_name(owner), attribute)


def _captures(module: Any) -> int:
    return module.cache_info().captures if hasattr(module, "cache_info") else 0


def _wrong(bundle: store.Bundle, pool: Sequence[calls_of.Call], systems: dict[str, Any], when: str) -> list[str]:
    found = []
    for name, module in systems.items():
        errors = [record.relative_error(module(*call.inputs), call.answer) for call in pool]
        if bad := [error for error in errors if not error < bundle.tolerance]:
            found.append(f"{bundle.name}, {when}: {len(bad)} of {len(pool)} answers of {name} were wrong")
    return found


def _print(results: Sequence[dict[str, Any]]) -> None:
    rows = []
    for result in results:
        for name, system in result["systems"].items():
            figures = system["total_us"]
            rows.append([result["engine"], name, *(round(figures[key], 1) for key in ("p50", "p90", "p99"))])
    record.table("more shapes than graphs, µs for a call", ["engine", "system", "p50", "p90", "p99"], rows)
    names = [*dict.fromkeys(what for result in results for what in result["phases_us"])]
    rows = [[result["engine"], *(result["phases_us"].get(what, 0.0) for what in names)] for result in results]
    record.table("where the time goes, µs for a graph", ["engine", *names], rows)


if __name__ == "__main__":
    raise SystemExit(main())
