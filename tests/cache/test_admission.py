from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from graphcache.cache import graph_cache, key_table
from graphcache.cache.admission import OVERHEAD, PRICE, Admission
from graphcache.cache.graph_cache import Entry, GraphCache, clock, recency
from graphcache.cache.key_table import KeyState, KeyTable
from graphcache.errors import Reason
from tests.effort import share
from tests.helpers import in_threads

EAGER, REPLAY, CAPTURE = 180e-6, 50e-6, 5e-3
"""Of a network of 16 kernels."""
Times = tuple[float, float, float]
USUAL: Times = (EAGER, REPLAY, CAPTURE)


class Graph:
    def __init__(self, nbytes: int = 1) -> None:
        self.nbytes = nbytes

    def close(self, *, wait: bool = True) -> None:
        pass


class Served:
    """A module behind a cache, served as the engine serves it, with what everything took.

    Args:
        times: From a signature to what eager call, replay and capture take; always the same three if it is a tuple.
    """

    def __init__(
        self, times: Times | Callable[[Hashable], Times] = USUAL, slots: int = 4, nbytes: int = 1, **options: Any
    ) -> None:
        self.times = (lambda key: times) if isinstance(times, tuple) else times
        self.cache: GraphCache[Graph] = GraphCache(
            max_graphs=slots, max_bytes=options.pop("max_bytes", None), on_evict=self.evicted
        )
        self.keys = KeyTable(self.cache.entries)
        self.admission = Admission(options.pop("policy", "worthwhile"), self.cache, self.keys)
        assert not options
        self.nbytes = nbytes
        self.eager = self.total = self.dearest = 0.0
        self.captures: list[Hashable] = []
        self.evictions: list[Hashable] = []
        self.causes: list[Reason | None] = []

    def evicted(self, key: Hashable, entry: Entry[Graph]) -> None:
        self.evictions.append(key)
        self.admission.evicted(key, entry)

    def call(self, key: Hashable) -> bool:
        """One call; whether it was captured."""
        eager, replay, capture = self.times(key)
        self.eager += eager
        entry = self.cache.entries.get(key)
        if entry is not None:
            entry.hits += 1
            entry.used = clock()
            self.total += replay
            return False
        cause = self.admission.ask(key)
        self.causes.append(cause and cause.reason)
        self.total += eager
        self.admission.ran(key, eager)
        if cause is not None:
            return False
        self.total += capture
        self.dearest = max(self.dearest, capture)
        self.captures.append(key)
        self.cache.put(key, Graph(self.nbytes))
        self.keys.captured(key, capture, self.nbytes)
        if self.admission.captured(key, capture, replay) is not None:
            self.cache.evict(key)
        return True

    def known(self, key: Hashable) -> tuple[int, int, float | None, float | None, float | None]:
        """Calls and hits of a key, and what an eager call, a replay and a capture take."""
        state, hits = self.keys.states.get(key) or KeyState(0.0), self.keys.hits(key)
        return state.ran + hits, hits, state.eager.known, state.replay.known, state.capture.known

    def until_captured(self, key: Hashable, most: int = 100_000) -> int:
        """Call until there is a graph; how many calls that took."""
        return next(count for count in range(1, most) if self.call(key))


def taught(times: Times = USUAL, keys: str = "a", **options: Any) -> Served:
    """One that knows what calls take from the beginning."""
    served = Served(times, **options)
    for key in keys:
        served.admission.learn(key, eager=times[0], replay=times[1], capture=times[2])
    return served


# ---- bounds


def oracle(count: int, times: Times) -> float:
    """The least that so many calls of one signature could have taken."""
    eager, replay, capture = times
    return min(count * eager, eager + capture + (count - 1) * replay)


time = st.floats(1e-5, 1e-2)


signatures = st.integers(0, 7)
costs = st.tuples(st.floats(1e-5, 1e-3), st.floats(0.05, 1.3), st.floats(1e-4, 0.1))


