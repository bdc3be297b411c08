"""Models x systems x shapes: ``python -m bench --engines DIR``.

Measures graphcache in each of its modes, the raw launch of graphs captured by hand, TensorRT with and without its own
graphs, and Torch-TensorRT's two runtimes. For torch networks, those that the engines were made of and others, it
measures graphcache, copy, replay and clone by hand, ``make_graphed_callables`` and
``torch.compile(mode="reduce-overhead")``. graphcache is measured as it is installed, and once more without its native
code.

Each engine and number of shapes runs in a process of its own. Each system takes turns with the raw launch, call by
call, over the same sequence of shapes. Its answers are compared with torch's on the CPU before and after it is timed.
What cannot run is listed with the reason. Results are written after each row; ``--table FILE`` prints Markdown.

Exit codes: 0 all went well; 1 graphcache or the floor answered wrongly, raised, or missed while it was timed; 2 usage.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import record, store, systems, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SHAPES = (1, 8, 32, 128)
"""How many shapes take turns, unless something else is asked for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables, record everything."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.systems or () if name not in systems.SYSTEMS]:
        parser.error(f"unknown systems: {', '.join(unknown)}; there are {', '.join(systems.SYSTEMS)}")
    if min(options.shapes) < 1 or options.calls < 1:
        parser.error("--shapes and --calls take whole numbers, 1 or more")
    if options.table is not None:
        print("\n".join(table.markdown(table.read(options.table), options.table, options.only)))
        return 0
    if options.engines is None:
        parser.error("give --engines DIR to measure, or --table FILE to show what was measured")
    names = options.only or sorted(file.stem for file in options.engines.glob("*.json"))
    if not names:
        parser.error(f"no engines in {options.engines}; make some with: python -m bench.models --out {options.engines}")
    record.require_cuda("bench")
    payload: dict[str, Any] = {
        "benchmark": "suite",
        "complete": False,
        "environment": {},
        "peers": versions(),
        "engines": {},
        "settings": {key: getattr(options, key) for key in ("shapes", "calls", "seconds", "default_stream")},
        "results": [],
    }
    for name in names:
        bundle = store.load(options.engines, name)
        available = len(bundle.sizes())
        for count in sorted({min(count, available) for count in options.shapes}):
            row: dict[str, Any] = {"engine": name, "sizes": [], "systems": {}}
            for kind in ("engine", "torch") if bundle.has_engine else ("torch",):
                wanted = [each for each in options.systems or systems.SYSTEMS if systems.SYSTEMS[each]().kind == kind]
                measure_apart(options, name, count, wanted, row, payload)
            payload["results"].append(row)
            payload["failures"] = failures(payload["results"])
            file = record.write(options.name, payload, options.out)
    payload["complete"] = True
    file = record.write(options.name, payload, options.out)
    table.show(payload["results"])
    for text in payload["failures"]:
        print(f"FAILED: {text}")
    print(f"written to {file}")
    return 1 if payload["failures"] else 0


def measure_apart(
    options: argparse.Namespace,
    name: str,
    count: int,
    wanted: Sequence[str],
    row: dict[str, Any],
    payload: dict[str, Any],
) -> None:
    """Measure systems in processes of their own, another one whenever one ends early.

    Args:
        options: As on the command line.
        name: Of the engine.
        count: Of its shapes.
        wanted: The systems, of one kind.
        row: Figures are added to its ``systems``.
        payload: Facts about the engine and the environment are added to it.
    """
    left = list(wanted)
    while left:
        arguments = ["--engines", str(options.engines), "--engine", name, "--shapes", str(count), "--systems", *left]
        arguments += ["--calls", str(options.calls), "--seconds", str(options.seconds)]
        arguments += ["--default-stream"] if options.default_stream else []
        code, found = _run(arguments)
        if found is not None:
            payload["environment"] = payload["environment"] or found["environment"]
            payload["engines"][name] = found["row"]["facts"]
            row["sizes"] = found["row"]["sizes"]
            # Of the floor, which each process measures, the first counts.
            row["systems"] = {**found["row"]["systems"], **row["systems"]}
        before, left = left, [each for each in left if each not in row["systems"]]
        if left and len(left) == len(before):
            why = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            system = systems.SYSTEMS[left[0]]()
            row["systems"][left.pop(0)] = {
                "kind": system.kind,
                "rival": system.rival,
                "exact": system.exact,
                "reason": f"the process {why} and recorded nothing",
                "failed": True,
            }


def _run(arguments: Sequence[str]) -> tuple[int, dict[str, Any] | None]:
    """The exit code of ``python -m bench.row`` and what it recorded, if it did."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench.row", *arguments, "--out", folder]
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False).returncode
        try:
            return code, json.loads((Path(folder) / "row.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return code, None


def failures(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What went wrong with graphcache or a floor: wrong answers, exceptions, and misses while timed."""
    found = []
    for result in results:
        for name, figures in result["systems"].items():
            where = f"{result['engine']}, {len(result['sizes'])} shapes, {name}"
            if not figures["exact"]:
                continue
            if figures.get("failed"):
                found.append(f"{where}: {figures['reason']}")
            elif figures.get("misses_while_timed"):
                found.append(f"{where}: {figures['misses_while_timed']} of the timed calls were no hits")
            elif "closing" in figures:
                found.append(f"{where}: closing it: {figures['closing']}")
    return found


def versions() -> dict[str, str]:
    """The versions of the peers that are installed."""
    found = {}
    for name in systems.PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=Path, metavar="DIR", help="made by python -m bench.models")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure nothing; print this JSON as Markdown")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="engines; default: all")
    parser.add_argument("--systems", nargs="+", metavar="NAME", help=f"of {', '.join(systems.SYSTEMS)}; default: all")
    parser.add_argument("--shapes", type=int, nargs="+", metavar="N", default=SHAPES, help="how many take turns")
    parser.add_argument("--calls", type=int, default=1000, metavar="N", help="timed calls of a system (default 1000)")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="time limit of those (default 5)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON; default: bench/results")
    parser.add_argument("--name", default="suite", help="name of the JSON, without its ending (default suite)")
    parser.add_argument("--default-stream", action="store_true", help="call on torch's default stream")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
