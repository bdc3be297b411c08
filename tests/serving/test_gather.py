"""Requests gathered in one process: who comes together goes together, and everybody gets their own."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError

import pytest
import torch
from torch import nn

from graphcache.errors import ClosedError, ConfigError, InputRankError
from graphcache.serving.gather import Gather
from graphcache.serving.runner import Runner
from graphcache.serving.settings import Settings
from tests.helpers import in_threads
from tests.serving import nets

X = {"x": torch.zeros(1, nets.WIDTH)}


@pytest.fixture(scope="module")
def runner():
    made = Runner(Settings(nets.first, rows=[1, 2, 4, 8], prepare=(X,)))
    yield made
    made.close()


def numbered(number, rows=1):
    x = torch.zeros(rows, nets.WIDTH)
    x[:, 0] = torch.arange(rows) / 4 + number
    return {"x": x}


def is_own(request, answer):
    return torch.equal(answer["check"], request["x"][:, :1] * 3 + 1)


def test_requests_that_wait_go_together(runner):
    before = dict(runner.counts.batches)
    with Gather(runner, wait_s=59) as gather:
        # A full batch does not wait for the end of its time.
        futures = [gather.submit(numbered(index)) for index in range(8)]
        assert all(is_own(numbered(index), future.result(60)) for index, future in enumerate(futures))
        assert runner.counts.batches[8] == before.get(8, 0) + 1
        # What waits at the end is answered.
        last = gather.submit(numbered(9, rows=3))
    assert is_own(numbered(9, rows=3), last.result(0))
    assert runner.counts.batches[4] == before.get(4, 0) + 1


def test_threads_and_tasks_get_their_own(runner):
    with Gather(runner, wait_s=0.0) as gather:

        def work(index):
            for turn in range(40):
                request = numbered(1000 * index + turn, 1 + turn % 3)
                assert is_own(request, gather.submit(request).result(60))

        in_threads(work, 16)

        async def tasks():
            async def one(number):
                request = numbered(number, 1 + number % 3)
                return is_own(request, await asyncio.wrap_future(gather.submit(request)))

            return await asyncio.gather(*(one(number) for number in range(200)))

        assert all(asyncio.run(tasks()))
    assert runner.info().eager == {}


def test_kinds_do_not_wait_for_one_another():
    class Any(nn.Module):
        def forward(self, x):
            return x + 1

    runner = Runner(Settings(Any, rows=[1, 2], prepare=({"x": (1, 2)}, {"x": (1, 3)})))
    with Gather(runner, wait_s=59) as gather:
        alone = gather.submit({"x": torch.zeros(1, 3)})
        both = [gather.submit({"x": torch.full((1, 2), float(index))}) for index in range(2)]
        assert [future.result(60)["output_0"].tolist() for future in both] == [[[1.0, 1.0]], [[2.0, 2.0]]]
        assert not alone.done()
    assert alone.result(0)["output_0"].tolist() == [[1.0, 1.0, 1.0]]
    runner.close()


def test_what_is_wrong_is_told_at_once_or_to_whom_it_concerns(runner):
    with Gather(runner) as gather, pytest.raises(InputRankError):
        gather.submit({"x": torch.zeros(1)})
    lookup = Runner(Settings(nets.Lookup, rows=[4], prepare=({"ids": torch.zeros(1, 1, dtype=torch.int64)},)))
    with Gather(lookup, wait_s=59) as gather:
        futures = [gather.submit({"ids": torch.tensor([[index]])}) for index in (1, 99, 3, 4)]
        assert isinstance(futures[1].exception(60), IndexError)
        assert [futures[place].result(60)["ids"].item() for place in (0, 2, 3)] == [1, 3, 4]
    lookup.close()
    with Gather(lookup) as gather, pytest.raises(ClosedError, match="Lookup is closed"):
        gather.submit({"ids": torch.tensor([[1]])}).result(60)


def test_a_cancelled_request_is_not_run_and_holds_nobody_up(runner):
    before = runner.counts.requests
    with Gather(runner, wait_s=59) as gather:
        given_up = gather.submit(numbered(1))
        assert given_up.cancel()
        others = [gather.submit(numbered(index, rows=7)) for index in (2,)]
        assert all(is_own(numbered(2, rows=7), future.result(60)) for future in others)
    with pytest.raises(CancelledError):
        given_up.result(0)
    assert runner.counts.requests == before + 1


def test_after_its_end(runner):
    gather = Gather(runner)
    gather.close()
    gather.close()
    with pytest.raises(ClosedError, match="requests of first are gathered no more; make another Gather"):
        gather.submit(numbered(1))
    assert not [each for each in threading.enumerate() if each.name.startswith("graphcache-gather")]


@pytest.mark.parametrize("wait_s", [-1, 60, float("nan"), "1", None, True])
def test_a_wait_that_is_none(runner, wait_s):
    with pytest.raises(ConfigError, match="expected seconds from 0 to 60"):
        Gather(runner, wait_s=wait_s)
