"""Graphs that share an execution context: how many, and that every one of them is looked at again, over stand-ins."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import graphcache
from graphcache import CachedModule, EngineModule, Reason
from graphcache.capture import engine_recorder
from graphcache.capture import engine_recorder as shared_contexts
from graphcache.errors import Refusal
from graphcache.graphs.cuda import CudaGraph
from tests.engine_modules import MODULES, load, made_contexts, prepare, rows
from tests.engines import fake_tensorrt
from tests.engines.fake_tensorrt import IExecutionContext
from tests.graphs.fake_driver import Torch, installed
from tests.helpers import dispatcher_of, graphs_of, in_threads, outcomes, wrap_recorded


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(*MODULES, patch=monkeypatch) as fake:
        yield prepare(fake, monkeypatch)


def shares(fast: CachedModule) -> bool:
    return bool(dispatcher_of(fast).target.recorder._contexts.shares)


def flat(fake: Torch, count: int, start: float = 0.0) -> Tensor:
    return fake.driver.heap.tensor([start + each for each in range(count)])


def captured(module: EngineModule, fake: Torch, *counts: int, **options: Any) -> CachedModule:
    fast = wrap_recorded(module, **options)
    for count in counts:
        x = rows(fake, count)
        assert torch.equal(fast(x), x * 3 + 1)
    return fast


def test_so_many_graphs_have_one_context(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_contexts, "MAX_GRAPHS_PER_CONTEXT", 2)
    module = load("affine")
    fast = captured(module, fake, 1, 2, 3)
    assert (fast.cache_info().graphs, made_contexts(module)) == (3, 2)
    captured(module, fake, 1, 2, 3, contexts="private")
    assert made_contexts(module) == 5


def test_a_context_whose_check_takes_long_has_no_further_graphs(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_contexts, "MAX_CHECK_SECONDS", 0)
    module = load("affine")
    fast = captured(module, fake, 1, 2, 3, 4)
    assert (fast.cache_info().graphs, made_contexts(module)) == (4, 4)
    for start, count in enumerate([4, 1, 2, 3]):
        x = rows(fake, count, start)
        assert torch.equal(fast(x), x * 3 + 1)
    fast.clear()
    assert len(module.contexts) == 4


def test_an_evicted_graph_makes_room_in_its_context(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_contexts, "MAX_GRAPHS_PER_CONTEXT", 2)
    module = load("affine")
    fast = captured(module, fake, 1, 2, 3, max_graphs=2)
    before = made_contexts(module)
    for start, count in enumerate([4, 1, 2, 3, 1] * 4):
        x = rows(fake, count, start)
        assert torch.equal(fast(x), x * 3 + 1)
        assert torch.equal(fast(x), x * 3 + 1)
    assert made_contexts(module) == before


def test_each_profile_has_its_own(fake: Torch) -> None:
    """To switch the profile of a context is more than a change of shapes."""
    module = load("affine")
    fast = captured(module, fake, 1, 8, 2, 9)
    assert (fast.cache_info().graphs, made_contexts(module)) == (4, 2)


def test_sessions_share_none(fake: Torch) -> None:
    """A replay of the session's graph on other memory would end what it is good for."""
    module = load("affine")
    fast = captured(module, fake, 1)
    with fast.session(rows(fake, 2)) as session:
        for start, count in enumerate((3, 4, 1)):
            x = rows(fake, count, start)
            assert torch.equal(fast(x), x * 3 + 1)
            session.inputs[0].copy_(rows(fake, 2, start))
            session.run()
            assert torch.equal(session.outputs, rows(fake, 2, start) * 3 + 1)
        assert made_contexts(module) == 2


