"""What holds for every test: the hypothesis profile, the seed, and modes that are back at their default afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from graphcache.config import Modes, modes

settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("dev"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(autouse=True)
def clean_context(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test starts from the same seed and environment, and leaves the modes and torch's own switches alone."""
    variables = ("DISABLE", "MAX_GRAPHS", "MAX_BYTES", "PROCESS_MAX_BYTES")
    for name in (f"GRAPHCACHE_{each}" for each in variables):
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)
    yield
    left = modes.get()
    modes.set(Modes())
    assert left == Modes(), f"the test left the modes at {left}"
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch._C._len_torch_dispatch_stack() == 0
