"""Modules that answer in this process, each in a thread of its own."""

import asyncio
import threading

import pytest
import torch
from torch import nn

import graphcache
from graphcache.errors import (
    ConfigError,
    InputError,
    ServingError,
    UnavailableError,
    UnknownModelError,
)
from graphcache.serving.local import LocalBackend, spec_of
from tests.engines import fake_tensorrt
from tests.helpers import Fn
from tests.serving.models import POLICY, policy, spec
from tests.standins import engines

ONE = spec("one", {"x": ("float32", (-1,))}, {"y": ("float32", (-1,))})
X = torch.tensor([-1.0, 2.0])


def backend(module, described=ONE):
    return LocalBackend({"one": module}, specs={"one": described})


def infer(found, name="one", version=None, **inputs):
    return asyncio.run(found.infer(name, version, inputs))


class Slow(nn.Module):
    """Gives back what it gets, once it may."""

    def __init__(self):
        super().__init__()
        self.begun, self.go = threading.Event(), threading.Event()
        self.sizes, self.threads = [], []

    def forward(self, x):
        self.sizes.append(x.numel())
        self.threads.append(threading.current_thread())
        self.begun.set()
        assert self.go.wait(20)
        return x

    async def first_of(self, found, x=X):
        """A request that it is answering."""
        first = asyncio.ensure_future(found.infer("one", None, {"x": x}))
        assert await asyncio.to_thread(self.begun.wait, 20)
        return first


def test_answers_are_those_of_the_module():
    module = policy()
    with LocalBackend({"policy": graphcache.wrap(module)}, specs={"policy": POLICY}) as found:
        found.prepare("policy", *[(torch.zeros(batch, 4),) for batch in (1, 3)])
        for batch in (1, 3, 1, 2):
            x = torch.randn(batch, 4)
            answer = infer(found, "policy", x=x)
            action, best = module(x)
            assert torch.equal(answer["action"], action)
            assert torch.equal(answer["best"], best)
        info = found._model("policy", None).module.cache_info()
        assert (info.hits, info.captures) == (3, 3)


def test_nothing_is_ready_before_it_is_prepared():
    with backend(nn.ReLU()) as found:
        assert not asyncio.run(found.is_ready("one"))
        with pytest.raises(UnavailableError, match="one is being prepared; ask again later"):
            infer(found, x=X)
        found.prepare()
        assert asyncio.run(found.is_ready("one", "1"))
        assert infer(found, x=X)["y"].tolist() == [0, 2]


def test_a_model_whose_preparation_fails_is_not_ready():
    with backend(graphcache.wrap(nn.ReLU())) as found:
        with pytest.raises(ConfigError):
            found.prepare("one", 7)
        assert not asyncio.run(found.is_ready("one"))


def test_the_loop_does_not_wait_for_a_model():
    slow = Slow()

    async def run(found):
        first = await slow.first_of(found)
        other = await found.infer("two", None, {"x": X})
        assert not first.done()
        slow.go.set()
        return await first, other

    two = spec("two", {"x": ("float32", (-1,))}, {"y": ("float32", (-1,))})
    with LocalBackend({"one": slow, "two": nn.ReLU()}, specs={"one": ONE, "two": two}) as found:
        found.prepare()
        first, other = asyncio.run(run(found))
    assert (first["y"].tolist(), other["y"].tolist()) == ([-1, 2], [0, 2])
    assert slow.threads[0] is not threading.current_thread()


def test_what_was_given_up_before_it_began_is_not_run():
    slow = Slow()

    async def run(found):
        first = await slow.first_of(found, torch.zeros(1))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(found.infer("one", None, {"x": torch.zeros(2)}), 0.01)
        slow.go.set()
        await first
        await found.infer("one", None, {"x": torch.zeros(3)})

    with backend(slow) as found:
        found.prepare()
        asyncio.run(run(found))
    assert slow.sizes == [1, 3]


def test_an_answer_stays_as_it_is():
    with backend(graphcache.wrap(nn.ReLU())) as found:
        found.prepare()
        answers = [infer(found, x=torch.full((2,), float(value)))["y"] for value in range(5)]
    assert [each.tolist() for each in answers] == [[value] * 2 for value in range(5)]


def test_a_module_that_gives_its_own_memory_again_and_again():
    memory = torch.zeros(2)
    with backend(Fn(lambda module, x: memory.copy_(x))) as found:
        found.prepare()
        first = infer(found, x=X)["y"]
        infer(found, x=X + 1)
    assert first.tolist() == X.tolist()