@pytest.mark.parametrize(
    ("version", "options", "expected"),
    [
        ("1.5.0.114", {}, True),
        ("1.6.1.120", {}, True),
        ("1.4.0.76", {}, False),
        ("1.7.1.116", {}, False),
        ("1.4.0.76", {"contexts": "shared"}, True),
        ("1.5.0.114", {"contexts": "private"}, False),
        ("1.5.0.114", {"capture_in": "background"}, False),
    ],
)
def test_where_they_are_shared(fake: Torch, version: str, options: dict[str, Any], expected: bool) -> None:
    module = load("affine")
    object.__setattr__(module.engine.library, "version", version)
    assert shares(wrap_recorded(module, **options)) is expected


def test_the_full_tensorrt_and_engines_that_update_an_input_share_none(fake: Torch) -> None:
    for updating in [name for name, each in fake_tensorrt.NETWORKS.items() if each.aliased]:
        assert not shares(graphcache.wrap(load(updating)))
    module = load("affine")
    object.__setattr__(module.engine.library, "flavour", "tensorrt")
    assert not shares(graphcache.wrap(module))


BROKEN = ["hidden", "keeping"]
"""Their contexts keep something in memory of their own, which a capture overwrites: the address of the output, where
graphs copy; the last shape, where they are pointed at the caller's tensors."""


