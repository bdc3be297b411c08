"""Odd arguments of everything that saves, loads, keeps and compiles: taken, or a typed error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import graphcache
from graphcache import EngineModule
from graphcache.errors import ConfigError, EngineFormatError, GraphCacheError
from graphcache.export.onnx_export import open_sizes
from tests.engines.fake_tensorrt import serialize
from tests.helpers import mlp
from tests.standins import engines
from tests.test_fuzz import ODD, untyped

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
X = torch.ones(2, 4)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[EngineModule]:
    monkeypatch.chdir(tmp_path)
    with engines(monkeypatch):
        yield EngineModule(serialize("affine"), name="net")


def short(error: Any, said: str, _: Any) -> bool:
    return error is None or 0 < len(said) < 1500


@pytest.mark.parametrize("option", ["into", "rebuild", "prepare", "keep_kernels", "name"])
def test_odd_options_of_load(module: EngineModule, option: str) -> None:
    module.save("m.gcache")
    for path in ("m.gcache", serialize("affine")):
        assert not untyped(
            ODD, lambda odd, path=path: graphcache.load(path, **{option: odd}), GraphCacheError, holds=short
        )


def test_odd_arguments_of_save(module: EngineModule, tmp_path: Path) -> None:
    module.save("m.gcache")
    before = (tmp_path / "m.gcache").read_bytes()
    assert not untyped(ODD, module.save, ConfigError, holds=short)
    assert not untyped(ODD, lambda odd: module.save("n.gcache", onnx=odd), ConfigError, holds=short)
    assert not untyped(ODD, lambda odd: module.save("n.gcache", onnx=b"m", build=odd), ConfigError, holds=short)
    assert (tmp_path / "m.gcache").read_bytes() == before


@pytest.mark.parametrize("field", [None, "engine", "inputs", "outputs", "name", "profile", "output_shapes", "version"])
def test_odd_states(module: EngineModule, field: str | None) -> None:
    engine = module.engine

    def take(odd: Any) -> None:
        module.set_extra_state(odd if field is None else {**module.get_extra_state(), field: odd})

    assert not untyped(ODD, take, GraphCacheError, holds=short)
    assert module.engine is engine or field in ("name", "inputs", "outputs")
    if field is None:
        assert not untyped({"None": lambda: None}, take, EngineFormatError, holds=lambda error, *_: error is not None)


@pytest.mark.parametrize("argument", ["module", "example_inputs", "dynamic", "tolerance", "name", "max_graphs"])
def test_odd_arguments_of_compile(monkeypatch: pytest.MonkeyPatch, argument: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def take(odd: Any) -> None:
        graphcache.compile(**{"module": mlp(), "example_inputs": X, argument: odd})

    # Whatever is right is refused for want of a device.
    assert not untyped(ODD, take, GraphCacheError, holds=short)


def test_odd_sizes() -> None:
    for make in (lambda odd: {"input": odd}, lambda odd: {"input": {0: odd}}, lambda odd: {0: {0: (1, odd)}}):
        assert not untyped(ODD, lambda odd, make=make: open_sizes(mlp(), [X], make(odd)), ConfigError, holds=short)


def test_odd_options_of_build() -> None:
    pytest.importorskip("tensorrt_rtx")
    assert not untyped(
        {name: make for name, make in ODD.items() if not isinstance(make(), bool)},
        lambda odd: graphcache.build(b"no model", cache=odd),
        GraphCacheError,
        holds=short,
    )
