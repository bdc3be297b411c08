"""What forbids graphs around a call, each by itself and put back afterwards."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from graphcache.config import graphs_off
from graphcache.errors import CudaError, Reason
from graphcache.keys import call_key
from graphcache.keys.call_key import forbidden


def test_nothing_forbids_a_plain_call() -> None:
    assert forbidden(cuda=False) is None
    with torch.enable_grad(), torch.autocast("cpu"):
        assert forbidden(cuda=False) is None


def test_graphs_switched_off() -> None:
    with graphs_off():
        assert forbidden(cuda=False) is Reason.DISABLED
    assert forbidden(cuda=False) is None


def test_somebody_watches_the_operations() -> None:
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    seen = []

    def ask(x: torch.Tensor) -> torch.Tensor:
        seen.append(forbidden(cuda=False))
        return x + 1

    with Watching():
        ask(torch.ones(1))
    make_fx(ask)(torch.ones(1))
    torch.vmap(ask)(torch.ones(2))
    torch.func.grad(lambda x: ask(x).sum())(torch.ones(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(ask, torch.ones(1), check_trace=False)
    assert seen == [Reason.TRACING] * 5
    assert forbidden(cuda=False) is None


@pytest.mark.parametrize("cuda", [True, False])
def test_a_capture_around_concerns_a_device_alone(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_key, "is_capturing", lambda: True)
    assert forbidden(cuda=cuda) is (Reason.OUTER_CAPTURE if cuda else None)


def test_a_process_forked_after_cuda_has_started_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_capturing() -> bool:
        raise RuntimeError("CUDA error: initialization error")

    monkeypatch.setattr(call_key, "is_capturing", is_capturing)
    assert forbidden(cuda=False) is None
    with pytest.raises(CudaError, match="'spawn' method"):
        forbidden(cuda=True)
