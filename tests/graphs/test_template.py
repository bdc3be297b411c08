"""A captured graph that is instantiated again, for other static buffers, until nobody holds it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphcache.errors import ClosedError, CudaError
from graphcache.graphs import driver
from graphcache.graphs.capture import capture_enqueue
from graphcache.graphs.copies import find_copies, with_copies
from graphcache.graphs.cuda import CudaGraph
from graphcache.graphs.lane import Lane
from graphcache.graphs.pointers import find_pointers
from graphcache.graphs.template import Template
from tests.graphs.fake_driver import Affine, Torch, installed

SIZE = 6


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(patch=monkeypatch) as fake:
        yield fake


class Kept:
    """What its kernels refer to."""


def made(fake: Torch, lane: Lane, keep: object = None, direct: tuple[bool, bool] = (True, True)) -> Template:
    """A template of ``y = 3 x + 1``, whose first graph is gone with its buffers."""
    work = Affine(fake, SIZE, lane)
    tensors, others = [work.x, work.y], [fake.empty_like(work.x), fake.empty_like(work.y)]
    captured, second = work.capture(), work.capture(*others)
    found = find_pointers(captured, second, tensors, others)
    driver.call("cuGraphDestroy", second)
    template = Template(captured, tensors, found, direct, inputs=1, lane=lane, keep=(work.scratch, keep))
    with lane.lock:
        template.hold()
        graph = template.graph(tensors)
    assert right(fake, graph)
    graph.close()
    return template


def right(fake: Torch, graph: CudaGraph, start: float = 0.0) -> bool:
    x = fake.driver.heap.tensor([start + index for index in range(SIZE)])
    (answer,) = graph.replay([x])
    return torch.equal(answer, x * 3 + 1)


def test_it_is_a_graph_again(fake: Torch) -> None:
    lane = Lane(0)
    template = made(fake, lane)
    assert len(fake.driver.executables) == 0
    for start in range(3):
        with lane.lock:
            graph = template.again()
        assert right(fake, graph, start)
        assert right(fake, graph, start + 1)
        graph.close()
        with pytest.raises(ClosedError):
            right(fake, graph)
    assert (len(fake.driver.executables), len(fake.driver.graphs)) == (0, 1)


@pytest.mark.parametrize("direct", [(False, True), (True, False), (False, False)])
def test_what_is_copied_goes_through_buffers_of_the_new_graph(fake: Torch, direct: tuple[bool, bool]) -> None:
    """Fails if the graph that executables are made of still reads and writes where it was captured."""
    lane = Lane(0)
    template = made(fake, lane, direct=direct)
    for start in range(3):
        with lane.lock:
            graph = template.again()
        assert right(fake, graph, start)
        graph.close()


def test_static_buffers_are_its_own_and_can_be_launched(fake: Torch) -> None:
    lane = Lane(0)
    template = made(fake, lane)
    with lane.lock:
        graph = template.again()
    (x,), (y,) = graph.pin()
    x.copy_(torch.arange(float(SIZE)))
    graph.launch()
    assert torch.equal(y, x * 3 + 1)
    graph.close()


def test_nodes_that_copy_are_moved_too(fake: Torch) -> None:
    lane = Lane(0)
    work = Affine(fake, SIZE, lane)
    source, target = fake.empty_like(work.x), fake.empty_like(work.y)
    enqueue = with_copies(work.enqueue, [(work.x, source)], [(target, work.y)], None)
    captured = capture_enqueue(enqueue, lane, "affine")
    found = find_copies(captured, [source, target], None)
    template = Template(captured, [source, target], found, [True, True], inputs=1, lane=lane, keep=work)
    template.hold()
    before = [int(each.word.value) for places in found for each in places]
    with lane.lock:
        graph = template.again()
    addresses = [slot.buffer.data_ptr() for slot in (*graph.inputs, *graph.outputs)]
    nodes = [place.arguments[0] for (place,) in found]
    read, written = (driver.call("cuGraphMemcpyNodeGetParams", node) for node in nodes)
    assert [int(read.srcDevice), int(written.dstDevice)] == addresses != before
    assert right(fake, graph)
    graph.close()
    template.let_go()
    assert fake.driver.graphs == {}


def test_the_last_who_lets_go_destroys_it(fake: Torch) -> None:
    lane, keep = Lane(0), Kept()
    template, alive = made(fake, lane, keep), weakref.ref(keep)
    del keep
    with lane.lock:
        graph = template.again()
    template.let_go()
    assert right(fake, graph)
    graph.close()
    assert fake.driver.graphs == {}
    assert alive() is None


def test_nothing_is_destroyed_before_the_last_launch_is_over(fake: Torch) -> None:
    lane, stream, keep = Lane(0), fake.new_stream(), Kept()
    template, alive = made(fake, lane, keep), weakref.ref(keep)
    del keep
    with lane.lock:
        graph = template.again()
    with fake.on(stream):
        fake.driver.busy.add(stream.cuda_stream)
        right(fake, graph)
        graph.close(wait=False)
        template.let_go()
        assert len(fake.driver.graphs) == 1
        assert alive() is not None
        fake.driver.busy.clear()
        lane.reap()
    assert (fake.driver.graphs, fake.driver.executables, alive()) == ({}, {}, None)


@pytest.mark.parametrize("name", ["cuGraphKernelNodeSetParams", "cuGraphInstantiateWithParams"])
def test_a_refusal_leaves_it_as_it_was(fake: Torch, name: str) -> None:
    lane = Lane(0)
    template = made(fake, lane)
    fake.driver.fail(name)
    with lane.lock, pytest.raises(CudaError, match=name):
        template.again()
    assert fake.driver.executables == {}
    with lane.lock:
        graph = template.again()
    assert right(fake, graph)
    graph.close()


def test_one_that_nobody_let_go_of_is_not_left_behind(fake: Torch) -> None:
    template = made(fake, Lane(0))
    assert len(fake.driver.graphs) == 1
    del template
    gc.collect()
    assert fake.driver.graphs == {}


def test_a_graph_and_its_template_may_go_in_one_collection(fake: Torch) -> None:
    """Fails if either destroys what the other has destroyed."""
    lane = Lane(0)
    template = made(fake, lane)
    with lane.lock:
        graph = template.again()
    cycle: list[object] = [template, graph]
    cycle.append(cycle)
    del template, graph, cycle
    gc.collect()
    assert fake.driver.leaked() == {}


@given(st.lists(st.sampled_from(["again", "replay", "close", "change"]), max_size=12))
def test_any_sequence(steps: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch, installed(patch=patch) as fake:
        lane = Lane(0)
        template, graphs = made(fake, lane), []
        answers: list[tuple[Tensor, Tensor]] = []
        for start, step in enumerate(steps):
            if step == "again":
                with lane.lock:
                    graphs.append(template.again())
            elif step == "close" and graphs:
                graphs.pop(0).close(wait=False)
            elif graphs:
                # The template's words are those of all its graphs.
                x = fake.driver.heap.tensor([start + index for index in range(SIZE)], offset=4 * (step == "change"))
                answers += [(graph.replay([x])[0], x * 3 + 1) for graph in graphs]
        assert all(torch.equal(answer, wanted) for answer, wanted in answers)
        for graph in graphs:
            graph.close()
        template.let_go()
        lane.close()
        assert fake.driver.leaked() == {}
