"""A CUDA graph on the stand-in for the driver: what it answers, whatever it is called with and whatever fails."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphcache.errors import ClosedError, CudaError, Reason, Refusal
from graphcache.graphs import driver
from graphcache.graphs.cuda import EXECUTABLE_BYTES, MAX_EXECUTABLES, NODE_BYTES, CudaGraph, IoSlot
from graphcache.graphs.stream_order import StreamOrder
from tests.graphs import compiled as compiled_way
from tests.graphs import fake_driver
from tests.graphs.fake_driver import Affine, Stream, Torch, address, installed, pointer
from tests.helpers import in_threads

KINDS = ("bound", "copying", "staged")
SIZE = 6


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(patch=monkeypatch) as fake:
        yield fake


@pytest.fixture(params=KINDS)
def graph(fake: Torch, request: pytest.FixtureRequest) -> CudaGraph:
    made: CudaGraph = getattr(Affine(fake, SIZE, StreamOrder(0)), request.param)()
    return made


@pytest.fixture
def bound(fake: Torch) -> CudaGraph:
    return Affine(fake, SIZE, StreamOrder(0)).bound()


def given_to(fake: Torch, start: float = 0.0, **options: Any) -> Tensor:
    return fake.driver.heap.tensor([start + index for index in range(SIZE)], **options)


def right(answer: list[Tensor], x: Tensor) -> bool:
    return len(answer) == 1 and torch.equal(answer[0], x * 3 + 1)


# ---- answers


def test_answers(fake: Torch, graph: CudaGraph) -> None:
    for start in (0, 5, -2):
        x = given_to(fake, start)
        assert right(graph.replay([x]), x)
        assert x.tolist() == given_to(fake, start).tolist(), "inputs are not changed"


@pytest.mark.parametrize("way", ["python", "compiled"])
@given(
    st.sampled_from(KINDS),
    st.lists(
        st.tuples(
            st.sampled_from(["fresh", "same", "unaligned", "changed"]),
            st.integers(0, 2),
            st.sampled_from(["fresh", "out", "inference", "short", "again"]),
        ),
        min_size=1,
        max_size=12,
    ),
)
def test_any_inputs_on_any_streams(
    way: str, request: pytest.FixtureRequest, kind: str, steps: list[tuple[str, int, str]]
) -> None:
    """Every answer is right, stays intact, belongs to the caller, and nothing races or is read after it was freed."""
    with pytest.MonkeyPatch.context() as patch, installed(patch=patch) as fake:
        made: CudaGraph = getattr(Affine(fake, SIZE, StreamOrder(0)), kind)()
        streams = [Stream(fake.driver, 0), fake.new_stream(), fake.new_stream()]
        same = given_to(fake, 100)
        kept: list[tuple[Tensor, Tensor]] = []
        fire, into = (lambda x, stream: None), (lambda x, out, stream: False)
        functions = None
        if way == "compiled":
            functions = compiled_way.use(request.getfixturevalue("compiled"), fake, patch)
            fire, into, _ = compiled_way.single(made, same)
        out: list[Tensor] | None = None
        for number, (how, stream, to) in enumerate(steps):
            x = same if how in ("same", "changed") else given_to(fake, number, offset=36 * (how == "unaligned"))
            if how == "changed":
                same += 1
            if to == "again" and out is not None:
                with fake.on(streams[stream]):
                    if not into(x, out[0], streams[stream].cuda_stream):
                        made.replay([x], out)
                assert right(out, x)
                kept = [(earlier, wanted) for earlier, wanted in kept if earlier is not out[0]]
                kept.append((out[0], x * 3 + 1))
                continue
            out = [fake.empty_like(x)] if to == "out" else None
            with fake.on(streams[stream]), torch.inference_mode() if to == "inference" else nullcontext():
                short = fire(x, streams[stream].cuda_stream) if to == "short" else None
                answer = made.replay([x], out) if short is None else [short]
            assert answer is out or out is None
            assert right(answer, x)
            assert answer[0].is_inference() == (to == "inference")
            assert all(answer[0].data_ptr() != earlier.data_ptr() for earlier, _ in kept)
            kept.append((answer[0], x * 3 + 1))
        assert all(torch.equal(answer, wanted) for answer, wanted in kept)
        made.close()
        assert functions is None or functions.raised == []
        assert fake.driver.leaked() in ({}, {"events": 1})


@pytest.mark.parametrize("make", [lambda x: x.reshape(2, 3).t().reshape(-1), lambda x: x.repeat_interleave(2)[::2]])
def test_strided_inputs_are_copied_by_an_operation(fake: Torch, make: Callable[[Tensor], Tensor]) -> None:
    staged = Affine(fake, SIZE, StreamOrder(0)).staged()
    x = make(given_to(fake))
    for _ in range(2):
        assert right(staged.replay([x]), x)


def test_only_what_changed_is_patched(fake: Torch, bound: CudaGraph) -> None:
    x, other, out = given_to(fake), given_to(fake, 1), [fake.driver.heap.empty(SIZE)]
    setter = "cuGraphExecKernelNodeSetParams"
    with fake.on(fake.new_stream()):
        bound.replay([x], out)
        for replay, asked in (
            (lambda: bound.replay([x], out), []),
            (lambda: bound.replay([other], out), [setter]),
            (lambda: bound.replay([other]), [setter]),
            (lambda: bound.replay([x]), [setter, setter]),
        ):
            fake.driver.calls.clear()
            replay()
            assert fake.driver.calls == [*asked, "cuGraphLaunch"]


def test_answers_are_of_the_inference_mode_that_they_are_made_in(fake: Torch, bound: CudaGraph) -> None:
    x = given_to(fake)
    bound.replay([x])
    for inference in (True, True, False):
        with torch.inference_mode(inference):
            (answer,) = bound.replay([x])
        assert answer.is_inference() is inference
        assert torch.equal(answer, x * 3 + 1)


def test_threads(fake: Torch, graph: CudaGraph) -> None:
    streams = [fake.new_stream() for _ in range(4)]

    def work(index: int) -> None:
        with fake.on(streams[index]):
            for step in range(15):
                x = given_to(fake, 100 * index + step)
                assert right(graph.replay([x]), x)

    in_threads(work)


@pytest.mark.parametrize(("read", "written", "done"), [(0, 256, False), (256, 0, False), (0, 0, False), (0, 512, True)])
@pytest.mark.parametrize("kind", ["bound", "copying"])
def test_nothing_is_written_where_it_is_read(
    fake: Torch, monkeypatch: pytest.MonkeyPatch, compiled: Any, kind: str, read: int, written: int, done: bool
) -> None:
    """A kernel may read after another one has begun to write; copy nodes do too, before the last one ends."""
    compiled_way.use(compiled, fake, monkeypatch)
    made: CudaGraph = getattr(Affine(fake, 96, StreamOrder(0)), kind)()
    memory = fake.driver.heap.tensor([float(index) for index in range(256)])
    x, out = memory[read // 4 :][:96], memory[written // 4 :][:96]
    _, into, _ = compiled_way.single(made, x)
    wanted, stream = x * 3 + 1, fake.new_stream()
    with fake.on(stream):
        made.replay([fake.driver.heap.clone(x)])
        assert into(x, out, stream.cuda_stream) is done
        assert torch.equal(out, wanted) is done
        for bad in (memory[1:][:96], memory[512 // 4 :][:95], memory[:96].double(), memory[:96].reshape(2, 48)):
            assert not into(x, bad, stream.cuda_stream)


def test_several_outputs(fake: Torch) -> None:
    """2 x, which a copy node takes out, x itself, which a kernel writes, and x + 1, which is copied afterwards."""
    heap, owner = fake.driver.heap, StreamOrder(0)
    x, double, same, more = (heap.empty(4) for _ in range(4))
    outside = heap.empty(4)

    def body(memory: fake_driver.Memory, x: bytes, double: bytes, same: bytes, more: bytes) -> None:
        value = memory.load(address(x), (4,), torch.float32)
        for place, result in ((double, value * 2), (same, value), (more, value + 1)):
            memory.store(address(place), result)

    kernel = fake.driver.kernel([8, 8, 8, 8], body)

    def enqueue(stream: int) -> bool:
        fake.driver.launch(kernel, [pointer(x), pointer(double), pointer(same), pointer(more)], stream)
        driver.call("cuMemcpyDtoDAsync", outside.data_ptr(), double.data_ptr(), 16, stream)
        return True

    first = fake_driver.stream_order.capture_enqueue(enqueue, owner, "")
    (copied,) = fake_driver.param_patching.find_copies(first, [outside])
    mine, others = [x, double, same, more], [heap.empty(4) for _ in range(4)]
    x, double, same, more = others
    second = fake_driver.stream_order.capture_enqueue(enqueue, owner, "")
    found = fake_driver.param_patching.find_pointers(first, second, mine, others)
    driver.call("cuGraphDestroy", second)
    made = CudaGraph(
        first,
        inputs=[IoSlot(mine[0], found[0], 256)],
        outputs=[IoSlot(mine[1], copied, 1), IoSlot(mine[2], found[2], 256), IoSlot(mine[3], [], 1)],
        order=owner,
        keep=mine,
        release=lambda: None,
    )
    assert fake_driver.copies(made) == 1
    kept = []
    for start in range(4):
        given_x = heap.tensor([start, 1, 2, 3])
        kept.append((given_x, made.replay([given_x])))
    for given_x, answer in kept:
        assert [each.tolist() for each in answer] == [each.tolist() for each in (given_x * 2, given_x, given_x + 1)]


# ---- out=


def test_out(fake: Torch, graph: CudaGraph) -> None:
    out = [fake.driver.heap.empty(SIZE)]
    for start in range(3):
        x = given_to(fake, start)
        assert graph.replay([x], out) is out
        assert right(out, x)
    x = given_to(fake, 9)
    before = out[0].clone()
    assert right(graph.replay([x]), x)
    assert torch.equal(out[0], before), "later replays write elsewhere"


def test_an_unaligned_out_is_refused_by_kernels_and_taken_by_copies(fake: Torch) -> None:
    x, out = given_to(fake), [fake.driver.heap.empty(SIZE, offset=4)]
    made = Affine(fake, SIZE, StreamOrder(0)).bound()
    with pytest.raises(CudaError, match=rf"^an output at {out[0].data_ptr():#x} is not aligned to 256 bytes$"):
        made.replay([x], out)
    assert right(made.replay([x]), x)
    for kind in ("copying", "staged"):
        made = getattr(Affine(fake, SIZE, StreamOrder(0)), kind)()
        assert right(made.replay([x], out), x)


def test_a_wrong_number_of_outs_leaves_the_graph_sound(fake: Torch, graph: CudaGraph) -> None:
    x = given_to(fake)
    with pytest.raises(ValueError):
        graph.replay([x], [])
    assert right(graph.replay([x]), x)


# ---- pinned


def test_pin_and_launch(fake: Torch, graph: CudaGraph) -> None:
    x = given_to(fake)
    (answer,) = graph.replay([x])
    before = answer.clone()
    (static,), (output,) = graph.pin()
    for start in range(3):
        static.copy_(given_to(fake, start))
        graph.launch()
        assert torch.equal(output, static * 3 + 1)
    assert torch.equal(answer, before), "what was handed out is not written again"
    assert right(graph.replay([x]), x)


def test_launches_follow_one_another_on_any_stream(fake: Torch, bound: CudaGraph) -> None:
    (static,), (output,) = bound.pin()
    static.fill_(2)
    for stream in [fake.new_stream() for _ in range(3)] * 2:
        with fake.on(stream):
            bound.launch()
    assert output.tolist() == [7.0] * SIZE


def test_launching_asks_the_driver_for_nothing_else(fake: Torch, bound: CudaGraph) -> None:
    bound.pin()
    with fake.on(fake.new_stream()):
        bound.launch()
        fake.driver.calls.clear()
        bound.launch()
    assert fake.driver.calls == ["cuGraphLaunch"]


def test_a_thread_that_has_used_no_cuda(fake: Torch, bound: CudaGraph) -> None:
    """The legacy default stream is that of the current context, and such a thread has none."""
    x = given_to(fake)
    bound.replay([x])

    def work(index: int) -> None:
        fake.driver.strangers.add(threading.get_ident())
        assert right(bound.replay([x]), x)
        bound.pin()
        bound.launch()
        assert int(fake.driver.cuCtxGetCurrent()[1]) == 0, "it is left as it was"
        if not index:
            bound.close()

    in_threads(work, 1)
    assert not fake.driver.executables


# ---- poison


def test_poisoned_buffers_do_not_reach_an_answer(fake: Torch, graph: CudaGraph) -> None:
    x = given_to(fake)
    graph.replay([x])
    graph.poison()
    slots = (*graph.inputs, *graph.outputs)
    assert all(slot.buffer.isnan().all() for slot in slots)
    assert right(graph.replay([x]), x)


def test_poison_is_ordered_after_the_last_replay(fake: Torch, bound: CudaGraph) -> None:
    one, two = fake.new_stream(), fake.new_stream()
    with fake.on(one):
        bound.replay([given_to(fake)])
    with fake.on(two):
        bound.poison()
    assert fake.driver.ordered(one.cuda_stream, two.cuda_stream)


# ---- failures


@pytest.mark.parametrize("after", range(3))
def test_a_failing_launch(fake: Torch, graph: CudaGraph, after: int) -> None:
    for _ in range(after):
        graph.replay([given_to(fake)])
    fake.driver.fail("cuGraphLaunch", "LAUNCH_FAILED")
    x = given_to(fake, 7)
    with pytest.raises(CudaError, match=r"^cuGraphLaunch failed with CUDA_ERROR_LAUNCH_FAILED \(719\); .*restart"):
        graph.replay([x])
    for start in range(3):
        x = given_to(fake, start)
        assert right(graph.replay([x]), x)
    graph.pin()
    fake.driver.fail("cuGraphLaunch")
    with pytest.raises(CudaError, match=r"^cuGraphLaunch failed with CUDA_ERROR_UNKNOWN \(999\)$"):
        graph.launch()
    graph.launch()


@given(
    st.sampled_from(["bound", "copying"]),
    st.integers(0, 2),
    st.integers(0, 6),
    st.booleans(),
)
def test_wherever_the_driver_fails_an_answer_is_right_or_an_error(kind: str, ran: int, after: int, out: bool) -> None:
    with installed() as fake:
        made: CudaGraph = getattr(Affine(fake, SIZE, StreamOrder(0)), kind)()
        name = f"cuGraphExec{'Kernel' if kind == 'bound' else 'Memcpy'}NodeSetParams"
        kept = []
        for step in range(ran):
            x = given_to(fake, step)
            kept.append((made.replay([x]), x))
        fake.driver.fail(name, after=after)
        raised: list[str] = []
        for step in range(5):
            x = given_to(fake, 10 + step)
            try:
                kept.append((made.replay([x], [fake.empty_like(x)] if out else None), x))
            except CudaError as error:
                raised.append(str(error))
        assert raised in ([], [f"{name} failed with CUDA_ERROR_UNKNOWN (999)"])
        assert len(kept) == ran + 5 - len(raised)
        assert all(right(answer, x) for answer, x in kept)


def test_a_kernel_that_fails_is_a_cuda_error(fake: Torch, bound: CudaGraph) -> None:
    bound.pin()
    bound._point([bound.inputs[0].address, given_to(fake).data_ptr()])
    with pytest.raises(CudaError, match="cuGraphLaunch failed with CUDA_ERROR_ILLEGAL_ADDRESS"):
        bound.launch()


def test_no_memory_for_the_outputs(fake: Torch, graph: CudaGraph) -> None:
    x, heap = given_to(fake), fake.driver.heap
    kept = [graph.replay([x])]
    heap.refuse_after = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        graph.replay([x])
    heap.refuse_after = None
    kept += [graph.replay([x]), graph.replay([x])]
    assert all(right(answer, x) for answer in kept)
    assert len({answer[0].data_ptr() for answer in kept}) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_an_allocator_that_aligns_to_less(fake: Torch, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The graph must never go on writing into what was handed out before, nor hand out what nothing wrote."""
    made: CudaGraph = getattr(Affine(fake, SIZE, StreamOrder(0)), kind)()
    heap, x = fake.driver.heap, given_to(fake)
    before = made.replay([x])
    monkeypatch.setattr(IoSlot, "fresh", lambda slot: heap.empty(slot.buffer.shape, offset=16).fill_(-1))
    if kind == "bound":
        with pytest.raises(CudaError, match="is not aligned to 256 bytes"):
            made.replay([given_to(fake, 1)])
    else:
        other = given_to(fake, 1)
        assert right(made.replay([other]), other)
    assert right(before, x)


