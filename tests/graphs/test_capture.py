"""Captures on the stand-in for the driver: whatever happens inside, the stream leaves the capture and nothing leaks."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from graphcache.errors import CudaError, Reason, Refusal
from graphcache.graphs import capture, driver, stream_order
from graphcache.graphs.buffers import packed
from graphcache.graphs.capture import record_torch, refusal_of
from graphcache.graphs.cuda import CudaGraph
from graphcache.graphs.stream_order import StreamOrder, capture_enqueue, capture_lock, capturing
from tests.graphs import fake_driver
from tests.graphs.fake_driver import Affine, Memory, Torch, address, installed, pointer

SIZE = 6


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(patch=monkeypatch) as fake:
        yield fake


@pytest.fixture
def work(fake: Torch) -> Affine:
    return Affine(fake, SIZE, StreamOrder(0))


def sound(fake: Torch) -> bool:
    """No stream is in a capture, nothing was left behind, and the collector is on."""
    return not fake.driver.capturing() and fake.driver.leaked() == {} and gc.isenabled()


# ---- capture_enqueue


def test_captures_what_was_enqueued_and_runs_none_of_it(fake: Torch, work: Affine) -> None:
    work.y.zero_()
    graph = capture_enqueue(work.enqueue, work.order, "affine")
    assert fake_driver.node_count(graph) == 2
    assert work.y.tolist() == [0.0] * SIZE
    assert not fake.driver.capturing()
    driver.call("cuGraphDestroy", graph)
    assert sound(fake)


def test_captures_in_thread_local_mode_on_a_stream_of_its_own(
    fake: Torch, work: Affine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    real = fake.driver.cuStreamBeginCapture
    monkeypatch.setattr(
        fake.driver,
        "cuStreamBeginCapture",
        lambda stream, mode: (seen.append((int(stream), mode)), real(stream, mode))[1],
    )
    streams: list[int] = []
    driver.call("cuGraphDestroy", capture_enqueue(lambda stream: bool(streams.append(stream)) or True, work.order, ""))
    assert seen == [(streams[0], fake.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)]
    assert streams[0] != 0


@pytest.mark.parametrize(
    ("said", "detail"),
    [("IIfConditional is not capturable", "IIfConditional is not capturable"), ("", "the enqueue was refused or")],
)
def test_a_refusal_is_told_after_the_capture_has_ended(fake: Torch, work: Affine, said: str, detail: str) -> None:
    work.accepts = False
    at: list[list[int]] = []

    def ask() -> str:
        at.append(fake.driver.capturing())
        return said

    with pytest.raises(Refusal) as caught:
        capture_enqueue(work.enqueue, work.order, "affine", ask)
    cause = caught.value.cause
    assert (cause.reason, cause.where) == (Reason.NOT_CAPTURABLE, "affine")
    assert cause.detail.startswith(detail)
    assert at == [[]]
    assert sound(fake)


@pytest.mark.parametrize("enqueued", [False, True])
def test_a_refusal_after_half_of_the_work(fake: Torch, work: Affine, enqueued: bool) -> None:
    with pytest.raises(Refusal, match="not_capturable"):
        capture_enqueue(lambda stream: enqueued and work.enqueue(stream) and False, work.order, "")
    assert sound(fake)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3), CudaError("x"), MemoryError()])
@pytest.mark.parametrize("invalidated", [False, True])
def test_an_exception_comes_out_as_it_is(fake: Torch, work: Affine, error: BaseException, invalidated: bool) -> None:
    def enqueue(stream: int) -> bool:
        work.enqueue(stream)
        if invalidated:
            fake.driver.invalidate(stream)
        raise error

    with pytest.raises(type(error)) as caught:
        capture_enqueue(enqueue, work.order, "")
    assert caught.value is error
    assert sound(fake)


def test_an_invalidated_capture_is_a_refusal(fake: Torch, work: Affine) -> None:
    def enqueue(stream: int) -> bool:
        work.enqueue(stream)
        fake.driver.invalidate(stream)
        return True

    with pytest.raises(Refusal, match="the enqueue was refused or invalidated the capture"):
        capture_enqueue(enqueue, work.order, "affine")
    assert sound(fake)
    driver.call("cuGraphDestroy", work.capture())


def test_waiting_inside_is_a_refusal(fake: Torch, work: Affine) -> None:
    def enqueue(stream: int) -> bool:
        fake.cuda.current_stream()
        driver.binding().cuStreamSynchronize(stream)
        return True

    with pytest.raises(Refusal):
        capture_enqueue(enqueue, work.order, "affine")
    assert sound(fake)


def test_work_on_a_side_stream_that_never_joins_is_a_refusal(fake: Torch, work: Affine) -> None:
    side, event = fake_driver.new_stream(), driver.new_event()

    def enqueue(stream: int) -> bool:
        fake_driver.order(event, driver.binding().CUstream(stream), side)
        return work.enqueue(int(side))

    with pytest.raises(Refusal):
        capture_enqueue(enqueue, work.order, "affine")
    driver.call("cuEventDestroy", event)
    assert sound(fake)


def test_work_on_a_side_stream_that_joins_is_captured(fake: Torch, work: Affine) -> None:
    side, fork, join = fake_driver.new_stream(), driver.new_event(), driver.new_event()

    def enqueue(stream: int) -> bool:
        handle = driver.binding().CUstream(stream)
        fake_driver.order(fork, handle, side)
        work.enqueue(int(side))
        fake_driver.order(join, side, handle)
        return True

    assert fake_driver.node_count(capture_enqueue(enqueue, work.order, "affine")) == 2
    assert not fake.driver.capturing()


def test_a_capture_inside_of_a_capture_leaves_the_outer_one_whole(fake: Torch, work: Affine) -> None:
    inner: list[CudaError] = []

    def enqueue(stream: int) -> bool:
        work.enqueue(stream)
        with pytest.raises(CudaError, match="cuStreamBeginCapture failed with CUDA_ERROR_ILLEGAL_STATE") as caught:
            work.capture()
        inner.append(caught.value)
        return True

    assert fake_driver.node_count(capture_enqueue(enqueue, work.order, "")) == 2
    assert inner


@pytest.mark.parametrize("name", ["cuStreamCreate", "cuStreamBeginCapture"])
def test_a_capture_that_cannot_begin(fake: Torch, work: Affine, name: str) -> None:
    fake.driver.fail(name, "OUT_OF_MEMORY")
    ran: list[int] = []
    with pytest.raises(CudaError, match=f"{name} failed with CUDA_ERROR_OUT_OF_MEMORY"):
        capture_enqueue(lambda stream: bool(ran.append(stream)), work.order, "")
    assert ran == []
    assert sound(fake)
    driver.call("cuGraphDestroy", work.capture())


def test_no_collection_inside(fake: Torch, work: Affine) -> None:
    seen: list[bool] = []

    def enqueue(stream: int) -> bool:
        seen.append(gc.isenabled())
        return False

    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            with pytest.raises(Refusal):
                capture_enqueue(enqueue, work.order, "")
            assert gc.isenabled() is enabled
        finally:
            gc.enable()
    assert seen == [False, False]


def test_two_captures_on_two_devices_keep_the_collector_quiet_until_both_have_ended() -> None:
    one = two = stream_order.quiet_collector
    one.__enter__()
    two.__enter__()
    try:
        one.__exit__(None, None, None)
        assert not gc.isenabled(), "the other one is still capturing"
    finally:
        two.__exit__(None, None, None)
        during = gc.isenabled()
        gc.enable()
    assert during


# ---- record_torch


def recorded(
    body: Callable[[], Sequence[Tensor]],
    inputs: Sequence[Tensor],
    direct: Sequence[bool],
    expected: Sequence[Tensor],
    order: StreamOrder,
    release: Callable[[], object] = list,
    shared: bool = False,
) -> CudaGraph:
    captured, slots = record_torch(body, inputs, direct, expected, order, "net", full_edges=False)
    return CudaGraph(
        captured,
        inputs=slots[: len(inputs)],
        outputs=slots[len(inputs) :],
        order=order,
        keep=(body, order.pool()),
        release=release,
        pool_bytes=0 if shared else order.pool().nbytes,
    )


class Module:
    """Stands in for a module that launches kernels: 2 x + y, and x.t() as a tensor of another layout."""

    def __init__(self, fake: Torch) -> None:
        self.fake = fake
        self.x, self.y = (fake.driver.heap.tensor(range(4)).reshape(2, 2) for _ in range(2))
        self.order = StreamOrder(0)
        self.modes: list[tuple[bool, bool]] = []
        self.releases = 0
        self.fails: BaseException | None = None
        self.kernel = fake.driver.kernel([8, 8, 8, 8], self._body)

    @staticmethod
    def _body(memory: Memory, x: bytes, y: bytes, total: bytes, turned: bytes) -> None:
        left, right = (memory.load(address(each), (2, 2), torch.float32) for each in (x, y))
        memory.store(address(total), 2 * left + right)
        memory.store(address(turned), left)

    def __call__(self) -> Sequence[Tensor]:
        self.modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        if self.fails is not None:
            raise self.fails
        total, whole = self.fake.empty_like(self.x), self.fake.empty_like(self.x)
        stream = self.lane_stream()
        self.fake.driver.launch(self.kernel, [pointer(each) for each in (self.x, self.y, total, whole)], stream)
        return [total, whole.t()]

    def release(self) -> None:
        self.releases += 1

    def lane_stream(self) -> int:
        return stream_order.own_stream(0, "capture").cuda_stream

    def record(self, direct: Sequence[bool] = (True, True), transposed: bool = True, shared: bool = False) -> CudaGraph:
        second = torch.empty(2, 2).t() if transposed else torch.empty(2, 2)
        expected = [torch.empty(2, 2), second]
        return recorded(self, [self.x, self.y], direct, expected, self.order, self.release, shared)


@pytest.mark.parametrize("direct", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("transposed", [True, False])
def test_torch_graphs_answer(fake: Torch, direct: tuple[bool, bool], transposed: bool) -> None:
    module = Module(fake)
    graph = module.record(direct, transposed)
    assert fake_driver.copies(graph) == direct.count(False) + (not transposed)
    assert graph.nodes == sum(direct) + 1 + 1 + transposed, "a copy for each input and output"
    kept = []
    for step in range(4):
        x, y = (fake.driver.heap.tensor([step, 1, 2, 3], offset=4 * step).reshape(2, 2) for _ in range(2))
        kept.append((x, y, graph.replay([x, y])))
    for x, y, (total, turned) in kept:
        assert torch.equal(total, 2 * x + y)
        assert torch.equal(turned, x.t())
    graph.close()
    module.order.close()
    assert sound(fake)


def test_an_expanded_input_is_copied_by_a_node_of_the_graph(fake: Torch) -> None:
    module = Module(fake)
    row = fake.driver.heap.tensor([0, 1]).reshape(1, 2)
    total = fake.driver.kernel([8, 8], _doubled_rows)

    def body() -> list[Tensor]:
        out = fake.empty_like(module.x)
        fake.driver.launch(total, [pointer(row), pointer(out)], module.lane_stream())
        return [out]

    static = row.expand(2, 2)
    graph = recorded(body, [packed(static)], [True], [torch.empty(2, 2)], module.order)
    assert fake_driver.copies(graph) == 0
    for step in range(3):
        given = fake.driver.heap.tensor([step, 5], offset=4 * step).reshape(1, 2).expand(2, 2)
        (answer,) = graph.replay([given])
        assert torch.equal(answer, 2 * given)
    graph.close()
    module.order.close()


def _doubled_rows(memory: Memory, row: bytes, out: bytes) -> None:
    memory.store(address(out), 2 * memory.load(address(row), (1, 2), torch.float32).expand(2, 2).contiguous())


def test_torch_is_recorded_without_gradients_and_inference_mode(fake: Torch) -> None:
    module = Module(fake)
    with torch.inference_mode():
        module.record()
    assert module.modes == [(False, False)]


def test_workspaces_are_cleared_before_and_after(fake: Torch) -> None:
    module = Module(fake)
    module.record()
    assert fake.workspaces_cleared == 2
    module.fails = ValueError("no")
    with pytest.raises(ValueError, match="no"):
        module.record()
    assert fake.workspaces_cleared == 4


FAILURES = [
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"), Reason.OUT_OF_MEMORY, "CUDA out of memory. Tried"),
    (CudaError("cuGraphInstantiate failed with CUDA_ERROR_OUT_OF_MEMORY (2)"), Reason.OUT_OF_MEMORY, "cuGraphInst"),
    (CudaError("cuGraphInstantiate failed with CUDA_ERROR_UNKNOWN (999)"), Reason.CAPTURE_FAILED, "CudaError: cuG"),
    (
        RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with"),
        Reason.HOST_READ,
        "CUDA error: operation not permitted when stream is capturing",
    ),
    (
        RuntimeError(
            "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is pinned"
        ),
        Reason.HOST_READ,
        "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is pinned",
    ),
    (RuntimeError("operation would make the capture unsupported"), Reason.HOST_READ, "operation would make the"),
    (RuntimeError("not permitted"), Reason.CAPTURE_FAILED, "RuntimeError: not permitted"),
    (ValueError("wrong\nlines"), Reason.CAPTURE_FAILED, "ValueError: wrong"),
    (KeyError("captured"), Reason.CAPTURE_FAILED, "KeyError: 'captured'"),
    (ValueError(), Reason.CAPTURE_FAILED, "ValueError: "),
]


@pytest.mark.parametrize(("error", "reason", "detail"), FAILURES)
def test_why_a_capture_failed(fake: Torch, error: Exception, reason: Reason, detail: str) -> None:
    module = Module(fake)
    module.fails = error
    with pytest.raises(type(error)) as caught:
        module.record()
    assert caught.value is error
    cause = refusal_of(error, "net").cause
    assert (cause.reason, cause.where) == (reason, "net")
    assert cause.detail.startswith(detail)
    assert "\n" not in cause.detail
    assert sound(fake)


def test_a_refusal_inside_keeps_its_reason(fake: Torch) -> None:
    module = Module(fake)
    module.fails = Refusal(Reason.DATA_DEPENDENT, "part", "nonzero")
    with pytest.raises(Refusal) as caught:
        module.record()
    assert caught.value is module.fails
    assert sound(fake)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_inside_is_not_swallowed(fake: Torch, error: type[BaseException]) -> None:
    module = Module(fake)
    module.fails = error()
    with pytest.raises(error):
        module.record()
    assert sound(fake)
    assert fake.workspaces_cleared == 2
    module.fails = None
    module.record()


def test_another_number_of_outputs_than_before(fake: Torch) -> None:
    module = Module(fake)
    with pytest.raises(ValueError, match="zip"):
        recorded(module, [module.x], [True], [module.x], module.order)
    assert sound(fake)


def test_a_body_that_copies_an_input_once_more(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of two copies is the caller's cannot be told, so there is no graph."""
    module = Module(fake)
    monkeypatch.setattr(capture, "_copy", lambda *_: None)
    with pytest.raises(Refusal) as caught:
        module.record()
    cause = caught.value.cause
    assert (cause.reason, cause.where) == (Reason.CAPTURE_FAILED, "net")
    assert cause.detail == "tensor 0 is copied by 0 nodes instead of one"
    assert sound(fake)


