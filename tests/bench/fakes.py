"""Systems and engines for the suite's own logic, on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import calls, measure, store
from bench.systems import Peer

CPU = torch.device("cpu")
WEIGHT = torch.linspace(-1, 1, 12).reshape(4, 3)


def right(x: Tensor) -> Tensor:
    """What an engine of :func:`bundle` answers."""
    return x @ WEIGHT


def bundle(
    folder: Path, name: str = "net", batch: tuple[int, int, int] = (1, 2, 8), engine: bytes = b"no engine"
) -> store.Bundle:
    """An engine whose bytes nothing can run, with inputs and right answers."""
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    arrays = {"inputs": inputs.numpy(), "answers": right(inputs).numpy()}
    store.save(folder, name, engine, arrays, {"kind": "rows", "batch": batch}, compress=False)
    return store.load(folder, name)


def sentences(folder: Path) -> store.Bundle:
    """One with two inputs, as the sentence encoder has."""
    lengths = np.array([2, 3, 3])
    arrays = {"ids": np.arange(8), "lengths": lengths, "answers": np.eye(3, dtype=np.float32)}
    shape = ((1, 2), (1, 3), (1, 4))
    facts = {"kind": "sentences", "shapes": {"input_ids": shape, "attention_mask": shape}}
    store.save(folder, "words", b"no engine", arrays, facts, compress=False)
    return store.load(folder, "words")


def work(made: store.Bundle, count: int = 1, **options: Any) -> measure.Work:
    """Few calls of ``count`` sizes."""
    sizes = calls.spread(made, count)
    return measure.Work(made, sizes, calls.pool(made, sizes, 2, CPU), CPU, **{"calls": 60, **options})


class Fake(Peer):
    """A system that is a function.

    Args:
        name: Of the system.
        function: What it answers.
        log: Gets ``load NAME`` and ``close NAME``.
        reason: What :meth:`available` says.
        attributes: Of a peer, such as ``kind``.
    """

    def __init__(
        self,
        name: str = "fake",
        function: Callable[..., Tensor] = right,
        log: list[str] | None = None,
        reason: str | None = None,
        **attributes: Any,
    ) -> None:
        self.name = name
        self.function = function
        self.log = [] if log is None else log
        self.reason = reason
        self.sizes: Sequence[int] = ()
        self.calls = 0
        for attribute, value in attributes.items():
            setattr(self, attribute, value)

    def available(self) -> str | None:
        return self.reason

    def load(self, bundle: store.Bundle, device: torch.device, sizes: Sequence[int]) -> Callable[..., Tensor]:
        self.log.append(f"load {self.name}")
        self.sizes = sizes

        def call(*inputs: Tensor) -> Tensor:
            self.calls += 1
            return self.function(*inputs)

        return call

    def close(self) -> None:
        self.log.append(f"close {self.name}")


class Clock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


def raising(error: BaseException) -> Callable[..., Any]:
    """A function that raises."""

    def function(*_: Any) -> Any:
        raise error

    return function


def figures(p50: float, cpu: float = 1.0, raw: float = 10.0, **more: Any) -> dict[str, Any]:
    """What is recorded of a system, as far as tables and limits look at it."""
    total = {"p50": p50, "p90": p50, "p99": p50, "min": p50, "iqr": 0.0, "n": 1}
    return {
        "kind": "engine",
        "rival": None,
        "exact": False,
        "total_us": total,
        "cpu_burst_us": {**total, "p50": cpu},
        "raw_total_us": {**total, "p50": raw},
        "total_over_raw": round(p50 / raw, 4),
        "first_answer_seconds": 0.001,
        "steady_seconds": 0.002,
        "memory_per_shape": None,
        "misses_while_timed": 0,
        **more,
    }
