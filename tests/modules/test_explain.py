"""What is said of calls: outcome, reason, the nearest graph, costs, and nothing is changed by saying it."""

import json
import logging
import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphcache
from graphcache import Buckets, Reason
from graphcache.config import graphs_off
from graphcache.errors import ClosedError, ConfigError
from graphcache.modules.explain import Costs, explain
from tests.helpers import Fn, dispatcher_of, frozen, mlp, outcomes


def ids(module, length):
    return module(torch.zeros(1, length))


def tokens(**options):
    class Tokens(nn.Module):
        def forward(self, input_ids, scale=1.0):
            return input_ids * scale

    return graphcache.wrap(Tokens(), **options)


def only(explanation):
    [found] = explanation.calls
    return found


def test_the_next_call_of_a_new_length_is_told_with_what_differs():
    fast = tokens()
    ids(fast, 64)
    ids(fast, 77)
    found = only(fast.explain(torch.zeros(1, 78)))
    assert (found.outcome, found.cause, found.calls) == ("capture", None, 0)
    assert found.differs == ("`input_ids` dim 1: 77 → 78",)
    assert "the nearest with a graph is input_ids: float32[1, 77]; `input_ids` dim 1: 77 → 78" in str(found)
    assert only(fast.explain(torch.zeros(1, 77), scale=2)).differs == ("`scale`: absent → 2",)


def test_a_hit_is_told_with_its_costs_and_makes_no_call():
    fast = tokens()
    for _ in range(3):
        ids(fast, 8)
    before = fast.cache_info()
    found = only(fast.explain(torch.zeros(1, 8)))
    assert fast.cache_info() == before
    assert (found.outcome, found.hits, found.calls) == ("hit", 2, 3)
    assert found.nbytes > 0
    assert (found.costs.eager, found.costs.replay, found.costs.break_even) == (None, None, None)
    assert found.costs.capture > 0
    assert torch.equal(fast(torch.ones(1, 8)), torch.ones(1, 8))


def test_it_does_not_run_the_module():
    ran = []
    fast = graphcache.wrap(Fn(lambda m, x: ran.append(1) or x * 2), ignore=["self.function.ran"])
    fast(torch.ones(3))
    before = len(ran)
    for _ in range(2):
        fast.explain()
        fast.explain(torch.ones(3))
        fast.explain(torch.ones(4))
    assert len(ran) == before


def test_costs_are_those_that_calls_and_captures_have_taken():
    fast = tokens(capture="worthwhile")
    for _ in range(4):
        ids(fast, 8)
    [key] = dispatcher_of(fast).captures.keys.known()
    known = dispatcher_of(fast).captures.keys.states[key]
    costs = only(fast.explain(torch.zeros(1, 8))).costs
    assert (costs.eager, costs.replay, costs.capture) == (known.eager.known, known.replay.known, known.capture.known)
    assert costs.eager > 0


def test_all_calls_those_with_graphs_first():
    fast = tokens(max_graphs=1)
    for length in (4, 5, 5, 5):
        ids(fast, length)
    explanation = fast.explain()
    assert [(each.outcome, each.hits, each.calls) for each in explanation.calls] == [("hit", 2, 3), ("capture", 0, 1)]
    assert explanation.calls[1].note == "it had a graph, which was evicted"
    said = str(explanation)
    assert said.startswith("Tokens: 2 hits, 2 captures, 0 eager calls; 1 graphs, ")
    assert "input_ids: float32[1, 5], grad mode on: replays (2 so far)" in said


def test_many_signatures_are_cut_in_the_text_alone():
    fast = tokens(max_graphs=64)
    for length in range(1, 31):
        ids(fast, length)
    explanation = fast.explain()
    assert len(explanation.calls) == len(explanation.tree()["calls"]) == 30
    assert str(explanation).endswith("and 10 more signatures")


def refused(reason):
    return {
        Reason.DATA_DEPENDENT: lambda m, x: x[x > 0],
        Reason.HOST_READ: lambda m, x: x * x.sum().item(),
        Reason.RANDOM: lambda m, x: x + torch.rand(3),
        Reason.MUTATES: lambda m, x: (setattr(m, "calls", getattr(m, "calls", 0) + 1), x + 1)[1],
    }[reason]