def test_a_body_that_does_nothing(fake: Torch) -> None:
    with pytest.raises(Refusal) as caught:
        recorded(list, [], [], [], StreamOrder(0))
    assert caught.value.cause.reason is Reason.EMPTY_GRAPH
    assert sound(fake)


STEPS = [
    "cuStreamCreate",
    "cuStreamBeginCapture",
    "cuMemcpyDtoDAsync",
    "cuGraphGetNodes",
    "cuGraphNodeGetType",
    "cuGraphMemcpyNodeGetParams",
    "cuCtxGetCurrent",
    "cuGraphInstantiateWithParams",
    "cuStreamSynchronize",
]


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("name", STEPS)
def test_whichever_step_fails_nothing_is_left(fake: Torch, name: str, after: int) -> None:
    counted = Module(fake)
    counted.record().close()
    counted.order.close()
    if fake.driver.calls.count(name) <= after:
        assert fake.driver.calls.count(name) >= 1
        return
    with installed() as again:
        module = Module(again)
        again.driver.fail(name, after=after)
        with pytest.raises((CudaError, Refusal), match=f"{name} failed with CUDA_ERROR_UNKNOWN"):
            module.record()
        gc.collect()
        assert sound(again)
        module.record().close()
        module.order.close()
        assert sound(again)


