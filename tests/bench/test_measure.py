import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import measure, networks
from bench.systems.graphcache_modes import Fresh, Into, Module, Session
from tests.bench.fakes import Clock, Fake, bundle, raising, right, work


@pytest.fixture
def net(tmp_path):
    return bundle(tmp_path)


def floor_of(done):
    return [lambda: done.append("raw")]


@pytest.mark.parametrize("count", [1, 3])
def test_a_right_system_has_all_figures(net, count):
    peer, turns = Fake(misses=lambda: 7), []
    found = measure.measure(peer, work(net, count), floor_of(turns))
    assert "reason" not in found, found
    assert found["total_us"]["n"] == found["raw_total_us"]["n"] == 60
    assert len(turns) >= 60
    # What a call and a launch take of the processor comes from as many bursts of each, in turn.
    assert found["cpu_burst_us"]["n"] == found["raw_cpu_burst_us"]["n"] >= measure.FEWEST_BURSTS
    assert found["total_over_raw"] == pytest.approx(
        found["total_us"]["p50"] / max(found["raw_total_us"]["p50"], 1e-3), abs=1e-3
    )
    assert found["steady_seconds"] >= found["first_answer_seconds"] >= 0
    assert found["largest_relative_error"] < 1e-6
    assert (found["misses_while_timed"], found["memory_per_shape"]) == (0, None)
    assert peer.sizes == ([2] if count == 1 else [1, 5, 8])
    assert peer.log == ["load fake", "close fake"]
    json.dumps(found, allow_nan=False)


def test_the_floor_is_left_open_and_takes_turns_with_nobody(net):
    peer = Fake()
    found = measure.measure(peer, work(net))
    assert found["total_over_raw"] == 1.0
    assert peer.log == ["load fake"]


def test_a_floor_that_fails_is_closed(net):
    peer = Fake(function=raising(RuntimeError("no")))
    assert measure.measure(peer, work(net))["reason"] == "RuntimeError: no"
    assert peer.log == ["load fake", "close fake"]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: right(x) * 1.01,
        lambda x: right(x) * float("nan"),
        lambda x: right(x)[:, :2],
        lambda x: right(x).roll(1, 0) + 1,
    ],
    ids=["a little off", "nan", "misshapen", "other rows"],
)
def test_wrong_answers_are_never_timed(net, wrong):
    turns = []
    found = measure.measure(Fake(function=wrong), work(net, 2), floor_of(turns))
    assert found["failed"]
    assert found["reason"].startswith("4 of 4 answers were wrong before timing")
    assert "total_us" not in found
    assert turns == []


def test_a_system_that_goes_bad_while_it_is_timed_is_found_out(net):
    peer = Fake()
    peer.function = lambda x: right(x) if peer.calls < 40 else right(x) + 1
    found = measure.measure(peer, work(net), floor_of([]))
    assert found["failed"]
    assert "wrong after timing" in found["reason"]
    assert "total_us" not in found


@pytest.mark.parametrize(
    ("error", "reason", "failed"),
    [
        (RuntimeError("first line\nsecond"), "RuntimeError: first line", True),
        (ImportError("libx.so: cannot open"), "ImportError: libx.so: cannot open", True),
        (ValueError(), "ValueError", True),
        (SystemExit("minilm: no module; pip install it"), "minilm: no module; pip install it", False),
    ],
)
@pytest.mark.parametrize("where", ["available", "load", "call", "timed", "misses"])
def test_whatever_a_system_raises_is_its_reason(net, error, reason, failed, where):
    peer = Fake()
    setattr(peer, *({"call": ("function", raising(error))}.get(where) or (where, raising(error))))
    found = measure.measure(peer, work(net), floor_of([]))
    assert found["reason"] == reason
    assert found.get("failed", False) is failed
    assert peer.log[-1] == "close fake"


def test_a_system_that_is_not_there_is_not_loaded(net):
    peer = Fake(reason="not installed: thing")
    found = measure.measure(peer, work(net), floor_of([]))
    assert (found["reason"], found.get("failed")) == ("not installed: thing", None)
    assert "load fake" not in peer.log


def test_a_slow_system_makes_fewer_calls(net):
    found = measure.measure(Fake(), work(net, seconds=0.0), floor_of([]))
    assert found["total_us"]["n"] == measure.FEWEST_CALLS


