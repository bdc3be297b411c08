"""What a package says of itself: read back, or refused with the field."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.errors import PackageError
from graphcache.persist.package_file import PackagedEngine, PackageHeader, Part, read_header

ENGINE = PackagedEngine(
    module="",
    part="engines/0.engine",
    name="policy",
    inputs=["x"],
    outputs=["y"],
    bindings=[{"name": "x"}],
    flavour="tensorrt_rtx",
    tensorrt="1.5.0.114",
    capability=(9, 0),
    device="NVIDIA H100",
    onnx="engines/0.onnx",
    build={"shapes": {"x": [[1, 4], [2, 4], [8, 4]]}},
)
PART = Part(3, "0" * 64)
HEADER = PackageHeader(
    graphcache="0.1.0",
    kind="engine",
    engines=[ENGINE],
    name="fast",
    options={"max_graphs": 3},
    manifest="manifest.json",
    parts={"engines/0.engine": PART, "engines/0.onnx": PART, "manifest.json": PART},
)
TREE = json.loads(HEADER.data)


def changed(**changes: Any) -> bytes:
    return json.dumps({**TREE, **changes}).encode()


def test_it_comes_back() -> None:
    assert read_header(HEADER.data, "m") == HEADER
    assert HEADER.named() == ["engines/0.engine", "engines/0.onnx", "manifest.json"]


@pytest.mark.parametrize("version", [0, 2, 10**30, "1", 1.0, True, None])
def test_another_version_is_told_from_damage(version: Any) -> None:
    with pytest.raises(PackageError, match=r"is a package in format version .*pip install --upgrade"):
        read_header(changed(version=version, whatever="else"), "m")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is no JSON"),
        (b"\xff", "it is no JSON"),
        (b"[" * 100_000, "it is no JSON"),
        (b'{"format": 1, "format": 2}', "a key stands twice"),
        (b"[]", r"its format is \[\], not 'graphcache.package'"),
        (changed(format="zip"), "its format is 'zip'"),
        (changed(kind="model"), "kind is 'model'"),
        (changed(engines=None), "engines is None"),
        (changed(engines=[]), r"kind is 'engine', and engines are \[\]; expected"),
        (changed(kind="module", engines=[TREE["engines"][0]] * 2), "two engines have the same module"),
        (changed(engines=[{}]), r"engines\[0\]\.module is missing"),
        (changed(engines=[5]), r"engines\[0\] is 5; expected an object"),
        (changed(engines=[{**TREE["engines"][0], "profile": -1}]), r"engines\[0\].profile is -1"),
        (
            changed(engines=[{**TREE["engines"][0], "capability": [9]}]),
            r"engines\[0\].capability is \[9\]; expected tuple\[int, int\]",
        ),
        (changed(engines=[{**TREE["engines"][0], "inputs": ["x", 5]}]), r"engines\[0\].inputs\[1\] is 5; expected str"),
        (changed(extra=1), "'extra' is no field; expected graphcache, kind, engines"),
        (changed(weights="weights.safetensors"), "parts does not list 'weights.safetensors'"),
        (
            changed(parts={"engines/0.engine": {"nbytes": -1, "sha256": ""}}),
            r"parts\['engines/0.engine'\].nbytes is -1; expected int",
        ),
        (changed(options=[]), r"options is \[\]"),
    ],
)
def test_what_is_no_header(data: bytes, message: str) -> None:
    with pytest.raises(PackageError, match=f"^m: part 'header.json.: .*{message}.*; copy the file again, or save"):
        read_header(data, "m")


@given(
    st.sampled_from([*TREE, *(f"engines.{name}" for name in TREE["engines"][0])]),
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers()), st.just({})),
    st.booleans(),
)
def test_a_field_of_any_value_is_refused_or_harmless(field: str, value: Any, drop: bool) -> None:
    tree = copy.deepcopy(TREE)
    target, _, name = field.rpartition(".")
    table = tree["engines"][0] if target else tree
    if drop:
        del table[name]
    else:
        table[name] = value
    try:
        header = read_header(json.dumps(tree).encode(), "m")
    except PackageError:
        return
    assert all(part in header.parts for part in header.named())


@given(st.binary(max_size=60))
def test_any_bytes(data: bytes) -> None:
    with pytest.raises(PackageError):
        read_header(data, "m")