@settings(max_examples=60)
@given(st.lists(costs, min_size=8, max_size=8), st.lists(st.tuples(signatures, st.integers(1, 300)), max_size=60))
def test_it_never_takes_more_than_a_little_over_always_eager_and_one_capture(drawn, runs):
    times = [(eager, eager * share, capture) for eager, share, capture in drawn]
    served = Served(lambda key: times[key], slots=3)
    for key, length in runs:
        for _ in range(length):
            served.call(key)
            # At every moment, not only at the end.
            assert served.total <= (1 + OVERHEAD) * served.eager + served.dearest + 1e-9


@pytest.mark.parametrize("capture", [1e-4, 5e-3, 0.1])
def test_not_even_if_every_signature_is_gone_as_soon_as_it_is_captured(capture):
    served = Served((EAGER, REPLAY, capture))
    signature = 0
    for _ in range(50_000):
        signature += served.call(signature)
    assert signature > 1, "nothing was captured, so nothing was shown"
    assert served.total <= (1 + OVERHEAD) * served.eager + capture


def test_a_good_year_does_not_pay_for_a_bad_hour():
    served = Served(slots=4)
    for _ in range(2_000_000):
        served.call("favourite")
    assert served.total < 0.3 * served.eager
    total, eager, signature = served.total, served.eager, 0
    for _ in range(20_000):
        signature += served.call(signature)
    saved_up = (4 + 1) * CAPTURE
    assert served.total - total <= (1 + OVERHEAD) * (served.eager - eager) + saved_up + CAPTURE


# ---- when


def test_a_key_is_captured_when_it_has_lost_its_price():
    served = taught()
    assert served.until_captured("a") == math.ceil(PRICE * CAPTURE / (EAGER - REPLAY)) + 1


def test_one_call_is_never_enough():
    served = taught((1.0, 0.0, 1e-9))
    assert not served.call("a")


@given(st.lists(st.floats(1e-4, 1e-1), min_size=2, max_size=6, unique=True))
def test_the_dearer_the_capture_the_later(captures):
    waits = [taught((EAGER, REPLAY, capture)).until_captured("a") for capture in sorted(captures)]
    assert waits == sorted(waits)


@given(st.lists(st.floats(0.05, 0.95), min_size=2, max_size=6, unique=True))
def test_the_more_a_replay_saves_the_sooner(shares):
    waits = [taught((EAGER, EAGER * share, CAPTURE)).until_captured("a") for share in sorted(shares)]
    assert waits == sorted(waits)


def test_before_anything_was_measured_a_capture_is_taken_for_fifty_eager_calls():
    # Of which a replay is taken to save seven tenths.
    assert Served().until_captured("a") == math.ceil(PRICE * 50 / 0.7) + 1


def test_a_slow_first_call_makes_no_difference():
    usual, slow = Served(), Served()
    usual.admission.ran("a", EAGER)
    slow.admission.ran("a", 10_000 * EAGER)
    assert usual.until_captured("a") == slow.until_captured("a")


def test_signatures_that_were_not_measured_are_judged_by_those_that_were():
    served = Served()
    for _ in range(1000):
        served.call("a")
    price = math.ceil(PRICE * CAPTURE / (EAGER - REPLAY))
    # It may take until the next look before it is seen what "a" has earned meanwhile.
    assert price < served.until_captured("b") <= price + 16


def test_while_captures_have_not_paid_nothing_is_captured_and_the_cause_says_so():
    served = taught(keys="ab")
    served.until_captured("a")
    for _ in range(100):
        served.call("b")
    assert served.captures == ["a"]
    assert "have yet to pay" in str(served.admission.ask("b"))
    for _ in range(100):
        served.call("a")
    assert served.until_captured("b") <= 100


# ---- which


def test_a_loop_over_more_signatures_than_fit_keeps_the_graphs_it_has():
    served = Served(slots=16)
    for index in range(40_000):
        served.call(index % 24)
    assert (len(served.captures), served.evictions) == (16, [])
    refused = next(key for key in range(24) if key not in served.cache.entries)
    assert "about as hot" in str(served.admission.ask(refused))


