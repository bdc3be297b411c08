"""What is written for Triton's Python backend, loaded and called as Triton does, over the stand-ins of engines."""

from __future__ import annotations

import json
import logging

import pytest
import torch

import graphcache
from graphcache import EngineModule
from graphcache.errors import EngineFormatError, GraphCacheError, PackageError, ServingError
from graphcache.serving import triton_backend
from graphcache.serving.backend import ModelSpec, TensorMetadata
from graphcache.serving.triton import config_pbtxt, describe_file, export
from tests.engine_modules import numbers, rows
from tests.engines.fake_tensorrt import serialize
from tests.persist.test_packages import repacked
from tests.serving.fake_triton import DTYPES, Server
from tests.serving.models import spec
from tests.standins import Mixed, engines


@pytest.fixture
def fake(monkeypatch):
    with engines(monkeypatch) as fake:
        yield fake


@pytest.fixture
def engine(tmp_path):
    path = tmp_path / "affine.plan"
    path.write_bytes(serialize("affine"))
    return path


def test_a_folder_of_an_engine(fake, engine, tmp_path, monkeypatch):
    described = export(engine, tmp_path / "policy", prepare=[{"x": (2, 4)}, {"x": (3, 4)}])
    assert described == ModelSpec(
        "policy",
        ("1",),
        (TensorMetadata("x", "float32", (-1, 4)),),
        (TensorMetadata("y", "float32", (-1, 4)),),
        "tensorrt",
    )
    written = {str(each.relative_to(tmp_path / "policy")) for each in (tmp_path / "policy").rglob("*")}
    assert written == {"config.pbtxt", "1", "1/model.py", "1/model.engine"}
    assert (tmp_path / "policy" / "1" / "model.engine").read_bytes() == engine.read_bytes()
    server = Server(tmp_path / "policy", monkeypatch)
    assert (server.config.backend, server.config.max_batch_size, server.device) == ("python", 0, [0])
    assert server.config.parameters["FORCE_CPU_ONLY_INPUT_TENSORS"].string_value == "no"
    two, three = rows(fake, 2), rows(fake, 3)
    found = server.answers({"x": two}, {"x": three})
    assert torch.equal(found[0]["y"], two * 3 + 1)
    assert torch.equal(found[1]["y"], three * 3 + 1)
    info = server.model._module.cache_info()
    assert (info.captures, info.hits, info.eager) == (2, 2, {})
    server.model.finalize()


def test_one_wrong_request_leaves_the_others_as_they_are(fake, engine, tmp_path, monkeypatch, caplog):
    export(engine, tmp_path / "policy")
    server = Server(tmp_path / "policy", monkeypatch)
    x = rows(fake, 2)
    found = server.answers({"x": x}, {}, {"x": rows(fake, 7)}, {"x": x})
    assert torch.equal(found[0]["y"], found[3]["y"])
    assert found[1] == "input 'x' is missing"
    assert "outside the engine's range" in found[2]

    server.model.finalize()

    def broken(*args):
        raise RuntimeError("secret")

    server.model._module = broken
    with caplog.at_level(logging.ERROR, "graphcache.serving"):
        assert server.answers({"x": x}) == ["the model failed to answer; the server's log says why"]
    assert "secret" in caplog.text


def test_only_what_was_asked_for_is_given(fake, tmp_path, monkeypatch):
    (tmp_path / "pair.engine").write_bytes(serialize("pair"))
    export(tmp_path / "pair.engine", tmp_path / "pair")
    server = Server(tmp_path / "pair", monkeypatch)
    a, b = rows(fake, 2), rows(fake, 2, 5)
    [both] = server.answers({"b": b, "a": a})
    assert torch.equal(both["sum"], a + b)
    [one] = server.answers({"a": a, "b": b}, outputs=["product"])
    assert torch.equal(one["product"], a * b)
    server.model.finalize()


def test_a_package_tells_itself_what_it_is_and_begins_with_hits(fake, tmp_path, monkeypatch):
    path = tmp_path / "m.gcache"
    fast = graphcache.wrap(EngineModule(serialize("affine"), name="net"), max_graphs=5)
    with torch.inference_mode():
        fast.prepare((2, 4))
    fast.save(path)
    monkeypatch.setattr("graphcache.serving.triton.load", None)
    export(path, tmp_path / "policy", prepare=[{"x": (3, 4)}])
    server = Server(tmp_path / "policy", monkeypatch)
    first, second = rows(fake, 2), rows(fake, 2, 5)
    found = server.answers({"x": first}, {"x": second})
    assert torch.equal(found[0]["y"], first * 3 + 1)
    assert torch.equal(found[1]["y"], second * 3 + 1)
    info = server.model._module.cache_info()
    assert (server.model._module.config.max_graphs, info.captures, info.hits) == (5, 2, 2)
    server.model.finalize()


