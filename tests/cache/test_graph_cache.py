from __future__ import annotations

import threading
from contextlib import suppress

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from graphcache.cache.graph_cache import DeviceBudget, GraphCache, Reservation, clock
from graphcache.errors import Reason, Refusal
from tests.effort import share
from tests.helpers import in_threads


class Memory:
    """An owner that knows how often it was closed, and what the cache held when it was made."""

    def __init__(self, nbytes: int = 1) -> None:
        self.nbytes = nbytes
        self.closed = 0
        self.waited = False

    def close(self, *, wait: bool = True) -> None:
        self.closed += 1
        self.waited = wait


def reserve(cache: GraphCache[Memory], nbytes: int) -> Reservation:
    reservation = Reservation(cache)
    reservation.take(nbytes)
    return reservation


def pin(cache: GraphCache[Memory], key: str, graph: Memory) -> None:
    cache.put(key, graph).pinned = True


def use(cache: GraphCache[Memory], key: str) -> None:
    entry = cache.entries[key]
    entry.hits += 1
    entry.used = clock()


def test_the_least_recently_used_goes_first():
    cache: GraphCache[Memory] = GraphCache(max_graphs=2)
    a, b = Memory(), Memory()
    cache.put("a", a)
    cache.put("b", b)
    use(cache, "a")
    cache.put("c", Memory())
    assert list(cache.entries) == ["a", "c"]
    assert (a.closed, b.closed) == (0, 1)


def test_bytes_are_made_room_for_with_as_few_evictions_as_will_do():
    cache: GraphCache[Memory] = GraphCache(max_graphs=9, max_bytes=10)
    for key in "abc":
        cache.put(key, Memory(3))
    cache.put("d", Memory(4))
    assert (list(cache.entries), cache.nbytes) == (["b", "c", "d"], 10)


def test_a_graph_larger_than_the_budget_is_refused_and_closed_and_nothing_else_changes():
    cache: GraphCache[Memory] = GraphCache(max_graphs=2, max_bytes=10)
    kept, huge = Memory(5), Memory(11)
    cache.put("a", kept)
    with pytest.raises(Refusal, match=r"11 bytes wanted; 0 pinned graphs hold 0 bytes.* max_bytes=10") as refused:
        cache.put("b", huge)
    assert refused.value.cause.reason is Reason.OVER_BUDGET
    assert (list(cache.entries), kept.closed, huge.closed) == (["a"], 0, 1)


def test_a_refused_replacement_leaves_no_graph_open():
    cache: GraphCache[Memory] = GraphCache(max_graphs=2, max_bytes=10)
    other, old, huge = Memory(5), Memory(5), Memory(11)
    cache.put("a", other)
    cache.put("b", old)
    with pytest.raises(Refusal):
        cache.put("b", huge)
    assert (list(cache.entries), other.closed, old.closed, huge.closed) == (["a"], 0, 1, 1)


def test_a_replaced_graph_is_closed_and_does_not_count_against_the_new_one():
    cache: GraphCache[Memory] = GraphCache(max_graphs=1, max_bytes=10)
    old, new = Memory(6), Memory(10)
    cache.put("a", old)
    cache.put("a", new)
    assert (cache.nbytes, old.closed, new.closed) == (10, 1, 0)


def test_pinned_graphs_are_passed_over_and_pinned_all_nothing_fits():
    cache: GraphCache[Memory] = GraphCache(max_graphs=2)
    pin(cache, "a", Memory())
    cache.put("b", Memory())
    pin(cache, "c", Memory())
    assert list(cache.entries) == ["a", "c"]
    with pytest.raises(Refusal, match="2 pinned graphs"):
        cache.put("d", Memory())
    assert list(cache.entries) == ["a", "c"]


def test_clear_takes_pinned_graphs_too():
    cache: GraphCache[Memory] = GraphCache(max_graphs=2)
    graph = Memory()
    pin(cache, "a", graph)
    cache.clear()
    assert (len(cache), graph.closed, cache.nbytes) == (0, 1, 0)


def test_whoever_evicts_is_told_before_the_graph_is_closed():
    seen = []
    cache: GraphCache[Memory] = GraphCache(
        max_graphs=1, on_evict=lambda key, entry: seen.append((key, entry.hits, entry.graph.closed))
    )
    cache.put("a", Memory())
    use(cache, "a")
    assert (cache.evict("a"), cache.evict("a"), seen) == (True, False, [("a", 1, 0)])


