"""Native code points executables where they are said to point, and does not point them at tensors that come again."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphcache import native
from graphcache.cache.graph_cache import Entry
from graphcache.capture.recording import Recording
from graphcache.dispatch import fast_path
from graphcache.errors import CudaError
from graphcache.graphs import driver
from graphcache.graphs.cuda import ALIGNMENT, MAX_EXECUTABLES, SMALL, UNKNOWN, CudaGraph, IoSlot
from graphcache.graphs.param_patching import find_pointers
from graphcache.graphs.stream_order import StreamOrder
from tests.graphs import compiled as compiled_way
from tests.graphs import fake_driver
from tests.graphs.fake_driver import Affine, Stream, Torch, address, installed, pointer

SETTER = "cuGraphExecKernelNodeSetParams"
GROWS_AFTER = 32
"""As in native/executables.h."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, compiled: Any) -> Iterator[Torch]:
    with installed(patch=monkeypatch) as fake, torch.no_grad():
        functions = compiled_way.use(compiled, fake, monkeypatch)
        with fake.on(fake.new_stream()):
            yield fake
        assert functions.raised == []


class Chosen(IoSlot):
    """An output whose fresh tensors are those that a test chooses."""

    nodes: Nodes

    def fresh(self) -> Tensor:
        return self.nodes.at(self.nodes.next)


class Nodes:
    """A graph of kernels that all take the same three tensors, two inputs and an output, called in native code.

    Tensors are numbers: each stands for memory of its own.
    """

    def __init__(self, fake: Torch, nodes: int = 2, order: StreamOrder | None = None) -> None:
        self.fake = fake
        self.seen = seen = list[list[int]]()
        self.next = 0
        self._tensors: dict[int, Tensor] = {}
        kernel = fake.driver.kernel([8, 8, 8], lambda _, *given: seen.append([address(each) for each in given]))
        capture = fake_driver.new_stream()
        tensors = [[fake.driver.heap.empty(4) for _ in range(3)] for _ in range(2)]
        graphs = []
        for each in tensors:
            fake_driver.begin_capture(capture)
            for _ in range(nodes):
                fake.driver.launch(kernel, [pointer(tensor) for tensor in each], int(capture))
            graphs.append(driver.end_capture(capture))
        found = find_pointers(*graphs, *tensors)
        driver.call("cuGraphDestroy", graphs[1])
        slots = [Chosen(tensor, places, ALIGNMENT) for tensor, places in zip(tensors[0], found, strict=True)]
        slots[2].nodes = self
        self.nodes = nodes
        self.graph = CudaGraph(
            graphs[0],
            inputs=slots[:2],
            outputs=slots[2:],
            order=StreamOrder(0) if order is None else order,
            keep=None,
            release=lambda: None,
        )
        self.table = fast_path.new_table()
        entry: Entry[Recording] = Entry(Recording(self.graph, lambda outputs, _: outputs[0], 0, whole=True, bare=True))
        fast_path.put(self.table, (tensors[0][0], tensors[0][1]), entry)
        # The first call, after which the order is on the current stream, is Python's.
        self.graph.replay([self.at(100), self.at(101)], [self.at(102)])
        fake.driver.calls.clear()

    def at(self, number: int) -> Tensor:
        return self._tensors.setdefault(number, self.fake.driver.heap.empty(4))

    def into(self, first: int, second: int, out: int) -> None:
        """Read two tensors and write a third one; what comes next is not known."""
        self.seen.clear()
        assert self.table.into(self.at(out), (self.at(first), self.at(second)))
        self._saw(first, second, self.at(out))

    def call(self, first: int, second: int, following: int = 0) -> Tensor:
        """Read two tensors, write what lies ready; the next call writes ``following``."""
        self.seen.clear()
        self.next = following
        answer: Tensor = self.table.call((self.at(first), self.at(second)))
        self._saw(first, second, answer)
        return answer

    def _saw(self, first: int, second: int, out: Tensor) -> None:
        wanted = [self.at(first).data_ptr(), self.at(second).data_ptr(), out.data_ptr()]
        assert self.seen == [wanted] * self.nodes

    @property
    def rows(self) -> list[tuple[int, list[int]]]:
        found = self.graph.native.executables()
        return [(handle, list(addresses)) for handle, addresses in found]

    def check(self) -> None:
        """Each executable points where it is said to point, or that is unknown."""
        assert self.rows[0] == (int(self.graph.executable), self.graph.pointed.tolist())
        assert sorted(handle for handle, _ in self.rows) == sorted(self.fake.driver.executables)
        for handle, row in self.rows:
            for node in self.fake.driver.executables[handle].nodes.values():
                held = [address(argument) for argument in node.arguments]
                assert all(said in (UNKNOWN, found) for said, found in zip(row, held, strict=True)), (row, held)

    def sets(self) -> int:
        """How often the driver was asked since the last time."""
        count = self.fake.driver.calls.count(SETTER)
        self.fake.driver.calls.clear()
        return count


