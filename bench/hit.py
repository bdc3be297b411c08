"""What a hit costs, against the floor of a raw graph launch: ``python -m bench.hit --engines DIR [NAME ...]``.

Every system runs the same sequence of shapes in one process, call by call in turn with the raw launch:

- ``raw``: ``cuGraphLaunch`` of graphs captured by hand from the same engine; nothing is put in or taken out;
- ``torch``: ``torch.cuda.CUDAGraph.replay()`` of such graphs;
- ``hit_auto``, ``hit_full``, by ``isolation``: the wrapped module on 8 input tensors of each shape in turn, handing out
  fresh outputs;
- ``fresh``: the wrapped module on inputs that were allocated anew before each call, handing out fresh outputs;
- ``same_inputs``: the wrapped module on the same input tensor of each shape every time, handing out fresh outputs;
- ``session``: ``CachedModule.session(...).run()``, static buffers in the caller's hands;
- ``eager``: the bare engine module on the same tensors.

All answers are held against torch on the CPU before and after timing.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench import calls as calls_of
from bench import raw, record, store

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SEED = 0
POOL = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure engine by engine, print one table, record everything."""
    parser = argparse.ArgumentParser(prog="python -m bench.hit", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["mlp8", "policy"], metavar="NAME", help="default: mlp8 policy")
    parser.add_argument("--engines", type=Path, required=True, metavar="DIR", help="made by python -m bench.models")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON; default: bench/results")
    parser.add_argument("--shapes", type=int, nargs="+", default=[1, 4, 8, 32], help="how many shapes alternate")
    parser.add_argument("--calls", type=int, default=1000, help="timed calls of each system (default 1000)")
    parser.add_argument("--isolation", nargs="+", default=["auto", "full"], choices=("auto", "full"), metavar="MODE")
    parser.add_argument("--default-stream", action="store_true", help="call on torch's default stream")
    parser.add_argument("--max-cpu-us", type=float, metavar="N", help="fail if a hit costs more CPU time")
    parser.add_argument("--max-ratio", type=float, metavar="N", help="fail if call + sync over raw is more")
    options = parser.parse_args(arguments)
    device = record.require_cuda("bench.hit")
    failures: list[str] = []
    results: list[dict[str, Any]] = []
    facts = {}
    with record.stream_scope(options.default_stream), torch.inference_mode():
        for name in options.names:
            bundle = store.load(options.engines, name)
            facts[name] = dict(bundle.facts)
            for shapes in sorted({min(count, len(bundle.sizes())) for count in options.shapes}):
                result, failed = _measure(bundle, shapes, device, options.calls, options.isolation)
                results.append(result)
                failures += failed
    failures += _over_limits(results, options.max_cpu_us, options.max_ratio)
    payload = {
        "benchmark": "hit",
        "environment": record.environment(SEED),
        "engines": facts,
        "settings": {"default_stream": options.default_stream, "calls": options.calls, "pool": POOL},
        "results": results,
        "failures": failures,
    }
    file = record.write("hit", payload, options.out)
    _print(results)
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"written to {file}")
    return 1 if failures else 0


