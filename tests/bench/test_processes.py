import json
import sys

import pytest

from bench import processes

MODULE = """
import json, os, sys
from pathlib import Path
arguments = sys.argv[1:]
folder = Path(arguments[arguments.index("--out") + 1])
print("a table")
print("progress", file=sys.stderr)
{}
"""
WRITES = 'Path(folder, "part.json").write_text(json.dumps({"arguments": arguments[:-2], "folder": str(folder)}))'


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes a module that can be run as a benchmark."""

    def make(body):
        (tmp_path / "its_own_process.py").write_text(MODULE.format(body))
        return "its_own_process"

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return make


def test_what_another_process_recorded_is_read(module, capfd):
    found = processes.again(module(WRITES), ["--only", "mlp8"], "part")
    assert found["arguments"] == ["--only", "mlp8"]
    out, err = capfd.readouterr()
    assert (out, err) == ("", "progress\n")


def test_nothing_is_left_on_disk(module, tmp_path):
    from pathlib import Path

    found = processes.again(module(WRITES), [], "part")
    assert not Path(found["folder"]).exists()


def test_a_verdict_in_the_exit_code_is_no_failure(module):
    assert processes.again(module(f"{WRITES}\nsys.exit(3)"), [], "part")


@pytest.mark.parametrize(
    ("body", "how"),
    [
        ("", "ended with exit code 0"),
        ("sys.exit(7)", "ended with exit code 7"),
        ("os.kill(os.getpid(), 9)", "was ended by signal 9"),
        ('Path(folder, "part.json").write_text("{")', "ended with exit code 0"),
        ("raise RuntimeError('no device')", "ended with exit code 1"),
    ],
)
def test_without_a_record_it_is_said_how_the_process_ended(module, body, how):
    with pytest.raises(processes.NothingRecordedError, match=f"a process of its own {how} and recorded nothing"):
        processes.again(module(body), [], "part")


def test_it_is_the_same_python(module):
    found = processes.again(module('Path(folder, "part.json").write_text(json.dumps(sys.executable))'), [], "part")
    assert found == json.loads(json.dumps(sys.executable))