@pytest.mark.parametrize("reason", [Reason.DATA_DEPENDENT, Reason.HOST_READ, Reason.RANDOM, Reason.MUTATES])
def test_what_was_refused_is_told_with_its_reason_and_remedy(reason):
    fast = graphcache.wrap(Fn(refused(reason)))
    fast(torch.ones(3))
    for explanation in (fast.explain(), fast.explain(torch.ones(3))):
        found = only(explanation)
        assert (found.outcome, found.cause.reason, found.nearest) == ("eager", reason, "")
        assert reason.remedy in str(explanation)
    tree = json.loads(json.dumps(fast.explain().tree()))
    assert (tree["calls"][0]["reason"], tree["eager"]) == (reason.value, {reason.value: 1})


def test_looking_does_not_bring_another_try_nearer():
    fast = graphcache.wrap(Fn(refused(Reason.MUTATES)))
    fast(torch.ones(3))
    assert only(fast.explain(torch.ones(3))).note == "it is looked at again at its next call"
    fast(torch.ones(3))
    for _ in range(50):
        assert only(fast.explain(torch.ones(3))).note == "another capture is tried after 2 calls"
    fast(torch.ones(3))
    assert only(fast.explain()).note == "another capture is tried after 1 call"


def test_after_a_change_of_the_module_what_is_known_of_a_call_is_of_the_past():
    fast = graphcache.wrap(Fn(lambda m, x: x[x > 0] if m.selects else x * 2, selects=False))
    x = torch.ones(3)
    fast(x)
    assert only(fast.explain(x)).outcome == "hit"
    fast.module.selects = True
    for explanation in (fast.explain(x), fast.explain()):
        found = only(explanation)
        assert (found.outcome, found.cause, found.nearest) == ("capture", None, "")
        assert found.note == "the module has changed since its graph was captured"
    fast(x)
    assert (only(fast.explain(x)).cause.reason, only(fast.explain(x)).note) == (Reason.DATA_DEPENDENT, "")
    fast.module.selects = False
    found = only(fast.explain(x))
    assert (found.cause.reason, found.note) == (Reason.DATA_DEPENDENT, "it is looked at again at its next call")
    fast(x)
    assert only(fast.explain(x)).outcome == "hit"


@pytest.mark.parametrize(("capture", "reason"), [("worthwhile", Reason.COLD), ("prepared", Reason.NOT_PREPARED)])
def test_what_the_policy_leaves_eager(capture, reason):
    fast = tokens(capture=capture)
    ids(fast, 8)
    found = only(fast.explain())
    assert (found.outcome, found.cause.reason) == ("eager", reason)
    assert found.costs.eager is not None


def test_modes_of_this_moment():
    fast = graphcache.wrap(nn.Linear(2, 2))
    assert only(fast.explain(torch.zeros(1, 2))).cause.reason is Reason.GRAD
    with torch.no_grad():
        assert only(fast.explain(torch.zeros(1, 2))).outcome == "capture"
        with graphs_off():
            assert only(fast.explain(torch.zeros(1, 2))).cause.reason is Reason.DISABLED


def test_a_call_between_buckets():
    fast = graphcache.wrap(mlp(), buckets=Buckets({"input": {0: [4, 8]}}))
    with torch.no_grad():
        assert only(fast.explain(torch.zeros(3, 4))).note == "it is padded: `input` dim 0: 3 → 4"
        fast(torch.zeros(3, 4))
        found = only(fast.explain(torch.zeros(2, 4)))
    assert (found.call, found.outcome) == ("input: float32[2, 4]", "hit")


