from __future__ import annotations

import threading

import pytest
import torch

from graphcache.graphs import capture
from graphcache.graphs.capture import as_if_capturing


def no() -> bool:
    return False


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PyTorch without CUDA raises when it is asked."""
    monkeypatch.setattr(capture, "_ask_driver", no)
    monkeypatch.setattr(torch.cuda.graphs, "_cuda_isCurrentStreamCapturing", no)


def test_a_thread_is_told_that_it_captures_and_no_other_is() -> None:
    heard: list[bool] = []
    with as_if_capturing():
        with as_if_capturing():
            assert torch.cuda.is_current_stream_capturing()
        assert torch.cuda.is_current_stream_capturing()
        other = threading.Thread(target=lambda: heard.append(torch.cuda.is_current_stream_capturing()))
        other.start()
        other.join()
    assert heard == [False]
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.cuda.graphs._cuda_isCurrentStreamCapturing is no


def test_blocks_of_two_threads_end_in_any_order() -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with as_if_capturing():
            inside.set()
            assert leave.wait(60)

    other = threading.Thread(target=hold)
    with as_if_capturing():
        other.start()
        assert inside.wait(60)
    assert not torch.cuda.is_current_stream_capturing()
    leave.set()
    other.join()
    assert torch.cuda.graphs._cuda_isCurrentStreamCapturing is no
