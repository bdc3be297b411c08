"""``graphcache run``: how long, what percentiles, files in and out, other runtimes, and the last line."""

import importlib
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from graphcache import CachedModule
from graphcache.cli import measuring
from graphcache.cli.reference import OnnxRuntime
from graphcache.observe.result import read_result

QUICK = ("--iterations", "5", "--warm-up", "1")
MLP = ("nets.py:mlp", "--shapes", "input:8x16")


@pytest.fixture
def run(cli):
    return lambda *args: cli("run", *QUICK, *args)


def told(found):
    assert found.exit_code == 0, found.stderr
    return json.loads(found.stdout)


def test_percentiles_and_the_spread(run):
    [row] = told(run(*MLP, "--json", "--percentile", "90,99.9"))["shapes"]
    for way in ("eager", "enqueue", "graph"):
        times = row[way]
        assert set(times) == {"calls", "min", "mean", "max", "p50", "p90", "p99.9"}
        assert times["min"] <= times["p50"] <= times["p90"] <= times["p99.9"] <= times["max"]
    assert row["calls_per_second"]["eager"] == pytest.approx(1e6 / row["eager"]["mean"], rel=0.01)
    head = run(*MLP, "--percentile", "90").stdout.splitlines()[3]
    assert head.split() == ["inputs", "p50", "p90", "|", "p50", "p90", "first", "call"]


@pytest.mark.parametrize("text", ["", "0", "101", "a", "90,", "nan", "-1"])
def test_what_is_no_percentile(run, text):
    found = run(*MLP, "--percentile", text)
    assert found.exit_code == 2
    assert "is no percentile; expected numbers above 0 and up to 100" in found.stderr


def test_it_measures_at_least_as_long_as_asked(run, monkeypatch):
    looks = itertools.count()
    # A clock that ticks a hundredth of a second whenever somebody looks.
    monkeypatch.setattr(measuring, "time", SimpleNamespace(monotonic=lambda: next(looks) / 100))
    [row] = told(run(*MLP, "--json", "--duration", "0.5"))["shapes"]
    assert 40 <= row["eager"]["calls"] <= 60


def test_the_measured_calls_are_written(run):
    found = run(*MLP, "--shapes", "input:[4,16]", "--export-times", "times.json")
    assert found.exit_code == 0
    result = read_result("times.json")
    assert [each.label for each in result.inputs] == ["input:8x16", "input:4x16"]
    for number in range(2):
        outcomes = [each.outcome for each in result.calls if each.inputs == number]
        assert outcomes == ["capture", *["hit"] * 5]


def test_inputs_and_outputs_as_files(run, folder):
    files = pytest.importorskip("safetensors.torch")
    a, b = torch.arange(3.0), torch.ones(3)
    files.save_file({"b": b, "a": a}, folder / "in.safetensors")
    found = run("nets.py:Two", "--load-inputs", "in.safetensors", "--save-outputs", "out.safetensors", "--json")
    [row] = told(found)["shapes"]
    assert set(row["inputs"].split()) == {"a:3", "b:3"}
    outputs = files.load_file(folder / "out.safetensors")
    assert torch.equal(outputs["sum"], a + b)
    assert torch.equal(outputs["product"], a * b)


def test_outputs_of_several_shapes_are_told_apart(run, folder):
    files = pytest.importorskip("safetensors.torch")
    assert run("nets.py:mlp", "--shapes", "input:1x16:2x16:4x16", "--save-outputs", "out.safetensors").exit_code == 0
    outputs = files.load_file(folder / "out.safetensors")
    assert {name: tuple(each.shape) for name, each in outputs.items()} == {
        f"input:{rows}x16/output": (rows, 4) for rows in (1, 2, 4)
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "in.safetensors cannot be read (No such file or directory); expected a safetensors file"),
        (b"", "in.safetensors is no safetensors file"),
        (b"\xff" * 64, "in.safetensors is no safetensors file"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}", "in.safetensors holds no tensors"),
    ],
)
def test_damaged_inputs_are_told_in_one_line(run, folder, content, message):
    pytest.importorskip("safetensors")
    if content is not None:
        (folder / "in.safetensors").write_bytes(content)
    found = run("nets.py:Two", "--load-inputs", "in.safetensors")
    assert (found.exit_code, found.stdout) == (1, "")
    assert message in found.stderr
    assert found.stderr.count("\n") == 1