@pytest.mark.parametrize("answer", [lambda x: {"b": x + 1, "a": x}, lambda x: (x, x + 1), lambda x: [x, x + 1]])
def test_answers_in_every_form(answer):
    described = spec("one", {"x": ("float32", (-1,))}, {"a": ("float32", (-1,)), "b": ("float32", (-1,))})
    with backend(Fn(lambda module, x: answer(x)), described) as found:
        found.prepare()
        result = infer(found, x=X)
    assert [(name, each.tolist()) for name, each in result.items()] == [("a", [-1, 2]), ("b", [0, 3])]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: (x, x), "one gave another number of outputs than its spec has, y"),
        (lambda x: {"z": x}, "one gave another number of outputs than its spec has, y"),
        (lambda x: None, "one gave an output y of type NoneType, no tensor"),
    ],
)
def test_answers_that_are_not_what_the_spec_says(answer, message):
    with backend(Fn(lambda module, x: answer(x))) as found:
        found.prepare()
        with pytest.raises(ServingError, match=message):
            infer(found, x=X)


def test_inputs_that_the_model_does_not_have():
    with backend(nn.ReLU()) as found:
        found.prepare()
        for inputs in ({}, {"z": X}, {"x": X, "z": X}):
            with pytest.raises(InputError, match="one takes x; it was given"):
                infer(found, **inputs)


def test_names_and_versions():
    with backend(nn.ReLU()) as found:
        assert found.names() == ["one"]
        assert asyncio.run(found.describe("one")) is ONE
        for ask in (found.is_ready, found.describe):
            with pytest.raises(UnknownModelError, match="there is no model 'two'; the models are one"):
                asyncio.run(ask("two"))
            with pytest.raises(UnknownModelError, match="one has no version '2'; its versions are 1"):
                asyncio.run(ask("one", "2"))
        with pytest.raises(UnknownModelError):
            infer(found, "two", x=X)
        with pytest.raises(UnknownModelError):
            found.prepare("two")


def test_after_the_end():
    found = backend(nn.ReLU())
    found.prepare()
    found.close()
    found.close()
    assert not asyncio.run(found.is_ready("one"))
    with pytest.raises(UnavailableError):
        infer(found, x=X)
    with pytest.raises(UnavailableError, match="one is being shut down"):
        found.prepare()


def test_what_waits_at_the_end_is_refused_and_what_runs_is_answered():
    slow = Slow()

    async def run(found):
        first = await slow.first_of(found)
        second = asyncio.ensure_future(found.infer("one", None, {"x": X}))
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(asyncio.to_thread(found.close))
        with pytest.raises(UnavailableError, match="one was shut down before the request had its turn"):
            await second
        slow.go.set()
        await closing
        return await first

    found = backend(slow)
    found.prepare()
    assert asyncio.run(run(found))["y"].tolist() == [-1, 2]


def test_an_engine_describes_itself(monkeypatch):
    with engines(monkeypatch, streams=False):
        engine = graphcache.EngineModule(fake_tensorrt.serialize("affine"), name="affine")
        with LocalBackend({"affine": engine}) as found:
            found.prepare()
            described = asyncio.run(found.describe("affine"))
            assert described == spec_of("affine", engine) == spec_of("affine", graphcache.wrap(engine))
            assert described.platform == "tensorrt"
            inputs = {
                each.name: torch.ones([2 if size < 0 else size for size in each.shape]) for each in described.inputs
            }
            answer = infer(found, "affine", **inputs)
            expected = engine(*inputs.values())
            assert torch.equal(answer[described.outputs[0].name], expected)


@pytest.mark.parametrize(
    ("models", "specs", "message"),
    [
        ({"one": nn.ReLU()}, {}, "one is a ReLU, whose inputs and outputs are not known; give its ModelSpec"),
        ({"one": torch.relu}, {"one": ONE}, "one is of type builtin_function_or_method; expected an nn.Module"),
        ({}, {"one": ONE}, "specs names 'one', which is no model"),
        ({"one": nn.ReLU()}, {"one": spec("one", {}, {}, ("1", "2"))}, "the spec of one has 2 versions; expected one"),
    ],
)
def test_models_that_cannot_be_served(models, specs, message):
    with pytest.raises(ConfigError, match=message):
        LocalBackend(models, specs=specs)


def test_calls_are_for_wrapped_modules():
    with backend(nn.ReLU()) as found, pytest.raises(ConfigError, match="one is not wrapped"):
        found.prepare("one", (X,))
