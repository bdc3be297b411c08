"""``graphcache prepare``: what it captures, what it writes, what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

import graphcache
from graphcache.cli import main
from tests.cli.test_run import NETS


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    (tmp_path / "some_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(main, ["prepare", *map(str, args)])


def test_shapes_become_a_manifest_that_another_process_prepares(prepare, tmp_path):
    found = prepare(
        "some_nets.py:mlp", "--shapes", "input:1x8:2x8:4x8", "--shapes", "input:[3,8]", "--manifest", "m.json"
    )
    assert (found.exit_code, found.stderr) == (0, "")
    assert "some_nets.py:mlp: 4 signatures prepared in " in found.stdout
    assert "4 calls written to m.json" in found.stdout
    again = prepare("some_nets.py:mlp", "--manifest", "m.json", "--json")
    assert again.exit_code == 0, again.stderr
    result = json.loads(again.stdout)
    assert (result["signatures"], result["refused"], result["problems"], result["written"]) == (4, [], [], 0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    fast = graphcache.wrap(net, capture="prepared")
    assert fast.prepare(tmp_path / "m.json").signatures == 4
    with torch.no_grad():
        fast(torch.ones(3, 8))
    assert fast.cache_info().hits == 1


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_the_mode_is_that_of_the_calls_to_come(prepare, tmp_path, mode):
    assert prepare("some_nets:Half", "--shapes", "x:3", "--manifest", "m.json", "--mode", mode).exit_code == 0
    [entry] = graphcache.Manifest.load(tmp_path / "m.json").entries
    assert entry.spec.modes == ({"inference mode": "on"} if mode == "inference_mode" else {})


def test_what_cannot_be_captured_is_told_and_exits_with_1(prepare):
    found = prepare("some_nets:Positive", "--shapes", "x:3", "--json")
    assert found.exit_code == 1
    [refused] = json.loads(found.stdout)["refused"]
    assert refused["call"] == "float32[3]"
    assert refused["cause"].startswith("data_dependent: ")
    assert found.stderr == "Error: 1 of what was asked for could not be prepared\n"
    assert "Refused, float32[3]: data_dependent: " in prepare("some_nets:Positive", "--shapes", "x:3").stdout


def test_a_foreign_manifest_is_told_and_exits_with_1(prepare):
    prepare("some_nets:mlp", "--shapes", "input:1x8", "--manifest", "m.json")
    found = prepare("some_nets:table", "--manifest", "m.json")
    assert found.exit_code == 1
    assert "Ignored, m.json: environment['module']: 'Sequential " in found.stdout


def test_more_than_32_calls_all_fit(prepare):
    shapes = [word for size in range(1, 41) for word in ("--shapes", f"x:{size}")]
    found = prepare(
        "some_nets:ready", *[word.replace("x:", "input:") for word in shapes], "--manifest", "m.json", "--json"
    )
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["written"] == 40
    assert json.loads(prepare("some_nets:ready", "--manifest", "m.json", "--json").stdout)["signatures"] == 40


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["some_nets:mlp"], 2, "Nothing to prepare: give --shapes, or --manifest with a file that was written before."),
        (["some_nets:mlp", "--manifest", "nothing.json"], 1, "there is no file nothing.json; write it with --shapes"),
        (["some_nets:mlp", "--shapes", "input:2x9"], 1, "some_nets:mlp refused a call: RuntimeError: mat1 and mat2"),
        (["some_nets:mlp", "--shapes", "x:2x8"], 1, "some_nets:mlp cannot be called with x:2x8: missing"),
        (
            ["some_nets:mlp", "--shapes", "input:1x8", "--manifest", "no/m.json"],
            1,
            "'no/m.json' cannot be written: No such",
        ),
        (["some_nets:mlp", "--shapes", "input:1x8", "--deadline", "0"], 2, "Invalid value for '--deadline'"),
        (["some_nets:mlp", "--shapes", "input:1x8", "--max-bytes", "0"], 2, "Invalid value for '--max-bytes'"),
        (["some_nets:mlp", "--shapes", "input:1xx8"], 2, "expected a size"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(prepare, args, code, message):
    found = prepare(*args)
    assert (found.exit_code, found.stdout) == (code, "")
    assert message in found.stderr
    if code == 1:
        assert found.stderr.count("\n") == 1
