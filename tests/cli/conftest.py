"""A folder with what the examples name, and a way to call the command line there."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from graphcache.cli import main
from graphcache.cli.network import Policy
from tests.cli.onnx_file import policy_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder: ``nets.py``, and ``policy.onnx`` with the input ``observation``."""
    shutil.copy(Path(__file__).with_name("nets.py"), tmp_path)
    (tmp_path / "policy.onnx").write_bytes(policy_model(Policy()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(folder):
    return lambda *args: CliRunner().invoke(main, [str(arg) for arg in args])
