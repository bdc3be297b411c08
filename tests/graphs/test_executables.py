"""Executables point where they are said to point, and tensors that come again are not pointed at again."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphcache.errors import CudaError
from graphcache.graphs import cuda, driver
from graphcache.graphs.cuda import CudaGraph
from graphcache.graphs.executables import (
    ADDRESSES,
    COUNT,
    EXECUTABLE_BYTES,
    GROWS_AFTER,
    HEAD,
    MOST,
    NODE_BYTES,
    SMALL,
    UNKNOWN,
    Executables,
)
from graphcache.graphs.io_slots import ALIGNMENT, IoSlot
from graphcache.graphs.param_patching import find_pointers
from graphcache.graphs.stream_order import StreamOrder
from tests.graphs import compiled as compiled_way
from tests.graphs.fake_driver import Affine, Torch, address, installed, pointer

SETTER = "cuGraphExecKernelNodeSetParams"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(patch=monkeypatch) as fake:
        yield fake


class Nodes:
    """A graph of kernels that all take the same three tensors: two inputs and an output."""

    def __init__(self, fake: Torch, nodes: int = 2) -> None:
        self.fake = fake
        self.seen: list[list[int]] = []
        kernel = fake.driver.kernel([8, 8, 8], lambda _, *given: self.seen.append([address(each) for each in given]))
        self.stream = driver.new_stream()
        tensors = [[fake.driver.heap.empty(4) for _ in range(3)] for _ in range(2)]
        graphs = []
        for each in tensors:
            driver.begin_capture(self.stream)
            for _ in range(nodes):
                fake.driver.launch(kernel, [pointer(tensor) for tensor in each], int(self.stream))
            graphs.append(driver.end_capture(self.stream))
        found = find_pointers(*graphs, *tensors)
        slots = [IoSlot(tensor, places, ALIGNMENT) for tensor, places in zip(tensors[0], found, strict=True)]
        self.nodes = nodes
        self.lane = StreamOrder(0)
        self.all = Executables(graphs[0], slots[:2], slots[2:], int(self.stream), self.lane)
        fake.driver.calls.clear()

    def launch(self, wanted: list[int]) -> None:
        """Aim and launch: that is where it reads and writes."""
        handle = self.all.aim(wanted)
        self.seen.clear()
        driver.call("cuGraphLaunch", handle, self.stream)
        assert self.seen == [wanted] * self.nodes

    def run(self, wanted: list[int]) -> None:
        """Launch, and be told of it."""
        self.launch(wanted)
        self.all.launched()

    def check(self) -> None:
        """What the table says is so; what it does not know is none of an address."""
        table = self.all.table.tolist()
        assert table[COUNT] == len(self.all.handles) == len(self.fake.driver.executables)
        for index, handle in enumerate(self.all.handles):
            row = table[HEAD + index * self.all.width + ADDRESSES :][:3]
            for node in self.fake.driver.executables[int(handle)].nodes.values():
                held = [address(argument) for argument in node.arguments]
                assert all(said in (UNKNOWN, found) for said, found in zip(row, held, strict=True)), (row, held)

    def sets(self) -> int:
        """How often the driver was asked since the last time."""
        count = self.fake.driver.calls.count(SETTER)
        self.fake.driver.calls.clear()
        return count


places = st.integers(1, 5).map(lambda number: number * 1024)


@given(
    st.lists(
        st.tuples(places, places, places, st.none() | places, st.none() | st.integers(0, 12)), min_size=30, max_size=80
    )
)
def test_whatever_comes_and_fails_the_table_is_true(steps: list[tuple[int, int, int, int | None, int | None]]) -> None:
    with installed() as fake:
        nodes = Nodes(fake)
        for first, second, out, following, failing in steps:
            if failing is not None:
                fake.driver.fail(SETTER, after=failing)
            try:
                nodes.launch([first, second, out])
                nodes.check()
                nodes.all.launched(None if following is None else [following])
            except CudaError:
                pass
            nodes.check()
        assert 1 <= len(nodes.all.handles) <= MOST


@pytest.mark.parametrize("changed", [1, 2, 3])
def test_a_node_is_told_once_however_many_of_its_tensors_change(fake: Torch, changed: int) -> None:
    nodes = Nodes(fake, 3)
    nodes.run([1024, 2048, 3072])
    nodes.sets()
    nodes.launch([5120 * (place + 1) if place < changed else 1024 * (place + 1) for place in range(3)])
    assert nodes.sets() == 3


@pytest.mark.parametrize("period", range(1, MOST + 1))
def test_tensors_that_come_again_are_not_pointed_at_again(fake: Torch, period: int) -> None:
    nodes = Nodes(fake)
    # Each turn reads and writes elsewhere, and the outputs are known one call ahead.
    turns = [[1024 * (3 * turn + place + 1) for place in range(3)] for turn in range(period)]
    asked = []
    for step in range(40 * period):
        nodes.launch(turns[step % period])
        nodes.all.launched(turns[(step + 1) % period][2:])
        asked.append(nodes.sets())
    assert period <= len(nodes.all.handles) <= min(period + 1, MOST)
    assert sum(asked) <= 2 * (GROWS_AFTER + 3 * MOST), "each of two nodes once, however many tensors it takes"
    assert not any(asked[-20 * period :])


def test_outputs_that_take_turns_over_one_input(fake: Torch) -> None:
    nodes = Nodes(fake)
    for step in range(100):
        nodes.launch([1024, 2048, 4096 * (1 + step % 2)])
        nodes.all.launched([4096 * (1 + (step + 1) % 2)])
        if step == 60:
            nodes.sets()
    assert nodes.sets() == 0
    assert len(nodes.all.handles) == 2


def test_tensors_that_never_come_again_cost_what_one_executable_would(fake: Torch) -> None:
    nodes, numbers = Nodes(fake), itertools.count(1)
    fresh = lambda: 1024 * next(numbers)  # noqa: E731
    out = fresh()
    for step in range(120):
        nodes.sets()
        nodes.launch([fresh(), 512, out])
        before = nodes.sets()
        out = fresh()
        nodes.all.launched([out])
        if step > 80:
            # An input before the launch, an output after it; both nodes take both.
            assert (before, nodes.sets()) == (2, 2)


@pytest.mark.parametrize("period", [2, 3, 4])
def test_tensors_that_begin_to_come_again_are_noticed(fake: Torch, period: int) -> None:
    nodes, numbers = Nodes(fake), itertools.count(100)
    for _ in range(200):
        nodes.launch([1024 * next(numbers), 512, 1024 * next(numbers)])
        nodes.all.launched()
    for step in range(200):
        turn = step % period
        nodes.launch([1024 + 512 * turn, 512, 8192 + 512 * turn])
        nodes.all.launched([8192 + 512 * ((step + 1) % period)])
        if step == 150:
            nodes.sets()
    assert nodes.sets() == 0


def test_a_graph_that_is_hardly_used_has_one(fake: Torch) -> None:
    nodes = Nodes(fake)
    # The first one followed nothing.
    for step in range(GROWS_AFTER + 1):
        nodes.run([1024 * (step + 1), 512, 512])
    assert len(nodes.all.handles) == 1
    nodes.run([512, 512, 1024])
    assert len(nodes.all.handles) == 2


@pytest.mark.parametrize(("alone", "between", "most"), [(1, 1, 1), (2, 1, 1), (3, 5, MOST), (9, 1, MOST)])
def test_a_graph_that_takes_turns_with_others_has_one(fake: Torch, alone: int, between: int, most: int) -> None:
    nodes = Nodes(fake)
    for step in range(600):
        if step % (alone + between) >= alone:
            nodes.lane.last = object()
        else:
            nodes.run([1024 * (step + 1), 512, 512])
    # Of the launches in a row, the first one counts against it.
    assert len(nodes.all.handles) == most


@pytest.mark.parametrize(("count", "most"), [(SMALL, MOST), (SMALL + 1, 1)])
def test_a_large_graph_has_one(fake: Torch, count: int, most: int) -> None:
    nodes = Nodes(fake, count)
    for step in range(200):
        nodes.run([1024 * (step % (MOST + 1) + 1), 512, 512])
    assert len(nodes.all.handles) == most
    assert nodes.all.nbytes == most * (EXECUTABLE_BYTES + count * NODE_BYTES)


def test_nothing_to_point_at_nothing_to_vary(fake: Torch) -> None:
    captured = Affine(fake, 4, StreamOrder(0)).capture()
    slots = [IoSlot(fake.driver.heap.empty(4), [], 1) for _ in range(2)]
    alone = Executables(captured, slots[:1], slots[1:], 0, StreamOrder(0))
    assert [alone.aim([0, 0]) for _ in range(100)] == alone.handles * 100
    alone.launched([0])


def test_no_room_for_another_executable(fake: Torch) -> None:
    nodes = Nodes(fake)
    fake.driver.fail("cuGraphInstantiateWithParams", "OUT_OF_MEMORY")
    for step in range(100):
        nodes.run([1024 * (step % 3 + 1), 512, 512])
        nodes.check()
    assert len(nodes.all.handles) == 1, "it is not asked again"


def test_close_destroys_all_of_them_even_if_the_driver_refuses_one(fake: Torch) -> None:
    nodes = Nodes(fake)
    for step in range(100):
        nodes.run([1024 * (step % 3 + 1), 512, 512])
    assert len(fake.driver.executables) == 3
    driver.call("cuStreamSynchronize", nodes.stream)
    fake.driver.fail("cuGraphExecDestroy", after=1)
    with pytest.raises(CudaError, match="cuGraphExecDestroy"):
        nodes.all.close()
    assert nodes.all.handles == []
    assert len(fake.driver.executables) == 1, "the one that was refused"


# ---- in a graph


class Ring:
    """An allocator that hands out what was freed, as torch's does."""

    def __init__(self, fake: Torch, like: Tensor, count: int) -> None:
        self.turn = itertools.cycle([fake.empty_like(like) for _ in range(count)])

    def __call__(self, _: Tensor) -> Tensor:
        return next(self.turn)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (1, 2), (2, 2), (4, 4), (4, 2)])
