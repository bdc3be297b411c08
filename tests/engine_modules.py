"""Engines as modules over the stand-ins, in Python and with compiled code; and their inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from graphcache import EngineModule
from graphcache.capture import engine_recorder
from graphcache.capture import engine_recorder as record_engine
from graphcache.capture.torch_recorder import TorchRecorder
from graphcache.dispatch import fast_path
from graphcache.engines import context, engine, library
from graphcache.graphs import buffers, verify
from graphcache.keys import call_key
from graphcache.modules import engine as room
from graphcache.modules import engine_base, engine_runner
from tests.engines import fake_tensorrt
from tests.engines.fake_tensorrt import IExecutionContext, serialize
from tests.graphs import compiled as compiled_way
from tests.graphs.fake_driver import Torch, installed

MODULES = (context, engine, library, verify, room, engine_base, engine_runner, record_engine)


def prepare(fake: Torch, patch: pytest.MonkeyPatch) -> Torch:
    fake_tensorrt.use(patch)
    patch.setattr(fake_tensorrt, "device", fake.driver)
    patch.setattr(engine_recorder, "MAX_CHECK_SECONDS", float("inf"))
    patch.setattr(fast_path, "raw_stream", fake.raw_stream)
    for each in (call_key, context):
        patch.setattr(each, "is_capturing", fake.is_capturing)
    return fake


def capture_by_driver(fake: Torch, patch: pytest.MonkeyPatch) -> None:
    """Have whole modules captured by the driver, as they are where tensors lie on a CUDA device."""
    patch.setattr(TorchRecorder, "_on_host", lambda self, call: self._on_cuda(call, 0, False))
    patch.setattr(buffers, "torch", fake)


@pytest.fixture(params=["python", "compiled"])
def fake(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Torch]:
    with installed(*MODULES, patch=monkeypatch) as fake:
        prepare(fake, monkeypatch)
        if request.param == "compiled":
            functions = compiled_way.use(request.getfixturevalue("compiled"), fake, monkeypatch)
            yield fake
            assert functions.raised == []
        else:
            yield fake


def load(network: str, **options: Any) -> EngineModule:
    return EngineModule(serialize(network), name=network, **options)


def rows(fake: Torch, count: int, start: float = 0.0) -> Tensor:
    return fake.driver.heap.tensor([[start + row + column for column in range(4)] for row in range(count)])


def numbers(fake: Torch, *values: float) -> Tensor:
    return fake.driver.heap.tensor(values)


def made_contexts(module: EngineModule) -> int:
    return sum(each.engine is module.engine.native_handles[1] for each in IExecutionContext.made)
