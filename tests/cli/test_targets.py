"""What ``graphcache run`` runs: a package is an engine too."""

from __future__ import annotations

from pathlib import Path

import pytest

import graphcache
from graphcache import EngineModule
from graphcache.cli.targets import resolve
from tests.engines.fake_tensorrt import serialize
from tests.standins import engines


def test_a_package_of_an_engine_wrapped_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engines(monkeypatch):
        module = EngineModule(serialize("affine"), name="net")
        for each in (module, graphcache.wrap(module)):
            each.save(tmp_path / "net.gcache")
            target = resolve(str(tmp_path / "net.gcache"), [], None)
            assert type(target.module) is EngineModule
            assert target.module.name == "net"
