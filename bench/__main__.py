"""Every system side by side, in one run: ``python -m bench --engines DIR``.

graphcache in each of its modes, the raw launch of graphs captured by hand, TensorRT with and without its own graphs,
Torch-TensorRT's two runtimes, the graph caches of inference-models and aitune; and for the torch networks that the
engines were made of, graphcache, ``make_graphed_callables`` and ``torch.compile(mode="reduce-overhead")``.

Each system takes turns with the raw launch, call by call, over the same sequence of shapes. Its answers are held
against torch's on the CPU before and after it is timed. What cannot run is listed with the reason. If one of them loses
the device, the rest is measured by further processes; with ``--apart`` each row is, as TensorRT ends a process now and
then that has made and dropped many contexts. Results are written to one file after each system, so that a run that is
killed keeps what it had; ``--table FILE`` prints them as Markdown.

Exit codes: 0 all went well; 1 graphcache or the floor answered wrongly, raised, or missed while it was timed; 2 usage;
3 with ``--gate``, a limit of :mod:`bench.limits` was not met.
"""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import limits, measure, peers, processes, readme, record, row, store, suite, tables
from bench.lost import LostDevice

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bench.lost import Apart

SEED = 0
SHAPES = (1, 8, 32, 128)
"""How many shapes take turns, unless something else is asked for."""
PARTS = frozenset({"minilm_tokens", "silero"})
"""Engines that are a part of a model, with the answers of all of it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print one table, record everything."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.systems or () if name not in peers.SYSTEMS]:
        parser.error(f"unknown systems: {', '.join(unknown)}; there are {', '.join(peers.SYSTEMS)}")
    if min(options.shapes or SHAPES) < 1 or options.calls < 1:
        parser.error("--shapes and --calls take whole numbers, 1 or more")
    if options.table is not None:
        payload = readme.read(options.table)
        print("\n".join(readme.lines(payload, options.table, options.only, options.shapes, options.systems)))
        return 0
    if options.engines is None:
        parser.error("give --engines DIR to measure, or --table FILE to show what was measured")
    if parts := sorted(set(options.only or ()) & PARTS):
        parser.error(
            f"{', '.join(parts)}: what is stored as the answer is not the engine's, so that it cannot be judged here; "
            "bench.mixed and bench.vad measure whole models"
        )
    there = sorted(file.stem for file in options.engines.glob("*.json"))
    names = options.only or [name for name in there if name not in PARTS]
    if not names:
        parser.error(f"no engines in {options.engines}; make some with: python -m bench.models --out {options.engines}")
    device = record.require_cuda("bench")
    environment = _environment()
    plan = suite.Plan(
        bundles=[store.load(options.engines, name) for name in names],
        shapes=options.shapes or SHAPES,
        systems={name: peers.SYSTEMS[name] for name in options.systems or peers.SYSTEMS},
        device=device,
        calls=options.calls,
        seconds=options.seconds,
        seed=SEED,
    )
    settings = {
        "shapes": list(plan.shapes),
        "systems": list(plan.systems),
        "calls": options.calls,
        "seconds": options.seconds,
        "max_seconds": options.max_seconds,
        "pool": row.POOL,
        "apart": options.apart,
        "default_stream": options.default_stream,
    }
    return run(plan, environment, settings, options)


def run(plan: suite.Plan, environment: dict[str, Any], settings: dict[str, Any], options: argparse.Namespace) -> int:
    """Measure a plan, print and record what was found.

    Args:
        plan: What to measure.
        environment: What figures depend on.
        settings: Recorded with them.
        options: As on the command line: ``out``, ``name``, ``gate``, ``max_seconds``, ``apart`` and ``default_stream``;
            should the device be lost, ``engines`` too.

    Returns:
        The exit code.
    """

    def payload(results: list[dict[str, Any]], *, complete: bool) -> dict[str, Any]:
        return {
            "benchmark": "suite",
            "complete": complete,
            "environment": environment,
            "peers": suite.versions(),
            "engines": {bundle.name: dict(bundle.facts) for bundle in plan.bundles},
            "settings": settings,
            "results": results,
            "failures": suite.failures(results),
            "limits_not_met": limits.shortfalls(results),
        }

    def write(results: list[dict[str, Any]], *, complete: bool = False) -> Path:
        return record.write(options.name, payload(results, complete=complete), options.out)

    lost = LostDevice(lambda: measure.device_lost(plan.device), _apart(plan, options), always=options.apart)
    going = suite.Suite(plan, suite.Deadline(options.max_seconds), write, lost=lost)
    try:
        with record.stream_scope(options.default_stream), torch.inference_mode():
            results = going.run()
    except KeyboardInterrupt:
        print(f"interrupted; what was measured is in {write(going.results)}")
        raise
    file = write(results, complete=True)
    tables.show(results)
    wrong, short = suite.failures(results), limits.shortfalls(results)
    for text in wrong:
        print(f"FAILED: {text}")
    for text in short:
        print(f"{'GATE' if options.gate else 'not met'}: {text}")
    print(f"written to {file}")
    return 1 if wrong else 3 if options.gate and short else 0


def _apart(plan: suite.Plan, options: argparse.Namespace) -> Apart:
    def apart(bundle: store.Bundle, count: int, names: Sequence[str], seconds: float | None) -> Mapping[str, Any]:
        arguments = ["--engines", str(options.engines), "--only", bundle.name, "--shapes", str(count)]
        arguments += ["--systems", *names, "--calls", str(plan.calls), "--seconds", str(plan.seconds)]
        arguments += [] if seconds is None else ["--max-seconds", str(seconds)]
        arguments += ["--default-stream"] if options.default_stream else []
        results: list[Mapping[str, Any]] = processes.again("bench", arguments, "suite")["results"]
        if not results:
            raise processes.NothingRecordedError("a process of its own was interrupted")
        return results[0]

    return apart


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=Path, metavar="DIR", help="made by python -m bench.models")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure nothing; print this JSON as Markdown")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="engines; default: all there that are whole models")
    parser.add_argument("--systems", nargs="+", metavar="NAME", help=f"of {', '.join(peers.SYSTEMS)}; default: all")
    parser.add_argument("--shapes", type=int, nargs="+", metavar="N", help="how many take turns (1 8 32 128)")
    parser.add_argument("--calls", type=int, default=1000, metavar="N", help="timed calls of a system (default 1000)")
    parser.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="about how long those may take (default 5)"
    )
    parser.add_argument("--max-seconds", type=float, metavar="S", help="begin no measurement later than this")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON; default: bench/results")
    parser.add_argument("--name", default="suite", help="of the JSON, without its ending (default suite)")
    parser.add_argument("--gate", action="store_true", help="exit with 3 if a limit of bench/limits.py is not met")
    parser.add_argument("--apart", action="store_true", help="each engine and number of shapes in its own process")
    parser.add_argument("--default-stream", action="store_true", help="call on torch's default stream")
    return parser


def _environment() -> dict[str, Any]:
    # Torch-TensorRT makes "tensorrt" another name of TensorRT-RTX when it is imported, and graphcache would find that
    # first; so the flavour is settled, and noted, before any peer is. Without any, torch networks are still measured.
    from graphcache.engines.library import library
    from graphcache.errors import TensorRTNotFoundError

    with suppress(TensorRTNotFoundError):
        os.environ["GRAPHCACHE_TENSORRT"] = library().flavour
    return record.environment(SEED)


if __name__ == "__main__":
    raise SystemExit(main())