def test_a_signature_clearly_hotter_takes_the_place_of_the_coldest():
    served = Served(slots=2)
    for key in "ab":
        served.until_captured(key)
        for _ in range(500):
            served.call(key)
    for index in range(4000):
        served.call("a" if index % 2 else "c")
        if index % 20 == 0:
            served.call("b")
    assert served.evictions == ["b"]
    assert set(served.cache.entries) == {"a", "c"}


@given(st.integers(1, 3))
@settings(max_examples=10)
def test_what_stays_hot_is_captured_however_hot_the_others_were(slots):
    served = Served(slots=slots)
    for key in range(slots):
        served.until_captured(key)
    for index in range(300_000):
        served.call(index % slots)
    # They are never called again, and so cool down.
    assert served.until_captured("new") < 3000


def test_a_hot_signature_is_captured_in_the_midst_of_others_that_are_called_once(monkeypatch):
    monkeypatch.setattr(key_table, "MAX_KEYS", 64)
    served = Served(slots=4)
    fresh = 0
    while "hot" not in served.cache.entries:
        assert fresh < 20_000
        for _ in range(9):
            served.call(("once", fresh))
            fresh += 1
        served.call("hot")
    assert set(served.captures) == {"hot"}


def test_for_room_in_bytes_the_worth_of_a_byte_counts():
    served = Served(slots=9, max_bytes=100)
    served.nbytes = 80
    served.until_captured("large")
    for _ in range(1000):
        served.call("large")
    served.nbytes = 10
    served.until_captured("small")
    for _ in range(1000):
        served.call("small")
    large, small = (served.admission.worth(key, served.cache.entries[key]) for key in ("large", "small"))
    assert small > 4 * large


def test_a_graph_that_does_not_fit_is_refused_for_that_reason():
    served = Served(max_bytes=10)
    served.nbytes = 10
    served.until_captured("a")
    served.cache.entries["a"].pinned = True
    for _ in range(2000):
        served.call("a")
        served.call("b")
    assert served.admission.ask("b").reason is Reason.OVER_BUDGET
    assert served.captures == ["a"]


def test_it_says_how_large_a_graph_will_be():
    served = Served(nbytes=100)
    assert served.keys.expected_nbytes("a") == 0
    served.until_captured("a")
    assert (served.keys.expected_nbytes("a"), served.keys.expected_nbytes("b")) == (100, 100)


def test_however_many_graphs_an_eager_call_rarely_looks_at_all_of_them(monkeypatch):
    served, looks = Served(slots=64), []
    for index in range(100_000):
        served.call(index % 64)
    assert len(served.cache) == 64
    original = served.cache.victims
    monkeypatch.setattr(served.cache, "victims", lambda *args: looks.append(args) or original(*args))
    before = len(served.causes)
    for index in range(20_000):
        served.call(index % 128)
    eager = len(served.causes) - before
    assert eager > 9_000
    # Each look costs about as much as there are graphs.
    assert 0 < len(looks) * 64 < 5 * eager


# ---- after a graph is gone


def test_a_graph_that_is_no_faster_is_dropped_and_not_tried_again():
    served = Served((EAGER, EAGER, CAPTURE))
    for _ in range(5000):
        served.call("a")
    assert (served.captures, served.evictions, len(served.cache)) == (["a"], ["a"], 0)
    assert served.causes[-1] is Reason.NOT_WORTH_IT


def test_it_is_tried_again_when_eager_calls_have_become_slower():
    served = Served((EAGER, EAGER, CAPTURE))
    for _ in range(500):
        served.call("a")
    served.times = lambda key: (10 * EAGER, EAGER, CAPTURE)
    for _ in range(5000):
        served.call("a")
    assert "a" in served.cache.entries


def test_one_eager_call_is_not_enough_to_call_a_graph_slow():
    served = Served()
    served.admission.ran("a", EAGER)
    served.cache.put("a", Graph())
    assert served.admission.captured("a", CAPTURE, 2 * EAGER) is None


def test_after_a_capture_that_failed_a_key_has_to_lose_its_price_again():
    served = taught()
    while served.admission.ask("a") is not None:
        served.admission.ran("a", EAGER)
    served.admission.charge(CAPTURE, "a")
    assert served.admission.account().capture_seconds == CAPTURE
    assert served.until_captured("a") > math.ceil(PRICE * CAPTURE / (EAGER - REPLAY))


