"""Models of engines and other modules, some of which no graph can hold: data-dependent outputs, control flow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphcache
from graphcache import EngineModule, Reason
from graphcache.graphs import driver
from tests.effort import share
from tests.engine_modules import MODULES, capture_by_driver, load, numbers, prepare
from tests.graphs import fake_driver
from tests.graphs.fake_driver import Torch, installed
from tests.helpers import dispatcher_of, graphs_of, outcomes


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    """Whole modules are captured by the driver, as they are where tensors lie on a CUDA device."""
    with installed(*MODULES, patch=monkeypatch) as fake:
        capture_by_driver(fake, monkeypatch)
        yield prepare(fake, monkeypatch)


class Pair(nn.Module):
    """Two engines that are captured together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = load("scaled"), load("scaled")

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.second(self.first(x))
        return answer


class Mixed(nn.Module):
    """A pair of engines, one that forbids a graph, a pair again, which takes nothing that is empty."""

    def __init__(self, between: EngineModule) -> None:
        super().__init__()
        self.body = Pair()
        self.between = between
        self.head = Pair()

    def forward(self, x: Tensor) -> Tensor:
        y = self.between(self.body(x))
        answer: Tensor = self.head(y) if y.shape[0] else y
        return answer


def values(fake: Torch, count: int, step: int) -> Tensor:
    """Positive and negative numbers, whose number of each changes from step to step."""
    return numbers(fake, *[float((index * 7 + step * 3) % 5 - 2) or 1.5 for index in range(count)])


SHAPES = (3, 8, 1, 16, 5, 2, 12, 7, 4, 9, 6, 10)


def test_outputs_that_depend_on_the_data_cost_only_themselves(whole: Torch) -> None:
    model = Mixed(load("positive", requires_output_allocator=True))
    fast = graphcache.wrap(model)
    for step in range(4):
        for count in SHAPES:
            x = values(whole, count, step)
            wanted = (x * 4)[x > 0] * 4
            assert torch.equal(fast(x), wanted)
    assert set(fast.parts) == {"body", "between", "head"}
    assert fast.cache_info().eager == {Reason.OUTPUT_ALLOCATOR: 4 * len(SHAPES)}
    body = fast.parts["body"]
    assert outcomes(body) == (2 * len(SHAPES), len(SHAPES), {})
    assert graphs_of(body).entries
    assert all(entry.graph.graph.nodes == 4 for entry in graphs_of(body).entries.values()), (
        "both engines, a copy in and one out"
    )
    assert fast.parts["head"].cache_info().hits > 0
    assert not graphs_of(fast.parts["between"]).entries


def test_answers_of_a_growing_output_stay_what_they_were(whole: Torch) -> None:
    fast = graphcache.wrap(Mixed(load("positive", requires_output_allocator=True)))
    kept = []
    for step in range(30):
        x = values(whole, SHAPES[step % len(SHAPES)], step)
        kept.append((fast(x), (x * 4)[x > 0] * 4))
    assert all(torch.equal(answer, wanted) for answer, wanted in kept)


def test_its_memory_grows_and_never_shrinks(whole: Torch) -> None:
    engine = load("positive", requires_output_allocator=True)
    fast = graphcache.wrap(Mixed(engine))
    seen = []
    for count in (4, 32, 2, 16, 32, 1):
        fast(whole.driver.heap.tensor([1.0] * count))
        (allocator,) = engine._runner.context._allocators.values()
        seen.append(allocator.buffer.numel())
    assert seen == sorted(seen)
    assert seen[1] == seen[-1] >= 32 * 4


def test_an_engine_that_refuses_to_be_captured(whole: Torch) -> None:
    model = Mixed(load("conditional"))
    fast = graphcache.wrap(model)
    for step in range(6):
        x = values(whole, 4, step)
        y = x * 4
        assert torch.equal(fast(x), (y.relu() if y.sum() > 0 else -y) * 4)
    assert fast.cache_info().eager == {Reason.NOT_CAPTURABLE: 6}
    assert outcomes(fast.parts["body"]) == (4, 1, {})
    assert outcomes(fast.parts["head"]) == (4, 1, {})


