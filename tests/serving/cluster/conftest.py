"""One Ray on this machine for all tests here, on the loopback, with a folder of its own that is gone afterwards."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from graphcache import Axis
from tests.shared import alone

# Not imported: Ray reads variables then, which are set where it is started.
if importlib.util.find_spec("ray") is None:
    pytest.skip("the extra ray is not installed", allow_module_level=True)
pytest.importorskip("tritonclient.http.aio")

ROOT = Path(__file__).parents[3]
DEADLINE_S = 60.0


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def path() -> str:
    """Where other processes find what is tested, and these tests."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(scope="module")
def cluster(one_ray: None) -> Iterator[int]:
    """Serve with two applications, and the port on which it listens."""
    from graphcache.serving.deployment import deployment
    from graphcache.serving.limits import Limits
    from graphcache.serving.server import ray_here, run
    from graphcache.serving.settings import Settings
    from tests.serving import nets

    checked = Settings(nets.first, name="checked", rows=[1, 2, 4, 8], prepare=({"x": torch.zeros(1, nets.WIDTH)},))
    # Room for half of the eight buckets in each replica: they all fit only where each has its own.
    sums = Settings(
        nets.Sums,
        name="sums",
        rows=[1, 4, 8],
        buckets={"x": {1: Axis(nets.LENGTHS, fill=0)}},
        prepare=({"x": torch.zeros(1, 4)},),
        max_kinds=4,
    )
    half = Settings(nets.Half, name="half", rows=[1, 4], prepare=({"x": torch.zeros(1, 3).bfloat16()},))
    lookup = Settings(
        nets.Lookup, name="lookup", rows=[1, 4, 8], prepare=({"ids": torch.zeros(1, 1, dtype=torch.int64)},)
    )
    port = free_port()
    with ray_here(port=port, num_cpus=8, env={"PYTHONPATH": path(), "GRAPHCACHE_NATIVE": "0"}):
        application = deployment(
            {each.name: each for each in (checked, sums)},
            num_replicas=2,
            num_gpus=0,
            # So long that there are always some in a replica.
            batch_wait_timeout_s=0.03,
            limits=Limits(max_request_bytes=2**16, body_seconds=5.0),
        )
        run(application)
        small = deployment({each.name: each for each in (half, lookup)}, num_gpus=0, batch_wait_timeout_s=0.05)
        run(small, name="small", route_prefix="/small")
        yield port


@pytest.fixture
def ask(cluster: int) -> Callable[..., Any]:
    """Makes many requests over HTTP, some at once, with Triton's own client."""
    return lambda requests, **options: asyncio.run(asked(cluster, requests, **options))


async def asked(
    port: int,
    requests: Any,
    *,
    model: str = "checked",
    at_once: int = 32,
    meanwhile: Callable[[int], Any] | None = None,
) -> list[tuple[Any, float]]:
    """Send requests, and give for each its answer (or what was raised) and how long it took, in seconds.

    Args:
        port: Of the server.
        requests: One tensor ``x`` each.
        model: Whom to ask.
        at_once: How many are under way.
        meanwhile: Is told how many are answered, after each of them.
    """
    import tritonclient.http.aio as triton
    from tritonclient.utils import InferenceServerException

    found: list[Any] = [None] * len(requests)
    left = iter(range(len(requests)))
    done = 0
    async with triton.InferenceServerClient(f"127.0.0.1:{port}", conn_limit=at_once) as client:

        async def work() -> None:
            nonlocal done
            for place in left:
                given = triton.InferInput("x", list(requests[place].shape), "FP32")
                given.set_data_from_numpy(requests[place].numpy())
                start = time.perf_counter()
                try:
                    answer = await client.infer(model, [given])
                    outputs = {each["name"]: answer.as_numpy(each["name"]) for each in answer.get_response()["outputs"]}
                    outputs = {name: torch.from_numpy(value.copy()) for name, value in outputs.items()}
                except InferenceServerException as error:
                    outputs = error
                found[place] = outputs, time.perf_counter() - start
                done += 1
                if meanwhile is not None:
                    meanwhile(done)

        await asyncio.gather(*(work() for _ in range(at_once)))
    return found


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for a condition, as long as it may take; what it asks Ray for takes a while by itself."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} has not come true within {DEADLINE_S} s"
    return found


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """No two files start Ray at once: each takes all cores."""
    with alone("ray"):
        yield
