"""Engines over the stand-ins, alone and deep inside of modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import nn

from graphcache import EngineModule
from tests.engine_modules import MODULES, load, prepare
from tests.graphs.fake_driver import Torch, installed


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(*MODULES, patch=monkeypatch) as fake:
        yield prepare(fake, monkeypatch)


@pytest.fixture
def nested(fake: Torch) -> Callable[..., tuple[nn.Module, list[EngineModule]]]:
    """A module with engines two levels down, one of them in two places, and the engines."""

    def make(*networks: str) -> tuple[nn.Module, list[Any]]:
        engines = [load(network) for network in networks]
        inner = nn.ModuleList(engines)
        return nn.Sequential(nn.ModuleDict({"deep": inner, "again": engines[0]}), nn.Identity()), engines

    return make
