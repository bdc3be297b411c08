"""What a hit costs in two checkouts of graphcache, in one run: ``python -m bench.compare_commits --old DIR --new DIR``.

Each measurement is a process of its own, and the two checkouts take turns, so that both see the same machine. In a
process the answers are checked first. Then a hit, the bare eager call, ``forward_into`` and a launch of a session are
timed: the CPU time until the call has returned, and the time until the device has finished.

``--engines`` names a folder made by :mod:`bench.models`; without it only PyTorch modules are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 5
CALLS = 300
WARM_UP = 50


def mlp() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """Eight linear layers: 16 parameters."""
    layers = [layer for _ in range(8) for layer in (torch.nn.Linear(64, 64), torch.nn.ReLU())]
    return torch.nn.Sequential(*layers), (torch.randn(8, 64),)


def resnet18() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """ResNet-18 of torchvision, random weights."""
    import torchvision

    return torchvision.models.resnet18(weights=None), (torch.randn(1, 3, 224, 224),)


def bert() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A BERT of 12 layers, random weights."""
    import transformers

    config = transformers.BertConfig(hidden_size=256, num_attention_heads=4, intermediate_size=512, vocab_size=1000)
    model = transformers.BertModel(config)

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.model(input_ids=ids).last_hidden_state
            return found

    return Encoder(), (torch.randint(0, 1000, (1, 32)),)


MODULES: dict[str, Callable[[], tuple[torch.nn.Module, tuple[torch.Tensor, ...]]]] = {
    "mlp": mlp,
    "resnet18": resnet18,
    "bert": bert,
}


def measure(name: str, engines: str) -> dict[str, Any]:
    """Measure one model with the graphcache that is on the path."""
    import graphcache
    from bench.record import environment

    torch.manual_seed(0)
    truth = None
    if name in MODULES:
        module, inputs = MODULES[name]()
        module = module.eval().cuda()
        given = tuple(tensor.cuda() for tensor in inputs)
        fast, eager = graphcache.wrap(module), module
    else:
        from bench.store import load

        bundle = load(Path(engines), name)
        eager = graphcache.load(bundle.engine)
        fast = graphcache.wrap(eager)
        case = (bundle.sentences() if bundle.facts["kind"] == "sentences" else bundle.cases(8, 1))[0]
        given, truth = tuple(tensor.cuda() for tensor in case.inputs), case.answer
    with torch.inference_mode():
        for _ in range(WARM_UP):
            answer = fast(*given)
        wanted = eager(*given)
        torch.testing.assert_close(answer, wanted, rtol=5e-3, atol=5e-3)
        if truth is not None:
            torch.testing.assert_close(answer.float().cpu(), truth.float(), rtol=5e-3, atol=5e-3)
        info = fast.cache_info()
        if not info.hits:
            raise SystemExit(f"{name}: no call was a hit: {info}")
        rows = {"hit": _timed(lambda: fast(*given)), "eager": _timed(lambda: eager(*given))}
        out = torch.empty_like(answer)
        rows["forward_into"] = _timed(lambda: fast.forward_into(out, *given))
        with fast.session(*given) as session:
            session.run()
            torch.testing.assert_close(session.outputs, wanted, rtol=5e-3, atol=5e-3)
            rows["session"] = _timed(session.run)
    return {"rows": rows, "environment": environment(0)}


def _timed(call: Callable[[], object]) -> dict[str, float]:
    cpu, whole = [], []
    for _ in range(WARM_UP):
        call()
    for _ in range(CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        call()
        returned = time.perf_counter_ns()
        torch.cuda.synchronize()
        cpu.append((returned - start) / 1e3)
        whole.append((time.perf_counter_ns() - start) / 1e3)
    return {"cpu_us": statistics.median(cpu), "us": statistics.median(whole)}


def compare(arguments: argparse.Namespace) -> None:
    """Measure all models in both checkouts, in turn."""
    found: dict[str, Any] = {}
    facts = {"old": arguments.commits[0], "new": arguments.commits[1], "rounds": arguments.rounds, "seed": 0}
    for name in arguments.models:
        runs: dict[str, list[Any]] = {"old": [], "new": []}
        for _ in range(arguments.rounds):
            for which in ("old", "new"):
                runs[which].append(_process(getattr(arguments, which), name, arguments))
        found[name] = {which: _summary(each) for which, each in runs.items()}
        for row, new in found[name]["new"].items():
            old = found[name]["old"][row]
            print(
                f"{name:10} {row:13} "
                + "  ".join(
                    f"{what} {old[what]['median']:8.2f} -> {new[what]['median']:8.2f}" for what in ("us", "cpu_us")
                ),
                flush=True,
            )
        if arguments.out is not None:
            # After each model: what was measured is kept if the run is ended.
            measured = next((run["environment"] for run in runs["new"] if run), None)
            arguments.out.write_text(json.dumps({"environment": measured, **facts, "models": found}, indent=1) + "\n")


def _process(checkout: str, name: str, arguments: argparse.Namespace) -> Any:
    here = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([checkout, here, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "bench.compare_commits", "--measure", name, "--engines", arguments.engines]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False, cwd=checkout
    )
    if done.returncode:
        print(f"{name} in {checkout}: {done.stderr.strip()[-1500:]}", flush=True)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def _summary(runs: list[Any]) -> dict[str, Any]:
    rows: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for row, values in (run or {"rows": {}})["rows"].items():
            for what, value in values.items():
                rows.setdefault(row, {}).setdefault(what, []).append(value)
    return {
        row: {w: {"median": statistics.median(v), "least": min(v), "most": max(v)} for w, v in each.items()}
        for row, each in rows.items()
    }


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--old", default=".")
    parser.add_argument("--new", default=".")
    parser.add_argument("--engines", default="")
    parser.add_argument("--models", nargs="+", default=[*MODULES])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--commits", nargs=2, default=["", ""], help="of the old and the new checkout")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", default="")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.engines)))
        return
    compare(arguments)


if __name__ == "__main__":
    main()
