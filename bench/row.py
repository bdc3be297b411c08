"""One row of the table, in this process: an engine, some of its shapes, and systems in turn with their floor.

``python -m bench`` starts it. What was measured is written after each system: a process that ends early keeps it.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import calls as calls_of
from bench import measure, record, store, systems

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SEED = 0
POOL = 8
"""Calls of each size, each with tensors of its own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure one row and record it."""
    parser = argparse.ArgumentParser(prog="python -m bench.row", description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=Path, required=True, metavar="DIR")
    parser.add_argument("--engine", required=True, metavar="NAME")
    parser.add_argument("--shapes", type=int, default=1, metavar="N")
    parser.add_argument("--systems", nargs="+", required=True, metavar="NAME")
    parser.add_argument("--calls", type=int, default=1000, metavar="N")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--default-stream", action="store_true")
    options = parser.parse_args(arguments)
    device = record.require_cuda("bench")
    facts = environment()
    bundle = store.load(options.engines, options.engine)
    sizes = calls_of.spread(bundle, options.shapes)
    row: dict[str, Any] = {"engine": bundle.name, "facts": dict(bundle.facts), "sizes": sizes, "systems": {}}

    def note() -> None:
        record.write("row", {"environment": facts, "row": row}, options.out)

    pool = calls_of.pool(bundle, sizes, POOL, device)
    work = measure.Work(bundle, sizes, pool, device, options.calls, options.seconds, SEED)
    with record.stream_scope(options.default_stream), torch.inference_mode():
        measure_row(work, options.systems, row["systems"], note)
    return 0


def measure_row(work: measure.Work, names: Sequence[str], found: dict[str, Any], note: Callable[[], object]) -> None:
    """Measure systems of one kind, each alone with the floor.

    Args:
        work: What every system does.
        names: The systems; their floor is measured too.
        found: Figures of each system by name.
        note: Called whenever something was added to them.
    """
    made = {name: systems.SYSTEMS[name]() for name in names}
    floor_name = systems.FLOORS[next(iter(made.values())).kind]
    floor = systems.SYSTEMS[floor_name]()
    found[floor_name] = figures = measure.measure(floor, work)
    if nodes := getattr(floor, "nodes", None):
        figures["nodes"] = nodes
    note()
    try:
        for name, system in made.items():
            if name == floor_name:
                continue
            if "reason" in figures:
                reason = f"there is no {floor_name} to take turns with"
                found[name] = {**measure.about(system), "reason": reason}
            else:
                launches = [floor.timed(call.inputs) for call in work.pool]
                found[name] = measure.measure(system, work, [launch for launch in launches if launch is not None])
            where = f"{work.bundle.name} x {len(work.sizes)}, {name}"
            print(f"{where}: {summary(found[name])}", file=sys.stderr, flush=True)
            note()
            if "reason" in found[name] and measure.device_lost(work.device):
                # Every further call would fail. The parent measures the others in another process.
                return
    finally:
        figures |= measure.close(floor)
        note()


def summary(figures: dict[str, Any]) -> str:
    """The figures of one system in a line."""
    if "reason" in figures:
        return str(figures["reason"])
    total, cpu = figures["total_us"]["p50"], figures["cpu_burst_us"]["p50"]
    return f"{total} µs, {figures['total_over_raw']} of raw, {cpu} µs of CPU"


def environment() -> dict[str, Any]:
    """What figures depend on."""
    # Torch-TensorRT makes "tensorrt" another name of TensorRT-RTX when it is imported, and graphcache would find that
    # first: so the flavour is settled before. Without any, torch networks are still measured.
    from graphcache.engines.library import library
    from graphcache.errors import TensorRTNotFoundError

    with suppress(TensorRTNotFoundError):
        os.environ["GRAPHCACHE_TENSORRT"] = library().flavour
    return record.environment(SEED)


if __name__ == "__main__":
    raise SystemExit(main())
