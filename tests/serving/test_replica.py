"""A replica without Ray: answers, reloads beside the calls, a Serve config file's settings, and its health."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from graphcache.errors import ConfigError, CudaError, ProfileRangeError, ServingError, UnavailableError
from graphcache.serving import replica as module
from graphcache.serving.replica import Replica, loses_device
from graphcache.serving.settings import Settings
from graphcache.serving.transport import pack, unpack
from tests.serving import nets

SETTINGS = Settings(nets.first, rows=[1, 2], prepare=({"x": torch.zeros(1, nets.WIDTH)},))


class Single(Replica):
    """Gathers nothing, which is for Ray to do."""

    async def answer_all(self, requests):
        [answer] = await super().answer_all([requests])
        return answer


@pytest.fixture
def replica(monkeypatch):
    pytest.importorskip("numpy")
    monkeypatch.setattr(module, "_model_id", lambda: "")
    monkeypatch.setattr(module, "_replica_id", lambda: "one")
    threads = torch.get_num_threads()
    made = Single(SETTINGS)
    yield made
    made._lane.shutdown()
    made._beside.shutdown()
    made._runner.close()
    torch.set_num_threads(threads)


def version(replica, rows=1):
    x = torch.ones(rows, nets.WIDTH)
    return set(unpack(asyncio.run(replica.infer(pack({"x": x}))))["version"].flatten().tolist())


def test_it_answers_and_counts(replica):
    assert version(replica, 2) == {1.0}
    with pytest.raises(ProfileRangeError, match="has the shape"):
        asyncio.run(replica.infer(pack({"x": torch.ones(1, 3)})))
    found = asyncio.run(replica.stats())
    assert (found["replica"], found["version"], found["requests"], found["failed"]) == ("one", 1, 1, 0)
    assert (found["batches"], found["graph_hits"], found["captures"], found["eager"]) == ({2: 1}, 1, 2, {})
    assert asyncio.run(replica.describe()).spec.name == "first"


def test_a_reload_changes_over_and_closes_the_old_one(replica):
    old = replica._runner
    assert asyncio.run(replica.reload(nets.second)) == 2
    assert version(replica) == {2.0}
    assert old._closed
    assert asyncio.run(replica.describe()).spec.versions == ("2",)
    # From the same place again.
    assert asyncio.run(replica.reload()) == 3
    assert version(replica) == {2.0}


def test_what_cannot_be_reloaded_changes_nothing(replica):
    with pytest.raises(ServingError, match="no such weights"):
        asyncio.run(replica.reload(nets.broken))
    assert version(replica) == {1.0}
    assert asyncio.run(replica.stats())["version"] == 1
    assert asyncio.run(replica.reload(nets.second)) == 2


def test_it_answers_while_the_next_version_is_made_and_makes_one_at_a_time(replica):
    inside, go = threading.Event(), threading.Event()

    def slow():
        inside.set()
        assert go.wait(60)
        return nets.second()

    async def both():
        reloading = asyncio.ensure_future(replica.reload(slow))
        await asyncio.get_running_loop().run_in_executor(None, inside.wait, 60)
        answer = unpack(await replica.infer(pack({"x": torch.ones(1, nets.WIDTH)})))
        second = asyncio.ensure_future(asyncio.to_thread(replica._reload, nets.second))
        with pytest.raises(UnavailableError, match="first is being reloaded; ask again when that is done"):
            await second
        go.set()
        return answer["version"].item(), await reloading

    assert asyncio.run(both()) == (1.0, 2)
    assert version(replica) == {2.0}


def test_a_config_file_reloads_when_it_says_something_else(replica):
    async def configured(*configs):
        for each in configs:
            await replica.reconfigure(each)
        return (await replica.stats())["version"]

    # The first is what the replica was made with.
    assert asyncio.run(configured({"version": "a"}, {"version": "a"})) == 1
    assert asyncio.run(configured({"version": "b"})) == 2
    assert asyncio.run(configured({"version": "b", "source": "tests.serving.nets:second"})) == 3
    assert version(replica) == {2.0}
    with pytest.raises(ConfigError, match="expected 'source', and maybe 'version'"):
        asyncio.run(configured({"colour": 1}))


def test_a_new_replica_of_a_config_file_begins_with_its_source(replica):
    asyncio.run(replica.reconfigure({"source": "tests.serving.nets:second"}))
    assert version(replica) == {2.0}


def test_it_is_healthy_until_its_device_is_lost(replica, monkeypatch):
    replica.check_health()

    def lost(requests):
        return [RuntimeError("CUDA error: device-side assert triggered")]

    monkeypatch.setattr(replica._runner, "answer", lost)
    with pytest.raises(RuntimeError):
        version(replica)
    with pytest.raises(UnavailableError, match="the device is lost: CUDA error: device-side assert triggered"):
        replica.check_health()


def test_what_loses_a_device():
    assert loses_device(CudaError("cuGraphLaunch: 700"))
    assert not loses_device(torch.cuda.OutOfMemoryError("CUDA error: out of memory"))
    assert not loses_device(ValueError("CUDA error"))
