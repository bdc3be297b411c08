from __future__ import annotations

import gc
import sys
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from graphcache.cache.graph_cache import (
    PROCESS_BYTES,
    DeviceBudget,
    GraphCache,
    Reservation,
    budget_of,
    clock,
    set_process_budget,
)
from graphcache.errors import ConfigError, Reason, Refusal
from tests.effort import share
from tests.helpers import in_threads, own_budgets


class Memory:
    """Owns bytes of a meter from its making to its end."""

    def __init__(self, nbytes: int, meter: Meter | None = None) -> None:
        self.nbytes = nbytes
        self.closed = 0
        self._meter = meter or Meter()
        self._meter.add(nbytes)

    def close(self, *, wait: bool = True) -> None:
        if not self.closed:
            self._meter.add(-self.nbytes)
        self.closed += 1


class Meter:
    """What is allocated, and the most that ever was."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.now += nbytes
            self.peak = max(self.peak, self.now)


@pytest.fixture(autouse=True)
def no_budgets_of_others(monkeypatch):
    """No budget and no budget of another test's."""
    own_budgets(monkeypatch)
    monkeypatch.delenv(PROCESS_BYTES, raising=False)


def caches(shared: DeviceBudget, count: int = 2, **options) -> list[GraphCache[Memory]]:
    found: list[GraphCache[Memory]] = [GraphCache(max_graphs=9, **options) for _ in range(count)]
    for cache in found:
        shared.register(cache)
    return found


def reserve(shared: DeviceBudget, nbytes: int) -> Reservation:
    """Bytes for a graph of another module."""
    (cache,) = caches(shared, 1)
    reservation = Reservation(cache)
    reservation.take(nbytes)
    return reservation


# ---- room


def test_the_coldest_graph_of_any_cache_goes_first():
    shared = DeviceBudget(30)
    one, other = caches(shared)
    for cache, key in ((one, "a"), (other, "b"), (one, "c")):
        cache.put(key, Memory(10))
    one.entries["a"].used = clock()
    with reserve(shared, 10):
        assert (list(one.entries), list(other.entries)) == (["a", "c"], [])
    with reserve(shared, 20):
        assert (list(one.entries), list(other.entries)) == (["a"], [])


def test_as_few_as_will_do_go():
    shared = DeviceBudget(10)
    one, other = caches(shared)
    for index in range(5):
        (one if index % 2 else other).put(index, Memory(2))
    with reserve(shared, 3):
        assert sorted([*one.entries, *other.entries]) == [2, 3, 4]


def test_without_a_budget_nothing_goes():
    shared = DeviceBudget()
    (cache,) = caches(shared, 1)
    cache.put("a", Memory(10**15))
    with reserve(shared, 10**15):
        assert shared.nbytes == 2 * 10**15
    assert list(cache.entries) == ["a"]


def test_pinned_graphs_and_what_is_shared_stay():
    shared = DeviceBudget(30)
    one, other = caches(shared)
    one.put("a", Memory(10)).pinned = True
    other.put("b", Memory(10))
    other.shared = 5
    with reserve(shared, 15):
        assert (list(one.entries), list(other.entries)) == (["a"], [])
    with pytest.raises(Refusal, match=r"16 bytes wanted; 15 bytes of all modules are pinned, shared or reserved"):
        reserve(shared, 16)


def test_what_cannot_fit_is_refused_and_nothing_goes():
    shared = DeviceBudget(30)
    (cache,) = caches(shared, 1)
    cache.put("a", Memory(10))
    with pytest.raises(Refusal, match="budget of the process is 30 bytes") as refused:
        reserve(shared, 31)
    assert refused.value.cause.reason is Reason.OVER_BUDGET
    assert (list(cache.entries), shared.nbytes) == (["a"], 10)


def test_what_is_reserved_is_not_reserved_twice():
    shared = DeviceBudget(30)
    with reserve(shared, 20) as room:
        with pytest.raises(Refusal, match="20 bytes of all modules"):
            reserve(shared, 11)
        room.release()
        reserve(shared, 30).release()
    assert shared.nbytes == 0


def test_a_cache_that_is_registered_twice_is_counted_once():
    shared = DeviceBudget(30)
    (cache,) = caches(shared, 1)
    shared.register(cache)
    cache.put("a", Memory(10))
    assert shared.nbytes == 10


def test_a_cache_that_is_collected_is_gone():
    shared = DeviceBudget(30)
    one, other = caches(shared)
    one.put("a", Memory(20))
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None
    assert shared.nbytes == 0
    with reserve(shared, 30):
        pass
    shared.register(other)
    assert len(shared._caches) == 1


def test_a_graph_that_cannot_be_closed_ends_the_reservation():
    shared = DeviceBudget(30)
    (cache,) = caches(shared, 1, on_evict=lambda key, entry: 1 / 0)
    cache.put("a", Memory(20))
    with pytest.raises(ZeroDivisionError):
        reserve(shared, 30)
    assert (list(cache.entries), shared.nbytes) == ([], 0)