# ---- making and closing


def test_a_graph_without_nodes_is_refused_and_released(fake: Torch) -> None:
    stream = fake_driver.new_stream()
    fake_driver.begin_capture(stream)
    empty = driver.end_capture(stream)
    with pytest.raises(Refusal) as caught:
        CudaGraph(
            empty,
            inputs=[],
            outputs=[],
            order=StreamOrder(0),
            keep=None,
            release=lambda: None,
        )
    assert caught.value.cause.reason is Reason.EMPTY_GRAPH
    assert fake.driver.leaked() == {}


@pytest.mark.parametrize(
    "name", ["cuGraphGetNodes", "cuStreamCreate", "cuGraphInstantiateWithParams", "cuStreamSynchronize"]
)
def test_what_fails_while_it_is_made_is_released(fake: Torch, name: str) -> None:
    work = Affine(fake, SIZE, StreamOrder(0))
    stream = fake_driver.new_stream()
    fake_driver.begin_capture(stream)
    work.enqueue(int(stream))
    captured = driver.end_capture(stream)
    fake.driver.fail(name, "OUT_OF_MEMORY")
    with pytest.raises(CudaError, match=f"{name} failed with CUDA_ERROR_OUT_OF_MEMORY"):
        work._graph(captured, [], [])
    gc.collect()
    assert fake.driver.leaked() == {}


