"""``graphcache doctor``: each check where something is there, missing or broken; verdicts and exit codes."""

from __future__ import annotations

import importlib
import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

import graphcache
from graphcache import CacheInfo, Cause, Reason, native
from graphcache.cli import main
from graphcache.cli.canary import Outcome
from graphcache.cli.doctor import (
    EXTRAS,
    check_canary,
    check_cuda_python,
    check_devices,
    check_extra,
    check_native_code,
    check_tensorrt,
    check_versions,
)
from graphcache.dispatch.dispatcher import Dispatcher
from graphcache.errors import ConfigError, CudaError, TensorRTNotFoundError
from graphcache.graphs import driver

# As an attribute of graphcache.cli it is the command.
MODULE = importlib.import_module("graphcache.cli.doctor")
H100, B200, RTX, ADA, TURING = (
    ("H100", (9, 0)),
    ("B200", (10, 0)),
    ("RTX 5090", (12, 0)),
    ("L4", (8, 9)),
    ("T4", (7, 5)),
)


def doctor(*args):
    return CliRunner().invoke(main, ["doctor", *args])


def checks(found):
    return {each["check"]: each for each in json.loads(found.stdout)["checks"]}


def raising(error):
    def fail(*args, **names):
        raise error

    return fail


@pytest.fixture
def devices(monkeypatch):
    """Sets the devices that a PyTorch for CUDA 13.0 sees."""

    def put(*found):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(found))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda which: found[getattr(which, "index", which)][0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found[index][1])

    return put


@pytest.fixture
def tensorrt(monkeypatch):
    """Sets the TensorRT in use."""

    def put(flavour):
        monkeypatch.setattr(MODULE, "library", lambda: SimpleNamespace(flavour=flavour, version="1.5.0"))

    return put


@pytest.fixture
def sings(monkeypatch):
    """Sets what the canary gives."""

    def put(hits=3, wrong=(), reasons=None):
        outcome = Outcome(3, CacheInfo(hits=hits, captures=4, evictions=3), list(wrong), reasons or {})
        monkeypatch.setattr(MODULE, "canary", lambda device: outcome)

    return put


@pytest.fixture
def sound(monkeypatch, devices, tensorrt, sings):
    """A machine on which nothing fails, whatever machine this is."""
    devices()
    tensorrt("tensorrt_rtx")
    sings()
    monkeypatch.setattr(driver, "binding", lambda: None)
    monkeypatch.setattr(MODULE, "EXTRAS", {"onnx": ("json",)})


# ---- the command


def test_the_table(sound):
    found = doctor()
    assert (found.exit_code, found.stderr) == (0, "")
    assert "\x1b" not in found.stdout
    lines = found.stdout.splitlines()
    assert lines[0].split("   ")[:1] == ["check"]
    verdicts = {
        match[1]: match[2] for match in map(re.compile(r"(\S+(?: \S+)*) {3,}(ok|not here) {3,}").match, lines) if match
    }
    assert verdicts == {
        "versions": "ok",
        "CUDA devices": "not here",
        "cuda-python": "ok",
        "native code": "ok",
        "TensorRT": "ok",
        "extra onnx": "ok",
        "canary": "ok",
    }
    assert "To go on, check that nvidia-smi lists a GPU" in " ".join(found.stdout.split())


def test_as_json(sound):
    found = doctor("--json")
    assert (found.exit_code, found.stderr) == (0, "")
    result = json.loads(found.stdout)
    assert (result["failed"], result["differences"]) == (0, 0)
    assert [each["check"] for each in result["checks"]] == [
        "versions", "CUDA devices", "cuda-python", "native code", "TensorRT", "extra onnx", "canary"
    ]  # fmt: skip
    assert all(set(each) == {"check", "verdict", "seen", "remedy"} and each["seen"] for each in result["checks"])


def test_the_real_machine_passes():
    found = doctor("--json")
    assert found.exit_code == 0, found.output
    canary = checks(found)["canary"]
    assert canary["verdict"] == "ok"
    where = "CUDA graphs on" if torch.cuda.is_available() else "host graphs (no CUDA device): 3 graphs evicted"
    assert canary["seen"].startswith(where)


@pytest.mark.parametrize("args", [(), ("--json",)])
def test_a_failed_check_ends_with_1_and_the_others_are_still_made(sound, monkeypatch, args):
    monkeypatch.setattr(MODULE, "library", raising(ConfigError("GRAPHCACHE_TENSORRT='x'\nis no flavour")))
    monkeypatch.setattr(MODULE, "canary", raising(RuntimeError("CUDA error: an illegal memory access")))
    found = doctor(*args)
    assert found.exit_code == 1
    assert found.stderr == "Error: 2 of 7 checks failed: TensorRT, canary\n"
    for seen in ("GRAPHCACHE_TENSORRT='x' is no flavour", "RuntimeError: CUDA error: an illegal memory access"):
        assert seen in found.stdout


