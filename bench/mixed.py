"""Models of engines with PyTorch around them: ``python -m bench.mixed --engines DIR``.

A sentence encoder that pools in torch; a detector's head whose number of rows depends on the data; speech detection,
whose engine no graph can hold, between two parts that one can; and, where torch_tensorrt is installed, a model that it
compiled into two engines with a graph break. Of each, twelve shapes take turns. Every answer is held against eager
execution before anything is timed: the whole as one graph, submodule by submodule, found by itself, eagerly, and by
Torch-TensorRT's own graph of the whole.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench import calls, measure, networks, record, store, vad

SEED = 0
SHAPES = 12
STRATEGIES: dict[str, dict[str, Any]] = {
    "found by itself": {},
    "whole graph": {"strategy": "whole_graph"},
    "per submodule": {"strategy": "per_submodule"},
}
Engines = Callable[[str], nn.Module]
"""Gives the engine of a name; a test gives torch modules."""


class Sentences(nn.Module):
    """Tokens from an engine; pooling and length in torch."""

    def __init__(self, engine: nn.Module) -> None:
        super().__init__()
        self.engine = engine
        # The order of an engine's bindings is TensorRT's.
        names = ["input_ids", "attention_mask"]
        self.order = [names.index(name) for name in getattr(engine, "input_binding_names", names)]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``(1, length)`` twice, to ``(1, 384)``."""
        given = (ids, mask)
        return networks.pooled(self.engine(*[given[index] for index in self.order]), mask)


class Positive(nn.Module):
    """The rows that score above average; how many these are depends on the data."""

    def forward(self, rows: Tensor) -> Tensor:
        """``(n, width)`` to ``(m, width)``."""
        scores = rows.max(dim=-1).values
        return rows[torch.nonzero(scores >= scores.mean()).squeeze(1)]