def test_a_graph_that_was_replaced_meanwhile_is_left_alone():
    shared = DeviceBudget(30)
    replaced = []

    def told(key, entry):
        if key == "a":
            replaced.append(cache.put("b", Memory(5)))

    (cache,) = caches(shared, 1, on_evict=told)
    cache.put("a", Memory(10))
    cache.put("b", Memory(10))
    with reserve(shared, 25):
        assert [cache.entries["b"]] == replaced


@pytest.mark.parametrize("wanted", [1, 5, 6])
def test_what_is_still_leaving_for_one_is_not_promised_to_another(wanted):
    shared = DeviceBudget(10)
    asked = []

    def told(key, entry):
        if key == "a":
            # Here 2 and 8 bytes are still allocated, and 3 are to come.
            with pytest.raises(Refusal):
                reserve(shared, wanted)
            asked.append(shared.nbytes)

    (cache,) = caches(shared, 1, on_evict=told)
    cache.put("a", Memory(2))
    cache.put("b", Memory(8))
    with reserve(shared, 3):
        assert asked
        assert asked[0] >= 10
        assert shared.nbytes == 3
        reserve(shared, 7).release()


# ---- changing the budget


def test_a_smaller_budget_is_kept_at_once():
    shared = DeviceBudget(100)
    one, other = caches(shared)
    for index in range(10):
        (one if index % 2 else other).put(index, Memory(10))
    shared.set_budget(35)
    assert sorted([*one.entries, *other.entries]) == [7, 8, 9]
    assert (shared.max_bytes, shared.nbytes) == (35, 30)


def test_a_budget_smaller_than_what_is_pinned_leaves_that_and_refuses_more():
    shared = DeviceBudget(100)
    (cache,) = caches(shared, 1)
    cache.put("a", Memory(10)).pinned = True
    cache.put("b", Memory(10))
    shared.set_budget(5)
    assert list(cache.entries) == ["a"]
    with pytest.raises(Refusal):
        reserve(shared, 0)
    shared.set_budget(None)
    reserve(shared, 10**9).release()


# ---- the process


def test_there_is_one_budget_for_each_device():
    assert budget_of("cuda:0") is budget_of(torch.device("cuda", 0))
    assert budget_of("cuda:0") is not budget_of("cuda:1")
    assert budget_of(torch.device("cpu")) is budget_of("cpu")


def test_a_process_budget_holds_for_devices_used_later_too():
    before = budget_of("cuda:0")
    set_process_budget(100)
    assert (before.max_bytes, budget_of("cuda:1").max_bytes) == (100, 100)
    set_process_budget(50, device="cuda:1")
    assert (before.max_bytes, budget_of("cuda:1").max_bytes) == (100, 50)
    set_process_budget(None)
    assert (before.max_bytes, budget_of("cuda:1").max_bytes, budget_of("cuda:2").max_bytes) == (None, None, None)


def test_the_environment_sets_it_unless_something_else_was_said(monkeypatch):
    monkeypatch.setenv(PROCESS_BYTES, " 1000 ")
    assert budget_of("cuda:0").max_bytes == 1000
    set_process_budget(None)
    assert (budget_of("cuda:0").max_bytes, budget_of("cuda:1").max_bytes) == (None, None)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "1e9", "9" * 31])
def test_an_environment_that_means_nothing_is_refused(monkeypatch, text):
    monkeypatch.setenv(PROCESS_BYTES, text)
    with pytest.raises(ConfigError, match=r"GRAPHCACHE_PROCESS_MAX_BYTES=.*expected a whole number, 1 or more"):
        budget_of("cuda:0")


@pytest.mark.parametrize("budget", [0, -1, 1.5, True, "1", [], 10.0**30])
def test_a_budget_that_means_nothing_is_refused_and_nothing_changes(budget):
    set_process_budget(7, device="cuda:0")
    for attempt in (
        lambda: set_process_budget(budget),
        lambda: set_process_budget(budget, device="cuda:0"),
    ):
        with pytest.raises(ConfigError, match=r"max_bytes=.*expected a whole number of bytes, 1 or more, or None"):
            attempt()
    assert (budget_of("cuda:0").max_bytes, budget_of("cuda:1").max_bytes) == (7, None)


@pytest.mark.parametrize("device", ["", "cuda", "cuda:", "cuda:-1", "cuda:x", 0, None, [], object(), "cuda:0 "])
def test_what_is_no_device_is_refused(device):
    with pytest.raises(ConfigError, match="expected 'cpu' or a device with its index"):
        budget_of(device)


# ---- threads


