"""Copies in graphs, by nodes of the driver's and by kernels: found again, pointed elsewhere, in the right order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphcache.errors import CudaError, Refusal
from graphcache.graphs import copies, driver
from graphcache.graphs.capture import capture_enqueue
from graphcache.graphs.copies import (
    LARGEST,
    MAX_COPIES,
    CopyKernels,
    CopyList,
    edges_of,
    find_copies,
    order_copies,
    with_copies,
)
from graphcache.graphs.cuda import CudaGraph, IoSlot
from graphcache.graphs.param_patching import CannotBind, Pointer
from graphcache.graphs.stream_order import StreamOrder
from tests.graphs import compiled as compiled_way
from tests.graphs.fake_driver import (
    Affine,
    CUgraphNodeType,
    Memory,
    Torch,
    Violation,
    address,
    installed,
    pointer,
)

SIZE = 16
WAYS = ["driver", "kernels", "older"]
"""The driver's own copies, the kernels of compute capability 9.0, and those of devices before."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(patch=monkeypatch) as fake:
        yield fake


@pytest.fixture(params=WAYS)
def kernels(fake: Torch, request: pytest.FixtureRequest) -> CopyKernels | None:
    return kernels_of(fake, request.param)


def kernels_of(fake: Torch, way: str) -> CopyKernels | None:
    if way == "driver":
        return None
    fake.capability = (9, 0) if way == "kernels" else (8, 9)
    found = copies.copy_kernels(0)
    assert found is not None
    assert found.waits is (way == "kernels")
    return found


def fresh(fake: Torch, count: int) -> list[Tensor]:
    return [fake.driver.heap.tensor(range(SIZE)) for _ in range(count)]


def sound(fake: Torch) -> bool:
    return not fake.driver.capturing() and fake.driver.leaked() == {}


def captured(fake: Torch, pairs: Sequence[tuple[Tensor, Tensor]], kernels: CopyKernels | None) -> Any:
    stream = driver.new_stream()
    driver.begin_capture(stream)
    work = fake.driver.kernel([], lambda memory: None)
    with_copies(lambda stream: fake.driver.launch(work, [], stream) is None, pairs, [], kernels)(int(stream))
    return driver.end_capture(stream)


def run(graph: Any, patched: Sequence[tuple[Pointer, int]] = ()) -> None:
    """Instantiate a graph, point it elsewhere, launch it once."""
    stream = driver.new_stream()
    executable = driver.instantiate(graph, int(stream))
    for place, elsewhere in patched:
        place.word.value = elsewhere + place.offset
    for place, _ in patched:
        driver.call(place.setter, executable, *place.arguments)
    driver.call("cuGraphLaunch", executable, stream)


# ---- enqueued


