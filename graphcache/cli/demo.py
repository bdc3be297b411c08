"""``graphcache demo``: mixed shapes through a small network, every answer held against eager execution."""

from __future__ import annotations

import functools
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import click
import torch
from torch import nn

import graphcache
from graphcache import CacheInfo, Reason
from graphcache.cli.network import BATCHES, OBSERVATION, Confident, Policy, observations
from graphcache.cli.options import json_option, seed_option
from graphcache.cli.output import (
    Causes,
    ComparisonFailed,
    described,
    environment,
    one_line,
    print_json,
    progress,
    stdout,
    table,
)
from graphcache.cli.timing import difference, spread, timed
from graphcache.errors import EngineError, TensorRTNotFoundError
from graphcache.export.onnx_export import export, open_sizes
from graphcache.modules.transparent import controls

_EVERY = 10
"""One call in so many is of the kind that no graph can answer."""

Outcome = Literal["hit", "capture"] | Reason


@dataclass
class _Tally:
    """What became of the calls, and how long they took in nanoseconds."""

    times: dict[Outcome, list[int]] = field(default_factory=lambda: defaultdict(list))
    eagerly: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    why: dict[Reason, str] = field(default_factory=dict)


@click.command(short_help="See it work: mixed shapes through a small network.")
@click.option("--calls", type=click.IntRange(min=1), default=300, show_default=True, help="How many calls to make.")
@seed_option
@click.option("--max-graphs", type=click.IntRange(min=1), help="How many graphs to keep; as many as by default.")
@json_option
def demo(calls: int, seed: int, max_graphs: int | None, as_json: bool) -> None:
    """Send mixed shapes through a small network and compare every answer with eager execution.

    With a GPU, TensorRT and the extra onnx the network is an engine, built on the spot; with a GPU alone a PyTorch
    module on CUDA graphs; without a GPU the same module on host graphs. One call in ten keeps only some rows of the
    answer, which no graph can do, so that its reason shows. Exits with 3 if any answer differs.

    \b
    Examples:
      graphcache demo
      graphcache demo --calls 50 --max-graphs 4 --json
    """
    options = {} if max_graphs is None else {"max_graphs": max_graphs}
    with progress("Preparing the network") as show, torch.no_grad():
        network, what, note = _network(seed, show)
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        confident = Confident(network)
        with (
            graphcache.wrap(network, **options) as fast,
            graphcache.wrap(confident, include=["policy"], **options) as picky,
        ):
            pairs = {False: (network, fast), True: (confident, picky)}
            tally = _traffic(pairs, calls, seed, device, show)
            info = controls(fast).cache_info()
            inner = picky.cache_info()
    result = {
        **environment(device, tensorrt=what.startswith("TensorRT")),
        "network": what,
        **({"note": note} if note else {}),
        "calls": calls,
        "seed": seed,
        "differences": len(tally.wrong),
        **_account(tally, info, inner),
    }
    if as_json:
        print_json(result)
    else:
        _print(result, tally, device)
    if tally.wrong:
        raise ComparisonFailed(
            f"{len(tally.wrong)} of {calls} answers differ from eager execution. The first: {tally.wrong[0]}"
        )


def _network(seed: int, show: Callable[[str], None]) -> tuple[nn.Module, str, str]:
    """The network, what it is in words, and why it is not an engine although there is a GPU."""
    policy = Policy(seed)
    if not torch.cuda.is_available():
        return policy, "PyTorch module on host graphs", ""
    show("Building a TensorRT engine")
    inputs = [torch.zeros(BATCHES[2], OBSERVATION)]
    try:
        made = export(policy, inputs, open_sizes(policy, inputs, {0: {0: (min(BATCHES), max(BATCHES))}}))
        engine = graphcache.build(made.onnx, shapes=made.shapes)
        return graphcache.load(engine, name="policy"), "TensorRT engine on CUDA graphs", ""
    except (TensorRTNotFoundError, EngineError) as error:
        return policy.cuda(), "PyTorch module on CUDA graphs", f"no TensorRT engine: {one_line(error)}"


