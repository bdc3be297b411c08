"""Two replicas on this machine: batches, routing, load and faults, each counted. Over HTTP, by Triton's own client."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from graphcache.errors import InputDtypeError, ProfileRangeError, ServingError, UnknownModelError
from tests.effort import share
from tests.serving import nets
from tests.serving.cluster.conftest import until

# Of Ray's own, at its import.
pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning")


def requests(count: int, *, start: int = 0, seed: int = 0) -> list[torch.Tensor]:
    """Requests of 1 to 3 rows, each of which begins with a number that no other row has."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(start, start + count):
        rows = 1 + index % 3
        x = torch.randn(rows, nets.WIDTH, generator=generator)
        x[:, 0] = torch.arange(rows) / 4 + index
        made.append(x)
    return made


def wrong(given: list[torch.Tensor], found: list[Any], *versions: float) -> Counter[str]:
    """What was wrong with answers, counted; nothing if each is its own request's, of one version."""
    problems: Counter[str] = Counter()
    modules = {version: nets.Checked(version) for version in versions or (1.0,)}
    for x, (answer, _) in zip(given, found, strict=True):
        if isinstance(answer, Exception):
            problems[f"{type(answer).__name__}: {answer}"] += 1
            continue
        version = float(answer["version"].flatten()[0])
        if version not in modules:
            problems[f"version {version}"] += 1
            continue
        wanted = modules[version](x)
        if not torch.equal(answer["check"], wanted["check"]):
            problems["somebody else's answer"] += 1
        elif not torch.equal(answer["version"], wanted["version"]):
            problems["a mixed answer"] += 1
        elif not torch.allclose(answer["y"], wanted["y"], atol=1e-4, rtol=1e-4):
            problems["another value"] += 1
    return problems


def stats(name: str = "checked", application: str = "graphcache") -> list[dict[str, Any]]:
    from graphcache.serving.deployment import stats

    return stats(name, application=application)


def front(application: str = "graphcache") -> dict[str, Any]:
    from ray import serve

    found: dict[str, Any] = serve.get_app_handle(application).own_stats.remote().result(timeout_s=60)
    return found


def at(share: float, times: list[float]) -> float:
    return sorted(times)[min(int(share * len(times)), len(times) - 1)]


def test_batches_have_captured_sizes_and_every_answer_is_its_own(ask):
    given = requests(300)
    assert wrong(given, ask(given)) == {}
    each = stats()
    assert len({one["pid"] for one in each}) == 2
    sizes: Counter[int] = sum((Counter(one["batches"]) for one in each), Counter())
    assert set(sizes) <= {1, 2, 4, 8}
    assert sum(sizes.values()) < sum(one["requests"] for one in each), "no two requests went together"
    for one in each:
        assert one["requests"] > 0, "one replica was given nothing"
        # Everything is a hit of a graph that was there before the first request.
        assert (one["captures"], one["eager"], one["failed"], one["apart"]) == (4, {}, 0, 0)
        assert one["graph_hits"] == sum(one["batches"].values())


def test_a_thousand_requests_at_32_in_flight(ask, capsys):
    before = stats()
    given = requests(share(1000, 300), start=1000, seed=1)
    found = ask(given, at_once=32)
    assert wrong(given, found) == {}
    times = [seconds for _, seconds in found]
    after = stats()
    batches = sum(sum(one["batches"].values()) for one in after) - sum(sum(one["batches"].values()) for one in before)
    spent = sum(one["answer_seconds"] for one in after) - sum(one["answer_seconds"] for one in before)
    p50, p99 = at(0.5, times), at(0.99, times)
    fraction = spent / batches / p50
    with capsys.disabled():
        print(
            f"\n{len(given)} requests, 32 in flight, 2 replicas: p50 {1e3 * p50:.1f} ms, p99 {1e3 * p99:.1f} ms; "
            f"{batches} batches of {1e6 * spent / batches:.0f} µs each in graphcache, {100 * fraction:.1f} % of p50"
        )
    assert fraction < 0.5, "most of the time is graphcache's"


