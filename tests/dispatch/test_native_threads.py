"""Threads that call, evict, forget and close at once: a call is answered rightly, or says that the module is closed."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from graphcache.errors import ClosedError
from tests.dispatch import test_fast_path
from tests.dispatch.test_fast_path import Warm
from tests.engine_modules import rows
from tests.graphs.fake_driver import Torch
from tests.helpers import dispatcher_of, in_threads

fake = test_fast_path.fake


@pytest.fixture(autouse=True)
def hasty() -> Iterator[None]:
    """Threads take turns as often as the interpreter lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_calls_while_graphs_come_and_go(fake: Torch) -> None:
    warm, sizes = Warm(fake, max_graphs=2), (1, 2, 3, 4)
    for size in sizes:
        warm.up(rows(fake, size))
    fast, done = warm.fast, threading.Event()
    answered, refused = [0] * 3, [0] * 3

    def calls(index: int) -> None:
        with torch.no_grad(), fake.on(warm.stream):
            for step in range(60):
                x = rows(fake, sizes[(step // 5 + index) % 4], step)
                try:
                    answer = fast(x) if step % 3 else fast.forward_into(rows(fake, len(x)), x)
                except ClosedError:
                    refused[index] += 1
                    continue
                assert torch.equal(answer, x * 3 + 1)
                answered[index] += 1
        if index == 0:
            fast.close()

    def disturbs() -> None:
        step = 0
        while not done.is_set():
            step += 1
            if step % 3 == 0:
                fast.clear()
            elif step % 3 == 1:
                dispatcher_of(fast).fast_path.clear()
            else:
                dispatcher_of(fast).fast_path.observed(step % 2 == 0)
            done.wait(0.001)

    disturber = threading.Thread(target=disturbs)
    disturber.start()
    try:
        in_threads(calls, 3)
    finally:
        done.set()
        disturber.join()
    assert answered[0] == 60
    assert [sum(each) for each in zip(answered, refused, strict=True)] == [60] * 3


def test_a_graph_is_closed_while_it_is_launched(fake: Torch) -> None:
    """Its order's lock is held meanwhile, so that nothing is launched that was destroyed."""
    warm, x = Warm(fake), rows(fake, 2)
    for _ in range(20):
        warm.up(x)
        start = threading.Barrier(3)

        def work(index: int, start: threading.Barrier = start) -> None:
            start.wait()
            with torch.no_grad(), fake.on(warm.stream):
                if index == 0:
                    warm.fast.clear()
                else:
                    assert torch.equal(warm.fast(x), x * 3 + 1)

        in_threads(work, 3)
