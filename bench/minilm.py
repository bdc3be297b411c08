"""200 sentences through the MiniLM encoder, one by one: ``python -m bench.minilm --engines DIR``.

The first pass captures a graph per sentence length, the second must be hits only. Every embedding is held against
torch on the CPU with the weights as published. Then hits are timed against the bare engine on the same sentences.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench import record, store

if TYPE_CHECKING:
    from collections.abc import Sequence

SEED = 0

_LEAST_COSINE = 0.999


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time, report and record."""
    parser = argparse.ArgumentParser(prog="python -m bench.minilm", description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=Path, required=True, metavar="DIR", help="made by python -m bench.models")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON; default: bench/results")
    parser.add_argument("--passes", type=int, default=5, help="timed passes over all sentences (default 5)")
    parser.add_argument("--isolation", default="auto", choices=("auto", "full"), help="as in graphcache.GraphConfig")
    parser.add_argument("--default-stream", action="store_true", help="call on torch's default stream")
    options = parser.parse_args(arguments)
    device = record.require_cuda("bench.minilm")
    bundle = store.load(options.engines, "minilm")
    text = (Path(__file__).parent / "sentences.txt").read_bytes()
    if hashlib.sha256(text).hexdigest() != bundle.facts["sentences_sha256"]:
        made = f"python -m bench.models --out {options.engines} minilm"
        raise SystemExit(f"bench/sentences.txt is not what minilm.npz was made of; make it again with: {made}")
    settings = {"isolation": options.isolation}
    with record.stream_scope(options.default_stream), torch.inference_mode():
        result, failures = _run(bundle, device, options.passes, settings)
    payload = {
        "benchmark": "minilm",
        "environment": record.environment(SEED),
        "engine": dict(bundle.facts),
        "settings": {**settings, "default_stream": options.default_stream, "passes": options.passes},
        **result,
        "failures": failures,
    }
    file = record.write("minilm", payload, options.out)
    _print(result)
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"written to {file}")
    return 1 if failures else 0


def _run(
    bundle: store.Bundle, device: torch.device, passes: int, settings: dict[str, str]
) -> tuple[dict[str, Any], list[str]]:
    import graphcache

    cases = bundle.sentences()
    module = graphcache.load(bundle.engine)
    # Which order the engine's bindings have is up to TensorRT.
    names = ["input_ids", "attention_mask"]
    order = [names.index(name) for name in module.input_binding_names]
    inputs = [tuple(case.inputs[index].to(device) for index in order) for case in cases]
    lengths = bundle.sizes()
    wrapped = graphcache.wrap(module, max_graphs=len(lengths), **settings)

    start = perf_counter_ns()
    first = [wrapped(*each) for each in inputs]
    torch.cuda.synchronize()
    first_seconds = (perf_counter_ns() - start) / 1e9
    after_first = wrapped.cache_info()
    second = [wrapped(*each) for each in inputs]
    torch.cuda.synchronize()
    after_second = wrapped.cache_info()
    eager = [module(*each) for each in inputs]
    torch.cuda.synchronize()
    times = _time(wrapped, module, inputs, passes)
    after_all = wrapped.cache_info()

    failures: list[str] = []
    accuracy = {}
    # Compared only now: what the first pass returned must have survived every later replay.
    for label, answers in (("first_pass", first), ("second_pass", second), ("eager", eager)):
        accuracy[label] = _accuracy(answers, cases)
        if not accuracy[label]["largest_relative_error"] < store.TOLERANCE:
            failures.append(f"{label}: relative error {accuracy[label]['largest_relative_error']:.3g}")
        if not accuracy[label]["least_cosine"] > _LEAST_COSINE:
            failures.append(f"{label}: cosine {accuracy[label]['least_cosine']:.6f}")
    if after_first.captures != len(lengths):
        failures.append(f"{after_first.captures} captures in the first pass; expected {len(lengths)}, one per length")
    if after_all.eager:
        failures.append(f"eager calls: {dict(after_all.eager)}; expected none")
    for label, before, after, calls in (
        ("second pass", after_first, after_second, len(cases)),
        ("timed passes", after_second, after_all, len(cases) * passes),
    ):
        if after.hits - before.hits != calls or after.captures != before.captures or after.evictions:
            failures.append(
                f"{label}: {after.hits - before.hits} hits and {after.captures - before.captures} captures in {calls} "
                f"calls, {after.evictions} evictions; expected hits only"
            )
    return {
        "sentences": len(cases),
        "lengths": lengths,
        "accuracy": accuracy,
        "captures": after_first.captures,
        "hits_first_pass": after_first.hits,
        "hits_second_pass": after_second.hits - after_first.hits,
        "capture_seconds": round(after_first.capture_seconds, 3),
        "first_pass_seconds": round(first_seconds, 3),
        "graphs": after_all.graphs,
        "graph_bytes": after_all.nbytes,
        "times": {name: samples.summary() for name, samples in times.items()},
    }, failures


def _time(wrapped: Any, module: Any, inputs: Sequence[tuple[Tensor, ...]], passes: int) -> dict[str, record.Samples]:
    # Each sentence is run by both, in turn first; the bare engine twice, since its second call in a row need not switch
    # shapes, which real use with sentences of any length cannot arrange, but a fair comparison should show.
    wait = record.synchroniser()
    times = {name: record.Samples() for name in ("hit", "eager", "eager_same_shape")}

    def call(name: str, function: Any, args: tuple[Tensor, ...]) -> None:
        wait()
        start = perf_counter_ns()
        function(*args)
        returned = perf_counter_ns()
        wait()
        times[name].total.append(perf_counter_ns() - start)
        times[name].cpu.append(returned - start)

    for turn in range(passes):
        for index, args in enumerate(inputs):
            hit_first = (turn + index) % 2 == 0
            if hit_first:
                call("hit", wrapped, args)
            call("eager", module, args)
            call("eager_same_shape", module, args)
            if not hit_first:
                call("hit", wrapped, args)
    return times


def _accuracy(answers: Sequence[Tensor], cases: Sequence[store.Case]) -> dict[str, float]:
    errors = [record.relative_error(answer, case.answer) for answer, case in zip(answers, cases, strict=True)]
    cosines = [
        float(torch.nn.functional.cosine_similarity(answer.cpu().double(), case.answer.double(), dim=-1))
        for answer, case in zip(answers, cases, strict=True)
    ]
    return {"largest_relative_error": max(errors), "least_cosine": min(cosines)}


def _print(result: dict[str, Any]) -> None:
    rows = [
        [name, *(times["total_us"][key] for key in ("p50", "p90", "p99", "iqr")), times["cpu_us"]["p50"]]
        for name, times in result["times"].items()
    ]
    columns = ["MiniLM-L6, batch 1, call + sync, µs", "p50", "p90", "p99", "iqr", "CPU p50"]
    record.table(f"{result['sentences']} sentences of {len(result['lengths'])} lengths", columns, rows)
    accuracy = result["accuracy"]["second_pass"]
    print(
        f"{result['captures']} captures in {result['capture_seconds']} s, then {result['hits_second_pass']} hits; "
        f"largest relative error {accuracy['largest_relative_error']:.2e}, least cosine {accuracy['least_cosine']:.6f}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