def test_a_new_graph_is_uploaded_and_waited_for(fake: Torch) -> None:
    work = Affine(fake, SIZE, StreamOrder(0))
    captured = work.capture()
    fake.driver.calls.clear()
    made = work._graph(captured, [], [])
    assert fake.driver.calls[-2:] == ["cuGraphInstantiateWithParams", "cuStreamSynchronize"]
    made.close()


def test_accounts_for_memory(fake: Torch) -> None:
    work = Affine(fake, SIZE, StreamOrder(0))
    made = work.bound()
    assert made.nodes == 2
    assert made.nbytes == 3 * 4 * SIZE + MAX_EXECUTABLES * (EXECUTABLE_BYTES + 2 * NODE_BYTES)
    assert fake_driver.copies(made) == 0
    captured = work.capture()
    whole = fake.driver.heap.empty(2 * SIZE)
    halves = whole[:SIZE], whole[SIZE:]
    shared = CudaGraph(
        captured,
        inputs=[IoSlot(halves[0], [], 1)],
        outputs=[IoSlot(halves[1], [], 1)],
        order=work.order,
        keep=None,
        release=lambda: None,
        pool_bytes=1000,
    )
    # One storage counts once, and the next outputs beside it.
    assert shared.nbytes == 3 * 4 * SIZE + 1000 + EXECUTABLE_BYTES + 2 * NODE_BYTES
    assert fake_driver.copies(shared) == 2


