"""What a hit costs around the work itself, on any machine: ``python -m bench.host``.

Host graphs of a module that does next to nothing (one addition), so that what is measured is the way of a call: the
signature, the look-up, the copies in. Held against eager execution in the same run, call by call in turn:

- with 1, 10, 100 and 1000 shapes in the cache, called in turn;
- with 1 to 64 inputs;
- with the same inputs in nested structures.

Absolute times are of the machine; what travels are the ratios, and that a hit costs the same however many graphs there
are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphcache
from bench import record

SEED = 0
SHAPES = (1, 10, 100, 1000)
INPUTS = (1, 4, 16, 64)


class Add(nn.Module):
    """One addition per tensor, whatever the structure."""

    def forward(self, *values: Any) -> Any:
        """The same structure, each tensor plus one."""
        return pytree.tree_map(lambda leaf: leaf + 1, values[0] if len(values) == 1 else values)


class First(nn.Module):
    """One addition to the first of any number of tensors, so that only the inputs become more."""

    def forward(self, *values: Tensor) -> Tensor:
        """The first plus one."""
        return values[0] + 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print one table, record everything."""
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON; default: bench/results")
    parser.add_argument("--rounds", type=int, default=2000, help="timed calls of each system (default 2000)")
    options = parser.parse_args(arguments)
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    with torch.inference_mode():
        results = [measure(*case, options.rounds) for case in cases()]
    flat = results[len(SHAPES) - 1]["hit"]["p50"] / results[0]["hit"]["p50"]
    payload = {
        "benchmark": "host",
        "environment": record.environment(SEED),
        "settings": {"rounds": options.rounds, "threads": 1},
        "results": results,
        "thousand_shapes_over_one": flat,
    }
    file = record.write("host", payload, options.out)
    rows = [
        [
            result["case"],
            *(result[name]["p50"] for name in ("eager", "hit")),
            result["hit"]["iqr"],
            result["over_eager"],
        ]
        for result in results
    ]
    record.table("host graphs, µs per call", ["case", "eager p50", "hit p50", "hit iqr", "hit over eager"], rows)
    print(f"a hit among {SHAPES[-1]} shapes costs {flat:.2f} times one among a single shape")
    print(f"written to {file}")
    return 0


def cases() -> list[tuple[str, nn.Module, list[tuple[Any, ...]]]]:
    """What is measured: a name, a module, and the arguments of calls in turn."""
    found: list[tuple[str, nn.Module, list[tuple[Any, ...]]]] = [
        (f"{count} shapes in turn", First(), [(torch.randn(size + 1),) for size in range(count)]) for count in SHAPES
    ]
    found += [(f"{count} inputs", First(), [tuple(torch.randn(4) for _ in range(count))]) for count in INPUTS]
    a, b, c = (torch.randn(4) for _ in range(3))
    structures: dict[str, tuple[Any, ...]] = {
        "3 tensors, flat": (a, b, c),
        "3 tensors in a list": ([a, b, c],),
        "3 tensors in dictionaries in a tuple": (({"a": a, "b": {"b": b}}, c),),
    }
    found += [(name, Add(), [args]) for name, args in structures.items()]
    return found


def measure(name: str, module: nn.Module, calls: list[tuple[Any, ...]], rounds: int) -> dict[str, Any]:
    """Eager calls and hits in turn, after every answer was checked.

    Args:
        name: Of the case.
        module: What is called.
        calls: Arguments, in turn.
        rounds: How many timed calls of each.

    Raises:
        AssertionError: If an answer is wrong, or anything but a hit is timed.
    """
    fast = graphcache.wrap(module, max_graphs=len(calls))
    for args in calls * 2:
        pairs = zip(pytree.tree_leaves(fast(*args)), pytree.tree_leaves(module(*args)), strict=True)
        assert all(torch.equal(got, wanted) for got, wanted in pairs), name
    systems: dict[str, Callable[[], object]] = {"eager": _in_turn(module, calls), "hit": _in_turn(fast, calls)}
    before = fast.cache_info()
    times = record.interleave(systems, calls=rounds)
    after = fast.cache_info()
    assert (after.captures, after.eager) == (before.captures, {}), after
    summary = {system: samples.summary()["cpu_us"] for system, samples in times.items()}
    over = summary["hit"]["p50"] / summary["eager"]["p50"]
    return {"case": name, **summary, "over_eager": over, "overhead_us": summary["hit"]["p50"] - summary["eager"]["p50"]}


def _in_turn(module: Callable[..., Any], calls: list[tuple[Any, ...]]) -> Callable[[], object]:
    turn = cycle(calls).__next__
    return lambda: module(*turn())


if __name__ == "__main__":
    raise SystemExit(main())