class Detector(nn.Module):
    """An engine, and in torch a choice of rows between two parts that a graph can hold."""

    def __init__(self, engine: nn.Module) -> None:
        super().__init__()
        self.backbone = engine
        self.before = nn.Sequential(nn.LayerNorm(64, elementwise_affine=False), nn.GELU())
        self.select = Positive()
        self.head = nn.Sequential(nn.Softmax(-1), nn.LayerNorm(64, elementwise_affine=False), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        """``(n, 64)`` to ``(m, 64)``."""
        return self.head(self.select(self.before(self.backbone(x))))


class Resample(nn.Module):
    """Frames of any length, brought to what a detector takes, with the mean taken off."""

    def forward(self, frame: Tensor) -> Tensor:
        """``(1, n)`` to ``(1, 576)``."""
        length = vad.CONTEXT + vad.FRAME
        even = functional.interpolate(frame[None], size=length, mode="linear", align_corners=False)[0]
        return (even - even.mean(dim=-1, keepdim=True)).contiguous()


class Smooth(nn.Module):
    """A probability from one and a state, as a filter behind a detector would have it."""

    def forward(self, probability: Tensor, state: Tensor) -> Tensor:
        """``(1, 1)`` and ``(2, 1, 128)`` to ``(1, 1)``."""
        energy = state.square().mean(dim=(0, 2)).sqrt()[None]
        return torch.sigmoid(4 * (probability - 0.5)) * torch.tanh(energy)


class Speech(nn.Module):
    """A detector that no graph can hold, between two parts that one can."""

    def __init__(self, engine: nn.Module, rate: Tensor) -> None:
        super().__init__()
        self.before = Resample()
        self.engine = engine
        self.after = Smooth()
        self.rate = rate

    def forward(self, frame: Tensor, state: Tensor) -> Tensor:
        """``(1, n)`` and ``(2, 1, 128)`` to ``(1, 1)``."""
        answer = self.engine(input=self.before(frame), sr=self.rate, state=state)
        probability, after = sorted(answer, key=lambda value: value.dim())
        return self.after(probability, after)


@dataclass(frozen=True)
class Mixed:
    """A model, and what is done with it.

    Args:
        name: Of the model.
        module: It.
        calls: Positional arguments, each of another shape than the one before.
        include: The submodules that are captured one by one, where they are named; those that are found otherwise.
        whole: Whether a graph of the whole can be had.
        others: Other systems for the same calls, by name, each a context manager that gives a function.
        peers: Those of them that are other people's: what they answer wrongly is recorded, and fails nothing here.
    """

    name: str
    module: nn.Module
    calls: Sequence[tuple[Tensor, ...]]
    include: tuple[str, ...] = ()
    whole: bool = True
    others: dict[str, Callable[[], Any]] = field(default_factory=dict)
    peers: tuple[str, ...] = ()

    def systems(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Names, and context managers that give functions to call."""
        import graphcache

        for name, options in STRATEGIES.items():
            if name == "whole graph" and not self.whole:
                continue
            own = {"include": self.include} if name == "per submodule" and self.include else {}
            yield (
                name,
                lambda settings=(options | own): graphcache.wrap(self.module, max_graphs=2 * SHAPES, **settings),
            )
        yield from self.others.items()


def models(engines: Engines, bundles: Callable[[str], store.Bundle], device: torch.device) -> list[Mixed]:
    """The models whose engines and inputs are on disk.

    Args:
        engines: Gives the engine of a name.
        bundles: Gives inputs of a name.
        device: Where everything lies.
    """
    sentences = bundles("minilm_tokens")
    lengths = calls.spread(sentences, SHAPES)
    texts = [tuple(value.to(device) for value in sentences.cases(length, 1)[0].inputs) for length in lengths]
    rows = bundles("mlp8")
    batches = calls.spread(rows, SHAPES)
    frames = torch.from_numpy(bundles("silero").arrays["audio"]).to(device)
    sizes = [400 + 32 * step for step in range(SHAPES)]
    state = torch.linspace(-0.5, 0.5, 256, device=device).reshape(2, 1, 128)
    silero = engines("silero")
    on_host = "sr" in [silero.input_binding_names[index] for index in getattr(silero, "host_inputs", ())]
    speech = Speech(silero, torch.tensor(vad.RATE, device="cpu" if on_host else device))
    return [
        Mixed("sentences", Sentences(engines("minilm_tokens")), texts, include=("engine",)),
        Mixed(
            "detector",
            Detector(engines("mlp8")),
            [(rows.cases(size, 1)[0].inputs[0].to(device),) for size in batches],
            include=("backbone",),
            whole=False,
        ),
        Mixed(
            "speech",
            speech,
            [(frames[None, vad.RATE : vad.RATE + size].contiguous(), state) for size in sizes],
            include=("before", "after"),
            whole=False,
        ),
    ]


def compiled(device: torch.device) -> Mixed | None:
    """A network that Torch-TensorRT compiled into two engines with a ``cumsum`` in torch between them.

    Returns:
        ``None`` where torch_tensorrt is not installed.
    """
    if importlib.util.find_spec("torch_tensorrt") is None:
        return None
    import torch_tensorrt

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = networks.Mlp8(SEED), networks.Mlp8(SEED + 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.cumsum(self.first(x), dim=-1))

    network = Broken().eval().requires_grad_(False).to(device)
    draw = torch.Generator().manual_seed(SEED)
    inputs = [(torch.randn(size, 64, generator=draw).to(device),) for size in range(2, 2 + SHAPES)]
    batch = torch.export.Dim("batch", min=1, max=16)
    program = torch.export.export(network, (inputs[4][0],), dynamic_shapes={"x": {0: batch}})
    module = torch_tensorrt.dynamo.compile(
        program,
        [torch_tensorrt.Input(min_shape=(1, 64), opt_shape=(8, 64), max_shape=(16, 64), dtype=torch.float32)],
        torch_executed_ops={"torch.ops.aten.cumsum.default"},
        min_block_size=1,
    )
    return Mixed(
        "compiled by torch_tensorrt",
        module,
        inputs,
        others={
            "torch_tensorrt, whole graph": lambda: torch_tensorrt.runtime.enable_cudagraphs(module),
            "its runtime in a whole graph": lambda: _left(module),
        },
        peers=("torch_tensorrt, whole graph", "its runtime in a whole graph"),
    )


def _left(module: nn.Module) -> Any:
    import graphcache

    return graphcache.wrap(module, strategy="whole_graph", runtime="torch_tensorrt", max_graphs=2 * SHAPES)


def check(model: Mixed, passes: int = 4) -> tuple[dict[str, Any], list[str]]:
    """Hold every system against eager execution, with all shapes taking turns.

    Args:
        model: What is called.
        passes: Over all shapes: the first two capture.

    Returns:
        By system the largest relative error and, of graphcache, its account; and what was wrong.
    """
    found: dict[str, Any] = {}
    failures: list[str] = []
    for name, make in model.systems():
        wanted = [_flat(model.module(*args)) for args in model.calls]
        try:
            with make() as function:
                kept = [[_flat(function(*args)) for args in model.calls] for _ in range(passes)]
                account = _account(function)
        except Exception as error:
            if name not in model.peers:
                raise
            found[name] = {"failed": measure.first_line(error)}
            continue
        # Compared only now: what was returned first must have survived every later replay.
        errors = [
            record.relative_error(left, right)
            for each in kept
            for answer, expected in zip(each, wanted, strict=True)
            for left, right in zip(answer, expected, strict=True)
        ]
        # JSON has no infinity.
        found[name] = {"largest_relative_error": min(max(errors), 1e30), **account}
        if bad := [error for error in errors if not error < store.TOLERANCE]:
            text = f"{len(bad)} of {len(errors)} answers were wrong, by {max(bad):.1e}"
            found[name]["wrong"] = text
            if name not in model.peers:
                failures.append(f"{model.name}, {name}: {text}")
        if account and not account["hits"] and name not in model.peers:
            failures.append(f"{model.name}, {name}: nothing was answered by a graph: {account['eager']}")
    return found, failures


def timed(model: Mixed, rounds: int, without: Collection[str] = ()) -> dict[str, record.Samples]:
    """Time every system and eager execution, all shapes taking turns.

    Systems take turns with each other, too, unless some of them exchange engines or set modes of the process: those
    come one after another.

    Args:
        model: What is called.
        rounds: Timed calls of each.
        without: Systems to leave out.
    """
    made = {"eager": lambda: nullcontext(model.module), **dict(model.systems())}
    made = {name: make for name, make in made.items() if name not in without}
    groups = [made] if not model.others else [{name: make} for name, make in made.items()]
    samples: dict[str, record.Samples] = {}
    for group in groups:
        with ExitStack() as stack:
            turns = {name: _in_turn(stack.enter_context(make()), model.calls) for name, make in group.items()}
            for call in turns.values():
                # The first calls of a shape capture, some of them later than others.
                for _ in range(4 * len(model.calls)):
                    call()
            samples |= record.interleave(turns, rounds, warmup=len(model.calls), seed=SEED)
    return samples


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time, report and record."""
    parser = argparse.ArgumentParser(prog="python -m bench.mixed", description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=Path, required=True, metavar="DIR", help="made by python -m bench.models")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON; default: bench/results")
    parser.add_argument("--rounds", type=int, default=600, help="timed calls of each system (default 600)")
    parser.add_argument("--default-stream", action="store_true", help="call on torch's default stream")
    options = parser.parse_args(arguments)
    device = record.require_cuda("bench.mixed")
    import graphcache

    bundles = {name: store.load(options.engines, name) for name in ("minilm_tokens", "mlp8", "silero")}
    results: dict[str, Any] = {}
    failures: list[str] = []
    with record.stream_scope(options.default_stream), torch.inference_mode():
        made = models(lambda name: graphcache.load(bundles[name].engine), bundles.__getitem__, device)
        for model in made:
            results[model.name], wrong = measured(model, options.rounds)
            failures += wrong
    with record.stream_scope(options.default_stream), torch.no_grad():
        if (theirs := compiled(device)) is not None:
            results[theirs.name], wrong = measured(theirs, options.rounds)
            failures += wrong
    payload = {
        "benchmark": "mixed",
        "environment": record.environment(SEED),
        "torch_tensorrt": _version("torch-tensorrt-rtx") or _version("torch-tensorrt"),
        "settings": {"rounds": options.rounds, "shapes": SHAPES, "default_stream": options.default_stream},
        "models": results,
        "failures": failures,
    }
    file = record.write("mixed", payload, options.out)
    for name, result in results.items():
        rows = [
            [system, *(each[key]["p50"] for key in ("total_us", "cpu_us"))] for system, each in result["times"].items()
        ]
        record.table(f"{name}, {SHAPES} shapes in turn", ["system", "call + sync, µs", "CPU, µs"], rows)
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"written to {file}")
    return 1 if failures else 0


def measured(model: Mixed, rounds: int) -> tuple[dict[str, Any], list[str]]:
    """Check a model; time it if it is right."""
    found, failures = check(model)
    if failures:
        return {"checked": found, "times": {}}, failures
    samples = timed(model, rounds, [name for name, each in found.items() if "failed" in each])
    return {"checked": found, "times": {name: each.summary() for name, each in samples.items()}}, failures


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _account(function: Any) -> dict[str, Any]:
    info = getattr(function, "cache_info", None)
    if info is None:
        return {}
    account = info()
    return {
        "hits": account.hits,
        "captures": account.captures,
        "graphs": account.graphs,
        "eager": {reason.value: count for reason, count in account.eager.items()},
        "parts": sorted(function.parts),
    }


def _flat(answer: Any) -> list[Tensor]:
    return list(answer) if isinstance(answer, (list, tuple)) else [answer]


def _in_turn(function: Callable[..., object], arguments: Sequence[tuple[Tensor, ...]]) -> Callable[[], object]:
    return calls.in_turn([lambda args=args: function(*args) for args in arguments])


if __name__ == "__main__":
    raise SystemExit(main())
