"""``graphcache doctor MODULE:FACTORY``: lines, exit codes, and what it refuses."""

import json

import pytest


def test_what_forbids_graphs_is_told_and_ends_with_3(cli):
    found = cli("doctor", "nets.py:Picky", "--shapes", "x:8")
    assert found.exit_code == 3
    assert "nets.py:17: host_read: Tensor.item\n    scale = x.abs().max().item()\n" in found.stdout
    assert "nets.py:18: data_dependent: Tensor.__getitem__\n" in found.stdout
    assert found.stderr == "Error: 2 operations of nets.py:Picky forbid a graph of the whole\n"


def test_as_json(cli):
    found = cli("doctor", "nets.py:Picky", "--shapes", "x:8", "--shapes", "x:9", "--json")
    first, second = json.loads(found.stdout)["breaks"]
    assert (first["line"], first["reason"], first["module"], first["times"]) == (17, "host_read", "", 1)
    assert second["code"] == "kept: Tensor = x[x > 0] / scale"
    assert found.exit_code == 3


def test_what_can_be_captured_ends_well(cli):
    found = cli("doctor", "nets.py:mlp", "--shapes", "input:8x16")
    assert (found.exit_code, found.stderr) == (0, "")
    assert found.stdout == "nets.py:mlp: nothing in these calls forbids a graph.\n"


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["model.onnx"], 2, "model.onnx is no package.module:function or file.py:function"),
        (["--shapes", "x:8"], 2, "--shapes and --device are for a module"),
        (["nets.py:mlp", "--shapes", "input:8x"], 2, "expected a size (a whole number, 0 or more) at column 9"),
        (["nets.py:mlp", "--shapes", "input:8x15"], 1, "nets.py:mlp refused input:8x15: RuntimeError"),
        (["nets.py:nothing"], 1, "nets.py has no 'nothing'"),
        (["nothing.py:mlp"], 1, "there is no file nothing.py"),
    ],
)
def test_what_is_refused(cli, args, code, message):
    found = cli("doctor", *args)
    assert (found.exit_code, found.stdout) == (code, "")
    assert message in found.stderr
