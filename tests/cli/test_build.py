"""``graphcache build``: what is handed to the builder, what is written, and that nothing half-made is left."""

import json
import os
import re
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

import graphcache
from graphcache.cli import main, output
from graphcache.cli.network import Policy
from graphcache.errors import EngineBuildError
from tests.cli.onnx_file import policy_model


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "policy.onnx"
    path.write_bytes(policy_model(Policy()))
    return path


@pytest.fixture
def built(monkeypatch):
    """Stands in for TensorRT: keeps what it was asked for."""
    asked = []

    def build(onnx, *, shapes, library, progress):
        progress("phase", 1, 2)
        asked.append(SimpleNamespace(onnx=onnx, shapes=shapes, library=library))
        return b"vtrt engine"

    monkeypatch.setattr(graphcache, "build", build)
    monkeypatch.setattr(output, "library", lambda name: SimpleNamespace(flavour=name or "tensorrt_rtx", version="1.5"))
    return asked


def build(*args):
    return CliRunner().invoke(main, ["build", *map(str, args)])


TRIPLE = {"observation": ((1, 48), (8, 48), (64, 48))}


@pytest.mark.parametrize(
    "words",
    [
        "--shapes observation:1x48:8x48:64x48",
        "--shapes=observation:[1,48]:[8,48]:[64,48]",
        "--minShapes=observation:1x48 --optShapes=observation:8x48 --maxShapes=observation:64x48",
        "--trt-min-shapes observation:[1,48] --trt-opt-shapes observation:[8,48] --trt-max-shapes observation:[64,48]",
    ],
)
def test_every_way_of_writing_a_range(model, built, words):
    found = build(model, *words.split())
    assert found.exit_code == 0, found.stderr
    assert built[0].shapes == TRIPLE
    assert built[0].onnx == model
    assert model.with_suffix(".engine").read_bytes() == b"vtrt engine"
    assert re.search(r"policy\.engine: 11 bytes, built in \d\.\d s by tensorrt_rtx 1\.5\.", found.stdout)


def test_several_inputs_as_separate_words(model, built):
    assert build("--input-shapes", "a:[1,2]", "b:[3]", model).exit_code == 0
    assert built[0].shapes == {"a": ((1, 2),) * 3, "b": ((3,),) * 3}


def test_several_profiles_no_shapes_and_the_library(model, built):
    assert build(model, "--shapes", "x:1:2:3", "--shapes", "x:4:5:6", "--tensorrt", "rtx").exit_code == 0
    assert built[0].shapes == {"x": [((1,), (2,), (3,)), ((4,), (5,), (6,))]}
    assert built[0].library == "rtx"
    assert build(model).exit_code == 0
    assert built[1].shapes is None


def test_json(model, built, tmp_path):
    target = tmp_path / "out.plan"
    found = build(model, "-o", target, "--json")
    result = json.loads(found.stdout)
    assert result.pop("seconds") >= 0
    assert result == {"tensorrt_rtx": "1.5", "engine": str(target), "nbytes": 11}
    assert target.read_bytes() == b"vtrt engine"


def test_malformed_shapes_are_shown_and_exit_with_2(model, built):
    found = build(model, "--shapes", "observation:1x48:8xq")
    assert found.exit_code == 2
    assert "expected a size (a whole number, 0 or more) at column 20:" in found.stderr
    assert "  observation:1x48:8xq\n                     ^" in found.stderr
    assert built == []


def test_contradicting_shapes_exit_with_2(model, built):
    found = build(model, "--minShapes=x:1")
    assert found.exit_code == 2
    assert "'x' needs --opt-shapes alone, or all of --min-shapes, --opt-shapes and --max-shapes." in found.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.onnx", None, "none.onnx cannot be read (No such file or directory); expected an ONNX model\n"),
        ("m.engine", b"vtrt....", "m.engine is a TensorRT engine already; expected an ONNX model. To run it: "),
        ("m.plan", b"ftrt....", "m.plan is a TensorRT engine already; expected an ONNX model. To run it: "),
    ],
)
def test_bad_models(tmp_path, built, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    found = build(tmp_path / name)
    assert (found.exit_code, found.stdout, built) == (1, "", [])
    assert message in found.stderr
    assert found.stderr.count("\n") == 1


def test_a_directory_is_no_model_and_no_output(tmp_path, model, built):
    assert "cannot be read (Is a directory); expected an ONNX model" in build(tmp_path).stderr
    found = build(model, "-o", tmp_path)
    assert (found.exit_code, built) == (1, [])
    assert "is a directory; choose another --output" in found.stderr


def test_an_unwritable_output_is_told_before_anything_is_built(tmp_path, model, built):
    found = build(model, "-o", tmp_path / "missing" / "m.engine")
    assert (found.exit_code, built) == (1, [])
    assert "m.engine cannot be written (No such file or directory); choose another --output\n" in found.stderr


def test_an_output_that_cannot_be_replaced_leaves_nothing(tmp_path, model, built, monkeypatch):
    def refuse(source, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr("pathlib.Path.replace", refuse)
    found = build(model)
    assert found.exit_code == 1
    assert "policy.engine cannot be written (Permission denied); choose another --output\n" in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["policy.onnx"]


def test_a_failed_build_leaves_what_was_there(tmp_path, model, monkeypatch):
    def fail(*args, **kwargs):
        raise EngineBuildError("the ONNX parser rejected it:\nnode 3")

    monkeypatch.setattr(graphcache, "build", fail)
    model.with_suffix(".engine").write_bytes(b"old")
    found = build(model)
    assert (found.exit_code, found.stderr) == (1, "Error: the ONNX parser rejected it: node 3\n")
    assert model.with_suffix(".engine").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.engine", "policy.onnx"]


def test_a_real_engine(model):
    pytest.importorskip("tensorrt_rtx")
    found = build(model, "--shapes", "observation:1x48:8x48:64x48", "--tensorrt", "rtx")
    assert found.exit_code == 0, found.stderr
    assert model.with_suffix(".engine").read_bytes()[:4] == b"vtrt"
    refused = build(model, "--shapes", "obs:1x48", "--tensorrt", "rtx")
    assert refused.exit_code == 1
    assert (
        "shapes names 'obs', which is not an input of the model; its inputs are: observation (n, 48)" in refused.stderr
    )
