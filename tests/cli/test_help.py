"""Help reads well at 80 columns, names every option, and its examples run."""

import inspect
import re
import shlex

import click
import pytest
import torch
from click.testing import CliRunner

from graphcache.cli import main
from graphcache.cli.network import Policy
from tests.cli.onnx_file import OnnxNode, policy_model, serialize
from tests.engines import fake_tensorrt

COMMANDS = sorted(name for name, command in main.commands.items() if not isinstance(command, click.Group))
MISSING = re.compile(r"needs a CUDA device|no flavour of TensorRT|TensorRT|pip install|C\+\+ compiler")
"""What an example that fails says: what this machine lacks."""


def examples(name):
    text = inspect.getdoc(main.commands[name].callback)
    if "Examples:\n" not in text:
        return []
    lines = text.split("Examples:\n")[1].replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip()]


def test_the_commands():
    assert set(COMMANDS) >= {
        *("build", "inspect", "run", "bench", "prepare", "report", "doctor", "demo", "env"),
        *("compile", "completion"),
    }


@pytest.mark.parametrize("args", [[], *[[name] for name in COMMANDS]])
def test_help_fits_80_columns(args):
    found = CliRunner().invoke(main, [*args, "--help"], terminal_width=80)
    assert found.exit_code == 0
    assert all(len(line) <= 80 for line in found.stdout.splitlines())
    assert found.stdout.startswith("Usage: ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_described(name):
    for param in main.commands[name].params:
        if isinstance(param, click.Option):
            assert param.help, param.opts


@pytest.mark.parametrize("name", sorted(main.commands))
def test_short_help_is_not_cut(name):
    listed = CliRunner().invoke(main, ["--help"], terminal_width=80).stdout
    [line] = [line for line in listed.splitlines() if line.startswith(f"  {name} ")]
    assert line.endswith(".")
    assert "..." not in line


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("completion", "compile", "doctor", "demo")])
def test_results_come_as_json_too(name):
    assert "--json" in {flag for param in main.commands[name].params for flag in param.opts}


EXAMPLES = [
    pytest.param(each, id=each[:60]) for name in COMMANDS if name not in ("compile", "serve") for each in examples(name)
]
"""Without those that need a compiler, or never end; tests/serving/cluster runs the latter."""


def test_every_command_has_examples():
    assert all(examples(name) for name in COMMANDS)
    assert all(each.startswith("graphcache ") for name in COMMANDS for each in examples(name))


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run(cli, folder, example):
    weights = {"w": torch.ones(8, 2)}
    nodes = [OnnxNode("MatMul", ["x", "w"], "y")]
    (folder / "model.onnx").write_bytes(serialize(nodes, weights, {"x": ["n", 8]}, {"y": ["n", 2]}))
    if "model.engine" in example:
        cli("build", "model.onnx", "--shapes", "x:1x8:4x8:8x8")
        if not (folder / "model.engine").exists():
            # Nothing here builds engines; what looks like one is enough to be told what is missing.
            (folder / "model.engine").write_bytes(fake_tensorrt.serialize("affine"))
    if " report " in example:
        assert cli("bench", "nets.py:mlp", "--shapes", "input:1x16", "--calls", "9", "-o", "result.json").exit_code == 0
    if "--manifest mlp.json" in example and "--shapes" not in example:
        cli("prepare", "nets.py:mlp", "--shapes", "input:1x16", "--manifest", "mlp.json")
    found = cli(*shlex.split(example)[1:])
    assert found.exit_code in (0, 1), found.stderr
    if found.exit_code:
        assert MISSING.search(found.stderr), found.stderr
        assert found.stderr.count("\n") == 1
        assert any(word in example for word in (".onnx", ".engine", "--html")), "these alone need what may be missing"


def test_the_policy_is_a_model_that_other_tests_rely_on(folder):
    assert (folder / "policy.onnx").read_bytes() == policy_model(Policy())