def test_a_graph_keeps_what_it_needs(fake: Torch) -> None:
    module = Module(fake)
    graph = module.record()
    kept = weakref.ref(module)
    pool = module.order.pool()
    assert pool in graph._held[-1]
    del module
    gc.collect()
    assert kept() is not None
    graph.close()
    gc.collect()
    assert kept() is None


def test_who_waits_for_the_graph_to_go_is_told_once(fake: Torch) -> None:
    module = Module(fake)
    graph = module.record()
    assert module.releases == 0
    graph.close()
    graph.close()
    assert module.releases == 1
    assert sound(fake)


def test_a_graph_is_charged_for_a_pool_of_its_own_alone(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Module(fake)
    mine, other = ({"total_size": 1000, "segment_pool_id": order.pool().id} for order in (module.order, StreamOrder(0)))
    monkeypatch.setattr(fake.cuda, "memory_snapshot", lambda: [mine, {**mine, "total_size": 500}, other, other])
    own, shared = (module.record(shared=shared).nbytes for shared in (False, True))
    assert own == shared + 1500
    assert module.order.pool().nbytes == 1500
    assert StreamOrder(0).pool().nbytes == 0


def test_memory_of_outputs_is_given_up_where_nothing_shows_them(fake: Torch) -> None:
    module = Module(fake)
    graph = module.record(shared=True)
    before, looks = graph.nbytes, [(slot.buffer.shape, slot.buffer.stride()) for slot in graph.outputs]
    buffers = [weakref.ref(slot.buffer) for slot in graph.outputs]
    graph.let_go()
    assert [buffer() for buffer in buffers] == [None, None]
    assert graph.nbytes == before - sum(slot.nbytes for slot in graph.outputs)
    assert [(slot.buffer.shape, slot.buffer.stride()) for slot in graph.outputs] == looks
    for start in range(3):
        x, y = (fake.driver.heap.tensor([start + 0.5 + index] * 4).reshape(2, 2) for index in range(2))
        total, turned = graph.replay([x, y])
        assert torch.equal(total, 2 * x + y)
        assert torch.equal(turned, x.t())
    graph.close()


def test_memory_of_outputs_that_are_copied_by_an_operation_is_kept(fake: Torch) -> None:
    graph = Module(fake).record(transposed=False, shared=True)
    _, copied = graph.outputs
    buffer = copied.buffer
    graph.let_go()
    assert copied.buffer is buffer


# ---- capturing


def entered(fake: Torch, body: Callable[[int], None]) -> tuple[StreamOrder, int]:
    order, caller = StreamOrder(0), fake.new_stream()
    with fake.on(caller):
        with capturing(order) as stream:
            assert fake.raw_stream(0) == stream.cuda_stream == order.stream
            body(caller.cuda_stream)
        assert fake.raw_stream(0) == caller.cuda_stream
    return order, caller.cuda_stream


def test_the_capture_stream_follows_the_callers_and_the_callers_follows_it(fake: Torch) -> None:
    tensor = fake.driver.heap.empty(4)
    kernel = fake.driver.kernel([8], lambda memory, x: memory.write(address(x), b"1234"))
    order, caller = StreamOrder(0), fake.new_stream()
    with fake.on(caller):
        fake.driver.launch(kernel, [pointer(tensor)], caller.cuda_stream)
        with capturing(order) as stream:
            fake.driver.launch(kernel, [pointer(tensor)], stream.cuda_stream)
        fake.driver.launch(kernel, [pointer(tensor)], caller.cuda_stream)
    assert order.stream == caller.cuda_stream


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_callers_stream_is_current_again_whatever_happened(fake: Torch, error: type[BaseException]) -> None:
    order, caller = StreamOrder(0), fake.new_stream()
    with fake.on(caller):
        with pytest.raises(error), capturing(order):
            raise error
        assert fake.raw_stream(0) == caller.cuda_stream
    assert order.stream == caller.cuda_stream
    assert order.lock.acquire(blocking=False)
    assert capture_lock(0).acquire(blocking=False)
    order.lock.release()
    capture_lock(0).release()


def test_the_lane_is_ordered_around_it(fake: Torch) -> None:
    order, tensor = StreamOrder(0), fake.driver.heap.empty(4)
    kernel = fake.driver.kernel([8], lambda memory, x: memory.write(address(x), b"1234"))
    earlier = fake.new_stream().cuda_stream
    order.enter(earlier)
    fake.driver.launch(kernel, [pointer(tensor)], earlier)
    with fake.on(fake.new_stream()), capturing(order) as stream:
        fake.driver.launch(kernel, [pointer(tensor)], stream.cuda_stream)
    later = fake.new_stream().cuda_stream
    order.enter(later)
    fake.driver.launch(kernel, [pointer(tensor)], later)


def test_captures_of_one_device_take_turns(fake: Torch) -> None:
    held: list[bool] = []

    def body(caller: int) -> None:
        thread = threading.Thread(target=lambda: held.append(capture_lock(0).acquire(blocking=False)))
        thread.start()
        thread.join()

    order, caller = entered(fake, body)
    assert held == [False]
    assert order.stream == caller
