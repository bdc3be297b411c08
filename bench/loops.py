"""A loop on the device beside launches from the host: ``python -m bench.loops --engines DIR``.

An engine runs some steps, in one launch of :func:`graphcache.loop`, and as that many launches of a session that follow
one another without waiting. Where the output has the shape of the input, the loop feeds it back, and so do further
launches. Its answers are compared, bit for bit, with those of a session whose output is copied into its input.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import record
from bench.store import load

if TYPE_CHECKING:
    from collections.abc import Sequence

SEED = 0


def measure(engines: Path, name: str, steps: int, rounds: int) -> dict[str, Any]:
    """Measure one engine."""
    import graphcache

    bundle = load(engines, name)
    (x,) = (tensor.cuda() for tensor in bundle.cases(1, 1)[0].inputs)
    fast = graphcache.wrap(graphcache.load(bundle.engine))
    feed = {0: 0} if fast(x).shape == x.shape else {}
    kept = torch.zeros((steps, *fast(x).shape), device="cuda")
    with (
        fast.session(x) as session,
        graphcache.loop(fast, x, feed=feed, steps=steps) as loop,
        graphcache.loop(fast, x, feed=feed, steps=steps, collect={0: kept}) as collecting,
    ):
        if loop.fallback:
            raise SystemExit(f"{name}: {loop.fallback}")
        collecting.run()
        wanted = torch.empty_like(kept)
        for row in wanted:
            session.run()
            row.copy_(session.outputs)
            if feed:
                session.inputs[0].copy_(session.outputs)
        if not torch.equal(kept, wanted) or int(collecting.taken) != steps:
            raise SystemExit(f"{name}: the loop's answers are not those of launches from the host")

        def launches() -> None:
            for _ in range(steps):
                session.run()

        def fed_launches() -> None:
            for _ in range(steps):
                session.run()
                if feed:
                    session.inputs[0].copy_(session.outputs)

        systems = {"loop": loop.run, "loop that collects": collecting.run, "launches": launches, "fed": fed_launches}
        samples = record.interleave(systems, rounds, warmup=3, seed=SEED)
    per_step = {
        system: {
            "us": {key: round(value / steps, 4) for key, value in found.summary()["total_us"].items() if key != "n"},
            "cpu_us": round(found.summary()["cpu_us"]["p50"] / steps, 4),
        }
        for system, found in samples.items()
    }
    return {"feeds": bool(feed), "per_step": per_step}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(prog="python -m bench.loops", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engines", type=Path, required=True, help="folder made by bench.models")
    parser.add_argument("--models", nargs="+", default=["mlp8", "policy"], help="default: mlp8 policy")
    parser.add_argument("--steps", type=int, default=1000, help="of a loop (default 1000)")
    parser.add_argument("--rounds", type=int, default=20, help="loops of each kind that are timed (default 20)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON; default: bench/results")
    options = parser.parse_args(arguments)
    record.require_cuda("bench.loops")
    with record.stream_scope(default_stream=False), torch.no_grad():
        models = {name: measure(options.engines, name, options.steps, options.rounds) for name in options.models}
    payload = {
        "benchmark": "loops",
        "environment": record.environment(SEED),
        "steps": options.steps,
        "rounds": options.rounds,
        "models": models,
    }
    file = record.write("loops", payload, options.out)
    rows = [
        [f"{name}, {system}", *(times["us"][key] for key in ("p50", "p90", "min")), times["cpu_us"]]
        for name, found in models.items()
        for system, times in found["per_step"].items()
    ]
    record.table(f"{options.steps} steps, µs a step", ["system", "p50", "p90", "min", "CPU p50"], rows)
    print(f"written to {file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