@pytest.mark.full
def test_eight_buckets_stay_where_they_are(ask, capsys):
    """Each replica has room for four of the eight kinds; hits are high only where requests go to who holds theirs."""
    generator = torch.Generator().manual_seed(2)

    def some(count: int) -> list[torch.Tensor]:
        made = []
        for index in range(count):
            length = nets.LENGTHS[index % 8] - index % 3
            x = torch.randn(1 + index % 2, length, generator=generator)
            x[:, 0] = torch.arange(len(x)) / 4 + index
            made.append(x)
        return made

    def settle() -> bool:
        missed = sum(one["kind_misses"] for one in stats("sums"))
        ask(some(64), model="sums", at_once=16)
        each = stats("sums")
        held = [set(one["kinds"]) for one in each]
        alone = len(held) == 2 and len(held[0] | held[1]) == 8 and not held[0] & held[1]
        # The router hears of what a replica holds some time later: it knows when all of a round went to who holds it.
        return alone and sum(one["kind_misses"] for one in each) == missed

    until(settle, "each kind of requests is held by one replica, and sent there")
    before = stats("sums")
    given = some(800)
    found = ask(given, model="sums", at_once=16)
    module = nets.Sums()
    for x, (answer, _) in zip(given, found, strict=True):
        sums, check = module(x)
        assert torch.equal(answer["output_1"], check)
        assert torch.allclose(answer["output_0"], sums, atol=1e-3)
    after = stats("sums")

    def counted(name: str) -> list[int]:
        first = {one["pid"]: one for one in before}
        return [one[name] - first[one["pid"]][name] for one in after]

    hits, misses = counted("kind_hits"), counted("kind_misses")
    with capsys.disabled():
        print(f"\n8 buckets on 2 replicas: {hits} hits, {misses} misses, {counted('captures')} captures")
    assert sum(hits) + sum(misses) == 800
    assert sum(hits) / 800 > 0.95
    assert all(hits), "one replica answers everything"
    batches = [sum(one["batches"].values()) for one in after]
    assert sum(counted("graph_hits")) / (sum(batches) - sum(sum(one["batches"].values()) for one in before)) > 0.95


def test_a_killed_replica_loses_no_request(ask, capsys):
    retried, deaths, answered = front()["retried"], 0, 0

    def kill() -> int:
        # After a question that takes as long as it takes: right after an answer, a replica has just given all it had.
        victim: int = stats()[0]["pid"]
        os.kill(victim, signal.SIGKILL)
        return victim

    # Until one died over requests that it had taken; those that it had not, Ray gives to another one by itself.
    with ThreadPoolExecutor(1) as beside:
        while (again := front()["retried"] - retried) == 0:
            assert deaths < 8, "no replica had a request when it was killed"
            deaths += 1
            killing: list[Any] = []

            def meanwhile(done: int, killing: list[Any] = killing) -> None:
                if done == 50:
                    killing.append(beside.submit(kill))

            given = requests(300, start=3000, seed=deaths)
            assert wrong(given, ask(given, meanwhile=meanwhile)) == {}
            answered += len(given)
            victim = killing[0].result(60)

            def back(victim: int = victim) -> bool:
                found = {one["pid"] for one in stats()}
                return len(found) == 2 and victim not in found

            until(back, "Ray has replaced the replica")
    with capsys.disabled():
        print(f"\n{deaths} replicas killed under load: {answered} answers, {again} requests were asked again")


def test_a_model_is_reloaded_under_load(ask, capsys):
    from graphcache.serving.deployment import reload

    given = requests(share(900, 300), start=5000, seed=4)
    with ThreadPoolExecutor(1) as beside:
        reloading: Any = None

        def meanwhile(done: int) -> None:
            nonlocal reloading
            if done == 100:
                reloading = beside.submit(reload, "checked", nets.second)

        found = ask(given, meanwhile=meanwhile, at_once=16)
        assert wrong(given, found, 1.0, 2.0) == {}
        assert sorted(set(reloading.result(timeout=60))) == [2]
    versions = Counter(float(answer["version"].flatten()[0]) for answer, _ in found)
    with capsys.disabled():
        print(f"\na reload under load: {len(found)} answers, by version {dict(versions)}")
    after = requests(50, start=6000, seed=5)
    assert wrong(after, ask(after), 2.0) == {}
    assert {one["version"] for one in stats()} == {2}
    # What cannot be loaded changes nothing.
    with pytest.raises(ServingError, match="raised OSError: no such weights"):
        reload("checked", nets.broken)
    assert wrong(after, ask(after), 2.0) == {}
    assert set(reload("checked", nets.first)) == {3}
    assert wrong(after, ask(after), 1.0) == {}


