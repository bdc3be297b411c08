"""``graphcache run``: what it takes, what it measures, what it refuses."""

import json

import pytest
import torch
from click.testing import CliRunner

from graphcache import CachedModule, Reason
from graphcache.cli import main

NETS = """
import torch
from torch import nn

class Pair(nn.Module):
    def forward(self, a, b=None, *, scale=None):
        return a * 2 if b is None else (a + b, a * scale if scale is not None else a - b)

class Positive(nn.Module):
    def forward(self, x):
        return x[x > 0]

class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4).requires_grad_(False)
    def forward(self, x):
        return self.first(x).sum().item()

def mlp():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

def table():
    return nn.Embedding(2, 3)

def broken():
    raise KeyError("weights")

class Half(nn.Module):
    def forward(self, x):
        return x.relu()

ready = nn.ReLU()
number = 3
factories = type("Factories", (), {"relu": staticmethod(nn.ReLU)})

def not_a_module():
    return 3
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "some_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(main, ["run", "--iterations", "5", "--warm-up", "1", *map(str, args)])


def rows(found):
    assert found.exit_code == 0, found.stderr
    return json.loads(found.stdout)["shapes"]


@pytest.mark.parametrize("target", ["some_nets:mlp", "some_nets.py:mlp"])
def test_a_factory_over_several_shapes(run, target):
    found = rows(run(target, "--json", "--shapes", "input:1x8:2x8:4x8", "--shapes", "input:[3,8]"))
    assert [row["inputs"] for row in found] == ["input:1x8", "input:2x8", "input:4x8", "input:3x8"]
    for row in found:
        assert row["graph"]["calls"] == row["eager"]["calls"] == 5
        assert row["reasons"] == {}
        assert row["first_call_us"] > 0


def test_the_table(run):
    found = run("some_nets:mlp", "--shapes", "input:1x8")
    assert found.exit_code == 0
    assert "some_nets:mlp: 5 calls per set of inputs" in found.stdout
    assert "Every answer of a graph equals eager execution." in found.stdout
    assert "\x1b" not in found.stdout


def test_arguments_by_name_in_any_order_and_by_keyword(run):
    found = rows(run("some_nets:Pair", "--json", "--shapes", "b:[2]", "a:[2]", "scale:[]", "--shapes", "a:3"))
    assert [row["inputs"] for row in found] == ["b:2 a:2 scale:[]", "a:3"]
    assert all(row["graph"] for row in found)


@pytest.mark.parametrize("target", ["some_nets:ready", "some_nets:Half", "some_nets:factories.relu"])
def test_a_module_a_class_and_a_dotted_name_will_do(run, target):
    [row] = rows(run(target, "--json", "--shapes", "x:4" if "Half" in target else "input:4"))
    assert row["graph"]


def test_dtypes(run):
    [row] = rows(run("some_nets:table", "--json", "--shapes", "input:[1,16]:int64"))
    assert row["graph"]
    refused = run("some_nets:table", "--shapes", "input:[1,16]:integer")
    assert refused.exit_code == 1
    assert "'input' has the dtype 'integer', which torch lacks; such as float16" in refused.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="modules stay on the CPU, but tell other things there")
def test_reasons_are_told(run):
    found = run("some_nets:Positive", "--shapes", "x:8")
    assert found.exit_code == 0
    assert f"Ran eagerly, data_dependent: {Reason.DATA_DEPENDENT.sentence} (at aten." in found.stdout
    [row] = rows(run("some_nets:Positive", "--json", "--shapes", "x:8"))
    assert row["graph"] is None
    assert list(row["reasons"]) == ["data_dependent"]


def test_parts_are_captured_by_name(run):
    [row] = rows(run("some_nets:Inner", "--json", "--shapes", "x:[1,4]", "--include", "first"))
    assert row["graph"]
    assert list(row["reasons"]) == ["host_read"]
    found = run("some_nets:Inner", "--json", "--shapes", "x:[1,4]", "--include", "nothing")
    assert found.exit_code == 1
    assert "include names 'nothing', which is no submodule" in found.stderr


def test_a_wrong_answer_ends_with_3(run, monkeypatch):
    right = CachedModule.__call__
    monkeypatch.setattr(CachedModule, "__call__", lambda self, *args: right(self, *args) + 1)
    found = run("some_nets:mlp", "--json", "--shapes", "input:1x8")
    assert found.exit_code == 3
    assert json.loads(found.stdout)["differences"] == 5
    assert "Error: 5 answers of graphs differ from eager execution. The first, input:1x8: output 0" in found.stderr


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("some_nets:nothing", "some_nets has no 'nothing'; expected a function that returns an nn.Module\n"),
        ("no_such_package:mlp", "no_such_package cannot be imported: ModuleNotFoundError: No module named"),
        ("nothing.py:mlp", "there is no file nothing.py; expected the path of a Python file\n"),
        ("some_nets:number", "some_nets:number is of type int; expected a function or an nn.Module\n"),
        ("some_nets:not_a_module", "some_nets:not_a_module gave an object of type int; expected an nn.Module\n"),
        ("some_nets:broken", "some_nets:broken raised KeyError: 'weights' ("),
        ("some_nets:mlp", "cannot be called with x:1x8: missing a required argument: 'input'; the parameters of its"),
        ("some_nets:Half", "Half refused x:1x8: "),
        ("missing.engine", "there is no file missing.engine; expected an engine, an ONNX model, or a factory as"),
        ("missing.onnx", "missing.onnx cannot be read (No such file or directory); expected an ONNX model\n"),
    ],
)
def test_bad_targets_are_told_in_one_line(run, target, message, monkeypatch):
    if target == "some_nets:Half":

        def fail(*args):
            raise RuntimeError("no such\nkernel")

        monkeypatch.setattr(torch.Tensor, "relu", fail)
    found = run(target, "--shapes", "x:1x8")
    assert (found.exit_code, found.stdout) == (1, "")
    assert message in found.stderr
    assert found.stderr.count("\n") == 1


def test_a_syntax_error_in_the_file_is_told_with_its_line(run, tmp_path):
    (tmp_path / "bad.py").write_text("x = 1\ndef :\n")
    found = run("bad.py:mlp")
    assert found.exit_code == 1
    assert "bad.py cannot be imported: SyntaxError: invalid syntax (bad.py, line 2)" in found.stderr


def test_malformed_shapes_are_shown_and_exit_with_2(run):
    found = run("some_nets:mlp", "--shapes", "input:[1,8")
    assert found.exit_code == 2
    assert "expected ',' or ']' at column 11:\n  input:[1,8\n            ^" in found.stderr


def test_engines_do_not_run_on_the_cpu(run, tmp_path):
    (tmp_path / "m.engine").write_bytes(b"vtrt")
    found = run("m.engine", "--device", "cpu")
    assert found.exit_code == 2
    assert "m.engine is no module:factory, and TensorRT engines run only on CUDA." in found.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("args", [["m.engine"], ["m.onnx"], ["some_nets:mlp", "--device", "cuda"]])
def test_without_a_gpu_one_line_says_so(run, tmp_path, args):
    for name in ("m.engine", "m.onnx"):
        (tmp_path / name).write_bytes(b"....")
    found = run(*args, "--shapes", "input:1x8")
    assert (found.exit_code, found.stdout) == (1, "")
    assert found.stderr.startswith(f"Error: running {args[0]}")
    assert "needs a CUDA device" in found.stderr
    assert found.stderr.count("\n") == 1
