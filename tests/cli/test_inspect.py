"""``graphcache inspect``: modules, models and what can be read of engines without a GPU."""

import json
import re
import struct

import pytest
import torch
from torch import nn

import graphcache


@pytest.fixture
def facts(cli):
    def get(*args):
        found = cli("inspect", "--json", *args)
        assert found.exit_code == 0, found.stderr
        return json.loads(found.stdout)

    return get


def test_a_module(facts):
    found = facts("nets.py:mlp", "--shapes", "input:8x16", "--layers")
    assert found["kind"] == "Sequential"
    assert found["inputs"] == [{"name": "input"}]
    assert (found["parameters"], found["parameter_bytes"]) == (16 * 32 + 32 + 32 * 4 + 4, 4 * 676)
    assert found["layers"] == ["0: Linear", "1: ReLU", "2: Linear"]
    assert found["capturable"]["yes"] is True
    assert found["capturable"]["graph_bytes"] > 0


def test_what_cannot_be_captured_is_told_with_its_lines(facts, cli):
    found = facts("nets.py:Picky", "--shapes", "x:8")
    assert found["capturable"]["yes"] is False
    first, second = found["capturable"]["why"]
    assert "nets.py:17: Tensor.item" in first
    assert "nets.py:18: Tensor.__getitem__" in second
    said = cli("inspect", "nets.py:Picky", "--shapes", "x:8").stdout
    assert re.search(r"^capturable +no *\n +\S*nets\.py:17: ", said, re.M)


def test_no_graph_is_evicted_before_its_memory_is_counted(facts):
    sizes = range(1, graphcache.GraphConfig.max_graphs + 4)
    shapes = [word for size in sizes for word in ("--shapes", f"input:{size}x16")]
    found = facts("nets.py:mlp", *shapes)["capturable"]
    with graphcache.wrap(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), max_graphs=1000) as fast:
        with torch.no_grad():
            for size in sizes:
                fast(torch.zeros(size, 16))
        assert fast.cache_info().graphs == len(sizes)
        assert found == {"yes": True, "why": [], "graph_bytes": fast.cache_info().nbytes}


def test_without_shapes_nothing_is_tried(facts):
    assert facts("nets.py:Picky")["capturable"] is None


def test_a_model(facts):
    pytest.importorskip("onnx")
    found = facts("policy.onnx")
    assert found["inputs"] == [{"name": "observation", "dtype": "float32", "shape": ["n", 48]}]
    assert found["outputs"] == [{"name": "action", "dtype": "float32", "shape": ["n", 12]}]
    assert found["layers"] == {"MatMul": 10, "Relu": 9, "Add": 8, "Tanh": 1}
    assert found["capturable"] is None
    assert len(facts("policy.onnx", "--layers")["layers"]) == 28


def test_operators_that_forbid_graphs_are_named(facts, folder):
    helper = pytest.importorskip("onnx.helper")
    onnx = pytest.importorskip("onnx")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("NonZero", ["x"], ["y"])],
        "g",
        [value("x", onnx.TensorProto.FLOAT, [3])],
        [value("y", onnx.TensorProto.INT64, [1, None])],
    )
    onnx.save(helper.make_model(graph), str(folder / "nonzero.onnx"))
    found = facts("nonzero.onnx")
    assert found["outputs"] == [{"name": "y", "dtype": "int64", "shape": [1, "?"]}]
    assert found["capturable"] == {
        "yes": False,
        "why": ["NonZero (1): the shape of its output depends on the values"],
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_of_an_engine_the_header_and_what_is_missing(cli, folder):
    (folder / "m.engine").write_bytes(struct.pack("<4sIQQ4B", b"vtrt", 0, 0, 64, 1, 5, 0, 114).ljust(64, b"\0"))
    found = cli("inspect", "m.engine", "--json")
    assert found.exit_code == 1
    told = json.loads(found.stdout)
    assert told == {
        "target": "m.engine",
        "kind": "engine",
        "file_bytes": 64,
        "built_by": "tensorrt_rtx 1.5.0.114",
        "complete": True,
    }
    assert "needs a CUDA device" in found.stderr
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["missing.engine"], "missing.engine cannot be read (No such file or directory); expected an engine, an ONNX"),
        (["missing.onnx"], "missing.onnx cannot be read (No such file or directory); expected an ONNX model"),
        (["engine.onnx"], "engine.onnx is a TensorRT engine already; expected an ONNX model"),
        (["nets.py:nothing"], "nets.py has no 'nothing'"),
        (["nets.py:mlp", "--shapes", "x:1"], "cannot be called with x:1"),
    ],
)
def test_bad_targets_are_told_in_one_line(cli, folder, args, message):
    (folder / "engine.onnx").write_bytes(b"vtrt....")
    found = cli("inspect", *args)
    assert (found.exit_code, found.stdout) == (1, "")
    assert message in found.stderr
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"\x00" * 9, b"not a model", b"\xff" * 100])
def test_what_is_no_model(cli, folder, content):
    pytest.importorskip("onnx")
    (folder / "odd.onnx").write_bytes(content)
    found = cli("inspect", "odd.onnx")
    assert (found.exit_code, found.stdout) == (1, "")
    assert "odd.onnx is no ONNX model" in found.stderr