def _measure(
    bundle: store.Bundle,
    shapes: int,
    device: torch.device,
    calls: int,
    modes: Sequence[str],
) -> tuple[dict[str, Any], list[str]]:
    import graphcache

    sizes = calls_of.spread(bundle, shapes)
    engine = graphcache.load(bundle.engine)
    pool = calls_of.pool(bundle, sizes, POOL, device, engine.input_binding_names)
    wrapped = {}
    for mode in modes:
        inner = engine if mode == modes[0] else graphcache.load(bundle.engine)
        wrapped[f"hit_{mode}"] = graphcache.wrap(inner, max_graphs=len(sizes), isolation=mode)
    scratch = torch.empty(max(engine.engine.scratch_bytes, 1), dtype=torch.uint8, device=device)
    recorded = {size: raw.Recorded(engine, _first(pool, size).inputs, scratch) for size in sizes}
    graphs = {size: raw.driver_graph(call) for size, call in recorded.items()}
    by_hand = {
        "raw": {size: graph.launch for size, graph in graphs.items()},
        "torch": {size: raw.torch_graph(call) for size, call in recorded.items()},
    }
    # One session a shape: what a loop that keeps its buffers pays.
    fast = wrapped[f"hit_{modes[0]}"]
    sessions = {size: fast.session(*_first(pool, size).inputs) for size in sizes}

    def check(when: str) -> list[str]:
        wrong = partial(_wrong, pool=pool, tolerance=bundle.tolerance)
        found = wrong("eager", engine)
        for name, module in wrapped.items():
            found += wrong(name, module)
        for name, launches in by_hand.items():
            found += wrong(name, _fed(recorded, launches))
        found += wrong("session", _through_sessions(sessions))
        return [f"{bundle.name}, {len(sizes)} shapes, {when}: {text}" for text in found]

    failures = check("before timing")
    before = {name: module.cache_info() for name, module in wrapped.items()}
    systems = {name: calls_of.in_turn([launches[call.size] for call in pool]) for name, launches in by_hand.items()}
    systems["eager"] = calls_of.in_turn([partial(engine, *call.inputs) for call in pool])
    for name, module in wrapped.items():
        systems[name] = calls_of.in_turn([partial(module, *call.inputs) for call in pool])
    systems["fresh"] = calls_of.Anew(fast, pool)
    systems["same_inputs"] = calls_of.in_turn([partial(fast, *_first(pool, size).inputs) for size in sizes])
    systems["session"] = calls_of.in_turn([sessions[size].run for size in sizes])
    # Each system takes turns with the raw launch alone, so that none pays for what another leaves in the caches.
    samples, floors = {}, {}
    for name, system in systems.items():
        pair = record.interleave({"raw": systems["raw"], name: system}, calls, warmup=2 * len(pool), seed=SEED)
        samples[name], floors[name] = pair[name], record.summarise(pair["raw"].total)["p50"]
    # Allocating is no part of a call, so that calls on fresh inputs cannot follow one another without a pause.
    bursts = {name: system for name, system in systems.items() if name != "fresh"}
    cpu = {"fresh": samples["fresh"].summary()["cpu_us"], **record.bursts(bursts, rounds=max(10, calls // 20))}
    for name, module in wrapped.items():
        after = module.cache_info()
        if after.captures != before[name].captures or after.eager != before[name].eager or after.evictions:
            failures.append(
                f"{bundle.name}, {len(sizes)} shapes: {name} was timed with {after.captures - before[name].captures} "
                f"captures, {after.evictions} evictions and eager calls {dict(after.eager)}; expected hits only"
            )
    failures += check("after timing")
    result = {
        "engine": bundle.name,
        "sizes": sizes,
        "nodes": {size: graph.nodes for size, graph in graphs.items()},
        "capture_seconds": {name: round(info.capture_seconds, 4) for name, info in before.items()},
        "graph_bytes": {name: info.nbytes for name, info in before.items()},
        "systems": {
            name: {
                **each.summary(),
                "cpu_burst_us": cpu[name],
                "raw_total_p50_us": floors[name],
                "total_over_raw": round(record.summarise(each.total)["p50"] / floors[name], 4),
            }
            for name, each in samples.items()
        },
    }
    torch.cuda.synchronize()
    for graph in graphs.values():
        graph.close()
    for session in sessions.values():
        session.close()
    for module in wrapped.values():
        module.close()
    return result, failures


def _first(pool: Sequence[calls_of.Call], size: int) -> calls_of.Call:
    return next(call for call in pool if call.size == size)


def _fed(recorded: dict[int, raw.Recorded], launches: dict[int, Callable[[], object]]) -> Callable[..., Tensor]:
    sizes = {call.inputs[0].shape: size for size, call in recorded.items()}

    def run(*inputs: Tensor) -> Tensor:
        size = sizes[inputs[0].shape]
        call = recorded[size]
        for static, value in zip(call.inputs, inputs, strict=True):
            static.copy_(value)
        call.outputs[0].fill_(float("nan"))
        launches[size]()
        return call.outputs[0]

    return run


def _through_sessions(sessions: dict[int, Any]) -> Callable[..., Tensor]:
    shapes = {session.inputs[0].shape: session for session in sessions.values()}

    def run(*inputs: Tensor) -> Tensor:
        session = shapes[inputs[0].shape]
        for static, value in zip(session.inputs, inputs, strict=True):
            static.copy_(value)
        session.outputs.fill_(float("nan"))
        session.run()
        return session.outputs

    return run


def _wrong(name: str, function: Callable[..., Tensor], pool: Sequence[calls_of.Call], tolerance: float) -> list[str]:
    errors = [record.relative_error(function(*call.inputs), call.answer) for call in pool]
    bad = [(call.size, error) for call, error in zip(pool, errors, strict=True) if not error < tolerance]
    return [f"{name}: {len(bad)} of {len(pool)} answers are wrong, such as size, error {bad[0]}"] if bad else []


def _over_limits(results: Sequence[dict[str, Any]], max_cpu_us: float | None, max_ratio: float | None) -> list[str]:
    failures = []
    for result in results:
        for name, figures in result["systems"].items():
            if not name.startswith("hit"):
                continue
            label = f"{result['engine']}, {len(result['sizes'])} shapes, {name}"
            if max_cpu_us is not None and figures["cpu_burst_us"]["p50"] > max_cpu_us:
                failures.append(f"{label}: {figures['cpu_burst_us']['p50']} µs of CPU, the limit is {max_cpu_us}")
            if max_ratio is not None and figures["total_over_raw"] > max_ratio:
                failures.append(f"{label}: {figures['total_over_raw']} times raw, the limit is {max_ratio}")
    return failures


def _print(results: Sequence[dict[str, Any]]) -> None:
    columns = ["engine", "shapes", "system", "p50 µs", "p90", "p99", "iqr", "over raw", "CPU µs per call"]
    rows = [
        [
            result["engine"],
            len(result["sizes"]),
            name,
            *(figures["total_us"][key] for key in ("p50", "p90", "p99", "iqr")),
            figures["total_over_raw"],
            figures["cpu_burst_us"]["p50"],
        ]
        for result in results
        for name, figures in result["systems"].items()
    ]
    record.table("call + synchronise", columns, rows)


if __name__ == "__main__":
    raise SystemExit(main())
