"""Evicted graphs that come back without a capture: right, only where they still are, and never after a change."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphcache
from graphcache import CachedModule, Reason
from graphcache.cache.lru import Entry
from graphcache.errors import Refusal
from graphcache.events import Captured
from graphcache.graphs.cuda import CudaGraph
from graphcache.modules.recall import Recallable
from tests.engines.fake_tensorrt import IExecutionContext
from tests.graphs.fake_driver import Torch, installed
from tests.helpers import in_threads, outcomes
from tests.modules.test_engine_module import MODULES, load, prepare, rows
from tests.modules.test_shared_contexts import flat, shares


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(*MODULES, patch=monkeypatch) as fake:
        yield prepare(fake, monkeypatch)


def right(fast: CachedModule, x: Tensor) -> bool:
    return torch.equal(fast(x), x * 3 + 1)


def began(fake: Torch) -> int:
    """Captures that the driver saw: two for each graph that is bound."""
    return fake.driver.calls.count("cuStreamBeginCapture")


def counts(fast: CachedModule) -> tuple[int, int, int]:
    info = fast.cache_info()
    return info.captures, info.recalls, info.evictions


def test_an_evicted_shape_comes_back_without_a_capture(fake: Torch) -> None:
    fast = graphcache.wrap(load("affine"), max_graphs=2)
    told: list[object] = []
    fast.subscribe(told.append)
    for count in (1, 2, 3):
        assert right(fast, rows(fake, count))
    before = began(fake)
    for start in range(4):
        for count in (1, 2, 3):
            x = rows(fake, count, start)
            assert right(fast, x)
            assert right(fast, x)
            assert fast.cache_info().graphs <= 2
    assert began(fake) == before
    assert counts(fast) == (15, 12, 13)
    assert fast.cache_info().eager == {}
    assert [each.recalled for each in told if isinstance(each, Captured)] == [False] * 3 + [True] * 12


def test_answers_belong_to_the_caller(fake: Torch) -> None:
    fast = graphcache.wrap(load("affine"), max_graphs=1)
    held = []
    for start, count in enumerate((1, 2) * 4):
        x = rows(fake, count, start)
        held += [(fast(x), x * 3 + 1), (fast(x), x * 3 + 1)]
    assert all(torch.equal(answer, wanted) for answer, wanted in held)


def test_it_takes_no_eager_run_unless_its_context_was_used_meanwhile(fake: Torch) -> None:
    """When 1 was gone, 3 was captured; when 2 and 3 went, nothing was any more."""
    fast = graphcache.wrap(load("affine"), max_graphs=1)
    for count in (1, 2, 3):
        right(fast, rows(fake, count))
    looks = []
    with pytest.MonkeyPatch.context() as patch:
        verify = Recallable._verify
        patch.setattr(Recallable, "_verify", lambda self, *given: looks.append(1) or verify(self, *given))
        for count, expected in ((1, 1), (2, 1), (3, 1), (1, 1), (2, 1)):
            assert right(fast, rows(fake, count))
            assert len(looks) == expected


def without_room_for_two(network: str, fake: Torch) -> CachedModule:
    """A cache where one graph goes before another is captured, so that nobody sees what that does to it."""
    alone = graphcache.wrap(load(network), contexts="shared")
    alone(flat(fake, 5))
    return graphcache.wrap(load(network), contexts="shared", max_bytes=int(1.5 * alone.cache_info().nbytes))


def test_one_that_another_capture_has_broken_is_found_out(fake: Torch, caplog: pytest.LogCaptureFixture) -> None:
    """Its context keeps the last shape in memory of its own, which a graph reads."""
    fast = without_room_for_two("keeping", fake)
    first, second = flat(fake, 3, 1), flat(fake, 5, 1)
    for x in (first, second):
        assert torch.equal(fast(x), x * 2)
    assert fast.cache_info().graphs == 1
    with caplog.at_level(logging.WARNING, "graphcache"):
        assert torch.equal(fast(first), first * 2)
    (record,) = caplog.records
    assert record.getMessage() == (
        "keeping: a graph that was evicted answers differently since its execution context was used for another "
        "shape; the graphs of that context were dropped, and each graph has a context of its own from now on, as with "
        "contexts='private'"
    )
    assert not shares(fast)
    assert counts(fast)[:2] == (3, 0)
    for x in (second, first, second, first):
        assert torch.equal(fast(x), x * 2)
        assert torch.equal(fast(x), x * 2)
    assert fast.cache_info().eager == {}


def test_the_same_would_be_a_wrong_answer_without_the_look(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test before this one shows something."""
    fast = without_room_for_two("keeping", fake)
    first, second = flat(fake, 3, 1), flat(fake, 5, 1)
    fast(first)
    fast(second)
    monkeypatch.setattr(Recallable, "_verify", lambda *_: None)
    assert not torch.equal(fast(first), first * 2)