@pytest.mark.parametrize("network", BROKEN)
def test_a_graph_that_another_capture_breaks_is_never_used_again(
    fake: Torch, network: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Fails if a graph is looked at with inputs of which every graph makes the same, such as NaN."""
    module = load(network)
    fast = wrap_recorded(module, contexts="shared")
    first, second = flat(fake, 3), flat(fake, 5)
    assert torch.equal(fast(first), first * 2)
    assert torch.equal(fast(first), first * 2)
    (kept,) = [entry.graph.graph for entry in graphs_of(fast).entries.values()]
    with caplog.at_level(logging.WARNING, "graphcache"):
        assert torch.equal(fast(second), second * 2)
    assert kept.executable is None
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{network}: 1 graph(s) answered differently once their execution context was used for another shape; they "
        "were dropped, and each graph has a context of its own from now on"
    )
    assert not shares(fast)
    info = fast.cache_info()
    assert (info.graphs, info.captures, info.evictions) == (1, 2, 1)
    for start in range(3):
        for count in (3, 5, 7):
            x = flat(fake, count, start)
            assert torch.equal(fast(x), x * 2)
    assert outcomes(fast) == (3 * 3 - 2 + 1, 4, {})


@pytest.mark.parametrize("network", BROKEN)
def test_the_same_breakage_goes_unseen_without_the_second_look(
    fake: Torch, network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the test before this one shows something."""
    monkeypatch.setattr(shared_contexts, "disagreement", lambda *_: None)
    fast = wrap_recorded(load(network), contexts="shared")
    first, second = flat(fake, 3, 1), flat(fake, 5)
    fast(first)
    fast(second)
    assert not torch.equal(fast(first), first * 2)


def test_graphs_that_could_not_be_looked_at_are_not_used_again(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if they stay because looking at them ended with an exception."""
    module = load("keeping")
    fast = wrap_recorded(module, contexts="shared")
    first, second = flat(fake, 3, 1), flat(fake, 5)
    fast(first)
    assert torch.equal(fast(first), first * 2)
    answers, looks = shared_contexts._answers, iter(range(9))

    def fails(graphs: list[CudaGraph]) -> list[Tensor]:
        if next(looks) == 1:
            raise torch.cuda.OutOfMemoryError("none left")
        return answers(graphs)

    with monkeypatch.context() as patch:
        patch.setattr(shared_contexts, "_answers", fails)
        assert torch.equal(fast(second), second * 2)
    assert fast.cache_info().graphs == 0
    assert fast.cache_info().eager == {Reason.OUT_OF_MEMORY: 1}
    for x in (first, second, first, second):
        assert torch.equal(fast(x), x * 2)


def test_a_capture_that_fails_is_the_last_of_its_context_and_the_others_are_looked_at(
    fake: Torch, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load("affine")
    fast = captured(module, fake, 1, 2)
    looked: list[int] = []

    def wrong(graph: CudaGraph, *_: Any, **__: Any) -> None:
        graph.close()
        raise Refusal(Reason.MISMATCH)

    def counted(graphs: list[CudaGraph]) -> list[Tensor]:
        looked.append(len(graphs))
        return answers(graphs)

    answers = shared_contexts._answers
    with monkeypatch.context() as patch:
        patch.setattr(engine_recorder, "verify", wrong)
        patch.setattr(shared_contexts, "_answers", counted)
        x = rows(fake, 3)
        assert torch.equal(fast(x), x * 3 + 1)
    assert looked == [2, 2]
    before = made_contexts(module)
    for count in (1, 2, 4):
        x = rows(fake, count, 7)
        assert torch.equal(fast(x), x * 3 + 1)
    assert made_contexts(module) == before + 1
    assert fast.cache_info().eager == {Reason.MISMATCH: 1}


def test_clearing_gives_unused_contexts_back_once_the_replays_are_over(fake: Torch) -> None:
    module = load("affine")
    fast = captured(module, fake, 1, 2, 3)
    assert len(module.contexts) == 0
    fast.clear()
    assert len(module.contexts) == 1
    fast = captured(module, fake, 4)
    assert (made_contexts(module), len(module.contexts)) == (1, 0)


def test_nothing_is_kept_alive(fake: Torch) -> None:
    module = load("affine")
    fast = captured(module, fake, 1, 2, 3)
    fast.close()
    module.close()
    gc.collect()
    assert not [each for each in IExecutionContext.made if each.engine is module.engine.native_handles[1]]
    assert fake.driver.leaked() == {}


def test_what_looking_takes_is_in_the_account(fake: Torch) -> None:
    fast = captured(load("affine"), fake, 1)
    recorder = dispatcher_of(fast).target.recorder
    alone = recorder.passing_nbytes
    x = rows(fake, 1)
    captured_again = rows(fake, 2)
    fast(x)
    fast(captured_again)
    assert recorder._contexts.passing_nbytes == 2 * x.nbytes
    assert recorder.passing_nbytes >= alone + 2 * x.nbytes


def test_threads_that_replay_while_others_capture(fake: Torch) -> None:
    module = load("affine")
    fast = graphcache.wrap(module, max_graphs=3)

    def work(index: int) -> None:
        with fake.on(fake.new_stream()), torch.no_grad():
            for turn in range(20):
                x = rows(fake, 1 + (index * turn) % 4, turn)
                assert torch.equal(fast(x), x * 3 + 1)

    in_threads(work, 4)
    assert shares(fast)


@given(st.lists(st.tuples(st.integers(1, 16), st.booleans()), max_size=20), st.integers(1, 3), st.integers(1, 4))
def test_any_sequence_of_shapes(calls: list[tuple[int, bool]], most: int, graphs: int) -> None:
    calls = [(8 if 4 < count < 8 else count, cleared) for count, cleared in calls]
    with pytest.MonkeyPatch.context() as patch, installed(*MODULES, patch=patch) as fake:
        prepare(fake, patch)
        patch.setattr(shared_contexts, "MAX_GRAPHS_PER_CONTEXT", most)
        module = load("affine")
        fast = graphcache.wrap(module, max_graphs=graphs)
        for start, (count, cleared) in enumerate(calls):
            x = rows(fake, count, start)
            assert torch.equal(fast(x), x * 3 + 1)
            if cleared:
                fast.clear()
        # Of either profile; while a graph is captured, the one whose place it takes is still there.
        assert made_contexts(module) <= 2 * -(-(graphs + 1) // most)
        assert fast.cache_info().eager == {}


def test_one_context_is_enough_where_graphs_take_each_others_places(fake: Torch) -> None:
    module = load("affine")
    fast = graphcache.wrap(module, max_graphs=2)
    for count in [*range(1, 5), *range(8, 17)] * 2:
        fast(rows(fake, count))
    assert made_contexts(module) == 2, "one of either profile"
