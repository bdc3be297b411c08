import asyncio
from contextlib import ExitStack

import pytest

from graphcache.errors import UnavailableError
from graphcache.serving.limits import Gate, Limits


def test_as_many_as_the_limits_say_are_inside():
    gate = Gate(Limits(max_concurrency=2, max_queue=3))
    with ExitStack() as inside:
        for count in range(5):
            assert gate.waiting == count
            inside.enter_context(gate.admitted())
        with pytest.raises(
            UnavailableError, match=r"5 requests .* \(max_concurrency=2, max_queue=3\); ask again"
        ) as no:
            inside.enter_context(gate.admitted())
        assert no.value.retry_after == 1
        assert gate.waiting == 5
    assert gate.waiting == 0
    with gate.admitted():
        assert gate.waiting == 1


def test_turns_are_taken_in_order_and_given_back_whatever_happens():
    gate = Gate(Limits(max_concurrency=1, max_queue=9))
    order = []

    async def one(index, go):
        with gate.admitted():
            async with gate.turn():
                assert gate.running == 1
                order.append(index)
                await go.wait()
                if index == 1:
                    raise KeyError("the model's")

    async def run():
        go = asyncio.Event()
        tasks = [asyncio.ensure_future(one(index, go)) for index in range(4)]
        while gate.running + gate.waiting < 4:
            await asyncio.sleep(0)
        assert (gate.running, gate.waiting, gate.full, order) == (1, 3, True, [0])
        tasks[2].cancel()
        go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    ended = asyncio.run(run())
    assert order == [0, 1, 3]
    assert [type(each) for each in ended] == [type(None), KeyError, asyncio.CancelledError, type(None)]
    assert (gate.running, gate.waiting, gate.full) == (0, 0, False)
