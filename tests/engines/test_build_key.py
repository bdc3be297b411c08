"""What makes a built engine another one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcache.engines import build_key as room
from graphcache.engines import plugins
from graphcache.engines.build_key import NotKeyed, build_key, external_files
from graphcache.engines.library import Library

FOUND = Library(SimpleNamespace(), "tensorrt_rtx", "1.5.0.114", None)  # type: ignore[arg-type]
OPTIONS: dict[str, Any] = {"shapes": {"x": ((1, 4), (2, 4), (8, 4))}, "workspace": None, "refittable": False}


def key(onnx: Any = b"model", found: Library = FOUND, **options: Any) -> str:
    return build_key(found, onnx, {**OPTIONS, **options})


def test_the_same_is_the_same() -> None:
    assert key() == key()
    assert len(key()) == 64
    assert key(shapes={"x": [[1, 4], [2, 4], [8, 4]]}) == key(shapes={"x": (torch.Size([1, 4]), (2, 4), [8, 4])})


def test_everything_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {
        key(),
        key(b"mode"),
        key(b"other"),
        key(shapes={"y": ((1, 4), (2, 4), (8, 4))}),
        key(shapes={"x": ((1, 4), (2, 4), (9, 4))}),
        key(shapes=None),
        key(workspace=1),
        key(refittable=True),
        key(refittable=["w"]),
        key(found=Library(FOUND.module, "tensorrt_rtx", "1.6.0.1", None)),
        key(found=Library(FOUND.module, "tensorrt", "1.5.0.114", None)),
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, capability in (("A", (8, 0)), ("B", (8, 0)), ("A", (9, 0))):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        keys.add(key())
    assert len(keys) == 14


def test_a_path_and_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"model")
    assert key(path) == key(str(path)) == key(b"model")


def external(name: bytes) -> bytes:
    size = len(name)
    length = bytes([size]) if size < 128 else bytes([size & 0x7F | 0x80, size >> 7])
    return b"..\x0a\x08location\x12" + length + name + b".."


def test_weights_beside_the_model_count(tmp_path: Path) -> None:
    path, weights = tmp_path / "m.onnx", tmp_path / "w.bin"
    path.write_bytes(external(b"w.bin"))
    with pytest.raises(NotKeyed, match="No such file"):
        key(path)
    weights.write_bytes(b"1")
    first = key(path)
    weights.write_bytes(b"2")
    assert key(path) != first


@given(st.lists(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=300), max_size=3))
def test_names_of_external_files(names: list[str]) -> None:
    assert external_files(b"".join(external(name.encode()) for name in names)) == list(dict.fromkeys(names))


@given(st.binary())
def test_any_bytes_have_a_key(data: bytes) -> None:
    external_files(data)
    assert len(key(data)) == 64


def test_a_model_of_onnx_with_external_data(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    import numpy as np

    weight = onnx.numpy_helper.from_array(np.arange(1024, dtype=np.float32), "w")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "w"], ["y"])],
        "net",
        [value("x", 1, [1024])],
        [value("y", 1, [1024])],
        [weight],
    )
    path = tmp_path / "m.onnx"
    onnx.save(
        onnx.helper.make_model(graph), path, save_as_external_data=True, location="the weights.bin", size_threshold=0
    )
    assert external_files(path.read_bytes()) == ["the weights.bin"]


def test_plugins_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = tmp_path / "plugin.so"
    plugin.write_bytes(b"1")
    before = key()
    monkeypatch.setattr(plugins, "_plugins", {("tensorrt_rtx", plugin), ("tensorrt", tmp_path / "other.so")})
    first = key()
    plugin.write_bytes(b"2")
    assert len({before, first, key()}) == 3


@pytest.mark.parametrize("wrong", [{"shapes": {"x": 1.5}}, {"shapes": object()}, {"workspace": 2.5}])
def test_what_has_no_key(wrong: dict[str, Any]) -> None:
    with pytest.raises(NotKeyed):
        key(**wrong)
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(NotKeyed):
        key(shapes=endless)
    assert room._VERSION == 1