inputs, outs = st.integers(0, 4), st.integers(10, 14)


@given(
    st.lists(
        st.tuples(st.sampled_from(["call", "into", "python"]), inputs, inputs, outs, st.none() | st.integers(0, 12)),
        min_size=40,
        max_size=100,
    )
)
def test_whatever_comes_and_fails_all_point_where_they_are_said_to(
    compiled: Any, steps: list[tuple[str, int, int, int, int | None]]
) -> None:
    with pytest.MonkeyPatch.context() as patch, installed(patch=patch) as fake, torch.no_grad():
        functions = compiled_way.use(compiled, fake, patch)
        with fake.on(fake.new_stream()):
            nodes = Nodes(fake)
            for way, first, second, out, failing in steps:
                if failing is not None:
                    fake.driver.fail(SETTER, after=failing)
                try:
                    if way == "call":
                        nodes.call(first, 5 + second, out)
                    elif way == "into":
                        nodes.into(first, 5 + second, out)
                    else:
                        nodes.seen.clear()
                        nodes.graph.replay([nodes.at(first), nodes.at(5 + second)], [nodes.at(out)])
                        nodes._saw(first, 5 + second, nodes.at(out))
                except CudaError:
                    pass
                nodes.check()
            assert 1 <= len(nodes.rows) <= MAX_EXECUTABLES
            nodes.graph.close()
            assert not fake.driver.executables
        assert functions.raised == []


@pytest.mark.parametrize("changed", [1, 2, 3])
@pytest.mark.parametrize("way", ["native", "python"])
def test_a_node_is_told_once_however_many_of_its_tensors_change(fake: Torch, changed: int, way: str) -> None:
    nodes = Nodes(fake, 3)
    nodes.into(1, 2, 3)
    nodes.sets()
    first, second, out = [number + 10 if place < changed else number for place, number in enumerate((1, 2, 3))]
    if way == "native":
        nodes.into(first, second, out)
    else:
        nodes.graph.replay([nodes.at(first), nodes.at(second)], [nodes.at(out)])
        nodes.check()
    assert nodes.sets() == 3


@pytest.mark.parametrize("period", range(1, MAX_EXECUTABLES + 1))
def test_tensors_that_come_again_are_not_pointed_at_again(fake: Torch, period: int) -> None:
    nodes = Nodes(fake)
    # Each turn reads and writes elsewhere, and the outputs are known one call ahead.
    asked = []
    for step in range(40 * period):
        turn, following = step % period, (step + 1) % period
        nodes.call(10 + turn, 20 + turn, 30 + following)
        asked.append(nodes.sets())
    assert period <= len(nodes.rows) <= min(period + 2, MAX_EXECUTABLES)
    assert sum(asked) <= 2 * (GROWS_AFTER + 3 * MAX_EXECUTABLES), "each of two nodes once, however many tensors"
    assert not any(asked[-20 * period :])


def test_outputs_that_take_turns_over_one_input(fake: Torch) -> None:
    nodes = Nodes(fake)
    for step in range(100):
        nodes.call(1, 2, 3 + step % 2)
        if step == 60:
            nodes.sets()
    assert nodes.sets() == 0
    assert len(nodes.rows) == 2


def test_tensors_that_never_come_again_cost_what_one_executable_would(fake: Torch) -> None:
    nodes, numbers = Nodes(fake), itertools.count(1000)
    for step in range(120):
        fake.driver.calls.clear()
        nodes.call(next(numbers), 1, next(numbers))
        if step > 80:
            # An input before the launch, an output after it; both nodes take both.
            assert fake.driver.calls == [SETTER, SETTER, "cuGraphLaunch", SETTER, SETTER]


@pytest.mark.parametrize("period", [2, 3, 4])
def test_tensors_that_begin_to_come_again_are_noticed(fake: Torch, period: int) -> None:
    nodes, numbers = Nodes(fake), itertools.count(1000)
    for _ in range(200):
        nodes.into(next(numbers), 1, next(numbers))
    for step in range(200):
        nodes.call(10 + step % period, 1, 20 + (step + 1) % period)
        if step == 150:
            nodes.sets()
    assert nodes.sets() == 0