def _traffic(
    pairs: dict[bool, tuple[nn.Module, graphcache.CachedModule]],
    calls: int,
    seed: int,
    device: torch.device,
    show: Callable[[str], None],
) -> _Tally:
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    skew = [1 / rank for rank in range(1, len(BATCHES) + 1)]
    tally = _Tally()
    causes = Causes(*(fast for _, fast in pairs.values()))
    for call in range(calls):
        show(f"Call {call + 1} of {calls}")
        [batch] = choose.choices(BATCHES, skew)
        eager, fast = pairs[call % _EVERY == _EVERY // 2]
        x = observations(batch, generator, device)
        before = controls(fast).cache_info()
        answer, nanoseconds = timed(functools.partial(fast, x), device)
        outcome = _outcome(before, controls(fast).cache_info())
        expected, eagerly = timed(functools.partial(eager, x), device)
        tally.times[outcome].append(nanoseconds)
        if outcome == "hit":
            tally.eagerly.append(eagerly)
        if (found := difference(answer, expected)) is not None:
            tally.wrong.append(f"call {call + 1}, batch {batch}, {_label(outcome)}: {found}")
    tally.why = {outcome: causes.explain(outcome.value) for outcome in tally.times if isinstance(outcome, Reason)}
    return tally


def _outcome(before: CacheInfo, after: CacheInfo) -> Outcome:
    for reason, count in after.eager.items():
        if count > before.eager.get(reason, 0):
            return reason
    return "capture" if after.captures > before.captures else "hit"


def _label(outcome: Outcome) -> str:
    return f"ran eagerly ({outcome.value})" if isinstance(outcome, Reason) else outcome


def _account(tally: _Tally, info: CacheInfo, inner: CacheInfo) -> dict[str, Any]:
    def measured(times: Sequence[int]) -> dict[str, Any]:
        return spread(times) or {"calls": 0}

    return {
        "hits": measured(tally.times["hit"]),
        "hits_run_eagerly": measured(tally.eagerly),
        "captures": measured(tally.times["capture"]),
        "eager": {reason.value: {**measured(tally.times[reason]), "why": why} for reason, why in tally.why.items()},
        "graphs": info.graphs,
        "nbytes": info.nbytes,
        "evictions": info.evictions,
        "hits_inside_eager_calls": inner.hits,
    }


def _cells(times: Mapping[str, Any]) -> list[str]:
    return [str(times["calls"]), *(f"{times[name]:.1f}" if name in times else "-" for name in ("p50", "p90", "p99"))]


def _print(result: dict[str, Any], tally: _Tally, device: torch.device) -> None:
    console = stdout()
    versions = environment(device, tensorrt=result["network"].startswith("TensorRT"))
    console.print(described(versions), soft_wrap=True)
    console.print(f"{result['network']}: {result['calls']} calls of {len(BATCHES)} batch sizes, seed {result['seed']}")
    if "note" in result:
        console.print(result["note"], soft_wrap=True)
    console.print()
    rows = table("outcome", "calls", "p50 µs", "p90 µs", "p99 µs")
    for label, key in (
        ("hit: answered by a graph", "hits"),
        ("     the same inputs, eagerly", "hits_run_eagerly"),
        ("capture: first call of a shape", "captures"),
    ):
        rows.add_row(label, *_cells(result[key]))
    for reason, times in result["eager"].items():
        rows.add_row(f"ran eagerly: {reason}", *_cells(times))
    console.print(rows)
    console.print()
    for why in tally.why.values():
        console.print(why, soft_wrap=True)
    if result["hits_inside_eager_calls"]:
        console.print(f"Inside those calls the network itself was a hit {result['hits_inside_eager_calls']} times.")
    console.print(f"Graphs kept: {result['graphs']} ({result['nbytes']} bytes); evicted: {result['evictions']}.")
    if device.type == "cpu":
        console.print(
            "A host graph repeats its operations one by one. What one launch for all of them saves shows on CUDA."
        )
    if not tally.wrong:
        how = "bit for bit" if device.type == "cpu" else "within 1e-3 of the largest value"
        console.print(f"All {result['calls']} answers equal eager execution, {how}.")
