"""Engines over the stand-ins, here and in other processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphcache import EngineModule
from graphcache.capture import engine_recorder
from graphcache.capture import engine_recorder as record_engine
from graphcache.dispatch import fast_path
from graphcache.engines import context, engine, library, output_shapes
from graphcache.graphs import verify
from graphcache.keys import call_key
from graphcache.modules import engine as room
from graphcache.modules import engine_base, engine_runner, portable, prepare
from graphcache.persist import saved_call
from tests.engines import fake_tensorrt
from tests.graphs.fake_driver import Torch, installed

MODULES = (
    context,
    engine,
    library,
    output_shapes,
    verify,
    room,
    engine_base,
    portable,
    engine_runner,
    record_engine,
    prepare,
    saved_call,
)
ROOT = Path(__file__).parents[1]


@contextmanager
def engines(patch: pytest.MonkeyPatch, *, streams: bool = True) -> Iterator[Torch]:
    """The stand-ins of TensorRT and of the driver in the place of both.

    Args:
        patch: What undoes it.
        streams: Whether engines run on the driver's streams, where their tensors have to be of its heap, and can be
            captured; otherwise they run at once, on any tensor.
    """
    with installed(*MODULES, patch=patch) as fake:
        fake_tensorrt.use(patch)
        patch.setattr(fake_tensorrt, "device", fake.driver if streams else None)
        patch.setattr(engine_recorder, "MAX_CHECK_SECONDS", float("inf"))
        patch.setattr(fast_path, "raw_stream", fake.raw_stream)
        patch.setattr(call_key, "is_capturing", fake.is_capturing)
        # What prepare() makes up has to lie where engines read.
        patch.setattr(fake, "zeros", lambda shape, dtype, device: fake.empty(shape, dtype=dtype).zero_(), raising=False)
        yield fake


class Mixed(nn.Module):
    """An engine between torch operations."""

    def __init__(self, engine: EngineModule | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.engine = engine if engine is not None else EngineModule()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.engine(x.relu()) * self.scale
        return y


def in_a_new_process(code: str, *arguments: object, streams: bool = False, check: bool = True) -> str:
    """What some code prints in a new process where engines run over the stand-ins.

    Args:
        code: ``graphcache``, ``torch``, ``pytest``, ``Mixed``, ``fake`` and ``arguments`` are there.
        arguments: Become text.
        streams: As :func:`engines` takes it.
        check: Whether it has to end well.
    """
    lines = [
        "import sys, pytest, torch, graphcache",
        "from tests.standins import Mixed, engines",
        "arguments = sys.argv[1:]",
        f"with pytest.MonkeyPatch.context() as patch, engines(patch, streams={streams}) as fake:",
        *(f"    {line}" for line in code.strip().splitlines()),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GRAPHCACHE_NATIVE": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=300,
    )
    assert ran.returncode == 0 or not check, ran.stderr
    return ran.stdout if check else ran.stdout + ran.stderr