def test_a_graph_that_is_hardly_used_has_one(fake: Torch) -> None:
    nodes = Nodes(fake)
    # The first one followed nothing.
    for step in range(GROWS_AFTER + 1):
        nodes.into(1000 + step, 1, 2)
    assert len(nodes.rows) == 1
    nodes.into(3, 1, 2)
    assert len(nodes.rows) == 2


@pytest.mark.parametrize(
    ("alone", "between", "most"), [(1, 1, 1), (2, 1, 1), (3, 5, MAX_EXECUTABLES), (9, 1, MAX_EXECUTABLES)]
)
def test_a_graph_that_takes_turns_with_others_has_one(fake: Torch, alone: int, between: int, most: int) -> None:
    nodes = Nodes(fake)
    other = Nodes(fake, order=nodes.graph.order)
    for step in range(600):
        if step % (alone + between) >= alone:
            other.into(1, 2, 3)
        else:
            nodes.into(1000 + step, 1, 2)
    # Of the launches in a row, the first one counts against it.
    assert len(nodes.rows) == most


@pytest.mark.parametrize(("count", "most"), [(SMALL, MAX_EXECUTABLES), (SMALL + 1, 1)])
def test_a_large_graph_has_one(fake: Torch, count: int, most: int) -> None:
    nodes = Nodes(fake, count)
    for step in range(200):
        nodes.into(10 + step % (MAX_EXECUTABLES + 1), 1, 2)
    assert len(nodes.rows) == most


def test_no_room_for_another_executable(fake: Torch) -> None:
    nodes = Nodes(fake)
    fake.driver.fail("cuGraphInstantiateWithParams", "OUT_OF_MEMORY")
    for step in range(100):
        nodes.into(10 + step % 3, 1, 2)
        nodes.check()
    assert len(nodes.rows) == 1, "it is not asked again"


def test_close_destroys_all_of_them_even_if_the_driver_refuses_one(fake: Torch) -> None:
    nodes = Nodes(fake)
    for step in range(100):
        nodes.into(10 + step % 3, 1, 2)
    assert len(fake.driver.executables) == 3
    fake.driver.fail("cuGraphExecDestroy", after=1)
    fake.driver.calls.clear()
    with pytest.raises(CudaError, match="cuGraphExecDestroy"):
        nodes.graph.close()
    assert fake.driver.calls[-5:-1] == ["cuGraphExecDestroy"] * 3 + ["cuGraphDestroy"]
    assert len(fake.driver.executables) == 1, "the one that was refused"


def test_a_graph_that_nobody_closed(fake: Torch) -> None:
    nodes = Nodes(fake)
    for step in range(100):
        nodes.into(10 + step % 3, 1, 2)
    nodes.table.clear()
    # Outputs refer to it here: a circle through the native half, which a collection finds.
    del nodes
    gc.collect()
    assert fake.driver.leaked() == {}


def test_what_is_remembered_anew_keeps_its_executables(fake: Torch) -> None:
    nodes = Nodes(fake)
    for step in range(100):
        nodes.into(10 + step % 3, 1, 2)
    half = nodes.graph.native
    nodes.table.clear()
    entry: Entry[Recording] = Entry(Recording(nodes.graph, lambda outputs, _: outputs[0], 0, whole=True, bare=True))
    fast_path.put(nodes.table, (nodes.at(1), nodes.at(2)), entry)
    assert nodes.graph.native is half
    nodes.sets()
    for step in range(100, 110):
        nodes.into(10 + step % 3, 1, 2)
    assert nodes.sets() == 0


def test_a_half_of_anything_else_is_refused(fake: Torch) -> None:
    nodes = Nodes(fake)
    good: list[Any] = []
    nodes.graph.native = None
    catcher: Any = type("Table", (), {"graph": lambda self, *args: good.extend(args)})()
    assert nodes.graph.in_native_code(catcher) is None
    for place in range(len(good)):
        for bad in (None, "x", (), (None,), ((),), [1], 2**70, -1, 0, object()):
            try:
                native.loaded().graph(*good[:place], bad, *good[place + 1 :])
            except (TypeError, ValueError, OverflowError, BufferError):
                continue
    with pytest.raises(TypeError):
        native.loaded().graph(*good[:-1])


# ---- in a loop


class Ring:
    """An allocator that hands out what was freed, as torch's does."""

    def __init__(self, fake: Torch, like: Tensor, count: int) -> None:
        self.turn = itertools.cycle([fake.empty_like(like) for _ in range(count)])

    def __call__(self, _: IoSlot) -> Tensor:
        return next(self.turn)