def test_a_cause_names_the_engines_place(whole: Torch) -> None:
    heard: list[Any] = []
    fast = graphcache.wrap(nn.Sequential(nn.Identity(), Mixed(load("conditional"))))
    fast.subscribe(heard.append)
    fast(values(whole, 4, 0))
    assert [each.cause.where for each in heard] == ["1.between: conditional"]


def test_weights_that_are_streamed_for_a_while(whole: Torch) -> None:
    engine = load("streaming")
    fast = graphcache.wrap(Mixed(engine))
    x = values(whole, 4, 0)
    wanted = (x * 4 + 1) * 4
    for _ in range(2):
        assert torch.equal(fast(x), wanted)
    assert len(graphs_of(fast).entries) == 1
    with graphcache.runtime.weight_streaming(fast) as weights:
        weights.device_budget = 100
        for _ in range(4):
            assert torch.equal(fast(x), wanted)
        assert fast.parts["body"].cache_info().hits > 0
        assert fast.cache_info().eager == {Reason.WEIGHT_STREAMING: 4}
    for _ in range(2):
        assert torch.equal(fast(x), wanted)
    assert len(graphs_of(fast).entries) == 1, "a graph of the whole again"


def test_excluded_from_the_start_nothing_is_tried_in_vain(whole: Torch) -> None:
    model = Mixed(load("positive", requires_output_allocator=True))
    fast = graphcache.wrap(model, exclude=["between"])
    for step in range(3):
        x = values(whole, 6, step)
        assert torch.equal(fast(x), (x * 4)[x > 0] * 4)
    assert fast.cache_info().eager == {}
    assert outcomes(fast.parts["body"]) == (2, 1, {})


def test_engines_keep_their_graphs_where_the_rest_needs_gradients(whole: Torch) -> None:
    class Trains(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = load("scaled")
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * self.scale

    fast = graphcache.wrap(Trains())
    for _ in range(3):
        x = values(whole, 4, 0)
        answer = fast(x)
        assert torch.equal(answer, x * 2)
        answer.sum().backward()
    assert fast.cache_info().eager == {Reason.GRAD: 3}
    assert outcomes(fast.parts["body"]) == (2, 1, {})


@pytest.mark.parametrize("options", [{}, {"strategy": "per_submodule"}, {"exclude": ["second"]}])
def test_inside_a_capture_of_the_callers_everything_enqueues_into_it(whole: Torch, options: dict[str, Any]) -> None:
    class Shows(Pair):
        """A capture has no pool of memory here, so that what lies between is kept by being shown."""

        def forward(self, x: Tensor) -> Any:
            between = self.first(x)
            return self.second(between), between

    fast = graphcache.wrap(Shows(), **options)
    # Tensors of the stand-in say that they lie on the CPU.
    dispatcher_of(fast).captures.on_cuda = True
    stream, x = whole.new_stream(), values(whole, 4, 0)
    handle = driver.binding().CUstream(stream.cuda_stream)
    with whole.on(stream):
        for _ in range(3):
            fast(x)
        fast.module.first(x)
        fast.module.second(x)
        hits = fast.cache_info().hits
        fake_driver.begin_capture(handle)
        y, between = fast(x)
        graph = driver.end_capture(handle)
        assert graph is not None
        assert fast.cache_info().hits == hits
        executable = fake_driver.instantiate(graph, stream.cuda_stream)
        x.fill_(5)
        driver.call("cuGraphLaunch", executable, handle)
        assert torch.equal(y, x * 4)
        assert torch.equal(between, x * 2)


@settings(max_examples=share(30, 10))
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 4)), min_size=1, max_size=12), st.booleans())
def test_any_calls(steps: list[tuple[int, int]], excluded: bool) -> None:
    with pytest.MonkeyPatch.context() as patch, installed(*MODULES, patch=patch) as fake:
        capture_by_driver(fake, patch)
        prepare(fake, patch)
        model = Mixed(load("positive", requires_output_allocator=True))
        fast = graphcache.wrap(model, max_graphs=2, exclude=["between"] if excluded else ())
        for count, step in steps:
            x = values(fake, count, step)
            assert torch.equal(fast(x), (x * 4)[x > 0] * 4)
        fast.close()
