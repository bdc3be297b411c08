"""What holds for every test: the hypothesis profile, the seed, and modes that are back at their default afterwards."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from graphcache.config import Modes, modes
from graphcache.errors import CompileError
from graphcache.graphs import native
from graphcache.graphs.native.build import build, compiler
from graphcache.modules import background

settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("dev"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


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
    monkeypatch.setattr(background, "_LONGEST", 0.0)
    torch.manual_seed(0)
    yield
    left = modes.get()
    modes.set(Modes())
    assert left == Modes(), f"the test left the modes at {left}"
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch._C._len_torch_dispatch_stack() == 0


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The compiled library, made once; what uses it is skipped only where there is no C++ compiler."""
    try:
        compiler()
    except CompileError as why:
        pytest.skip(str(why))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return native.load(build())