def test_bad_requests_fail_alone(ask, cluster):
    before = sum(one["failed"] for one in stats())
    good = requests(60, start=7000, seed=6)
    bad = [torch.zeros(1, nets.WIDTH + 1), torch.zeros(9, nets.WIDTH), torch.zeros(0, nets.WIDTH)]
    given = [x for index, each in enumerate(good) for x in ([each, bad[index % 3]] if index % 2 else [each])]
    found = ask(given)
    right = [(x, each) for x, each in zip(given, found, strict=True) if not any(x is other for other in bad)]
    assert len(right) == 60
    assert wrong([x for x, _ in right], [each for _, each in right]) == {}
    refused = [answer for x, (answer, _) in zip(given, found, strict=True) if any(x is other for other in bad)]
    assert len(refused) == 30
    assert all(isinstance(each, Exception) and each.status() == "400" for each in refused), Counter(map(repr, refused))
    # They were refused before any of them reached a batch.
    assert sum(one["failed"] for one in stats()) == before
    status, _ = posted(cluster, b'{"inputs": [', path="/v2/models/checked/infer")
    assert status == 400
    status, _ = posted(cluster, json.dumps({"inputs": [{"name": "x" * 2**16}]}).encode())
    assert status == 413
    status, _ = posted(cluster, b"{}", path="/v2/models/nobody/infer")
    assert status == 404


def test_a_slow_client_holds_nobody_up(ask, cluster):
    with socket.create_connection(("127.0.0.1", cluster), timeout=60) as slow:
        slow.sendall(b"POST /v2/models/checked/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        given = requests(100, start=8000, seed=7)
        assert wrong(given, ask(given)) == {}
        # It is told that its time is over, or is cut off.
        answer = slow.recv(4096)
        assert not answer or b" 408 " in answer.splitlines()[0], answer


@pytest.mark.usefixtures("cluster")
def test_bfloat16_goes_there_and_back():
    from ray import serve

    from graphcache.serving.transport import pack, unpack

    x = torch.tensor([[1.5, -2.0, 3.25], [0.0, 1e30, -1.0]], dtype=torch.bfloat16)
    handle = serve.get_app_handle("small")
    found = unpack(handle.infer.remote("half", pack({"x": x})).result(timeout_s=60))
    assert found["output_0"].dtype is torch.bfloat16
    assert torch.equal(found["output_0"], x * 2 + 1)


@pytest.mark.usefixtures("cluster")
def test_errors_keep_their_types_and_a_bad_value_fails_alone():
    from ray import serve

    from graphcache.serving.transport import pack, told, unpack

    handle = serve.get_app_handle("small")

    def outcome(name: str, **inputs: torch.Tensor) -> Any:
        try:
            return unpack(handle.infer.remote(name, pack(inputs)).result(timeout_s=60))
        except Exception as error:
            return told(error)

    assert isinstance(outcome("nobody", ids=torch.zeros(1)), UnknownModelError)
    assert isinstance(outcome("lookup", ids=torch.zeros(1, 1)), InputDtypeError)
    assert isinstance(outcome("lookup", ids=torch.zeros(9, 1, dtype=torch.int64)), ProfileRangeError)
    before = stats("lookup", "small")[0]
    start = threading.Barrier(8)

    def one(index: int) -> Any:
        start.wait()
        return outcome("lookup", ids=torch.tensor([[99 if index == 3 else index]]))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(8)))
    for index, answer in enumerate(found):
        if index == 3:
            assert isinstance(answer, ServingError)
            assert "IndexError" in str(answer)
        else:
            assert answer["ids"].tolist() == [[index]]
    after = stats("lookup", "small")[0]
    assert after["failed"] - before["failed"] == 1
    assert after["apart"] > before["apart"], "the bad one was in nobody's batch"


@pytest.mark.usefixtures("cluster")
def test_a_model_that_cannot_be_made_is_told_by_what_it_raised():
    from ray import serve

    from graphcache.serving.deployment import deployment
    from graphcache.serving.server import drain, run

    application = deployment(nets.broken, num_gpus=0, num_cpus=0, prepare=[{"x": (1, 4)}])
    with pytest.raises(
        ServingError, match=r"^ServingError: .* raised OSError: no such weights; expected an nn\.Module"
    ):
        run(application, name="broken", route_prefix="/broken")
    serve.delete("broken")
    with pytest.raises(ServingError, match="Ray Serve runs no application 'broken' here"):
        drain("broken")


def posted(port: int, body: bytes, *, path: str = "/v2/models/checked/infer") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()