def test_a_graph_is_closed_even_if_the_one_who_is_told_fails():
    cache: GraphCache[Memory] = GraphCache(max_graphs=1, on_evict=lambda key, entry: 1 / 0)
    graph = Memory()
    cache.put("a", graph)
    with pytest.raises(ZeroDivisionError):
        cache.evict("a")
    assert (list(cache.entries), graph.closed) == ([], 1)


def test_a_new_graph_is_closed_when_making_room_for_it_fails():
    cache: GraphCache[Memory] = GraphCache(max_graphs=1, on_evict=lambda key, entry: 1 / 0)
    cache.put("a", Memory())
    new = Memory()
    with pytest.raises(ZeroDivisionError):
        pin(cache, "b", new)
    assert (list(cache.entries), new.closed, cache.nbytes) == ([], 1, 0)


def test_what_makes_room_is_not_waited_for_and_what_is_cleared_is():
    cache: GraphCache[Memory] = GraphCache(max_graphs=1)
    first, second = Memory(), Memory()
    cache.put("a", first)
    cache.put("b", second)
    cache.clear()
    assert (first.closed, first.waited, second.closed, second.waited) == (1, False, 1, True)


def test_clear_closes_every_graph_even_if_one_of_them_fails():
    class Broken(Memory):
        def close(self, *, wait: bool = True) -> None:
            super().close(wait=wait)
            raise RuntimeError("the device is lost")

    cache: GraphCache[Memory] = GraphCache(max_graphs=3)
    graphs = [Broken(), Memory(), Memory()]
    for key, graph in zip("abc", graphs, strict=True):
        cache.put(key, graph)
    with pytest.raises(RuntimeError, match="the device is lost"):
        cache.clear()
    assert ([graph.closed for graph in graphs], len(cache)) == ([1, 1, 1], 0)