def test_a_loop_ends_with_nothing_but_launches(
    fake: Torch, monkeypatch: pytest.MonkeyPatch, inputs: int, outputs: int
) -> None:
    made: CudaGraph = Affine(fake, 6, StreamOrder(0)).bound()
    ring, turn = Ring(fake, made.outputs[0].buffer, outputs), itertools.count()
    monkeypatch.setattr(cuda, "_empty_like", ring)
    given_ = [fake.driver.heap.tensor([float(start + place) for place in range(6)]) for start in range(inputs)]
    with fake.on(fake.new_stream()):
        for _ in range(80):
            x = given_[next(turn) % inputs]
            assert torch.equal(made.replay([x])[0], x * 3 + 1)
        fake.driver.calls.clear()
        for _ in range(8):
            x = given_[next(turn) % inputs]
            assert torch.equal(made.replay([x])[0], x * 3 + 1)
    assert fake.driver.calls == ["cuGraphLaunch"] * 8


def test_what_is_pinned_stays_so_whatever_the_others_did(fake: Torch) -> None:
    made: CudaGraph = Affine(fake, 6, StreamOrder(0)).bound()
    given_ = [fake.driver.heap.tensor([float(start)] * 6) for start in range(3)]
    for step in range(90):
        made.replay([given_[step % 3]])
    assert made.executables is not None
    assert len(made.executables.handles) > 1
    (x,), (y,) = made.pin()
    for value in (2.0, 5.0):
        x.fill_(value)
        made.launch()
        assert y.tolist() == [3 * value + 1] * 6
    made.close()
    assert not fake.driver.executables


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=30),
    st.integers(0, 90),
    st.booleans(),
)
def test_compiled_code_chooses_as_python_does(
    compiled: Any, pairs: list[tuple[int, int]], before: int, again: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch, installed(patch=patch) as fake, torch.no_grad():
        functions = compiled_way.use(compiled, fake, patch)
        stream = fake.new_stream()
        graphs = [Affine(fake, 6, StreamOrder(0)).bound() for _ in range(2)]
        tensors = [fake.driver.heap.tensor([float(start)] * 6) for start in range(6)]
        answers = [fake.empty_like(tensors[0]) for _ in range(6)]
        with fake.on(stream):
            for made in graphs:
                made.replay([tensors[0]])
            _, into, _ = compiled_way.single(graphs[1], tensors[0])
            warm = [(step % 5, step % 3) for step in range(before)]
            for read, written in warm + pairs * (4 if again else 1):
                x, out = tensors[read], answers[written]
                graphs[0].replay([x], [out])
                assert torch.equal(out, x * 3 + 1)
                out.zero_()
                if not into(x, out, stream.cuda_stream):
                    graphs[1].replay([x], [out])
                assert torch.equal(out, x * 3 + 1)
                assert _without_handles(graphs[0]) == _without_handles(graphs[1])
        assert functions.raised == []


def _without_handles(made: CudaGraph) -> list[int]:
    """The table, apart from handles, and from what belongs to the first call, whose outputs were allocated."""
    assert made.executables is not None
    table, width = made.executables.table.tolist(), made.executables.width
    rows = [table[start + 1 : start + width] for start in range(HEAD, len(table), width)]
    return [table[:HEAD], *rows]  # type: ignore[list-item]


class Blocks:
    """An allocator of equal blocks: the lowest one that nobody holds, as torch's does."""

    def __init__(self, fake: Torch, like: Tensor, count: int) -> None:
        self.blocks = [fake.empty_like(like) for _ in range(count)]
        self.free = list(range(count))

    def __call__(self, _: Tensor) -> Tensor:
        self.free.sort()
        number = self.free.pop(0)
        made = self.blocks[number][:]
        weakref.finalize(made, self.free.append, number)
        return made


@pytest.mark.parametrize("way", ["replay", "compiled"])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_several_graphs_in_turn_are_pointed_at_one_input_before_a_launch(
    fake: Torch, monkeypatch: pytest.MonkeyPatch, compiled: Any, way: str, count: int
) -> None:
    """What lies ready for one graph is in the others' way: each gets other memory every time, which costs no time."""
    lane = StreamOrder(0)
    made: list[CudaGraph] = [Affine(fake, 6, lane).bound() for _ in range(count)]
    blocks = Blocks(fake, made[0].outputs[0].buffer, 2 * count + 2)
    monkeypatch.setattr(cuda, "_empty_like", blocks)
    monkeypatch.setattr(IoSlot, "fresh", lambda slot: blocks(slot.buffer))
    inputs = [fake.driver.heap.tensor([float(start + place) for place in range(6)]) for start in range(2)]
    functions = compiled_way.use(compiled, fake, monkeypatch)
    stream = fake.new_stream()
    with fake.on(stream), torch.no_grad():
        for each in made:
            each.replay([inputs[0]])
        short = [compiled_way.single(each, inputs[0]) for each in made] if way == "compiled" else []

        def call(index: int, x: Tensor) -> bool:
            found = None if way == "replay" else short[index][0](x, stream.cuda_stream)
            answer = made[index].replay([x])[0] if found is None else found
            return torch.equal(answer, x * 3 + 1)

        for turn in range(400):
            assert all(call(index, inputs[turn % 2]) for index in range(count))
        fake.driver.calls.clear()
        for turn in range(6):
            assert all(call(index, inputs[turn % 2]) for index in range(count))
    assert len(fake.driver.executables) == count
    assert fake.driver.calls == [SETTER, "cuGraphLaunch", SETTER] * 6 * count
    assert functions.raised == []
