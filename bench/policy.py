"""Which graphs to keep: graphcache's policy against others and the offline optimum: ``python -m bench.policy``.

Simulates synthetic traces with measured costs, under four policies: always eager, plain least recently
used with a capture at every miss, graphcache's admission (with noisy measurements), and the optimum of whoever knows
the trace beforehand (:mod:`bench.optimum`). ``--gate`` exits with 3 unless graphcache takes at most 1.05 times
always-eager on every trace, and at most 1.25 times the optimum where a trace has favourites.

A trace is as long as ``--calls`` says, and longer where it would take less than ten times what capturing a full cache
takes: 5 % over always-eager means nothing where a single capture takes more than that. Costs of one's own are given as
JSON: ``{"name": {"eager_us": 180, "replay_us": 50, "capture_ms": 5}}``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import record
from bench.optimum import Times, optimum
from bench.simulate import FIRST_CALL, always_eager, graphcache, least_recently_used
from bench.traces import SYNTHETIC, Traffic

OVER_EAGER = 1.05
OVER_OPTIMUM = 1.25
FILLINGS = 10


@dataclass(frozen=True)
class Model:
    """What calls take.

    Args:
        name: Of the model.
        times: From a signature to its times.
        ratio: Capture over eager time, typically, which decides how long a trace has to be.
        source: Where the figures are from.
    """

    name: str
    times: Callable[[int], Times]
    ratio: float
    source: str


def alike(name: str, times: Times, source: str) -> Model:
    """A model in which all signatures cost the same."""
    return Model(name, lambda signature: times, times.capture / times.eager, source)


def measured_models() -> dict[str, Model]:
    """The models to be had from bench/results, and what else was measured."""
    hit, soak, minilm = (json.loads((record.RESULTS / f"{name}-h100.json").read_text()) for name in _FILES)
    one_shape = {each["engine"]: each for each in hit["results"] if len(each["sizes"]) == 1}
    models = []
    for engine, captured, which in (
        ("mlp8", soak["capture_seconds"] / soak["captures"], "soak-h100.json, mean"),
        ("mlp8", _first_capture(one_shape["mlp8"]), "hit-h100.json, the first"),
        ("policy", _first_capture(one_shape["policy"]), "hit-h100.json, the first"),
    ):
        systems = one_shape[engine]["systems"]
        times = Times(_p50(systems["eager"]), _p50(_of_hits(systems)), captured)
        name = engine if which.endswith("mean") else f"{engine}, slow captures"
        models.append(alike(name, times, f"calls: hit-h100.json, p50; capture: {which}"))
    times = minilm["times"]
    each = minilm["capture_seconds"] / minilm["captures"]
    models.append(
        alike("minilm", Times(_p50(times["eager"]), _p50(times["hit"]), each), "minilm-h100.json, p50 and mean capture")
    )
    for capture, which in (
        (0.05, "contexts share a runtime cache"),
        (0.4, "private contexts"),
        (1.5, "private contexts, with the first enqueue of a new shape"),
    ):
        source = f"MobileNetV3-small, one run on an H200, TensorRT-RTX 1.5.0.114, driver 580.159; capture: {which}"
        models.append(alike(f"mobilenet {capture:g} s", Times(540e-6, 264e-6, capture), source))
    drawn = "drawn: eager 130 to 550 us, replay 0.1 to 1.1 of it, capture 5 to 50 ms"
    models.append(Model("mixed", _mixed, 27.5e-3 / 340e-6, drawn))
    return {model.name: model for model in models}


def read_models(file: Path) -> dict[str, Model]:
    """Models from JSON.

    Raises:
        SystemExit: If the file is no such JSON; it names the model and the field.
    """
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{file}: {error}") from error
    if not isinstance(given, dict) or not given:
        raise SystemExit(f"{file}: expected an object of models by name")
    models = {}
    for name, costs in given.items():
        figures = []
        for key, unit in (("eager_us", 1e-6), ("replay_us", 1e-6), ("capture_ms", 1e-3)):
            value = costs.get(key) if isinstance(costs, dict) else None
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
                raise SystemExit(f"{file}: {key} of {name!r} is {value!r}; expected a number above 0")
            figures.append(value * unit)
        models[name] = alike(name, Times(*figures), str(costs.get("source", file)))
    return models


def judge(traffic: Traffic, times: Mapping[int, Times], slots: int, *, noise: float, seed: int) -> dict[str, Any]:
    """All policies on one trace."""
    outcomes = {
        "eager": always_eager(traffic.calls, times),
        "lru": least_recently_used(traffic.calls, times, slots),
        "graphcache": graphcache(traffic.calls, times, slots, noise=noise, seed=seed),
    }
    best = optimum(traffic.calls, times, slots)
    seconds = {**{name: outcome.seconds for name, outcome in outcomes.items()}, "optimum": best}
    return {
        "trace": traffic.name,
        "favourites": traffic.favourites,
        "calls": len(traffic.calls),
        "policies": {name: asdict(outcome) for name, outcome in outcomes.items()},
        "optimum_seconds": best,
        "over_eager": {name: took / seconds["eager"] for name, took in seconds.items()},
        "over_optimum": {name: took / best for name, took in seconds.items()},
    }


def failures(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What misses a limit, in words."""
    found = []
    for result in results:
        where = f"{result['model']}, {result['trace']}"
        over_eager, over_optimum = result["over_eager"]["graphcache"], result["over_optimum"]["graphcache"]
        if over_eager > OVER_EAGER:
            found.append(f"{where}: {over_eager:.3f} times always-eager, at most {OVER_EAGER} wanted")
        if result["favourites"] and over_optimum > OVER_OPTIMUM:
            found.append(f"{where}: {over_optimum:.3f} times the optimum, at most {OVER_OPTIMUM} wanted")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate, print a table for each model, record everything, and judge it."""
    parser = argparse.ArgumentParser(prog="python -m bench.policy", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON; default: bench/results")
    parser.add_argument("--calls", type=int, default=20_000, help="calls in a trace, at least (default 20000)")
    parser.add_argument("--slots", type=int, default=16, help="how many graphs fit (default 16)")
    parser.add_argument("--noise", type=float, default=0.15, help="spread of what is measured (default 0.15)")
    parser.add_argument("--seed", type=int, default=0, help="of traces and noise (default 0)")
    parser.add_argument("--costs", type=Path, metavar="FILE", help="models as JSON, instead of those measured")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these models")
    parser.add_argument("--traces", nargs="+", metavar="NAME", help="only these synthetic traces")
    parser.add_argument("--gate", action="store_true", help="exit with 3 if a limit is missed")
    options = parser.parse_args(arguments)
    if options.calls < 1 or options.slots < 1 or not 0 <= options.noise <= 2:
        parser.error("--calls and --slots are 1 or more, --noise is from 0 to 2")
    models = read_models(options.costs) if options.costs else measured_models()
    chosen = _chosen(parser, models, options.models)
    names = _chosen(parser, SYNTHETIC, options.traces)
    results: list[dict[str, Any]] = []
    for model in chosen.values():
        calls = max(options.calls, math.ceil(FILLINGS * options.slots * model.ratio))
        traffic = [
            (made := make(calls, options.seed), {signature: model.times(signature) for signature in set(made.calls)})
            for make in names.values()
        ]
        judged = [
            {"model": model.name, **judge(each, times, options.slots, noise=options.noise, seed=options.seed)}
            for each, times in traffic
        ]
        _show(model, judged)
        results += judged
    missed = failures(results)
    payload = {
        "benchmark": "policy",
        "environment": record.environment(options.seed),
        "settings": {
            "calls": options.calls,
            "slots": options.slots,
            "noise": options.noise,
            "first_call_times": FIRST_CALL if options.noise else 1.0,
        },
        "limits": {"over_eager": OVER_EAGER, "over_optimum": OVER_OPTIMUM},
        "models": {
            model.name: {**(model.times(0)._asdict() if model.name != "mixed" else {}), "source": model.source}
            for model in chosen.values()
        },
        "results": results,
        "failures": missed,
    }
    print(f"written to {record.write('policy', payload, options.out)}")
    for each in missed:
        print(f"missed: {each}")
    return 3 if missed and options.gate else 0


def _chosen(parser: argparse.ArgumentParser, known: Mapping[str, Any], names: Sequence[str] | None) -> dict[str, Any]:
    for name in names or ():
        if name not in known:
            parser.error(f"{name!r} is not known; there are {', '.join(map(repr, known))}")
    return {name: known[name] for name in names or known}


def _show(model: Model, judged: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        [
            result["trace"] + ("" if result["favourites"] else " *"),
            result["calls"],
            result["over_eager"]["lru"],
            result["over_eager"]["graphcache"],
            result["over_eager"]["optimum"],
            result["over_optimum"]["graphcache"],
            result["policies"]["graphcache"]["captures"],
        ]
        for result in judged
    ]
    columns = ["trace (* without favourites)", "calls", "lru", "graphcache", "optimum", "over optimum", "captures"]
    record.table(f"{model.name}: total time over always-eager ({model.source})", columns, rows)


def _first_capture(result: Mapping[str, Any]) -> float:
    return float(_of_hits(result["capture_seconds"]))


def _of_hits(figures: Mapping[str, Any]) -> Any:
    """Those of the default way to record; files of version 0.1 name it otherwise."""
    return figures["hit_auto"] if "hit_auto" in figures else figures["hit_bind"]


def _p50(system: Mapping[str, Any]) -> float:
    return float(system["total_us"]["p50"]) * 1e-6


def _mixed(signature: int) -> Times:
    draw = random.Random(signature)
    eager = draw.uniform(130e-6, 550e-6)
    return Times(eager, eager * draw.uniform(0.1, 1.1), draw.uniform(5e-3, 50e-3))


_FILES = ("hit", "soak", "minilm")

if __name__ == "__main__":
    raise SystemExit(main())
