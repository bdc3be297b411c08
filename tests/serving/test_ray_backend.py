"""What stands before the handles: routing, what is asked again, what errors become. The handles are stand-ins."""

from __future__ import annotations

import asyncio
import importlib.util
from collections import Counter

import pytest
import torch

from graphcache.errors import InputRankError, ServingError, UnavailableError, UnknownModelError
from graphcache.serving.backend import ModelSpec, TensorMetadata
from graphcache.serving.examples import with_rows
from graphcache.serving.replica import Described
from graphcache.serving.transport import pack, unpack

if importlib.util.find_spec("ray") is None:
    pytest.skip("the extra ray is not installed", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning")

SPEC = ModelSpec("net", ("1",), (TensorMetadata("x", "float32", (-1, -1)),), (), "pytorch")


class Method:
    def __init__(self, call):
        self._call = call

    def remote(self, *args):
        return self._call(*args)


class Handle:
    """A deployment of one replica, which raises what it is told to, one after another, before it answers."""

    def __init__(self, *raised, version="1"):
        self.raised = list(raised)
        self.routes = Counter()
        self.version = version
        self.described = 0
        self.gate = None

    def options(self, multiplexed_model_id):
        self.routes[multiplexed_model_id] += 1
        return self

    @property
    def describe(self):
        async def call():
            self.described += 1
            spec = ModelSpec("net", (self.version,), SPEC.inputs, (), "pytorch")
            return Described(spec, with_rows({"x": {1: [4, 8]}}, [1, 4], ["x"]))

        return Method(call)

    @property
    def infer(self):
        async def call(packed):
            if self.gate is not None:
                await self.gate.wait()
            if self.raised:
                raise self.raised.pop(0)
            return pack({"y": unpack(packed)["x"] + 1})

        return Method(call)


def backend(handle, **options):
    from graphcache.serving.ray_backend import RayBackend

    return RayBackend({"net": handle}, **options)


def ask(made, x=None, version=None, name="net"):
    inputs = {"x": torch.zeros(1, 3) if x is None else x}
    return asyncio.run(made.infer(name, version, inputs))


def died():
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


def test_requests_go_where_their_kind_is():
    handle = Handle()
    made = backend(handle)
    for length in (3, 4, 7, 2):
        assert torch.equal(ask(made, torch.zeros(2, length))["y"], torch.ones(2, length))
    # One route for each bucket, made once.
    assert handle.routes == {'[["x","float32",[4]]]': 1, '[["x","float32",[8]]]': 1}
    assert handle.described == 1


def test_a_request_whose_replica_died_is_asked_again():
    made = backend(Handle(died(), died()))
    assert ask(made)["y"].tolist() == [[1.0, 1.0, 1.0]]
    assert (made.retried, made.under_way) == (2, 0)


def test_it_is_given_up_in_the_end():
    made = backend(Handle(*[died() for _ in range(9)]), retries=2)
    with pytest.raises(UnavailableError, match="3 replicas of net died over this request"):
        ask(made)
    assert made.retried == 2


def test_errors_are_those_of_the_replica():
    from ray.exceptions import RayTaskError
    from ray.serve.exceptions import BackPressureError

    cause = InputRankError("input 'x' has 1 dimensions")
    with pytest.raises(InputRankError, match="has 1 dimensions"):
        ask(backend(Handle(RayTaskError("infer", "trace", cause))))
    with pytest.raises(ServingError, match="the model raised KeyError: 'k'"):
        ask(backend(Handle(RayTaskError("infer", "trace", KeyError("k")))))
    with pytest.raises(UnavailableError, match="net has too many requests waiting"):
        ask(backend(Handle(BackPressureError(num_queued_requests=2, max_queued_requests=1))))


def test_what_is_not_served():
    made = backend(Handle())
    with pytest.raises(UnknownModelError, match="no model 'other' is served; there are net"):
        ask(made, name="other")
    with pytest.raises(UnknownModelError, match="net has no version '7'; it has 1"):
        ask(made, version="7")
    with pytest.raises(InputRankError):
        ask(made, torch.zeros(3))


def test_a_version_that_came_since_is_found():
    handle = Handle()
    made = backend(handle)
    assert asyncio.run(made.describe("net")).versions == ("1",)
    handle.version = "2"
    assert asyncio.run(made.describe("net", "2")).versions == ("2",)
    assert asyncio.run(made.is_ready("net", "2"))
    assert list(made.names()) == ["net"]


def test_one_that_does_not_answer_is_given_up():
    handle = Handle()
    made = backend(handle, timeout_s=0.05)

    async def waits():
        await made.describe("net")
        handle.gate = asyncio.Event()
        await made.infer("net", None, {"x": torch.zeros(1, 3)})

    with pytest.raises(UnavailableError, match=r"net has not answered within 0\.05 s"):
        asyncio.run(waits())


def test_draining_waits_for_what_is_under_way_and_refuses_the_rest():
    async def drained(timeout_s, opens):
        handle = Handle()
        made = backend(handle)
        await made.describe("net")
        handle.gate = asyncio.Event()
        one = asyncio.ensure_future(made.infer("net", None, {"x": torch.zeros(1, 3)}))
        # Until it waits at the gate.
        while not made.under_way:
            await asyncio.sleep(0)
        draining = asyncio.ensure_future(made.drain(timeout_s))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="net is being shut down; ask another server"):
            await made.infer("net", None, {"x": torch.zeros(1, 3)})
        if opens:
            handle.gate.set()
        left = await draining
        handle.gate.set()
        return left, (await one)["y"].tolist()

    assert asyncio.run(drained(60, True)) == (0, [[1.0, 1.0, 1.0]])
    assert asyncio.run(drained(0.01, False)) == (1, [[1.0, 1.0, 1.0]])