def test_parts_have_their_own():
    inner = frozen(nn.Linear(2, 2))
    fast = graphcache.wrap(Fn(lambda m, x: m.inner(x)[x[:, 0] > 0], inner=inner), include=["inner"])
    with torch.no_grad():
        fast(torch.ones(3, 2))
        fast(torch.ones(3, 2))
        explanation = fast.explain()
    assert only(explanation).cause.reason is Reason.DATA_DEPENDENT
    [part] = explanation.parts
    assert (part.module, only(part).outcome) == ("inner", "hit")
    parted = graphcache.wrap(Fn(lambda m, x: m.inner(x), inner=inner), include=["inner"], strategy="per_submodule")
    with torch.no_grad():
        parted(torch.ones(3, 2))
        assert only(parted.explain(torch.ones(3, 2))).note == "its parts are captured one by one"


def test_what_no_signature_describes():
    found = only(tokens().explain(object()))
    assert (found.outcome, found.cause.reason) == ("eager", Reason.ARGUMENT)


@pytest.mark.parametrize("what", [nn.ReLU(), None, 3, "module"])
def test_what_is_not_wrapped_is_refused(what):
    with pytest.raises(ConfigError, match=r"expected a wrapped module, got .*wrap it with graphcache\.wrap"):
        explain(what)


def test_a_closed_module_is_refused():
    fast = tokens()
    fast.close()
    with pytest.raises(ClosedError, match="was closed"):
        fast.explain()


@given(st.lists(st.one_of(st.integers(), st.floats(), st.text(), st.none(), st.just(torch.zeros(2))), max_size=3))
def test_odd_arguments_are_explained_and_change_nothing(args):
    fast = graphcache.wrap(Fn(lambda m, *values: values))
    explanation = fast.explain(*args)
    assert isinstance(str(explanation), str)
    json.dumps(explanation.tree(), allow_nan=False)
    assert outcomes(fast) == (0, 0, {})


@pytest.mark.parametrize(
    ("costs", "calls", "said"),
    [
        (Costs(), None, ""),
        (Costs(capture=5e-3), None, "capture 5 ms"),
        (Costs(180e-6, 50e-6, 5e-3), 39, "eager 180 µs, replay 50 µs, capture 5 ms: paid for after 39 replays"),
        (Costs(1e-6, 2e-6, 1.0), math.inf, "eager 1 µs, replay 2 µs, capture 1 s: a replay saves nothing"),
    ],
)
def test_costs(costs, calls, said):
    assert costs.break_even == calls
    assert str(costs) == said


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if "calls that were new" in record.getMessage()]


def test_sizes_that_are_new_at_each_call_are_warned_of_once(caplog):
    caplog.set_level(logging.WARNING, logger="graphcache")
    fast = tokens()
    for length in range(1, 32):
        ids(fast, length)
    assert warnings_of(caplog) == []
    for length in range(32, 99):
        ids(fast, length)
    [said] = warnings_of(caplog)
    assert said.startswith("Tokens: 32 of the last 32 captures were of calls that were new, ")
    assert "`input_ids` dim 1 had 32 values (1, 2, 3, 4, …)" in said
    assert "buckets={'input_ids': {1: [1, …]}}" in said
    assert said.endswith("(Said once.)")


def test_a_number_that_is_new_at_each_call_is_named(caplog):
    class Step(nn.Module):
        def forward(self, x, step):
            return x * (1.0 - step / 1000)

    fast = graphcache.wrap(Step())
    for step in range(99):
        fast(torch.ones(2), step)
    [said] = warnings_of(caplog)
    assert "`step` had 32 values (0, 1, 2, 3, …)" in said
    assert "pass `step` as a tensor" in said


@pytest.mark.parametrize("how", ["prepared", "buckets", "off", "worthwhile", "hits"])
def test_sizes_that_are_provided_for_are_not_warned_of(caplog, how):
    caplog.set_level(logging.WARNING, logger="graphcache")
    options = {"buckets": {"buckets": {"input_ids": {1: [16, 64]}}}, "worthwhile": {"capture": "worthwhile"}}
    fast = tokens(**options.get(how, {}))
    if how == "prepared":
        fast.prepare(*[(torch.zeros(1, length),) for length in range(1, 60)], progress=False)
    with graphs_off() if how == "off" else nullcontext():
        for length in range(1, 60):
            for _ in range(3 if how == "hits" else 1):
                ids(fast, length)
    assert warnings_of(caplog) == []