def test_a_graph_is_closed_once_however_many_threads_evict_it():
    cache: GraphCache[Memory] = GraphCache(max_graphs=50)
    graphs = [Memory() for _ in range(50)]
    for index, graph in enumerate(graphs):
        cache.put(index, graph)
    start = threading.Barrier(4)

    def clear() -> None:
        start.wait()
        cache.clear()

    threads = [threading.Thread(target=clear) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {graph.closed for graph in graphs} == {1}


def test_what_has_the_lowest_rank_goes_first():
    cache: GraphCache[Memory] = GraphCache(max_graphs=3)
    for key in "abc":
        cache.put(key, Memory())
    cache.rank = lambda key, entry: {"a": 2.0, "b": 0.0, "c": 1.0}.get(key, 9.0)
    cache.put("d", Memory())
    cache.put("e", Memory())
    assert list(cache.entries) == ["a", "d", "e"]


def test_victims_are_named_coldest_first_and_nothing_goes():
    cache: GraphCache[Memory] = GraphCache(max_graphs=4, max_bytes=10)
    for key in "abc":
        cache.put(key, Memory(3))
    use(cache, "a")
    assert [key for key, _ in cache.victims(1)] == []
    assert [key for key, _ in cache.victims(5)] == ["b", "c"]
    assert list(cache.entries) == ["a", "b", "c"]
    with pytest.raises(Refusal, match="11 bytes wanted"):
        cache.victims(11)


@pytest.mark.parametrize("nbytes", range(12))
def test_room_is_made_by_evicting_the_victims(nbytes):
    cache: GraphCache[Memory] = GraphCache(max_graphs=4, max_bytes=11)
    for key in "abcd":
        cache.put(key, Memory(2))
    use(cache, "b")
    expected = [key for key, _ in cache.victims(nbytes, graphs=0)]
    reserve(cache, nbytes).release()
    assert [key for key in "acdb" if key not in cache.entries] == expected


def test_what_is_reserved_is_free_before_the_graph_is_there_and_nobody_else_gets_it():
    cache: GraphCache[Memory] = GraphCache(max_graphs=2, max_bytes=10)
    for key in "ab":
        cache.put(key, Memory(4))
    with reserve(cache, 6) as room:
        assert list(cache.entries) == ["b"]
        with pytest.raises(Refusal, match=r"5 bytes wanted.* 6 are shared or reserved"):
            reserve(cache, 5)
        cache.put("c", Memory(6), reservation=room)
    assert (list(cache.entries), cache.nbytes) == (["b", "c"], 10)


def test_a_reservation_evicts_nothing_where_only_the_number_of_graphs_is_short():
    cache: GraphCache[Memory] = GraphCache(max_graphs=1, max_bytes=10)
    cache.put("a", Memory(4))
    with reserve(cache, 6) as room:
        assert list(cache.entries) == ["a"]
        cache.put("b", Memory(6), reservation=room)
    assert list(cache.entries) == ["b"]


def test_a_graph_that_was_not_reserved_makes_room_on_the_device_too():
    budget = DeviceBudget(10)
    one, other = GraphCache[Memory](max_graphs=9), GraphCache[Memory](max_graphs=9)
    budget.register(one)
    budget.register(other)
    gone, refused = Memory(8), Memory(11)
    one.put("a", gone)
    other.put("b", Memory(4))
    assert (len(one), gone.closed, budget.nbytes) == (0, 1, 4)
    with pytest.raises(Refusal, match="the budget of the process is 10 bytes"):
        other.put("c", refused)
    assert (list(other.entries), refused.closed) == (["b"], 1)


def test_a_graph_may_be_larger_than_what_was_reserved_for_it():
    cache: GraphCache[Memory] = GraphCache(max_graphs=3, max_bytes=10)
    cache.put("a", Memory(6))
    cache.put("b", Memory(10), reservation=reserve(cache, 2))
    assert (list(cache.entries), cache.nbytes) == (["b"], 10)


def test_a_capture_that_was_given_up_leaves_the_room_to_others():
    cache: GraphCache[Memory] = GraphCache(max_graphs=1, max_bytes=10)
    room = reserve(cache, 10)
    room.release()
    room.release()
    cache.put("a", Memory(10))
    assert list(cache.entries) == ["a"]


def test_a_reservation_that_cannot_be_had_changes_nothing():
    cache: GraphCache[Memory] = GraphCache(max_graphs=2, max_bytes=10)
    pin(cache, "a", Memory(6))
    with pytest.raises(Refusal):
        reserve(cache, 5)
    cache.put("b", Memory(4))
    assert list(cache.entries) == ["a", "b"]


def test_a_reservation_ends_though_a_victim_cannot_be_closed():
    cache: GraphCache[Memory] = GraphCache(max_graphs=1, max_bytes=1, on_evict=lambda key, entry: 1 / 0)
    cache.put("a", Memory())
    with pytest.raises(ZeroDivisionError):
        reserve(cache, 1)
    cache.put("b", Memory())
    assert (list(cache.entries), cache.nbytes) == (["b"], 1)


def test_what_the_graphs_share_counts_and_is_not_evicted():
    cache: GraphCache[Memory] = GraphCache(max_graphs=9, max_bytes=10)
    cache.shared = 4
    cache.put("a", Memory(6))
    assert cache.nbytes == 10
    cache.put("b", Memory(3))
    assert (list(cache.entries), cache.nbytes) == (["b"], 7)
    with pytest.raises(Refusal, match="4 are shared or reserved"):
        cache.put("c", Memory(7))


def test_only_the_entry_that_was_meant_is_evicted():
    cache: GraphCache[Memory] = GraphCache(max_graphs=2)
    old = cache.put("a", Memory())
    new = cache.put("a", Memory())
    assert not cache.evict("a", only=old)
    assert cache.evict("a", only=new)
    assert old.graph.closed == new.graph.closed == 1


def test_graphs_are_closed_without_the_lock_and_count_until_then():
    seen = []

    class Slow(Memory):
        def close(self, *, wait: bool = True) -> None:
            def another() -> None:
                seen.append((cache.nbytes, cache.evict("other")))

            thread = threading.Thread(target=another)
            thread.start()
            # With the lock held, this would never end.
            thread.join(timeout=60)
            super().close(wait=wait)

    cache: GraphCache[Memory] = GraphCache(max_graphs=2)
    cache.put("slow", Slow(5))
    cache.put("other", Memory(2))
    cache.put("new", Memory(1))
    assert seen == [(8, True)]
    assert (list(cache.entries), cache.nbytes) == (["new"], 1)


def test_a_listener_may_store_a_graph_while_another_is_stored():
    graphs = {key: Memory() for key in "abx"}
    told: list[str] = []

    def tell(key, entry):
        told.append(key)
        if key == "a":
            cache.put("x", graphs["x"])

    cache: GraphCache[Memory] = GraphCache(max_graphs=1, on_evict=tell)
    cache.put("a", graphs["a"])
    cache.put("b", graphs["b"])
    assert (list(cache.entries), told) == (["x"], ["a", "b"])
    assert {key: graph.closed for key, graph in graphs.items()} == {"a": 1, "b": 1, "x": 0}


def test_a_listener_does_not_get_the_room_that_is_reserved():
    graph, refused = Memory(), []

    def tell(key, entry):
        with pytest.raises(Refusal) as caught:
            cache.put("x", graph)
        refused.append(caught.value)

    cache: GraphCache[Memory] = GraphCache(max_graphs=9, max_bytes=1, on_evict=tell)
    cache.put("a", Memory())
    with reserve(cache, 1) as room:
        cache.put("b", Memory(), reservation=room)
    assert (list(cache.entries), graph.closed, len(refused)) == (["b"], 1, 1)


def test_graphs_that_are_stored_under_one_key_at_once_are_closed_but_for_one():
    cache: GraphCache[Memory] = GraphCache(max_graphs=1)
    graphs = [[Memory() for _ in range(200)] for _ in range(4)]

    def store(index: int) -> None:
        for graph in graphs[index]:
            # What others are just storing takes its room too: with several of them there may be none.
            with suppress(Refusal):
                cache.put("a", graph)

    in_threads(store, 4)
    everything = [graph for each in graphs for graph in each]
    assert [graph for graph in everything if not graph.closed] == [cache.entries["a"].graph]
    assert {graph.closed for graph in everything} == {0, 1}
    assert cache.nbytes == 1


class AgainstAModel(RuleBasedStateMachine):
    """The cache against a list of (key, size, pinned), oldest use first."""

    @initialize(graphs=st.integers(1, 4), nbytes=st.none() | st.integers(1, 12))
    def start(self, graphs, nbytes):
        self.told: list[str] = []
        self.cache: GraphCache[Memory] = GraphCache(
            max_graphs=graphs, max_bytes=nbytes, on_evict=lambda key, entry: self.told.append(key)
        )
        self.limits = (graphs, float("inf") if nbytes is None else nbytes)
        self.model: dict[str, tuple[Memory, bool]] = {}
        self.closed: list[Memory] = []

    def size(self, items) -> int:
        return sum(graph.nbytes for graph, _ in items)

    def drop(self, key: str) -> None:
        self.closed.append(self.model.pop(key)[0])

    @rule(key=st.sampled_from("abcdef"), nbytes=st.integers(0, 6), pinned=st.booleans())
    def put(self, key, nbytes, pinned):
        graph = Memory(nbytes)
        rest = {name: item for name, item in self.model.items() if name != key}
        stuck = [item for item in rest.values() if item[1]]
        if len(stuck) + 1 > self.limits[0] or self.size(stuck) + nbytes > self.limits[1]:
            with pytest.raises(Refusal):
                self.cache.put(key, graph)
            self.closed.append(graph)
            # What became of a graph under the same key has a test of its own.
            if key in self.model and key not in self.cache.entries:
                self.drop(key)
            return
        entry = self.cache.put(key, graph)
        assert (entry.graph, entry.nbytes, entry.pinned, entry.hits) == (graph, nbytes, False, 0)
        entry.pinned = pinned
        if key in self.model:
            self.drop(key)
        while len(self.model) + 1 > self.limits[0] or self.size(self.model.values()) + nbytes > self.limits[1]:
            self.drop(next(name for name, item in self.model.items() if not item[1]))
        self.model[key] = (graph, pinned)

    @rule(data=st.data())
    def use(self, data):
        if self.model:
            key = data.draw(st.sampled_from(list(self.model)))
            use(self.cache, key)
            self.model[key] = self.model.pop(key)

    @rule(key=st.sampled_from("abcdef"))
    def evict(self, key):
        assert self.cache.evict(key) == (key in self.model)
        if key in self.model:
            self.drop(key)

    @rule(nbytes=st.integers(0, 6))
    def make_room(self, nbytes):
        before = list(self.model)
        try:
            reserve(self.cache, nbytes).release()
        except Refusal:
            assert set(self.cache.entries) == set(before)
            return
        for key in before:
            if key not in self.cache.entries:
                self.drop(key)
        assert self.size(self.model.values()) + nbytes <= self.limits[1]

    @rule()
    def clear(self):
        self.cache.clear()
        for key in list(self.model):
            self.drop(key)

    @invariant()
    def holds_what_the_model_holds(self):
        if not hasattr(self, "model"):
            return
        assert {key: entry.graph for key, entry in self.cache.entries.items()} == {
            key: graph for key, (graph, _) in self.model.items()
        }
        assert self.cache.nbytes == self.size(self.model.values()) <= self.limits[1]
        assert len(self.cache) == len(self.model) <= self.limits[0]

    @invariant()
    def closed_once_what_left_and_nothing_else(self):
        if hasattr(self, "model"):
            assert all(graph.closed == 1 for graph in self.closed)
            assert all(graph.closed == 0 for graph, _ in self.model.values())


def test_the_cache_does_what_a_list_would_do():
    run_state_machine_as_test(AgainstAModel, settings=settings(max_examples=share(100, 20), stateful_step_count=40))