def test_after_an_eviction_a_key_has_to_lose_its_price_again():
    served = taught()
    first = served.until_captured("a")
    for _ in range(50):
        served.call("a")
    served.cache.evict("a")
    assert served.until_captured("a") >= first - 1


@pytest.mark.parametrize("charged", [1e-3, 10e-3])
def test_what_was_charged_has_to_be_earned_first(charged):
    free, served = taught().until_captured("a"), taught()
    served.admission.charge(charged)
    assert served.until_captured("a") >= max(free, charged / (OVERHEAD * EAGER) - 1)
    assert served.admission.account().capture_seconds == pytest.approx(charged + CAPTURE)


# ---- the other policies


def test_first_captures_at_once_and_keeps_what_is_slow():
    served = Served((EAGER, 2 * EAGER, CAPTURE), policy="first")
    for key in "abcdef":
        assert served.call(key)
        assert not served.call(key)
    assert served.cache.rank is recency
    assert list(served.cache.entries) == list("cdef")
    assert served.known("f") == (2, 1, EAGER, 2 * EAGER, CAPTURE)


def test_prepared_captures_nothing_by_itself():
    served = Served(policy="prepared")
    for _ in range(1000):
        served.call("a")
    assert (served.captures, set(served.causes)) == ([], {Reason.NOT_PREPARED})
    assert served.known("a")[0] == 1000


# ---- costs of keys


def test_what_is_known_of_a_key():
    served = Served()
    calls = served.until_captured("a")
    for _ in range(10):
        served.call("a")
    served.admission.ran("b", 1.0)
    assert served.known("a") == (calls + 10, 10, *map(pytest.approx, USUAL))
    assert served.known("b") == (1, 0, 1.0, None, None)
    assert served.known("c") == (0, 0, None, None, None)


@given(st.lists(st.integers(0, 500), max_size=300), st.integers(1, 8))
def test_costs_are_bounded_and_the_last_key_is_always_known(keys, remembered):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_table, "MAX_KEYS", remembered)
        served = Served(slots=2)
        for key in keys:
            served.call(key)
            assert served.known(key)[0]
            assert sum(served.known(key)[0] > 0 for key in set(keys)) <= remembered + 2


def test_the_account_adds_up():
    served = Served()
    served.until_captured("a")
    for _ in range(1000):
        served.call("a")
    account = served.admission.account()
    assert account.eager_seconds == pytest.approx(served.eager)
    assert account.eager_seconds - account.saved_seconds + account.capture_seconds == pytest.approx(served.total)


def test_hits_of_a_graph_count_when_it_is_evicted_too():
    served = Served()
    served.until_captured("a")
    for _ in range(1000):
        served.call("a")
    served.cache.evict("a")
    assert served.admission.account().saved_seconds == pytest.approx(1000 * (EAGER - REPLAY))


def test_a_slow_first_call_is_no_measure_of_the_time_that_hits_saved():
    served = Served()
    # It compiles kernels; the graph was prepared.
    served.admission.ran("a", 1.24)
    served.cache.put("a", Graph()).hits = 9000
    served.admission.captured("a", CAPTURE, REPLAY, preparing=True)
    # Before other keys were measured a replay is taken to last three tenths of an eager call.
    assert served.admission.account().eager_seconds == pytest.approx(1.24 + 9000 * REPLAY / 0.3)
    served.admission.ran("a", EAGER)
    served.cache.entries["a"].hits += 1000
    seconds = served.admission.account().eager_seconds
    assert seconds == pytest.approx(1.24 + 9000 * REPLAY / 0.3 + 1001 * EAGER)


def test_a_graph_that_was_evicted_before_it_was_booked_is_paid_for_all_the_same():
    cache: GraphCache[Graph] = GraphCache(max_graphs=1)
    admission = Admission("worthwhile", cache, KeyTable(cache.entries))
    assert admission.captured("a", 0.5, 0.1) is None
    assert admission.account().capture_seconds == 0.5


