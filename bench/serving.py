"""200 sentences from many callers at once through the MiniLM encoder: ``python -m bench.serving --engines DIR``.

What stands in front of an engine in a server, without the server: requests of different lengths are padded to buckets,
put together up to a captured size, run by one graph and taken apart again. Each embedding is held against torch on the
CPU with the weights as published, before anything is timed and once more afterwards. Timed are the calls of many
threads at once, with gathering against one by one; a call is from tensors in host memory to tensors in host memory.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench import record, store

if TYPE_CHECKING:
    from graphcache.serving.runner import Runner

SEED = 0
ROWS = (1, 2, 4, 8, 16, 32)
LENGTHS = (16, 32, 64)

_LEAST_COSINE = 0.999

Request = dict[str, Tensor]
Answer = dict[str, Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time, report and record."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=Path, required=True, metavar="DIR", help="made by python -m bench.models")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON; default: bench/results")
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 8, 32], help="threads at once (default 1 8 32)")
    parser.add_argument("--passes", type=int, default=5, help="timed passes over all sentences (default 5)")
    parser.add_argument("--wait-us", type=float, default=200.0, help="how long a batch waits for others (default 200)")
    options = parser.parse_args(arguments)
    record.require_cuda("bench.serving")
    bundle = store.load(options.engines, "minilm")
    result, failures = run(bundle, options.callers, options.passes, options.wait_us / 1e6)
    payload = {
        "benchmark": "serving",
        "environment": record.environment(SEED),
        "engine": dict(bundle.facts),
        "settings": {"rows": ROWS, "lengths": LENGTHS, "passes": options.passes, "wait_us": options.wait_us},
        **result,
        "failures": failures,
    }
    file = record.write("serving", payload, options.out)
    _print(result)
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"written to {file}")
    return 1 if failures else 0


def run(
    bundle: store.Bundle, callers: Sequence[int], passes: int, wait_s: float, source: Any = None
) -> tuple[dict[str, Any], list[str]]:
    """Measure one model.

    Args:
        bundle: The engine, the sentences and their embeddings.
        callers: Threads at once.
        passes: Over all sentences.
        wait_s: How long the first request of a batch waits for others, in seconds.
        source: What makes another module in place of the engine.

    Returns:
        What was measured, and what was wrong.
    """
    from graphcache.serving.gather import Gather

    cases = bundle.sentences()
    requests = [dict(zip(bundle.inputs, case.inputs, strict=True)) for case in cases]
    start = perf_counter_ns()
    runner = _runner(bundle, source)
    prepared_seconds = (perf_counter_ns() - start) / 1e9
    captures = runner.info().captures
    [output] = bundle.outputs
    failures = [f"requests run one by one: {why}" for why in runner.held.values() if why]

    def check(label: str, answers: Sequence[Any]) -> dict[str, float]:
        accuracy = _accuracy([next(iter(answer.values())) for answer in answers], cases)
        if not accuracy["largest_relative_error"] < store.TOLERANCE:
            failures.append(f"{label}: relative error {accuracy['largest_relative_error']:.3g}")
        if not accuracy["least_cosine"] > _LEAST_COSINE:
            failures.append(f"{label}: cosine {accuracy['least_cosine']:.6f}")
        if accuracy["swapped"]:
            failures.append(f"{label}: {accuracy['swapped']} embeddings are nearest to another sentence's")
        return accuracy

    def one_by_one(request: Request) -> Answer:
        [answer] = runner.answer([request])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def eager(request: Request) -> Answer:
        with lock, torch.inference_mode():
            given = {name: tensor.to(runner.device) for name, tensor in request.items()}
            return {output: runner.module(**given).cpu()}

    lock = threading.Lock()
    systems: dict[str, dict[str, Any]] = {}
    accuracy = {"one_by_one": check("one by one", [one_by_one(each) for each in requests])}
    with Gather(runner, wait_s=wait_s) as gather:

        def gathered(request: Request) -> Answer:
            return gather.submit(request).result()

        accuracy["together"] = check("together", _many(gathered, requests, max(callers), 1)[0])
        ways = {"eager": eager, "one_by_one": one_by_one, "together": gathered}
        for count in callers:
            for name, call in ways.items():
                before = _counted(runner)
                answers, samples, seconds = _many(call, requests, count, passes)
                check(f"{name}, {count} callers", answers)
                systems[f"{name}, {count} callers"] = {
                    "latency_us": record.summarise(samples),
                    "requests_per_second": round(len(samples) / seconds, 1),
                    **_since(before, runner),
                }
    info = runner.info()
    if info.captures != captures or info.eager:
        failures.append(f"{info.captures - captures} captures and eager calls {dict(info.eager)}; expected hits only")
    runner.close()
    return {
        "sentences": len(cases),
        "accuracy": accuracy,
        "captures": captures,
        "prepared_seconds": round(prepared_seconds, 3),
        "graph_bytes": info.nbytes,
        "systems": systems,
    }, failures


def _runner(bundle: store.Bundle, source: Any) -> Runner:
    from graphcache import Axis, Mask
    from graphcache.serving.runner import Runner
    from graphcache.serving.settings import Settings

    ids, mask = bundle.inputs
    kind = torch.from_numpy(bundle.arrays["ids"]).dtype
    longest = max(bundle.sizes())
    lengths = [length for length in LENGTHS if length < longest] + [longest]
    buckets = {
        ids: {0: Axis(ROWS, name="rows"), 1: Axis(lengths, name="length")},
        mask: Mask(["rows", "length"], dtype=kind),
    }
    prepare = tuple(
        {name: torch.ones(1, length, dtype=kind) for name in (ids, mask)}
        if source is not None
        else {ids: (1, length), mask: (1, length)}
        for length in lengths
    )
    return Runner(Settings(source or str(bundle.engine), name=bundle.name, buckets=buckets, prepare=prepare))


def _many(
    call: Callable[[Request], Answer], requests: Sequence[Request], callers: int, passes: int
) -> tuple[list[Answer], list[int], float]:
    """Answers of the last pass, nanoseconds of each call, seconds of all; threads take one request after another."""
    answers: list[Any] = [None] * len(requests)
    samples: list[int] = []
    left = iter([place for _ in range(passes) for place in range(len(requests))])
    failed: list[BaseException] = []
    lock, ready = threading.Lock(), threading.Barrier(callers + 1)

    def work() -> None:
        ready.wait()
        while not failed:
            with lock:
                place = next(left, None)
            if place is None:
                return
            start = perf_counter_ns()
            try:
                answers[place] = call(requests[place])
            except BaseException as error:
                failed.append(error)
                return
            samples.append(perf_counter_ns() - start)

    threads = [threading.Thread(target=work) for _ in range(callers)]
    for thread in threads:
        thread.start()
    ready.wait()
    start = perf_counter_ns()
    for thread in threads:
        thread.join()
    seconds = (perf_counter_ns() - start) / 1e9
    if failed:
        raise failed[0]
    return answers, samples, seconds


def _accuracy(answers: Sequence[Tensor], cases: Sequence[store.Case]) -> dict[str, float]:
    wanted = torch.nn.functional.normalize(torch.cat([case.answer for case in cases]).double(), dim=-1)
    got = torch.nn.functional.normalize(torch.cat([answer.cpu() for answer in answers]).double(), dim=-1)
    nearest = (got @ wanted.T).argmax(dim=1)
    # A sentence that is there twice is nearest to either.
    swapped = sum(not torch.equal(wanted[near], wanted[own]) for own, near in enumerate(nearest.tolist()))
    errors = [record.relative_error(answer, case.answer) for answer, case in zip(answers, cases, strict=True)]
    return {
        "largest_relative_error": max(errors),
        "least_cosine": float((got * wanted).sum(1).min()),
        "swapped": swapped,
    }


def _counted(runner: Runner) -> tuple[dict[int, int], int, int]:
    counts = runner.counts
    return dict(counts.batches), counts.cells, counts.padded_cells


def _since(before: tuple[dict[int, int], int, int], runner: Runner) -> dict[str, Any]:
    batches, cells, padded = _counted(runner)
    made = padded - before[2]
    return {
        "batches": {size: count - before[0].get(size, 0) for size, count in sorted(batches.items())},
        "padding_share": round(1 - (cells - before[1]) / made, 4) if made else 0.0,
    }


def _print(result: dict[str, Any]) -> None:
    rows = [
        [name, each["requests_per_second"], *(each["latency_us"][key] for key in ("p50", "p90", "p99"))]
        for name, each in result["systems"].items()
    ]
    columns = ["MiniLM-L6, host to host", "requests/s", "p50 µs", "p90 µs", "p99 µs"]
    record.table(f"{result['sentences']} sentences from several threads", columns, rows)
    accuracy = result["accuracy"]["together"]
    print(
        f"{result['captures']} captures in {result['prepared_seconds']} s before the first request; largest relative "
        f"error {accuracy['largest_relative_error']:.2e}, least cosine {accuracy['least_cosine']:.6f}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
