"""What observing costs a hit, on any machine: ``python -m bench.observed``.

Host graphs of one addition, call by call in turn: a bare module, one that is observed by all that is free on the way of
a hit (a collector that was scraped, ranges around captures and eager calls, a subscriber, explanations), and one with a
range around every call, which is not free and is not meant to be. What travels is the ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphcache
from bench import record
from graphcache.observe import Collector, nvtx_ranges

SEED = 0


class Add(nn.Module):
    """One addition."""

    def forward(self, x: Tensor) -> Tensor:
        """The input plus one."""
        return x + 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print one table, record everything."""
    parser = argparse.ArgumentParser(prog="python -m bench.observed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON; default: bench/results")
    parser.add_argument("--rounds", type=int, default=4000, help="timed calls of each system (default 4000)")
    options = parser.parse_args(arguments)
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    with torch.inference_mode():
        found = measure(options.rounds)
    over = {name: times["p50"] / found["bare"]["p50"] for name, times in found.items()}
    payload = {
        "benchmark": "observed",
        "environment": record.environment(SEED),
        "settings": {"rounds": options.rounds, "threads": 1},
        "results": found,
        "over_bare": over,
    }
    file = record.write("observed", payload, options.out)
    rows = [[name, times["p50"], times["iqr"], over[name]] for name, times in found.items()]
    record.table("hits of host graphs, µs per call", ["module", "p50", "iqr", "over bare"], rows)
    print(f"written to {file}")
    return 0


def measure(rounds: int) -> dict[str, Any]:
    """Hits of the three modules in turn, after every answer was checked.

    Args:
        rounds: How many timed calls of each.

    Raises:
        AssertionError: If an answer is wrong, or anything but a hit is timed.
    """
    x = torch.randn(4)
    modules = {name: graphcache.wrap(Add()) for name in ("bare", "observed", "ranges around every call")}
    observed = modules["observed"]
    collector = Collector(observed)
    observed.subscribe(lambda event: None)
    ranges = [nvtx_ranges(observed), nvtx_ranges(modules["ranges around every call"], hits=True)]
    for fast in modules.values():
        assert torch.equal(fast(x), x + 1)
        assert torch.equal(fast(x), x + 1)
    observed.explain(x)
    assert len(list(collector.collect())) > 0
    systems: dict[str, Callable[[], object]] = {name: _calling(fast, x) for name, fast in modules.items()}
    before = {name: fast.cache_info() for name, fast in modules.items()}
    times = record.interleave(systems, calls=rounds)
    for name, fast in modules.items():
        after = fast.cache_info()
        assert (after.captures, after.eager) == (before[name].captures, {}), after
    for each in ranges:
        each.close()
    return {name: samples.summary()["cpu_us"] for name, samples in times.items()}


def _calling(fast: Callable[[Tensor], object], x: Tensor) -> Callable[[], object]:
    return lambda: fast(x)


if __name__ == "__main__":
    raise SystemExit(main())
