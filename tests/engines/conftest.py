from __future__ import annotations

from collections.abc import Iterator

import pytest

from graphcache.engines import context, engine, library
from tests.engines import fake_tensorrt
from tests.graphs.fake_driver import Torch, installed


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    """The stand-ins of TensorRT and of the driver in the place of both, on one device."""
    with installed(context, engine, library, patch=monkeypatch) as fake:
        fake_tensorrt.use(monkeypatch)
        monkeypatch.setattr(fake_tensorrt, "device", fake.driver)
        yield fake
