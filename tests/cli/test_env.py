"""``graphcache env`` and ``completion``: everything that a report of a problem needs; what a shell needs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import graphcache
from graphcache.cli import machine, main
from graphcache.extras import EXTRAS


def test_versions_devices_and_settings(monkeypatch):
    monkeypatch.setenv("GRAPHCACHE_MAX_GRAPHS", "7")
    found = CliRunner().invoke(main, ["env", "--json"])
    assert (found.exit_code, found.stderr) == (0, "")
    told = json.loads(found.stdout)
    assert (told["graphcache"], told["torch"]) == (graphcache.__version__, torch.__version__)
    assert told["variables"]["GRAPHCACHE_MAX_GRAPHS"] == "7"
    assert set(told["extras"]) == set(EXTRAS)
    assert len(told["devices"]) == torch.cuda.device_count()
    text = CliRunner().invoke(main, ["env"]).stdout
    assert "GRAPHCACHE_MAX_GRAPHS=7" in text
    for name in ("torch", "driver", "TensorRT", "extra plots", "variables"):
        assert f"\n{name} " in text or text.startswith(name)


def test_every_variable_that_is_read_is_told():
    sources = (path.read_text(encoding="utf-8") for path in Path(graphcache.__file__).parent.rglob("*.py"))
    read = {name for source in sources for name in re.findall(r"GRAPHCACHE_[A-Z]+(?:_[A-Z]+)*", source)}
    assert read == set(machine.VARIABLES)


def test_a_secret_is_not_told(monkeypatch):
    monkeypatch.setenv("GRAPHCACHE_SERVE_TOKEN", "the.secret")
    for options in ([], ["--json"]):
        text = CliRunner().invoke(main, ["env", *options]).stdout
        assert "the.secret" not in text
        assert "GRAPHCACHE_SERVE_TOKEN" in text


def test_the_driver_is_read_where_the_kernel_tells_it(monkeypatch):
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 2025\nGCC version: 12.2.0\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **options: text)
    assert machine.driver_version() == "580.65.06"
    monkeypatch.setattr(Path, "read_text", lambda self, **options: "nothing of the kind")
    assert machine.driver_version() is None


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_a_script(shell):
    found = CliRunner().invoke(main, ["completion", shell])
    assert (found.exit_code, found.stderr) == (0, "")
    assert "_GRAPHCACHE_COMPLETE" in found.stdout
    assert "graphcache" in found.stdout


def test_another_shell_is_a_usage_error():
    assert CliRunner().invoke(main, ["completion", "tcsh"]).exit_code == 2


@pytest.mark.full(every=3)
@pytest.mark.parametrize(
    ("words", "position", "expected"),
    [("graphcache do", 1, "doctor"), ("graphcache run --co", 2, "--compare"), ("graphcache run --device c", 3, "cuda")],
)
def test_what_is_completed(words, position, expected, monkeypatch):
    code = "from graphcache.cli import main; main(prog_name='graphcache')"
    environment = {
        "_GRAPHCACHE_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(position),
        "PYTHONPATH": str(Path(graphcache.__file__).parents[1]),
        "PATH": "/usr/bin:/bin",
    }
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert f"plain,{expected}" in found.stdout.splitlines(), found.stderr
