"""State that several threads advance, captures that cannot begin, and what a fork finds locked."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import Reason
from graphcache.capture.torch_recorder import TorchRecorder
from graphcache.events import QuietLock
from tests.helpers import in_threads, settled


class Counts(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.n.add_(1)
        return x + self.n


def rows(count: int) -> Tensor:
    return torch.zeros(count, 1)


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("known", [True, False], ids=["a hit", "a miss"])
def test_a_call_of_another_thread_waits_while_state_is_put_back_and_forth(
    monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    fast = graphcache.wrap(Counts())
    fast(rows(1)), fast(rows(1))
    record, answers, threads = TorchRecorder.record, list[Tensor](), list[threading.Thread]()

    def call() -> None:
        with torch.no_grad():
            answers.append(fast(rows(1 if known else 3)))

    def recording(self: TorchRecorder, *args: Any) -> Any:
        if not threads:
            threads.append(threading.Thread(target=call))
            threads[0].start()
            # It cannot end before this recording has.
            threads[0].join(0.05)
            assert threads[0].is_alive()
        return record(self, *args)

    monkeypatch.setattr(TorchRecorder, "record", recording)
    fast(rows(2))
    threads[0].join()
    assert fast.module.n.item() == 4
    assert answers[0][0].item() == 4.0


def test_state_that_another_thread_advanced_since_the_observed_run_is_not_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fast = graphcache.wrap(Counts())
    fast(rows(1)), fast(rows(1))
    observe = TorchRecorder.observe

    def observing(self: TorchRecorder, *args: Any, **kwargs: Any) -> Any:
        effects = observe(self, *args, **kwargs)
        in_threads(lambda _: torch.no_grad()(fast)(rows(1)), 1)
        return effects

    monkeypatch.setattr(TorchRecorder, "observe", observing)
    fast(rows(2))
    assert fast.module.n.item() == 4
    assert fast.cache_info().eager == {Reason.UNSETTLED: 1}
    monkeypatch.undo()
    fast(rows(2)), fast(rows(2))
    assert fast.module.n.item() == 6
    assert fast.cache_info().captures == 2


def test_threads_count_every_call() -> None:
    fast = graphcache.wrap(Counts())

    def work(_: int) -> None:
        with torch.no_grad():
            for size in [*range(1, 12), *range(1, 12)]:
                fast(rows(size))

    in_threads(work, 3)
    assert fast.module.n.item() == 66
    assert fast.cache_info().eager.keys() <= {Reason.UNSETTLED, Reason.PENDING}


def test_a_thread_that_cannot_start_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = graphcache.wrap(nn.Linear(2, 2), capture_in="background")

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert torch.equal(fast(torch.ones(1, 2)), fast.module(torch.ones(1, 2)))
    fast(torch.ones(1, 2))
    settled(fast)
    assert fast.cache_info().captures == 1
    fast.close()


def test_a_module_that_an_observer_closes_keeps_no_graph() -> None:
    class Closes(graphcache.Observer):
        def before(self, name: str, *args: Any) -> None:
            if name == "capture":
                fast.close()

    fast = graphcache.wrap(nn.Linear(2, 2))
    fast.observe(Closes())
    with pytest.raises(graphcache.errors.ClosedError):
        for _ in range(3):
            fast(torch.ones(1, 2))
    assert fast.cache_info().graphs == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_finds_no_lock_of_another_thread() -> None:
    lock, taken, end = QuietLock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            end.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    try:
        if not (child := os.fork()):
            os._exit(0 if lock.acquire(timeout=1) else 1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert not lock.acquire(timeout=0), "of this process it is"
    finally:
        end.set()
        thread.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_keeps_the_locks_of_its_own_thread() -> None:
    lock = QuietLock()
    with lock:
        if not (child := os.fork()):
            try:
                lock.release()
            except RuntimeError:
                os._exit(1)
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
