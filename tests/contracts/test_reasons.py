"""Every ``Reason`` has a sentence and a remedy, and ``explain`` tells both of a call that ran eagerly for it."""

import random
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import graphcache
from graphcache import Reason, runtime
from tests.helpers import Fn, mlp

X = torch.linspace(-1, 1, 8).reshape(2, 4)
SCALES = [2.0]


def scaled(x):
    return x * SCALES[0]


def of(function, **options):
    """A wrapped module of a function of its input."""
    return graphcache.wrap(Fn(lambda _, x: function(x)), **options), X


def counting(self, x):
    self.calls += 1
    return x + 1


def streaming(load, numbers):
    engine = load("streaming")
    engine.set_device_memory_budget(0)
    return graphcache.wrap(engine), numbers(1.0)


def profiled(load, rows):
    engine = load("affine")
    engine.enable_profiling()
    return graphcache.wrap(engine), rows(2)


def unsteady():
    runs = []
    module = Fn(lambda _, x: (runs.append(1), x + len(runs))[1])
    return graphcache.wrap(module, ignore=["self.function.runs"]), X


def failing(error):
    """A module that fails in the thread that captures, and in no other."""

    caller = threading.local()
    caller.here = True

    def forward(_, x):
        if not hasattr(caller, "here"):
            raise error
        return x + 1

    fast = graphcache.wrap(Fn(forward), capture_in="background", ignore=["self.function.caller"])
    end = time.monotonic() + 60
    while set(fast.cache_info().eager) <= {Reason.PENDING}:
        fast(X)
        assert time.monotonic() < end
    return fast, X


CALLS = {
    Reason.OUTPUT_ALLOCATOR: lambda at: (
        graphcache.wrap(at.load("positive", requires_output_allocator=True)),
        at.numbers(1.0),
    ),
    Reason.DATA_DEPENDENT: lambda at: of(lambda x: x.nonzero()),
    Reason.HOST_READ: lambda at: of(lambda x: x * x.sum().item()),
    Reason.NOT_CAPTURABLE: lambda at: (graphcache.wrap(at.load("conditional")), at.numbers(1.0)),
    Reason.CAPTURE_FAILED: lambda at: failing(ValueError("not here")),
    Reason.EMPTY_GRAPH: lambda at: of(lambda x: x),
    Reason.NONDETERMINISTIC: lambda at: unsteady(),
    Reason.RANDOM: lambda at: of(lambda x: x + random.random()),
    Reason.MUTATES: lambda at: (graphcache.wrap(Fn(counting, calls=0)), X),
    Reason.UNOBSERVED: lambda at: (graphcache.wrap(Fn(lambda _, x: x * 2, source=random.SystemRandom())), X),
    Reason.UNSETTLED: lambda at: of(lambda x: globals()["".join(["sca", "led"])](x)),
    Reason.ALIASES_STATE: lambda at: (graphcache.wrap(Fn(lambda self, x: self.weight[:1], weight=torch.ones(2))), X),
    Reason.GRAD: lambda at: (graphcache.wrap(nn.Linear(4, 4)), X),
    Reason.ARGUMENT: lambda at: (graphcache.wrap(Fn(lambda _, x: torch.ones(2))), object()),
    Reason.NEW_STATE: lambda at: (graphcache.wrap(Fn(lambda _, x: torch.ones(2))), type("Cache", (), {})()),
    Reason.OUTPUT: lambda at: of(lambda x: object()),
    Reason.WEIGHT_STREAMING: lambda at: streaming(at.load, at.numbers),
    Reason.PROFILING: lambda at: profiled(at.load, at.rows),
    Reason.COLD: lambda at: (graphcache.wrap(mlp(), capture="worthwhile"), X),
    Reason.PENDING: lambda at: (graphcache.wrap(mlp(), capture_in="background"), X),
    Reason.NOT_PREPARED: lambda at: (graphcache.wrap(mlp(), capture="prepared"), X),
    Reason.PADDING: lambda at: (graphcache.wrap(Fn(lambda _, x: x - x.mean()), buckets={0: {0: [4]}}), X),
    Reason.OVER_BUDGET: lambda at: (graphcache.wrap(mlp(), max_bytes=1), X),
    Reason.OUT_OF_MEMORY: lambda at: failing(torch.OutOfMemoryError("none left")),
}
"""By reason, a wrapped module and an argument that it does not capture."""

OTHERWISE = {Reason.DISABLED, Reason.TRACING, Reason.OUTER_CAPTURE}
"""Told by tests of their own: they are of the context of the call."""

ELSEWHERE = {
    Reason.MISMATCH: "no graph here is wrong",
    Reason.NOT_WORTH_IT: "measured times decide it",
}
"""Not to be had through public names, and why."""


def test_every_reason_is_here():
    assert set(CALLS) | OTHERWISE | set(ELSEWHERE) == set(Reason)


@pytest.mark.parametrize("reason", Reason, ids=lambda each: each.value)
def test_a_reason_says_what_is_the_case_and_what_would_change_it(reason):
    assert reason.value == reason.name.lower()
    for text in (reason.sentence, reason.remedy):
        assert len(text) > 10
        assert "\n" not in text
        assert not text.endswith(".")
    assert str(graphcache.Cause(reason)) == f"{reason.value}: {reason.sentence}. To change that: {reason.remedy}."


@pytest.mark.parametrize("reason", CALLS, ids=lambda each: each.value)
def test_explain_tells_why_a_call_ran_eagerly(reason, load, rows, numbers, caplog):
    fast, argument = CALLS[reason](SimpleNamespace(load=load, rows=rows, numbers=numbers))
    fast(argument)
    assert fast.cache_info().eager.get(reason), fast.cache_info()
    told = str(fast.explain())
    assert f"{reason.value}: {reason.sentence}" in told
    assert reason.remedy in told
    fast.close()


def test_explain_tells_that_graphs_are_off_here(in_own_context):
    fast = graphcache.wrap(mlp())

    def calls():
        runtime.set_cudagraphs_mode(False)
        fast(X)
        [call] = fast.explain(X).calls
        assert call.cause.reason is Reason.DISABLED

    in_own_context(calls)
    assert Reason.DISABLED.remedy in str(fast.explain())


def test_explain_tells_of_tracers():
    fast = graphcache.wrap(Fn(lambda _, x: x.sin()))
    torch.vmap(fast)(X)
    assert Reason.TRACING.remedy in str(fast.explain())


def test_explain_tells_of_a_capture_of_the_callers(fake, load, rows):
    fast, stream = graphcache.wrap(load("affine")), fake.new_stream()
    with fake.on(stream):
        fast.module(rows(2))
        fake.driver.cuStreamBeginCapture(stream.cuda_stream, 1)
        fast(rows(2))
        fake.driver.cuStreamEndCapture(stream.cuda_stream)
    assert fast.cache_info().eager == {Reason.OUTER_CAPTURE: 1}
    assert Reason.OUTER_CAPTURE.remedy in str(fast.explain())


def test_explain_of_a_call_names_its_reason_before_and_after_it_was_made():
    fast = graphcache.wrap(Fn(lambda _, x: x * x.sum().item()))
    assert fast.explain(X).calls[0].outcome == "capture"
    fast(X)
    [call] = graphcache.explain(fast, X).calls
    assert (call.outcome, call.cause.reason) == ("eager", Reason.HOST_READ)
    assert call.tree()["remedy"] == Reason.HOST_READ.remedy