def test_close_gives_everything_back(fake: Torch, graph: CudaGraph) -> None:
    kept = weakref.ref(graph._held[-1])
    x = given_to(fake)
    (answer,) = graph.replay([x])
    graph.close()
    graph.close()
    gc.collect()
    assert kept() is None
    assert fake.driver.leaked() == {}
    assert len(fake.driver.heap.blocks) == 3, "input, answer, and the scratch memory of the order"
    assert torch.equal(answer, x * 3 + 1)


def test_a_closed_graph_says_so(fake: Torch, graph: CudaGraph) -> None:
    graph.close()
    fake.driver.calls.clear()
    with pytest.raises(ClosedError, match=r"^the graph was closed; call the module again to capture a new one$"):
        graph.replay([given_to(fake)])
    for refused in (graph.pin, graph.launch):
        with pytest.raises(ClosedError, match=r"^the graph was closed; make a new session$"):
            refused()
    graph.poison()
    assert "cuGraphLaunch" not in fake.driver.calls


def test_close_waits_for_the_last_launch(fake: Torch, bound: CudaGraph) -> None:
    """The stand-in refuses to destroy an executable that still runs."""
    for stream in (fake.new_stream(), fake.new_stream()):
        with fake.on(stream):
            bound.replay([given_to(fake)])
    fake.driver.calls.clear()
    bound.close()
    assert fake.driver.calls == [
        "cuCtxPushCurrent",
        "cuStreamIsCapturing",
        "cuStreamIsCapturing",
        "cuStreamSynchronize",
        "cuGraphExecDestroy",
        "cuGraphDestroy",
        "cuCtxPopCurrent",
    ]