@settings(max_examples=15)
@given(st.integers(20, 60), st.integers(0, 1000))
def test_with_every_graph_reserved_the_budget_holds_at_every_moment(budget, seed):
    interval = sys.getswitchinterval()
    # A thread may be stopped between any two steps.
    sys.setswitchinterval(1e-6)
    shared, meter = DeviceBudget(budget), Meter()
    every = caches(shared, 3)
    refused: list[int] = []

    def work(index: int) -> None:
        for count in range(150):
            number = seed + index * 7919 + count * 104729
            nbytes = 1 + number % 13
            cache = every[number % 3]
            try:
                with Reservation(cache) as room:
                    room.take(nbytes)
                    # Allocated while reserved; the reservation ends when it is in the cache.
                    cache.put(number % 5, Memory(nbytes, meter), room)
            except Refusal:
                refused.append(1)

    try:
        in_threads(work, 4)
    finally:
        sys.setswitchinterval(interval)
    assert meter.peak <= budget
    assert shared.nbytes == meter.now == sum(cache.nbytes for cache in every)
    assert len(refused) < 4 * 150


def test_modules_that_evict_from_each_other_do_not_wait_for_each_other():
    shared = DeviceBudget(10)
    every = caches(shared, 3)
    locks = [threading.RLock() for _ in every]

    def told(index: int):
        def tell(key, entry):
            # As a listener may: it calls the module that lost a graph, which takes that module's lock.
            with locks[index]:
                assert every[index].nbytes >= 0

        return tell

    for index, cache in enumerate(every):
        cache.on_evict = told(index)

    def work(index: int) -> None:
        for count in range(300):
            with locks[index]:
                pass
            try:
                with Reservation(every[index]) as room:
                    room.take(4)
                    with locks[index]:
                        every[index].put(count % 4, Memory(4), room)
            except Refusal:
                pass

    finished = threading.Thread(target=in_threads, args=(work, 3), daemon=True)
    finished.start()
    finished.join(timeout=120)
    assert not finished.is_alive(), "the threads wait for each other"


def test_reserving_with_a_module_s_lock_held_waits_for_no_other_module():
    shared = DeviceBudget(8)
    every = caches(shared, 2)
    locks = [threading.RLock(), threading.RLock()]

    def work(index: int) -> None:
        for count in range(500):
            # As a module that captures: its own lock first.
            with locks[index]:
                try:
                    with Reservation(every[index]) as room:
                        room.take(4)
                        every[index].put(count % 3, Memory(4), room)
                except Refusal:
                    pass

    finished = threading.Thread(target=in_threads, args=(work, 2), daemon=True)
    finished.start()
    finished.join(timeout=120)
    assert not finished.is_alive(), "the threads wait for each other"


class AgainstAList(RuleBasedStateMachine):
    """A budget over two caches against a list of (cache, key, bytes, pinned), oldest use first."""

    @initialize(budget=st.none() | st.integers(1, 20))
    def start(self, budget):
        self.shared = DeviceBudget(budget)
        self.caches = caches(self.shared)
        self.limit = float("inf") if budget is None else budget
        self.model: list[tuple[int, int, int, bool]] = []
        self.rooms = []

    def held(self) -> int:
        return sum(nbytes for _, _, nbytes, _ in self.model) + sum(room.nbytes for room in self.rooms)

    def shrink(self, nbytes: int) -> None:
        for item in [item for item in self.model if not item[3]]:
            if self.held() + nbytes <= self.limit:
                return
            self.model.remove(item)

    @rule(which=st.integers(0, 1), key=st.integers(0, 3), nbytes=st.integers(0, 8), pinned=st.booleans())
    def capture(self, which, key, nbytes, pinned):
        stuck = sum(size for _, _, size, pin in self.model if pin) + sum(room.nbytes for room in self.rooms)
        if stuck + nbytes > self.limit:
            with pytest.raises(Refusal):
                reserve(self.shared, nbytes)
            return
        with Reservation(self.caches[which]) as room:
            room.take(nbytes)
            self.shrink(nbytes)
            self.caches[which].put(key, Memory(nbytes), room).pinned = pinned
        self.model = [item for item in self.model if item[:2] != (which, key)] + [(which, key, nbytes, pinned)]

    @rule(nbytes=st.integers(0, 8))
    def hold(self, nbytes):
        try:
            room = reserve(self.shared, nbytes)
        except Refusal:
            return
        self.shrink(nbytes)
        self.rooms.append(room)

    @rule()
    def give_up(self):
        if self.rooms:
            self.rooms.pop().release()

    @rule(data=st.data())
    def use(self, data):
        if self.model:
            item = data.draw(st.sampled_from(self.model))
            self.caches[item[0]].entries[item[1]].used = clock()
            self.model.remove(item)
            self.model.append(item)

    @rule(budget=st.none() | st.integers(1, 20))
    def set_budget(self, budget):
        self.shared.set_budget(budget)
        self.limit = float("inf") if budget is None else budget
        self.shrink(0)

    @invariant()
    def holds_what_the_list_holds(self):
        if hasattr(self, "model"):
            held = [(which, key) for which, cache in enumerate(self.caches) for key in cache.entries]
            assert sorted(held) == sorted(item[:2] for item in self.model)
            assert self.shared.nbytes == self.held()


def test_the_budget_does_what_a_list_would_do():
    run_state_machine_as_test(AgainstAList, settings=settings(max_examples=share(100, 20), stateful_step_count=30))
