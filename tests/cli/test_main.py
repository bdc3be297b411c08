"""The group: version, help, usage errors, and what a real process prints and exits with."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import graphcache
from graphcache.cli import main
from graphcache.errors import CudaError


@pytest.fixture
def invoke():
    return lambda *args: CliRunner().invoke(main, [str(arg) for arg in args])


def test_version_and_help(invoke):
    assert invoke("--version").stdout == f"graphcache, version {graphcache.__version__}\n"
    for args in (["-h"], ["demo", "--help"], ["build", "-h"], ["run", "-h"]):
        found = invoke(*args)
        assert found.exit_code == 0
        assert found.stdout.startswith("Usage: ")


@pytest.mark.parametrize(
    "args", [["nonsense"], ["demo", "--nonsense"], ["demo", "--calls", "0"], ["build"], ["run"], ["run", "a", "b"]]
)
def test_usage_errors_exit_with_2(invoke, args):
    found = invoke(*args)
    assert (found.exit_code, found.stdout) == (2, "")
    assert "Error: " in found.stderr


def test_errors_of_graphcache_are_one_line_and_exit_with_1(invoke, monkeypatch):
    def fail(*args, **kwargs):
        raise CudaError("cuGraphLaunch failed\nbadly")

    monkeypatch.setattr(graphcache, "wrap", fail)
    found = invoke("demo", "--calls", "1")
    assert (found.exit_code, found.stdout) == (1, "")
    assert found.stderr == "Error: cuGraphLaunch failed badly\n"


def test_only_verbose_sets_up_logging(invoke, monkeypatch):
    log = logging.getLogger("graphcache")
    monkeypatch.setattr(log, "level", logging.NOTSET)
    called = []
    monkeypatch.setattr(logging, "basicConfig", lambda **options: called.append(options))
    invoke("demo", "--calls", "1")
    assert called == []
    assert log.level == logging.NOTSET
    invoke("-v", "demo", "--calls", "1")
    assert len(called) == 1
    assert log.level == logging.INFO
    log.setLevel(logging.NOTSET)


def test_a_real_process(tmp_path):
    root = Path(graphcache.__file__).parents[1]
    environment = {**os.environ, "NO_COLOR": "1", "GRAPHCACHE_MAX_GRAPHS": "3", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "graphcache"]
    found = subprocess.run(
        [*command, "demo", "--calls", "30", "--json"], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert (found.returncode, found.stderr) == (0, "")
    result = json.loads(found.stdout)
    assert result["graphs"] == 3
    assert result["differences"] == 0
    failed = subprocess.run(
        [*command, "build", "none.onnx"], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == "Error: none.onnx cannot be read (No such file or directory); expected an ONNX model\n"
