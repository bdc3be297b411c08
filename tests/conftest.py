"""What holds for every test: how much of the suite runs, the seed, and modes that are reset afterwards."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from graphcache import native
from graphcache.config import Modes, modes
from graphcache.dispatch import background
from graphcache.keys import call_key
from graphcache.native import compiler, recipe
from graphcache.native.probe import prepare
from tests import effort, shared

# The settings of PyTorch at the start are the usual ones, which keys leave out.
USUAL = call_key.ambient_state()
assert USUAL == call_key.USUAL
settings.register_profile("dev", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("dev"), derandomize=True)
settings.register_profile("full", parent=settings.get_profile("dev"), max_examples=200)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--full``."""
    parser.addoption("--full", action="store_true", help="run everything, not the share that runs by default")


def pytest_configure(config: pytest.Config) -> None:
    """Read ``--full``. Workers of pytest-xdist share the cores, so each computes with one thread."""
    if config.getoption("full"):
        effort.run_everything()
        settings.load_profile("full")
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs ``--full``, unless the command line names a test."""
    if any("::" in arg for arg in config.args):
        return
    if left_out := effort.deselected(items):
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


def pytest_collection_finish() -> None:
    """What was imported stays out of every later collection: tests of lifetimes make thousands of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def clean_context(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test starts from the same seed and environment, and leaves the modes and torch's own switches alone."""
    for name in ("DISABLE", "MAX_GRAPHS", "MAX_BYTES", "PROCESS_MAX_BYTES", "CACHE_DIR", "CACHE_MAX_BYTES"):
        monkeypatch.delenv(f"GRAPHCACHE_{name}", raising=False)
    # What somebody compiled on this machine is no part of the tests, which compile their own.
    monkeypatch.setenv("GRAPHCACHE_NATIVE", "0")
    # Captures beside the calls follow one another without a rest, where that is not what is tested.
    monkeypatch.setattr(background, "_MAX_REST_SECONDS", 0.0)
    torch.manual_seed(0)
    yield
    left = modes.get()
    modes.set(Modes())
    assert left == Modes(), f"the test left the modes at {left}"
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch._C._len_torch_dispatch_stack() == 0
    assert call_key.ambient_state() == USUAL, "the test left a setting of PyTorch changed"


@pytest.fixture(scope="session")
def library_or_none() -> Any:
    """The compiled library, made once per source for all workers; ``None`` without a C compiler."""
    try:
        recipe.compiler()
    except recipe.NotCompiled:
        return None
    with shared.alone("compile"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(shared.folder()))
        library = compiler.load(compiler.build())
    with ThreadPoolExecutor(1) as apart:
        apart.submit(prepare, library).result()
    return library


@pytest.fixture(scope="session")
def compiled(library_or_none: Any) -> Any:
    """The compiled library. Only without a C compiler its users are skipped."""
    if library_or_none is None:
        pytest.skip("there is no C compiler")
    return library_or_none


@pytest.fixture(autouse=True)
def guards_in_native_code(library_or_none: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards compare in native code, as they do for whoever installs the package."""
    monkeypatch.setattr(native, "guard_type", lambda: getattr(library_or_none, "Guard", None))