@pytest.mark.parametrize(("network", "dtype"), [("keeping", torch.float32), ("keeping integers", torch.int64)])
def test_one_that_came_back_is_looked_at_like_any_other(fake: Torch, network: str, dtype: torch.dtype) -> None:
    """Fails if nothing of the kind that callers give is in its static inputs: of zeros every graph makes the same."""
    fast = graphcache.wrap(load(network), contexts="shared")
    first, second = (fake.driver.heap.tensor(range(1, 1 + count), dtype=dtype) for count in (3, 5))
    fast(first)
    fast._cache.evict(next(iter(fast._entries)))
    assert torch.equal(fast(first), first * 2)
    assert counts(fast)[:2] == (2, 1)
    assert torch.equal(fast(second), second * 2)
    assert not shares(fast)
    for x in (first, second):
        assert torch.equal(fast(x), x * 2)


def test_one_that_came_back_for_zeros_is_looked_at_with_something_else(fake: Torch) -> None:
    fast = graphcache.wrap(load("keeping"), contexts="shared")
    first, second = flat(fake, 3, 1), flat(fake, 5, 1)
    fast(first)
    fast._cache.evict(next(iter(fast._entries)))
    fast(fake.driver.heap.tensor([0.0, 0.0, 0.0]))
    assert fast.cache_info().recalls == 1
    fast(second)
    assert not shares(fast)
    assert torch.equal(fast(first), first * 2)


def test_hooks_on_the_engine_are_no_part_of_what_a_graph_is_held_against(fake: Torch) -> None:
    """They are none of a graph either. Here one is wrong whenever it is asked."""
    module = load("affine")
    fast = graphcache.wrap(module, max_graphs=1)
    called: list[object] = []
    module.register_forward_hook(lambda *given: called.append(given) or given[-1] * 2)
    for count in (1, 2, 3, 1, 2):
        assert right(fast, rows(fake, count))
    assert (fast.cache_info().recalls, shares(fast), called) == (2, True, [])


def test_others_of_a_context_that_went_wrong_are_not_had_back(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = graphcache.wrap(load("affine"), max_graphs=1)
    for count in (1, 2, 3):
        right(fast, rows(fake, count))
    kept = fast._misses.templates.take(next(iter(fast._misses.templates._items)))
    assert isinstance(kept, Recallable)
    kept._contexts.distrust(kept._shared)
    kept.close()
    before = fast.cache_info().captures
    for count in (2, 1):
        assert right(fast, rows(fake, count))
    assert counts(fast)[:2] == (before + 2, 0)
    # What was captured since has a context of its own, and leaves nothing.
    for count in (2, 1, 2):
        assert right(fast, rows(fake, count))
    assert fast.cache_info().recalls == 0


@pytest.mark.parametrize("how", ["clear", "refit", "close"])
def test_nothing_of_before_comes_back(fake: Torch, how: str) -> None:
    module = load("refittable")
    fast = graphcache.wrap(module, max_graphs=1)
    x, y = rows(fake, 2)[:, :2].contiguous().clone(), rows(fake, 3)[:, :2].contiguous().clone()
    scale, shift = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 1.0])
    with torch.no_grad():
        for each in (x, y):
            assert torch.equal(fast(each), each * scale + shift)
        assert len(fast._misses.templates) == 1
        if how == "refit":
            scale = torch.tensor([5.0, 7.0])
            module.refit({"scale.a": scale, "scale.b": torch.zeros(2)})
        elif how == "clear":
            fast.clear()
        else:
            fast.close()
            assert len(fast._misses.templates) == 0
            assert fake.driver.graphs == {}
            return
        for each in (x, y):
            assert torch.equal(fast(each), each * scale + shift)
    assert fast.cache_info().recalls == 0