def test_inputs_that_do_not_fit(run, folder):
    files = pytest.importorskip("safetensors.torch")
    files.save_file({"c": torch.ones(3)}, folder / "in.safetensors")
    found = run("nets.py:Two", "--load-inputs", "in.safetensors")
    assert found.exit_code == 1
    assert "nets.py:Two cannot be called with c:3" in found.stderr


@pytest.mark.parametrize("option", ["--save-outputs", "--export-times"])
@pytest.mark.parametrize("place", ["nowhere/file", "."])
def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(run, monkeypatch, option, place):
    # As an attribute of graphcache.cli it is the command.
    module = importlib.import_module("graphcache.cli.run")
    monkeypatch.setattr(module, "resolve", lambda *args: pytest.fail("it ran"))
    found = run(*MLP, option, place)
    assert (found.exit_code, found.stdout) == (1, "")
    assert f"choose another {option}" in found.stderr


POLICY = ("graphcache.cli.network:Policy", "--shapes", "observation:8x48")


def test_answers_are_held_against_onnxruntime(run):
    pytest.importorskip("onnxruntime")
    found = run(*POLICY, "--compare", "onnxruntime", "--onnx", "policy.onnx")
    assert found.exit_code == 0
    assert "Every answer of a graph equals eager execution and onnxruntime." in found.stdout
    assert told(run(*POLICY, "--compare", "onnxruntime", "--onnx", "policy.onnx", "--json"))["differs"] == []


def test_an_answer_that_differs_from_onnxruntime_ends_with_3(run, folder):
    pytest.importorskip("onnxruntime")
    from graphcache.cli.network import Policy
    from tests.cli.onnx_file import policy_model

    (folder / "other.onnx").write_bytes(policy_model(Policy(seed=1)))
    found = run(*POLICY, "--compare", "onnxruntime", "--onnx", "other.onnx", "--json")
    assert found.exit_code == 3
    [why] = json.loads(found.stdout)["differs"]
    assert why.startswith("observation:8x48: output 0: Tensor-likes are not close!")
    assert "answers differ from onnxruntime. The first, observation:8x48: output 0" in found.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--compare", "onnxruntime"], 2, "--compare onnxruntime needs the model: give it with --onnx."),
        (["--onnx", "policy.onnx"], 2, "--onnx is the model for --compare onnxruntime"),
        (["--compare", "onnxruntime", "--onnx", "none.onnx"], 1, "none.onnx cannot be read"),
        (["--compare", "onnxruntime", "--onnx", "nets.py"], 1, "nets.py does not run under onnxruntime"),
        (["--compare", "onnxruntime", "--onnx", "policy.onnx"], 1, "policy.onnx refused input:8x16"),
        (["--load-inputs", "x.safetensors"], 2, "--load-inputs gives the inputs; leave --shapes out."),
        (["--duration", "-1"], 2, "--duration"),
    ],
)
def test_what_is_refused(run, args, code, message):
    if "onnxruntime" in args and code == 1:
        pytest.importorskip("onnxruntime")
    found = run(*MLP, *args)
    assert found.exit_code == code
    assert message in found.stderr


def test_fewer_outputs_than_the_model_are_a_difference(folder):
    pytest.importorskip("onnxruntime")
    from graphcache.cli.targets import TargetCall

    x = torch.zeros(1, 48)
    call = TargetCall("x", (x,), {}, {"observation": x})
    assert OnnxRuntime(folder / "policy.onnx").difference(call, ()) == "0 outputs, onnxruntime gives 1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_last_line_is_the_verdict(run):
    assert run(*MLP).stdout.splitlines()[-1].startswith("Verdict: no launches: on the CPU a graph has nothing to save")
    [row] = told(run(*MLP, "--json"))["shapes"]
    assert row["verdict"]["kind"] == "no launches"


def test_the_live_view_was_removed_which_is_said(run):
    found = run(*MLP, "--watch")
    assert found.exit_code == 2
    assert "--watch was removed: the summary at the end says how calls ended." in found.stderr


def test_nothing_is_left_of_files_when_answers_are_wrong(run, folder, monkeypatch):
    right = CachedModule.__call__
    monkeypatch.setattr(CachedModule, "__call__", lambda self, *args: right(self, *args) + 1)
    found = run(*MLP, "--export-times", "times.json")
    assert found.exit_code == 3
    assert [path.name for path in folder.iterdir() if path.name.startswith(".times")] == []