def test_a_wrong_answer_of_a_real_graph_ends_with_3(monkeypatch):
    monkeypatch.setattr(MODULE, "EXTRAS", {})
    right = Dispatcher.replay
    monkeypatch.setattr(Dispatcher, "replay", lambda *args, **names: right(*args, **names) + 1)
    found = doctor("--json")
    assert found.exit_code == 3
    assert found.stderr.startswith("Error: graphs gave wrong answers: ")
    assert json.loads(found.stdout)["differences"] == 3
    canary = checks(found)["canary"]
    assert canary["verdict"] == "failed"
    assert "3 times wrong. The first, after a graph was evicted: output 0: " in canary["seen"]
    assert "GRAPHCACHE_DISABLE=1" in canary["remedy"]


def test_a_wrong_answer_weighs_more_than_a_failed_check(sound, monkeypatch, sings):
    monkeypatch.setattr(MODULE, "library", raising(ConfigError("no")))
    sings(wrong=["it was NaN"])
    assert doctor().exit_code == 3


def test_help_and_usage():
    assert doctor("-h").exit_code == 0
    found = doctor("everything")
    assert (found.exit_code, found.stdout) == (2, "")


# ---- the checks


@pytest.mark.parametrize(
    ("cuda", "smi", "verdict", "seen"),
    [
        ("13.0", "/usr/bin/nvidia-smi", "ok", "(built for CUDA 13.0)"),
        ("13.0", None, "ok", "(built for CUDA 13.0)"),
        (None, None, "ok", "(built without CUDA)"),
        (None, "/usr/bin/nvidia-smi", "warning", "(built without CUDA), but an NVIDIA driver is here"),
    ],
)
def test_versions(monkeypatch, cuda, smi, verdict, seen):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(MODULE.shutil, "which", lambda name: smi)
    found = check_versions()
    assert (found.verdict, bool(found.remedy)) == (verdict, verdict == "warning")
    python = ".".join(map(str, sys.version_info[:3]))
    assert found.seen.startswith(f"Python {python}, graphcache {graphcache.__version__}, torch {torch.__version__} ")
    assert found.seen.endswith(seen)


def test_devices_are_told_with_their_driver(monkeypatch, devices):
    devices(H100, RTX)
    monkeypatch.setattr(driver, "call", lambda name: {"cuDriverGetVersion": 12080}[name])
    found = check_devices()
    assert (found.verdict, found.seen) == (
        "ok",
        "H100, compute capability 9.0; RTX 5090, compute capability 12.0; the driver serves CUDA up to 12.8",
    )
    monkeypatch.setattr(driver, "call", raising(CudaError("no cuda-python")))
    assert check_devices().seen.endswith("the driver's version cannot be asked for without cuda-python")


def test_no_device_is_no_failure(devices):
    devices()
    found = check_devices()
    assert (found.verdict, found.seen) == ("not here", "no CUDA device")
    assert "is built for CUDA 13.0, but found no device" in found.remedy


def test_cuda_python_is_told_with_its_version(monkeypatch):
    monkeypatch.setattr(driver, "binding", lambda: None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(__version__="13.1.2"))
    assert (check_cuda_python().verdict, check_cuda_python().seen) == ("ok", "cuda.bindings 13.1.2")


@pytest.mark.parametrize(("found", "verdict"), [((RTX,), "failed"), ((), "not here")])
def test_cuda_python_may_be_missing_only_without_a_device(monkeypatch, devices, found, verdict):
    devices(*found)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    driver.binding.cache_clear()
    result = check_cuda_python()
    assert result.verdict == verdict
    assert "pip install cuda-python" in result.remedy


def test_native_code(monkeypatch):
    assert check_native_code().seen == native.OFF
    for status, verdict in (
        ("active", "ok"),
        ("CompileError: there is no C compiler; install gcc or clang", "not here"),
    ):
        monkeypatch.setattr(native, "status", lambda status=status: status)
        found = check_native_code()
        assert found.verdict == verdict
        assert status in (found.seen, found.remedy)


