"""``GRAPHCACHE_DISABLE`` turns graphs off, ``GRAPHCACHE_NATIVE=0`` native code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import graphcache
from graphcache import Reason
from graphcache.errors import CaptureError
from tests.helpers import mlp, outcomes

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("value", ["1", "true"])
def test_without_graphs_wrapped_modules_run_eagerly_and_say_so(monkeypatch, value):
    monkeypatch.setenv("GRAPHCACHE_DISABLE", value)
    fast, x = graphcache.wrap(mlp()), torch.ones(1, 4)
    for _ in range(3):
        assert torch.equal(fast(x), fast.module(x))
    assert outcomes(fast) == (0, 0, {Reason.DISABLED: 3})
    with pytest.raises(CaptureError):
        fast.session(x)


def test_engines_too(monkeypatch, load, rows, fake):
    monkeypatch.setenv("GRAPHCACHE_DISABLE", "1")
    fast = graphcache.wrap(load("affine"))
    for _ in range(2):
        assert torch.equal(fast(rows(2)), rows(2) * 3 + 1)
    assert outcomes(fast) == (0, 0, {Reason.DISABLED: 2})
    assert "cuGraphLaunch" not in fake.driver.calls


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_other_values_leave_them_on(monkeypatch, value):
    monkeypatch.setenv("GRAPHCACHE_DISABLE", value)
    fast = graphcache.wrap(mlp())
    for _ in range(2):
        fast(torch.ones(1, 4))
    assert outcomes(fast) == (1, 1, {})


def test_what_is_no_switch_is_an_error(monkeypatch):
    monkeypatch.setenv("GRAPHCACHE_DISABLE", "perhaps")
    with pytest.raises(ValueError, match="GRAPHCACHE_DISABLE='perhaps': expected 1, true, 0, false or nothing"):
        graphcache.wrap(mlp())


PROGRAM = """
import sys, threading, torch, graphcache
module, x = torch.nn.Linear(4, 4).requires_grad_(False), torch.ones(1, 4)
fast = graphcache.wrap(module)
for _ in range(30):
    assert torch.equal(fast(x), module(x))
assert (fast.cache_info().captures, fast.cache_info().hits) == (1, 29)
loaded = [getattr(each, "__file__", None) or "" for each in sys.modules.values()]
print([path for path in loaded if path.startswith(sys.argv[1])], threading.active_count())
"""


def test_without_native_code_nothing_is_compiled_or_loaded_and_answers_are_the_same(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "GRAPHCACHE_NATIVE": "0",
        "XDG_CACHE_HOME": str(tmp_path),
        "GRAPHCACHE_CACHE_DIR": str(tmp_path / "cache"),
    }
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        timeout=300,
    )
    assert ran.stdout.split() == ["[]", "1"]
    assert list(tmp_path.iterdir()) == []