def test_an_eager_call_of_a_signature_that_has_a_graph_is_counted():
    served = Served()
    served.until_captured("a")
    before = served.known("a")[0]
    served.admission.ran("a", EAGER)
    assert served.known("a")[0] == before + 1
    assert "a" in served.cache.entries


def test_times_that_are_all_zero_do_no_harm():
    served = Served((0.0, 0.0, 0.0))
    for index in range(2000):
        served.call(index % 7)
    assert served.admission.account().eager_seconds == 0.0


def test_threads_may_all_use_it():
    served = Served(slots=2)
    calls = 3000

    def work(index: int) -> None:
        for count in range(calls):
            key = (index + count) % 5
            if served.admission.ask(key) is None:
                served.cache.put(key, Graph())
                served.admission.captured(key, CAPTURE, REPLAY)
            served.admission.ran(key, EAGER)
            served.admission.account()

    in_threads(work, 4)
    assert sum(served.known(key)[0] for key in range(5)) == 4 * calls
    assert len(served.cache) <= 2


def test_it_may_be_called_with_the_lock_of_the_cache_held_while_others_ask():
    served = Served(slots=1)
    done = threading.Event()

    def ask() -> None:
        for _ in range(2000):
            served.call("a")
        done.set()

    thread = threading.Thread(target=ask)
    with graph_cache._lock:
        # Only a put has to wait; it comes after the last question.
        thread.start()
        served.admission.account()
        served.admission.ask("a")
    thread.join()
    assert done.is_set()


class AnyOrder(RuleBasedStateMachine):
    """Whatever is called in whatever order, costs stay bounded and finite."""

    keys = st.integers(0, 6)
    seconds = st.sampled_from([0.0, 1e-6, 2e-4, 5e-3, 3.0, 1e9])

    @initialize(slots=st.integers(1, 3), policy=st.sampled_from(["first", "worthwhile", "prepared"]))
    def start(self, slots, policy):
        self.served = Served(slots=slots, policy=policy)

    @rule(key=keys)
    def ask(self, key):
        cause = self.served.admission.ask(key)
        reasons = (Reason.COLD, Reason.NOT_WORTH_IT, Reason.NOT_PREPARED, Reason.OVER_BUDGET)
        assert cause is None or cause.reason in reasons

    @rule(key=keys, seconds=seconds, count=st.sampled_from([1, 2, 40]))
    def ran(self, key, seconds, count):
        for _ in range(count):
            self.served.admission.ran(key, seconds)

    @rule(key=keys, seconds=seconds, replay=seconds, preparing=st.booleans(), stored=st.booleans())
    def captured(self, key, seconds, replay, preparing, stored):
        if stored:
            self.served.cache.put(key, Graph())
        self.served.keys.captured(key, seconds, 1)
        self.served.admission.captured(key, seconds, replay, preparing=preparing)

    @rule(key=keys, seconds=seconds)
    def failed(self, key, seconds):
        self.served.admission.charge(seconds, key)

    @rule(seconds=seconds)
    def charge(self, seconds):
        self.served.admission.charge(seconds)

    @rule(key=keys, eager=seconds, replay=seconds, capture=seconds)
    def learn(self, key, eager, replay, capture):
        self.served.admission.learn(key, eager=eager, replay=replay, capture=capture)

    @rule(key=keys, hits=st.sampled_from([1, 1000]))
    def hit(self, key, hits):
        if key in self.served.cache.entries:
            self.served.cache.entries[key].hits += hits

    @rule(key=keys)
    def evict(self, key):
        self.served.cache.evict(key)

    @invariant()
    def costs_are_in_order(self):
        if not hasattr(self, "served"):
            return
        admission, cache = self.served.admission, self.served.cache
        account = admission.account()
        assert all(math.isfinite(seconds) for seconds in vars(account).values())
        for key, entry in cache.entries.items():
            assert math.isfinite(cache.rank(key, entry))
            assert self.served.known(key)[1] >= entry.hits


def test_any_order_of_calls_leaves_the_costs_in_order():
    run_state_machine_as_test(AnyOrder, settings=settings(max_examples=share(120, 20), stateful_step_count=40))