def test_a_system_that_owns_its_buffers_is_timed_on_them(net):
    timed = []
    peer = Fake(timed=lambda inputs: lambda: timed.append(inputs[0].shape[0]))
    measure.measure(peer, work(net, 2, calls=50), floor_of([]))
    assert set(timed) == {1, 8}
    assert len(timed) >= 50
    assert peer.calls < 50


def test_misses_while_timed_are_counted(net):
    peer = Fake()
    limit = 12
    peer.misses = lambda: max(0, peer.calls - limit)
    found = measure.measure(peer, work(net), floor_of([]))
    assert found["misses_while_timed"] > 0


@given(st.lists(st.integers(0, 3), max_size=10))
def test_steady_is_the_first_pass_without_a_miss(misses_of_passes):
    clock, count, passes = Clock(), [0], iter([*misses_of_passes, 0])

    def one_pass():
        clock.pass_by(0.25)
        count[0] += next(passes)

    wanted = [*misses_of_passes, 0].index(0)
    assert measure.become_steady(one_pass, lambda: count[0], clock) == (wanted / 4, wanted + 1, 0.25)


def test_a_system_that_captures_late_is_waited_for():
    clock, count = Clock(), [0]

    def one_pass():
        clock.pass_by(0.01)
        count[0] += clock.now < 5

    seconds, passes, _ = measure.become_steady(one_pass, lambda: count[0], clock)
    assert seconds == pytest.approx(5)
    assert passes == pytest.approx(501, abs=1)


@given(st.lists(st.floats(0.3, 1), max_size=8), st.lists(st.floats(0.1, 0.14), min_size=3, max_size=3))
def test_where_nothing_is_counted_steady_is_when_passes_are_alike(slow, alike):
    clock, times = Clock(), iter([*sorted(slow, reverse=True), *alike, *[0.12] * 30])
    seconds, passes, last = measure.become_steady(lambda: clock.pass_by(next(times)), lambda: None, clock)
    assert passes <= len(slow) + 3
    assert seconds <= sum(slow) + 1e-6
    assert last <= 1


def test_what_never_becomes_steady_is_said_not_to():
    clock, count = Clock(), [0]

    def captures_always():
        clock.pass_by(1)
        count[0] += 1

    assert measure.become_steady(captures_always, lambda: count[0], clock) == (None, measure.MOST_SECONDS, 1)
    waver = iter([0.1, 0.9] * 50)
    seconds, passes, _ = measure.become_steady(lambda: clock.pass_by(next(waver)), lambda: None, clock)
    assert (seconds, passes) == (None, measure.MOST_PASSES)


def settled(busy_until):
    clock = Clock()
    quiet = measure.settle(10.0, clock.pass_by, clock, lambda: min(clock.now, busy_until))
    return quiet, clock.now


class _OnHost:
    """graphcache's modes over the torch network, where there is no engine."""

    def _unwrapped(self, bundle, device):
        return networks.torch_network("policy")


@pytest.fixture
def policy(tmp_path):
    inputs = torch.randn(8, 48, generator=torch.Generator().manual_seed(0))
    answers = networks.torch_network("policy")(inputs)
    from bench import store

    arrays = {"inputs": inputs.numpy(), "answers": answers.numpy()}
    store.save(tmp_path, "policy", b"no engine", arrays, {"kind": "rows", "batch": (1, 1, 8)}, compress=False)
    return store.load(tmp_path, "policy")


@pytest.mark.parametrize(
    "peer",
    [
        type("HostFresh", (_OnHost, Fresh), {})(),
        type("HostIsolated", (_OnHost, Fresh), {})("graphcache-isolated", isolation="full"),
        type("HostInto", (_OnHost, Into), {})(),
        type("HostSession", (_OnHost, Session), {})(),
        Module(),
    ],
    ids=lambda peer: type(peer).__name__ + peer.name,
)
def test_every_mode_of_graphcache_is_measured_on_host_graphs(policy, peer):
    with torch.inference_mode():
        found = measure.measure(peer, work(policy, 3), floor_of([]))
    assert "reason" not in found, found
    assert found["misses_while_timed"] == 0
    assert found["steady_seconds"] is not None
    assert found["exact"]