def test_close_while_its_stream_is_captured_is_put_off(fake: Torch) -> None:
    owner = StreamOrder(0)
    one, two = Affine(fake, SIZE, owner).bound(), Affine(fake, SIZE, owner).bound()
    stream = fake.new_stream()
    with fake.on(stream):
        one.replay([given_to(fake)])
    kept = weakref.ref(one._held[-1])
    handle = driver.binding().CUstream(stream.cuda_stream)
    fake_driver.begin_capture(handle)
    one.close()
    one.close()
    gc.collect()
    assert fake.driver.leaked() == {"graphs": 2, "executables": 2}
    assert kept() is not None, "what the kernels refer to stays as long as they may run"
    captured = driver.end_capture(handle)
    assert captured is not None, "the caller's capture is whole"
    driver.call("cuGraphDestroy", captured)
    two.close()
    gc.collect()
    assert fake.driver.leaked() == {}
    assert kept() is None


def test_a_graph_that_nobody_closed(fake: Torch) -> None:
    made = Affine(fake, SIZE, StreamOrder(0)).bound()
    with fake.on(fake.new_stream()):
        made.replay([given_to(fake)])
    del made
    gc.collect()
    assert fake.driver.leaked() == {}
    assert len(fake.driver.heap.blocks) == 0


def test_a_graph_that_nobody_closed_goes_quietly_with_a_lost_device(
    fake: Torch, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, said = Affine(fake, SIZE, StreamOrder(0)).bound(), []
    made.replay([given_to(fake)])
    fake.driver.lost = "ILLEGAL_ADDRESS"
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    del made
    gc.collect()
    assert said == []


def test_a_release_that_fails_still_lets_go_of_the_memory(fake: Torch) -> None:
    work = Affine(fake, SIZE, StreamOrder(0))
    made = work.bound()
    with fake.on(fake.new_stream()):
        made.replay([given_to(fake)])
    kept = weakref.ref(work)
    del work
    fake.driver.fail("cuGraphExecDestroy")
    with pytest.raises(CudaError, match="cuGraphExecDestroy failed"):
        made.close()
    made.close()
    gc.collect()
    assert kept() is None
    assert "graphs" not in fake.driver.leaked(), "the other half is given back all the same"


def test_the_legacy_stream_is_the_current_one_by_default(fake: Torch, bound: CudaGraph) -> None:
    bound.replay([given_to(fake)])
    assert bound.order.stream == 0


def test_launching_into_a_capture_of_the_callers_makes_a_node(fake: Torch, bound: CudaGraph) -> None:
    (static,), (output,) = bound.pin()
    static.fill_(2)
    stream = fake.new_stream()
    with fake.on(stream):
        bound.launch()
        output.zero_()
        handle = driver.binding().CUstream(stream.cuda_stream)
        fake_driver.begin_capture(handle)
        bound.launch()
        captured = driver.end_capture(handle)
    assert output.tolist() == [0.0] * SIZE
    executable = fake_driver.instantiate(captured, stream.cuda_stream)
    driver.call("cuGraphLaunch", executable, handle)
    assert output.tolist() == [7.0] * SIZE