@pytest.mark.parametrize(
    ("flavour", "found", "verdict", "seen"),
    [
        ("tensorrt_rtx", (), "ok", "builds engines and runs none"),
        ("tensorrt", (), "ok", "does nothing"),
        ("tensorrt_rtx", (RTX,), "ok", "it runs engines"),
        ("tensorrt_rtx", (TURING, ADA), "ok", "it runs engines"),
        ("tensorrt_rtx", (H100,), "warning", "on H100 (compute capability 9.0); it is"),
        ("tensorrt_rtx", (RTX, B200), "warning", "on B200 (compute capability 10.0); it is"),
        ("tensorrt_rtx", (("V100", (7, 0)),), "warning", "on V100 (compute capability 7.0); it is"),
        ("tensorrt", (H100,), "ok", "it runs engines"),
        ("tensorrt_lean", (H100,), "ok", "it runs engines, but builds none"),
    ],
)
def test_tensorrt_and_what_its_maker_supports(devices, tensorrt, flavour, found, verdict, seen):
    devices(*found)
    tensorrt(flavour)
    result = check_tensorrt()
    assert result.verdict == verdict
    assert result.seen.startswith(f"{flavour} 1.5.0")
    assert seen in result.seen
    assert ("against another runtime" in result.remedy) == (verdict == "warning")


@pytest.mark.parametrize(
    ("spec", "verdict"),
    [
        (None, "not here"),
        (SimpleNamespace(origin=None), "not here"),  # a folder of that name
        (SimpleNamespace(origin="tensorrt/__init__.py"), "failed"),
    ],
)
def test_tensorrt_that_is_missing_is_told_from_one_that_is_broken(monkeypatch, spec, verdict):
    monkeypatch.setattr(MODULE, "library", raising(TensorRTNotFoundError("none. Tried all.\nTo install: pip")))
    monkeypatch.setattr(MODULE.importlib.util, "find_spec", lambda name: spec if name == "tensorrt" else None)
    found = check_tensorrt()
    assert (found.verdict, found.remedy) == (verdict, "none. Tried all. To install: pip")
    assert found.seen == {"failed": "installed, but not to be used: tensorrt"}.get(verdict, "no flavour of TensorRT")


def test_the_extras_are_those_of_the_project():
    path = Path(graphcache.__file__).parents[1] / "pyproject.toml"
    declared = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    modules = {
        name: tuple(re.match(r"[\w-]+", requirement)[0].replace("-", "_") for requirement in requirements)
        for name, requirements in declared.items()
        if name not in ("rtx", "tensorrt", "lean", "test")
    }
    assert modules == EXTRAS


def test_an_extra_is_there_or_missing_or_broken(monkeypatch, tmp_path):
    monkeypatch.setitem(EXTRAS, "onnx", ("here", "away", "bad"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "here", ModuleType("here"))
    sys.modules["here"].__version__ = "1.2"
    (tmp_path / "bad.py").write_text("import warnings\nwarnings.warn('old')\n", encoding="utf-8")
    found = check_extra("onnx")
    assert (found.verdict, found.seen) == ("not here", "here 1.2; bad; no away")
    assert found.remedy == 'pip install "graphcache[onnx]"'

    del sys.modules["bad"]
    (tmp_path / "bad.py").write_text("import surely_not_there_either\n", encoding="utf-8")
    importlib.invalidate_caches()
    found = check_extra("onnx")
    assert found.verdict == "warning"
    assert "bad cannot be imported: ModuleNotFoundError: No module named 'surely_not_there_either'" in found.seen

    monkeypatch.setitem(EXTRAS, "onnx", ("here",))
    assert (check_extra("onnx").verdict, check_extra("onnx").remedy) == ("ok", "")


def test_the_canary_says_where_it_ran(devices, sings):
    sings()
    devices()
    assert check_canary().seen == (
        "host graphs (no CUDA device): 3 graphs evicted, their memory overwritten; 3 replays of the others equal eager "
        "execution"
    )
    devices(RTX)
    assert check_canary().seen.startswith("CUDA graphs on RTX 5090: 3 graphs evicted")


@pytest.mark.parametrize(
    ("reasons", "verdict"),
    [
        ([Reason.DISABLED], "warning"),
        ([Reason.MISMATCH], "failed"),
        ([Reason.DISABLED, Reason.OUT_OF_MEMORY], "failed"),
        ([], "failed"),
    ],
)
def test_a_canary_without_graphs_proves_nothing(devices, sings, reasons, verdict):
    devices()
    sings(hits=2, reasons={reason: str(Cause(reason)) for reason in reasons})
    found = check_canary()
    assert (found.verdict, found.differences) == (verdict, 0)
    assert found.seen.endswith("2 of 3 answers came from graphs")
    assert all(reason.remedy in found.remedy for reason in reasons)
