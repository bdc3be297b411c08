"""``build(cache=True)``: built once, whoever asks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graphcache.engines import build as room
from graphcache.engines.build import build
from graphcache.engines.library import Library
from graphcache.engines.store import Store, user_store
from graphcache.errors import ConfigError, EngineBuildError

ROOT = Path(__file__).parents[2]
FOUND = Library(SimpleNamespace(Builder=object), "tensorrt_rtx", "1.5.0.114", None)  # type: ignore[arg-type]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What is really built, over a TensorRT that writes down what it was asked for."""
    calls: list[Any] = []

    def made(found: Library, onnx: Any, options: Any, progress: Any) -> bytes:
        calls.append(onnx)
        if onnx == b"bad":
            raise EngineBuildError("no such layer")
        return repr((onnx, options)).encode()

    monkeypatch.setenv("GRAPHCACHE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(room, "find", lambda name: FOUND)
    monkeypatch.setattr(room, "_build", made)
    return calls


def test_the_same_model_is_built_once(built: list[Any]) -> None:
    first = build(b"model", shapes={"x": (1, 4)}, cache=True)
    assert build(b"model", shapes={"x": [1, 4]}, cache=True) == first
    assert len(built) == 1
    assert build(b"model", shapes={"x": (2, 4)}, cache=True) != first
    assert len(built) == 2
    (_, entry) = user_store().entries()
    assert entry.note == {"name": "", "tensorrt_rtx": "1.5.0.114"}


def test_nothing_is_kept_unasked(built: list[Any], tmp_path: Path) -> None:
    build(b"model")
    build(b"model")
    assert len(built) == 2
    assert not (tmp_path / "cache").exists()


def test_a_file_is_known_by_its_contents(built: list[Any], tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_bytes(b"model")
        build(tmp_path / name, cache=True)
    assert built == [tmp_path / "a.onnx"]
    (tmp_path / "a.onnx").write_bytes(b"another")
    build(str(tmp_path / "a.onnx"), cache=True)
    assert len(built) == 2
    assert user_store().entries()[0].note["name"] == "a.onnx"


def test_what_cannot_be_built_is_not_kept(built: list[Any]) -> None:
    for _ in range(2):
        with pytest.raises(EngineBuildError, match="no such layer"):
            build(b"bad", cache=True)
    assert len(built) == 2
    assert user_store().entries() == []


def test_what_has_no_key_is_left_to_the_builder_to_refuse(built: list[Any], tmp_path: Path) -> None:
    build(tmp_path / "missing.onnx", cache=True)
    build(b"model", shapes={"x": 1.5}, cache=True)  # type: ignore[dict-item]
    assert len(built) == 2
    assert user_store().entries() == []


def test_an_option_that_is_none(built: list[Any]) -> None:
    with pytest.raises(ConfigError, match="cache=1: expected True or False"):
        build(b"model", cache=1)  # type: ignore[arg-type]


BUILD = """
import sys, graphcache
from graphcache.engines import build as room
really = room._build
def told(*given, **options):
    print("building", flush=True)
    sys.stdin.readline()
    return really(*given, **options)
room._build = told
engine = graphcache.build(sys.argv[1], shapes={"x": ((1, 64), (2, 64), (8, 64))}, cache=True)
print(len(engine), flush=True)
"""


def test_two_processes_build_a_real_engine_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    networks = pytest.importorskip("tests.gpu.networks")
    (tmp_path / "m.onnx").write_bytes(networks.mlp8()[0])
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "GRAPHCACHE_CACHE_DIR": str(tmp_path / "cache")}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", BUILD, str(tmp_path / "m.onnx")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    first = start()
    assert first.stdout is not None
    assert first.stdout.readline() == "building\n"
    second = start()
    printed, _ = first.communicate("\n")
    other, errors = second.communicate("\n")
    assert int(printed) > 1000, errors
    assert other == printed
    (entry,) = Store(tmp_path / "cache" / "built", 10**9).entries()
    assert entry.note["name"] == "m.onnx"