@given(
    st.sampled_from(WAYS),
    st.lists(st.integers(0, 4), min_size=1, max_size=2 * MAX_COPIES + 1),
    st.lists(st.integers(0, 4), max_size=2 * MAX_COPIES + 1),
)
def test_copies_before_and_after(way: str, before: list[int], after: list[int]) -> None:
    with installed() as fake:
        heap, lane, kernels = fake.driver.heap, StreamOrder(0), kernels_of(fake, way)
        ins = [(heap.tensor([-1.0] * size), heap.tensor(range(size))) for size in before]
        outs = [(heap.tensor([-1.0] * size), heap.tensor([9.0] * size)) for size in after]
        order: list[int] = []

        def body(memory: Memory) -> None:
            order.append(1)
            for target, source in ins:
                assert torch.equal(target, source), "the copies before it come first"
            for target, _ in outs:
                assert (target == -1).all(), "the copies after it come last"

        kernel = fake.driver.kernel([], body)

        def enqueue(stream: int) -> bool:
            fake.driver.launch(kernel, [], stream)
            return True

        graph = capture_enqueue(with_copies(enqueue, ins, outs, kernels), lane, "")
        real = [sum(size > 0 for size in sizes) for sizes in (before, after)]
        nodes = [count if kernels is None else -(-count // MAX_COPIES) for count in real]
        assert driver.node_count(graph) == 1 + sum(nodes)
        run(graph)
        assert order == [1]
        assert all(torch.equal(target, source) for target, source in ins + outs)


def test_what_is_large_is_the_drivers_to_copy(fake: Torch) -> None:
    kernels = kernels_of(fake, "kernels")
    heap = fake.driver.heap
    sizes = [LARGEST, LARGEST + 1, 1]
    pairs = [(heap.empty(size, dtype=torch.uint8), heap.empty(size, dtype=torch.uint8).fill_(7)) for size in sizes]
    graph = captured(fake, pairs, kernels)
    handles, _ = driver.call("cuGraphGetNodes", graph, 9)
    kinds = [driver.call("cuGraphNodeGetType", handle) for handle in handles]
    assert kinds.count(CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMCPY) == 1
    assert len(kinds) == 3, "the one that is there before, the large one, and one for both small ones"
    run(graph)
    assert all((target == 7).all() for target, _ in pairs)


def between(fake: Torch, kernels: CopyKernels | None, *, programmatic: bool, **options: Any) -> tuple[Any, list[bool]]:
    """A graph of work between two copies, ordered; and for each of its four edges whether it is programmatic."""
    x, y, out, source = fresh(fake, 4)
    scale = fake.driver.kernel([8, 8], lambda memory, x, y: memory.write(address(y), memory.read(address(x), 4 * SIZE)))

    def enqueue(stream: int) -> bool:
        for _ in range(3):
            fake.driver.launch(scale, [pointer(x), pointer(y)], stream, programmatic=programmatic)
        return True

    graph = capture_enqueue(with_copies(enqueue, [(x, source)], [(out, y)], kernels), StreamOrder(0), "")
    order_copies(graph, kernels, **options)
    edges = sorted(edges_of(graph), key=lambda edge: int(edge.start))
    source.fill_(7)
    run(graph)
    assert out.tolist() == [7.0] * SIZE
    return graph, [edge.is_programmatic for edge in edges]


@pytest.mark.parametrize("programmatic", [False, True])
def test_work_waits_for_its_inputs_whatever_it_was_launched_with(
    fake: Torch, kernels: CopyKernels | None, programmatic: bool
) -> None:
    """TensorRT launches the first kernel of some engines programmatically: seen with TensorRT-RTX 1.5 on an H200."""
    graph, found = between(fake, kernels, programmatic=programmatic)
    assert found[:3] == [False, programmatic, programmatic], "what TensorRT does between its own kernels is its own"
    assert found[3] is (kernels is not None and kernels.waits)
    order_copies(graph, kernels, full_edges=True)
    assert not any(edge.is_programmatic for edge in edges_of(graph)), "that option has the last word"


def test_without_order_the_stand_in_finds_the_race(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "make_full", lambda graph, edges: None)
    with pytest.raises(Violation, match="not waited for"):
        between(fake, kernels_of(fake, "kernels"), programmatic=True)


def test_nothing_begins_early_where_that_is_not_wanted(fake: Torch) -> None:
    _, found = between(fake, kernels_of(fake, "kernels"), programmatic=False, full_edges=True)
    assert found == [False] * 4


def test_a_driver_that_knows_no_early_launch(fake: Torch) -> None:
    fake.driver.fail("cuGraphAddDependencies", "INVALID_VALUE")
    _, found = between(fake, kernels_of(fake, "kernels"), programmatic=False)
    assert found == [False] * 4


def test_a_refusal_between_copies(fake: Torch, kernels: CopyKernels | None) -> None:
    work = Affine(fake, SIZE, StreamOrder(0))
    work.accepts = False
    x, y = fake.empty_like(work.x), fake.empty_like(work.y)
    with pytest.raises(Refusal, match="not_capturable"):
        capture_enqueue(with_copies(work.enqueue, [(work.x, x)], [(y, work.y)], kernels), work.lane, "")
    assert sound(fake)


def test_a_copy_that_the_driver_refuses(fake: Torch, kernels: CopyKernels | None) -> None:
    work = Affine(fake, SIZE, StreamOrder(0))
    name = "cuMemcpyDtoDAsync" if kernels is None else "cuLaunchKernel"
    fake.driver.fail(name, "INVALID_VALUE")
    pairs = [(work.x, fake.empty_like(work.x))]
    with pytest.raises(CudaError, match=f"{name} failed with CUDA_ERROR_INVALID_VALUE"):
        capture_enqueue(with_copies(work.enqueue, pairs, [], kernels), work.lane, "")
    assert sound(fake)


# ---- found again


@given(st.sampled_from(WAYS), st.integers(1, 2 * MAX_COPIES + 1), st.data())
def test_each_is_found_and_pointed_elsewhere_alone(way: str, count: int, data: st.DataObject) -> None:
    with installed() as fake:
        kernels = kernels_of(fake, way)
        outwards = [data.draw(st.booleans(), label=f"tensor {index} is written") for index in range(count)]
        static, outside, others = (fresh(fake, count) for _ in range(3))
        pairs = [
            (theirs, ours) if out else (ours, theirs)
            for ours, theirs, out in zip(static, outside, outwards, strict=True)
        ]
        graph = captured(fake, pairs, kernels)
        found = find_copies(graph, outside, kernels)
        assert [[place.offset for place in places] for places in found] == [[0]] * count
        moved = data.draw(st.sets(st.integers(0, count - 1)), label="pointed elsewhere")
        for index in range(count):
            static[index].fill_(index)
            outside[index].fill_(100 + index)
            others[index].fill_(200 + index)
        run(graph, [(place, others[index].data_ptr()) for index in sorted(moved) for place in found[index]])
        for index, out in enumerate(outwards):
            theirs = others[index] if index in moved else outside[index]
            assert torch.equal(static[index], theirs), "what is told of one says nothing of another in the same node"
            value = index if out else (200 if index in moved else 100) + index
            assert static[index].tolist() == [value] * SIZE
        if kernels is not None:
            assert len({int(place.arguments[0]) for (place,) in found}) == -(-count // MAX_COPIES)


def test_a_tensor_copied_never_or_twice(fake: Torch, kernels: CopyKernels | None) -> None:
    static, outside = fresh(fake, 2), fresh(fake, 1)
    behind = fake.driver.heap.tensor(range(SIZE + 1))
    with pytest.raises(CannotBind, match="tensor 0 is copied by 0 nodes instead of one"):
        find_copies(captured(fake, [(static[0], behind[1:])], kernels), [behind[:-1]], kernels)
    with pytest.raises(CannotBind, match="tensor 0 is copied by 0 nodes instead of one"):
        find_copies(captured(fake, [(static[0][1:], outside[0][1:])], kernels), [outside[0]], kernels)
    with pytest.raises(CannotBind, match="tensor 0 is copied by 2 nodes instead of one"):
        find_copies(captured(fake, [(target, outside[0]) for target in static], kernels), outside, kernels)


def test_kernels_of_others_are_none_of_its(fake: Torch) -> None:
    kernels = kernels_of(fake, "kernels")
    static, outside = fresh(fake, 2)
    alike = fake.driver.kernel([192], lambda memory, copies: None)
    values = CopyList(outside.data_ptr(), static.data_ptr(), 4 * SIZE)
    stream = driver.new_stream()
    driver.begin_capture(stream)
    fake.driver.launch(alike, [bytes(values)], int(stream))
    with pytest.raises(CannotBind, match="tensor 0 is copied by 0 nodes"):
        find_copies(driver.end_capture(stream), [outside], kernels)


@pytest.mark.parametrize("name", ["cuGraphGetNodes", "cuGraphNodeGetType", "cuGraphMemcpyNodeGetParams"])
def test_a_failing_call_is_a_cuda_error(fake: Torch, name: str) -> None:
    static, outside = fresh(fake, 2)
    graph = captured(fake, [(static, outside)], None)
    fake.driver.fail(name)
    with pytest.raises(CudaError, match=f"{name} failed with CUDA_ERROR_UNKNOWN"):
        find_copies(graph, [outside], None)


def test_a_graph_for_which_the_kernel_is_unknown_is_no_error(fake: Torch) -> None:
    """Who gave no kernels finds none."""
    static, outside = fresh(fake, 2)
    graph = captured(fake, [(static, outside)], kernels_of(fake, "kernels"))
    with pytest.raises(CannotBind):
        find_copies(graph, [outside], None)


def test_a_copy_that_is_late_sees_what_the_work_wrote(fake: Torch, kernels: CopyKernels | None) -> None:
    source, target = fresh(fake, 2)

    def write(memory: Memory) -> None:
        source.fill_(5)

    kernel = fake.driver.kernel([], write)
    stream = driver.new_stream()
    driver.begin_capture(stream)
    work = with_copies(lambda stream: fake.driver.launch(kernel, [], stream) is None, [], [(target, source)], kernels)
    work(int(stream))
    run(driver.end_capture(stream))
    assert target.tolist() == [5.0] * SIZE


# ---- replayed


@pytest.mark.parametrize("library", ["python", "compiled"])
def test_a_node_of_several_tensors_is_pointed_elsewhere_once(
    fake: Torch, library: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = None
    if library == "compiled":
        functions = compiled_way.use(request.getfixturevalue("compiled"), fake, monkeypatch)
    kernels, owner = kernels_of(fake, "kernels"), StreamOrder(0)
    x, y, total, *outside = fresh(fake, 6)

    def add(memory: Memory) -> None:
        torch.add(x, y, out=total)

    kernel = fake.driver.kernel([], add)

    def enqueue(stream: int) -> bool:
        fake.driver.launch(kernel, [], stream)
        return True

    work = with_copies(enqueue, [(x, outside[0]), (y, outside[1])], [(outside[2], total)], kernels)
    graph = capture_enqueue(work, owner, "")
    order_copies(graph, kernels)
    slots = [
        IoSlot(own, places, 1) for own, places in zip((x, y, total), find_copies(graph, outside, kernels), strict=True)
    ]
    made = CudaGraph(
        graph,
        inputs=slots[:2],
        outputs=slots[2:],
        lane=owner,
        keep=outside,
        release=lambda: None,
    )
    with fake.on(fake.new_stream()), torch.no_grad():
        made.replay(fresh(fake, 2))
        call = made.replay if functions is None else compiled_way.call(made, x, y)
        kept = []
        for step in range(6):
            given_ = [tensor.mul_(step) for tensor in fresh(fake, 2)]
            fake.driver.calls.clear()
            kept.append((call(given_), given_))
            # Native code points the node of the outputs at the next ones already, but for its first call.
            nodes = 3 if functions is not None and step == 0 else 2
            assert fake.driver.calls.count("cuGraphExecKernelNodeSetParams") == nodes
    assert functions is None or functions.raised == []
    for (answer,), (left, right) in kept:
        assert torch.equal(answer, left + right)