class Blocks:
    """An allocator of equal blocks: the lowest one that nobody holds, as torch's does."""

    def __init__(self, fake: Torch, like: Tensor, count: int) -> None:
        self.blocks = [fake.empty_like(like) for _ in range(count)]
        self.free = list(range(count))

    def __call__(self, _: IoSlot) -> Tensor:
        self.free.sort()
        number = self.free.pop(0)
        made = self.blocks[number][:]
        weakref.finalize(made, self.free.append, number)
        return made


def ready(fake: Torch, graphs: Sequence[CudaGraph], x: Tensor) -> list[Any]:
    """What calls each graph in native code."""
    for each in graphs:
        each.replay([x])
    stream = Stream(fake.driver, fake.raw_stream(0)).cuda_stream
    return [partial(compiled_way.single(each, x)[0], stream=stream) for each in graphs]


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (1, 2), (2, 2), (4, 4), (4, 2)])
def test_a_loop_ends_with_nothing_but_launches(
    fake: Torch, monkeypatch: pytest.MonkeyPatch, inputs: int, outputs: int
) -> None:
    made: CudaGraph = Affine(fake, 6, StreamOrder(0)).bound()
    given_ = [fake.driver.heap.tensor([float(start + place) for place in range(6)]) for start in range(inputs)]
    ring = Ring(fake, made.outputs[0].buffer, outputs)
    monkeypatch.setattr(IoSlot, "fresh", lambda slot: ring(slot))
    (fire,) = ready(fake, [made], given_[0])
    turn = itertools.count()
    for step in range(88):
        if step == 80:
            fake.driver.calls.clear()
        x = given_[next(turn) % inputs]
        assert torch.equal(fire(x), x * 3 + 1)
    assert fake.driver.calls == ["cuGraphLaunch"] * 8


def test_what_is_pinned_stays_so_whatever_the_others_did(fake: Torch) -> None:
    made: CudaGraph = Affine(fake, 6, StreamOrder(0)).bound()
    given_ = [fake.driver.heap.tensor([float(start)] * 6) for start in range(3)]
    (fire,) = ready(fake, [made], given_[0])
    for step in range(90):
        fire(given_[step % 3])
    assert len(fake.driver.executables) > 1
    (x,), (y,) = made.pin()
    for value in (2.0, 5.0):
        x.fill_(value)
        made.launch()
        assert y.tolist() == [3 * value + 1] * 6
    made.close()
    assert not fake.driver.executables


@pytest.mark.parametrize("count", [2, 3, 8])
def test_several_graphs_in_turn_are_pointed_at_one_input_before_a_launch(
    fake: Torch, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """What lies ready for one graph is in the others' way: each gets other memory every time, which costs no time."""
    order = StreamOrder(0)
    made: list[CudaGraph] = [Affine(fake, 6, order).bound() for _ in range(count)]
    inputs = [fake.driver.heap.tensor([float(start + place) for place in range(6)]) for start in range(2)]
    blocks = Blocks(fake, made[0].outputs[0].buffer, 2 * count + 2)
    monkeypatch.setattr(IoSlot, "fresh", lambda slot: blocks(slot))
    calls = ready(fake, made, inputs[0])

    def work(turns: int) -> None:
        for turn in range(turns):
            x = inputs[turn % 2]
            assert all(torch.equal(call(x), x * 3 + 1) for call in calls)

    work(400)
    fake.driver.calls.clear()
    work(6)
    assert len(fake.driver.executables) == count
    assert fake.driver.calls == [SETTER, "cuGraphLaunch", SETTER] * 6 * count


@pytest.mark.parametrize("other", ["stream", "inference"])
def test_outputs_that_lie_ready_are_used_on_their_own_stream_and_in_their_own_inference_mode(
    fake: Torch, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    made: CudaGraph = Affine(fake, 6, StreamOrder(0)).bound()
    x, handed = fake.driver.heap.tensor([1.0] * 6), []

    def fresh(slot: IoSlot) -> Tensor:
        handed.append(fake.empty_like(slot.buffer))
        return handed[-1]

    monkeypatch.setattr(IoSlot, "fresh", fresh)
    stream = Stream(fake.driver, fake.raw_stream(0))
    made.replay([x])
    fire, _, _ = compiled_way.single(made, x)
    fire(x, stream.cuda_stream)
    ready = handed[-1]
    assert fire(x, stream.cuda_stream) is ready
    ready = handed[-1]
    second = fake.new_stream() if other == "stream" else stream
    with fake.on(second), torch.inference_mode(other == "inference"):
        made.replay([x])
        answer = fire(x, second.cuda_stream)
        assert answer is not ready
        assert answer.is_inference() is (other == "inference")
        assert torch.equal(answer, x * 3 + 1)