def test_tensors_without_dimensions(fake, tmp_path, monkeypatch):
    (tmp_path / "m.engine").write_bytes(serialize("scalar"))
    export(tmp_path / "m.engine", tmp_path / "scalar", prepare=[{"x": (3,)}])
    server = Server(tmp_path / "scalar", monkeypatch)
    scalar = next(each for each in server.config.input if each.name == "s")
    assert (list(scalar.dims), scalar.HasField("reshape"), list(scalar.reshape.shape)) == ([1], True, [])
    [found] = server.answers({"x": numbers(fake, 1, 2, 3), "s": numbers(fake, 2).reshape(())})
    assert found["y"].tolist() == [2, 4, 6]
    server.model.finalize()


def parsed(text):
    text_format = pytest.importorskip("google.protobuf.text_format")
    config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    return text_format.Parse(text, config_pb2.ModelConfig())


def test_every_datatype_and_any_name():
    name = 'quote" back\\slash\nline ü'
    every = spec("m", {f"{name}{kind}": (str(dtype)[6:], (-1, 3)) for kind, dtype in DTYPES.items()}, {})
    found = parsed(config_pbtxt(every, "model.engine"))
    kinds = type(found.input[0]).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    assert {each.name: kinds[each.data_type].name for each in found.input} == {f"{name}{kind}": kind for kind in DTYPES}
    assert all(list(each.dims) == [-1, 3] for each in found.input)
    assert not found.output


def test_what_is_prepared_is_in_the_configuration():
    text = config_pbtxt(spec("m", {"x": ("float32", (-1,))}, {}), "model.gcache", [{"x": (3,)}, {"x": (4,)}])
    own = json.loads(parsed(text).parameters[triton_backend.PARAMETER].string_value)
    assert own == {"file": "model.gcache", "prepare": [{"x": [3]}, {"x": [4]}]}


def test_a_dtype_that_triton_lacks():
    with pytest.raises(ServingError, match="the protocol has no datatype for 'float8_e4m3fn'"):
        config_pbtxt(spec("m", {"x": ("float8_e4m3fn", (1,))}, {}), "model.engine")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"z": (1,)}, "shapes name 'z', which is no input; the inputs are x"),
        ({}, "shapes leave out the input 'x', whose sizes are open; give it too"),
        ({"x": (2, 5)}, r"the shape \[2, 5\] of 'x' does not fit \[-1, 4\], where -1 is any size"),
        ({"x": (2,)}, r"the shape \[2\] of 'x' does not fit"),
    ],
)
def test_shapes_that_are_none_of_the_model(fake, engine, tmp_path, shapes, message):
    with pytest.raises(ServingError, match=message):
        export(engine, tmp_path / "policy", prepare=[shapes])
    assert [each.name for each in tmp_path.iterdir()] == ["affine.plan"]


@pytest.mark.parametrize("name", ["-x", ".hidden", "two words"])
def test_folders_that_name_no_model(engine, tmp_path, name):
    with pytest.raises(ServingError, match="is no name of a model"):
        export(engine, tmp_path / name)


def test_what_is_there_is_not_written_over(fake, engine, tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("policy", "link"):
        with pytest.raises(ServingError, match="is there already; choose another folder, or remove it"):
            export(engine, tmp_path / name)
    with pytest.raises(ServingError, match=r"cannot be written \(No such file or directory\); choose another"):
        export(engine, tmp_path / "missing" / "policy")


def test_a_copy_that_fails_leaves_nothing(fake, engine, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(ServingError, match=r"cannot be written \(No space left on device\)"):
        export(engine, tmp_path / "policy")
    assert [each.name for each in tmp_path.iterdir()] == ["affine.plan"]


def test_files_that_are_no_model(fake, tmp_path):
    model = Mixed(EngineModule(serialize("affine")))
    graphcache.wrap(model).save(tmp_path / "mixed.gcache")
    with pytest.raises(ServingError, match="holds a model of 1 engines and weights, which is loaded into code"):
        describe_file(tmp_path / "mixed.gcache", "m")
    (tmp_path / "damaged.gcache").write_bytes(b"PK\x03\x04")
    with pytest.raises(PackageError):
        describe_file(tmp_path / "damaged.gcache", "m")
    with pytest.raises(EngineFormatError):
        describe_file(tmp_path / "nothing.engine", "m")
    (tmp_path / "empty.engine").write_bytes(b"")
    with pytest.raises(GraphCacheError):
        describe_file(tmp_path / "empty.engine", "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header["engines"][0].update(bindings=[]), r"does not tell all bindings of its engine \('x'\)"),
        (
            lambda header: header["engines"][0]["bindings"][0].update(shape=3),
            "does not tell all bindings of its engine",
        ),
        (lambda header: header.update(version=99), "is a package in format version 99"),
    ],
)
def test_packages_that_do_not_tell_what_they_are(fake, tmp_path, change, message):
    path = tmp_path / "m.gcache"
    EngineModule(serialize("affine")).save(path)
    repacked(path, lambda header, parts: change(header))
    with pytest.raises((ServingError, PackageError), match=message):
        describe_file(path, "m")