def test_what_an_eviction_keeps_while_everything_is_forgotten_does_not_stay(
    fake: Torch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another thread may forget it, between an eviction and what it keeps."""
    fast = graphcache.wrap(load("affine"), max_graphs=1)
    recorder = fast._misses.recorder
    keeps = recorder.keeps

    def meanwhile(graph: CudaGraph) -> Any:
        kept = keeps(graph)
        fast.clear()
        return kept

    assert right(fast, rows(fake, 1))
    with monkeypatch.context() as patch:
        patch.setattr(recorder, "keeps", meanwhile)
        assert right(fast, rows(fake, 2))
    assert len(fast._misses.templates) == 0
    assert right(fast, rows(fake, 1))
    assert fast.cache_info().recalls == 0


@pytest.mark.parametrize("options", [{"templates": 0}, {"contexts": "private"}, {"io": "copy"}])
def test_where_none_are_kept(fake: Torch, options: dict[str, Any]) -> None:
    fast = graphcache.wrap(load("affine"), max_graphs=1, **options)
    for count in (1, 2, 1, 2):
        assert right(fast, rows(fake, count))
    assert counts(fast) == (4, 0, 3)
    assert len(fast._misses.templates) == 0
    assert len(fake.driver.graphs) == 1


def test_modules_of_torch_are_captured_anew() -> None:
    fast = CachedModule(nn.ReLU(), graphcache.GraphConfig(max_graphs=1))
    for size in (2, 3, 2):
        fast(torch.ones(size))
    assert (fast.cache_info().captures, fast.cache_info().recalls) == (3, 0)


def test_they_are_bounded_in_number(fake: Torch) -> None:
    fast = graphcache.wrap(load("affine"), max_graphs=1, templates=2)
    for count in (1, 2, 3, 8):
        right(fast, rows(fake, count))
    assert (len(fast._misses.templates), len(fake.driver.graphs)) == (2, 3)
    before = began(fake)
    assert right(fast, rows(fake, 1))
    assert began(fake) > before, "the longest unused was forgotten"
    assert right(fast, rows(fake, 8))
    assert counts(fast)[:2] == (6, 1)


@pytest.mark.parametrize("name", ["cuGraphKernelNodeSetParams", "cuGraphInstantiateWithParams", "cuGraphLaunch"])
def test_what_cannot_be_had_back_is_captured(fake: Torch, name: str) -> None:
    module = load("affine")
    fast = graphcache.wrap(module, max_graphs=1)
    for count in (1, 2):
        right(fast, rows(fake, count))
    fake.driver.fail(name)
    for count in (1, 2, 1, 2, 1):
        assert right(fast, rows(fake, count))
    fast.close()
    module.close()
    assert fake.driver.leaked() == {}


def test_no_memory_for_its_buffers(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = graphcache.wrap(load("affine"), max_graphs=1)
    for count in (1, 2):
        right(fast, rows(fake, count))

    def none_left(self: object) -> None:
        raise torch.cuda.OutOfMemoryError("none left")

    with monkeypatch.context() as patch:
        patch.setattr("graphcache.graphs.template.Template.again", none_left)
        assert right(fast, rows(fake, 1))
    assert counts(fast) == (3, 0, 2)


def test_the_budget_in_bytes_holds(fake: Torch) -> None:
    one = graphcache.wrap(load("affine"))
    right(one, rows(fake, 8))
    fast = graphcache.wrap(load("affine"), max_bytes=2 * one.cache_info().nbytes)
    for start, count in enumerate([1, 2, 3, 8] * 4):
        assert right(fast, rows(fake, count, start))
        info = fast.cache_info()
        assert info.budget is not None
        assert info.nbytes <= info.budget
    assert fast.cache_info().recalls == 12


def test_what_finds_no_room_stays_for_another_time(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = graphcache.wrap(load("affine"), max_graphs=1)
    for count in (1, 2):
        right(fast, rows(fake, count))

    def full(*_: object) -> None:
        raise Refusal(Reason.OVER_BUDGET)

    with monkeypatch.context() as patch:
        patch.setattr(fast._misses, "_take", full)
        assert right(fast, rows(fake, 1))
    assert fast.cache_info().eager == {Reason.OVER_BUDGET: 1}
    assert len(fast._misses.templates) == 1


def test_every_way_of_a_call_after_it(fake: Torch) -> None:
    fast = graphcache.wrap(load("affine"), max_graphs=1)
    with torch.no_grad(), fake.on(fake.new_stream()):
        for start, count in enumerate([1, 2] * 3):
            x = rows(fake, count, start)
            out = rows(fake, count)
            assert right(fast, x)
            assert fast.forward_into(out, x) is out
            assert torch.equal(out, x * 3 + 1)
            assert right(fast, x)
            with fake.on(fake.new_stream()):
                assert right(fast, x)
    assert fast.cache_info().recalls == 4


def test_several_inputs_and_outputs(fake: Torch) -> None:
    fast = graphcache.wrap(load("pair"), max_graphs=1)
    for start in range(3):
        for count in (2, 3):
            a, b = rows(fake, count, start), rows(fake, count, 7)
            total, product = fast(a, b)
            assert torch.equal(total, a + b)
            assert torch.equal(product, a * b)
    assert (shares(fast), fast.cache_info().recalls) == (True, 4)


def test_values_that_the_host_reads_are_part_of_what_is_kept(fake: Torch) -> None:
    fast = graphcache.wrap(load("head"), max_graphs=1)
    for start in range(3):
        for stop in (2, 5):
            x = rows(fake, 16, start - 9)
            assert torch.equal(fast(x, torch.tensor([stop])), x[:stop].relu())
    assert (shares(fast), fast.cache_info().recalls) == (True, 4)


def test_preparing_takes_what_there_is(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphcache.modules.prepare, "torch", fake)
    fast = graphcache.wrap(load("affine"), max_graphs=1)
    for count in (1, 2):
        right(fast, rows(fake, count))
    before = began(fake)
    fast.prepare((rows(fake, 1),))
    assert (began(fake), fast.cache_info().recalls) == (before, 1)


def test_the_policy_learns_what_it_takes(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape that can be had back is asked for sooner than one that has to be captured."""
    fast = graphcache.wrap(load("affine"), max_graphs=1, capture="worthwhile")
    admission = fast._misses.admission
    monkeypatch.setattr(admission, "ask", lambda *_, **__: None)
    for count in (1, 2, 1, 2):
        assert right(fast, rows(fake, count))
    assert fast.cache_info().recalls == 2
    records = [*admission._books.kept.values(), *admission._books.seen.values()]
    assert [record.template for record in records] == [True, True]
    assert [record.recalled for record in records] == [True, True]
    assert [record.capture.count for record in records] == [1, 1]
    assert admission._books._recall.count == 2
    fast.clear()
    assert not any(record.template for record in (*admission._books.kept.values(), *admission._books.seen.values()))


@pytest.mark.parametrize("hits", [0, 2])
def test_recalls_in_vain_are_told_of_once(fake: Torch, caplog: pytest.LogCaptureFixture, hits: int) -> None:
    """They are with less than one hit for each."""
    fast = graphcache.wrap(load("affine"), max_graphs=2)
    with caplog.at_level(logging.WARNING, "graphcache"):
        for start in range(150):
            for _ in range(1 + hits):
                right(fast, rows(fake, 1 + start % 3, start))
    assert fast.cache_info().recalls == 147
    said = [record.getMessage() for record in caplog.records if "again" in record.getMessage()]
    assert len(said) == (hits == 0)
    if said:
        assert said[0].startswith(
            "affine: graphs are evicted and had back again: 29 of the last 32 recalls were of signatures that had a "
            "graph before, and only 0 calls were answered by graphs meanwhile. To change that: raise max_graphs (now "
            "2; 3 signatures take turns), or "
        )


def test_it_is_explained(fake: Torch) -> None:
    fast = graphcache.wrap(load("affine"), max_graphs=1)
    for count in (1, 2):
        right(fast, rows(fake, count))
    (found,) = fast.explain(rows(fake, 1)).calls
    assert (found.outcome, found.note) == (
        "capture",
        "it had a graph, which was evicted and can be had back without a capture",
    )
    assert right(fast, rows(fake, 1))
    assert fast.cache_info().recalls == 1


def test_an_observer_hears_of_it_as_of_a_capture(fake: Torch) -> None:
    class Hears:
        def __init__(self) -> None:
            self.heard: list[tuple[str, bool]] = []

        def before(self, kind: str, module: str) -> None:
            pass

        def after(self, kind: str, module: str, seconds: float, done: bool) -> None:
            self.heard.append((kind, done))

    fast, hears = graphcache.wrap(load("affine"), max_graphs=1), Hears()
    fast.observe(hears)
    for start, count in enumerate((1, 2, 1, 2, 2)):
        assert right(fast, rows(fake, count, start))
    assert hears.heard == [("capture", True)] * 4 + [("replay", True)]
    assert outcomes(fast) == (1, 4, {})
    assert fast.cache_info().recalls == 2


def test_nothing_is_kept_alive(fake: Torch) -> None:
    module = load("affine")
    fast = graphcache.wrap(module, max_graphs=1)
    for count in (1, 2, 3):
        right(fast, rows(fake, count))
    gone = weakref.ref(fast)
    del fast
    gc.collect()
    assert gone() is None
    assert (fake.driver.graphs, fake.driver.executables) == ({}, {})
    module.close()
    gc.collect()
    assert not [each for each in IExecutionContext.made if each.engine is module.engine._engine]


def test_static_buffers_go_with_the_graph(fake: Torch) -> None:
    fast = graphcache.wrap(load("affine"), max_graphs=1)
    right(fast, rows(fake, 1))
    (entry,) = fast._entries.values()
    buffers = [weakref.ref(slot.buffer) for slot in (*entry.graph.graph.inputs, *entry.graph.graph.outputs)]
    del entry
    right(fast, rows(fake, 2))
    fake.driver.forgive()
    assert [each() for each in buffers] == [None, None]


def test_threads_whose_graphs_take_each_others_places(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    entries: list[Entry[Any]] = []
    make = Entry.__init__

    def remember(self: Entry[Any], *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        entries.append(self)

    monkeypatch.setattr(Entry, "__init__", remember)
    fast = graphcache.wrap(load("affine"), max_graphs=2)

    def work(index: int) -> None:
        with fake.on(fake.new_stream()), torch.no_grad():
            for turn in range(30):
                assert right(fast, rows(fake, 1 + (index + turn) % 4, turn))
                if index == 0 and turn % 10 == 9:
                    fast.clear(wait=False)

    in_threads(work, 4)
    info = fast.cache_info()
    assert info.recalls > 0
    assert info.eager == {}
    # The account leaves out hits that ended after another thread had evicted their graph; the entries know of them.
    assert sum(entry.hits for entry in entries) + info.captures == 4 * 30
    assert info.hits + info.captures <= 4 * 30


@given(
    st.lists(
        st.tuples(st.sampled_from(["call", "call", "call", "clear", "refit", "fail"]), st.integers(1, 6)), max_size=25
    ),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_any_sequence(steps: list[tuple[str, int]], most: int, templates: int) -> None:
    with pytest.MonkeyPatch.context() as patch, installed(*MODULES, patch=patch) as fake:
        prepare(fake, patch)
        module = load("refittable")
        fast = graphcache.wrap(module, max_graphs=most, templates=templates)
        scale, shift = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 1.0])
        with torch.no_grad():
            for start, (what, count) in enumerate(steps):
                if what == "clear":
                    fast.clear()
                elif what == "refit":
                    scale = torch.tensor([float(count), float(start)])
                    module.refit({"scale.a": scale, "scale.b": torch.zeros(2)})
                elif what == "fail":
                    fake.driver.fail("cuGraphInstantiateWithParams")
                x = fake.driver.heap.tensor([[start + row, start - row] for row in range(count)], dtype=torch.float32)
                assert torch.equal(fast(x), x * scale + shift)
                assert len(fast._misses.templates) <= templates
                assert fast.cache_info().graphs <= most
        assert set(fast.cache_info().eager) <= {Reason.CAPTURE_FAILED}
        fast.close()
        module.close()
        assert fake.driver.leaked() == {}
