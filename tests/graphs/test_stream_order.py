"""Work that shares memory follows one another, whichever streams it comes from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcache.errors import CudaError
from graphcache.graphs import driver, stream_order
from graphcache.graphs.stream_order import StreamOrder, capture_lock
from tests.graphs import fake_driver
from tests.graphs.fake_driver import Affine, Driver, Memory, Torch, Violation, address, installed, pointer
from tests.helpers import in_threads


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(patch=monkeypatch) as fake:
        yield fake


def writer(fake: Torch) -> int:
    return fake.driver.kernel([8], lambda memory, x: memory.write(address(x), b"1234"))


# ---- order


@given(st.lists(st.integers(0, 2), max_size=12))
def test_an_event_between_two_launches_exactly_where_the_stream_changed(order: list[int]) -> None:
    with installed() as fake:
        streams = [fake.new_stream().cuda_stream for _ in range(3)]
        owner, shared, kernel = StreamOrder(0), fake.driver.heap.empty(8), writer(fake)
        fake.driver.calls.clear()
        for index in order:
            owner.enter(streams[index])
            assert owner.stream == streams[index]
            fake.driver.launch(kernel, [pointer(shared)], streams[index])
        changes = sum(left != right for left, right in itertools.pairwise(order))
        assert fake.driver.calls.count("cuEventRecord") == fake.driver.calls.count("cuStreamWaitEvent") == changes
        assert fake.driver.calls.count("cuEventCreate") == min(changes, 1), "one event for all"
        owner.close()
        assert fake.driver.leaked() == {}


def test_without_a_lane_the_stand_in_sees_the_race(fake: Torch) -> None:
    shared, kernel = fake.driver.heap.empty(8), writer(fake)
    fake.driver.launch(kernel, [pointer(shared)], fake.new_stream().cuda_stream)
    with pytest.raises(Violation, match="race"):
        fake.driver.launch(kernel, [pointer(shared)], fake.new_stream().cuda_stream)


def test_the_legacy_stream_is_a_stream_like_any_other(fake: Torch) -> None:
    owner, stream = StreamOrder(0), fake.new_stream().cuda_stream
    shared, kernel = fake.driver.heap.empty(8), writer(fake)
    for each in (0, stream, 0):
        owner.enter(each)
        fake.driver.launch(kernel, [pointer(shared)], each)


def test_a_captured_stream_cannot_be_waited_for(fake: Torch) -> None:
    owner, one, two = StreamOrder(0), fake.new_stream().cuda_stream, fake.new_stream().cuda_stream
    owner.enter(one)
    handle = owner.stream
    fake_driver.begin_capture(handle)
    with pytest.raises(CudaError) as caught:
        owner.enter(two)
    assert str(caught.value) == (
        f"stream {one:#x}, where this module ran last, is being captured, so a launch on stream {two:#x} cannot wait "
        "for it; use one stream for both, or call again when the capture has ended"
    )
    assert owner.stream == one
    owner.enter(one)
    assert driver.end_capture(handle) is not None, "the capture is whole"
    owner.enter(two)
    assert owner.stream == two


@pytest.mark.parametrize("name", ["cuEventCreate", "cuEventRecord", "cuStreamWaitEvent", "cuStreamIsCapturing"])
def test_a_stream_is_entered_only_when_it_waits(fake: Torch, name: str) -> None:
    owner, one, two = StreamOrder(0), fake.new_stream().cuda_stream, fake.new_stream().cuda_stream
    shared, kernel = fake.driver.heap.empty(8), writer(fake)
    owner.enter(one)
    fake.driver.launch(kernel, [pointer(shared)], one)
    fake.driver.fail(name)
    with pytest.raises(CudaError, match=f"{name} failed with CUDA_ERROR_UNKNOWN"):
        owner.enter(two)
    assert owner.stream == one
    owner.enter(two)
    fake.driver.launch(kernel, [pointer(shared)], two)


def test_threads_on_streams_of_their_own(fake: Torch) -> None:
    owner, shared, kernel = StreamOrder(0), fake.driver.heap.empty(8), writer(fake)
    streams = [fake.new_stream().cuda_stream for _ in range(4)]

    def work(index: int) -> None:
        for _ in range(20):
            with owner.lock:
                owner.enter(streams[index])
                fake.driver.launch(kernel, [pointer(shared)], streams[index])

    in_threads(work)
    assert fake.driver.calls.count("cuLaunchKernel") == 0
    assert owner.stream in streams


# ---- memory


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=6))
def test_scratch_grows_by_being_replaced(sizes: list[int]) -> None:
    with installed():
        owner, largest, kept = StreamOrder(0), -1, []
        for size in sizes:
            before = owner._scratch
            made = owner.scratch(size)
            kept.append(made)
            assert made.numel() >= size
            assert made.dtype is torch.uint8
            assert made.data_ptr() % 256 == 0
            assert (made is before) == (size <= largest)
            largest = max(largest, size)
        owner.close()
        assert owner._scratch is None
        assert owner.scratch(8) is not kept[-1]


def test_scratch_may_be_written_in_any_mode(fake: Torch) -> None:
    with torch.inference_mode():
        made = StreamOrder(0).scratch(16)
    assert not made.is_inference()
    made.fill_(1)


def test_one_pool_until_it_is_closed(fake: Torch) -> None:
    owner = StreamOrder(0)
    pool = owner.pool()
    assert owner.pool() is pool
    owner.close()
    assert owner.pool() is not pool


# ---- wait


def test_waiting_is_for_the_last_launch_and_for_nothing_else(fake: Torch) -> None:
    owner, stream = StreamOrder(0), fake.new_stream().cuda_stream
    fake.driver.calls.clear()
    owner.wait()
    assert fake.driver.calls == []
    owner.enter(stream)
    owner.wait()
    assert fake.driver.calls[-2:] == ["cuStreamSynchronize", "cuCtxPopCurrent"]
    handle = driver.binding().CUstream(stream)
    fake_driver.begin_capture(handle)
    with pytest.raises(
        CudaError, match=rf"^stream {stream:#x}, where this module ran last, is being captured, so nothing"
    ):
        owner.wait()
    driver.call("cuGraphDestroy", driver.end_capture(handle))
    owner.wait()


# ---- release


def test_release_waits_for_the_last_launch(fake: Torch) -> None:
    owner, stream = StreamOrder(0), fake.new_stream().cuda_stream
    seen: list[str] = []
    owner.release(lambda: seen.append("at once"))
    assert seen == ["at once"]
    assert "cuStreamSynchronize" not in fake.driver.calls, "nothing has run"
    owner.enter(stream)
    owner.release(lambda: seen.append(fake.driver.calls[-1]))
    assert seen == ["at once", "cuStreamSynchronize"]


def test_release_is_put_off_while_the_stream_is_captured(fake: Torch) -> None:
    owner, stream = StreamOrder(0), fake.new_stream().cuda_stream
    owner.enter(stream)
    fake_driver.begin_capture(owner.stream)
    seen: list[int] = []
    owner.release(lambda: seen.append(1))
    owner.release(lambda: seen.append(2))
    assert seen == []
    driver.call("cuGraphDestroy", driver.end_capture(owner.stream))
    owner.release(lambda: seen.append(3))
    assert seen == [1, 2, 3]
    owner.release(lambda: seen.append(4))
    assert seen == [1, 2, 3, 4], "each once"


def test_release_that_could_not_wait_is_made_up_for(fake: Torch) -> None:
    owner = StreamOrder(0)
    owner.enter(fake.new_stream().cuda_stream)
    seen: list[int] = []
    fake.driver.fail("cuStreamSynchronize")
    with pytest.raises(CudaError):
        owner.release(lambda: seen.append(1))
    assert seen == []
    owner.release(lambda: seen.append(2))
    assert seen == [1, 2]


def test_a_release_that_fails_does_not_take_the_others_with_it(fake: Torch) -> None:
    owner, stream = StreamOrder(0), fake.new_stream().cuda_stream
    owner.enter(stream)
    fake_driver.begin_capture(owner.stream)
    seen: list[int] = []

    def fails() -> None:
        raise CudaError("cuGraphExecDestroy failed")

    owner.release(fails)
    owner.release(lambda: seen.append(2))
    driver.call("cuGraphDestroy", driver.end_capture(owner.stream))
    with pytest.raises(CudaError, match="cuGraphExecDestroy"):
        owner.release(lambda: seen.append(3))
    owner.close()
    assert seen == [2, 3]


def test_an_action_may_release_more(fake: Torch) -> None:
    owner, seen = StreamOrder(0), []
    owner.enter(fake.new_stream().cuda_stream)

    def outer() -> None:
        owner.release(lambda: seen.append("inner"))
        seen.append("outer")

    owner.release(outer)
    assert seen == ["inner", "outer"]


# ---- release without waiting


def test_an_action_that_does_not_wait_runs_when_its_launch_has_finished(fake: Torch) -> None:
    owner, stream = StreamOrder(0), fake.new_stream().cuda_stream
    owner.enter(stream)
    seen: list[int] = []
    fake.driver.busy.add(stream)
    fake.driver.calls.clear()
    for number in (1, 2, 3):
        owner.release(lambda number=number: seen.append(number), wait=False)
    owner.reap()
    assert seen == []
    assert "cuStreamSynchronize" not in fake.driver.calls
    assert fake.driver.calls.count("cuEventRecord") == 3, "each behind the launches before it, not behind later ones"
    fake.driver.busy.clear()
    owner.reap()
    owner.reap()
    assert seen == [1, 2, 3]
    assert fake.driver.leaked() == {}


def test_where_nothing_runs_no_event_is_made(fake: Torch) -> None:
    owner = StreamOrder(0)
    owner.enter(fake.new_stream().cuda_stream)
    seen: list[int] = []
    owner.release(lambda: seen.append(1), wait=False)
    assert seen == [1]
    assert not [name for name in fake.driver.calls if name.startswith("cuEvent")]


def test_what_is_not_finished_keeps_what_comes_after_it(fake: Torch) -> None:
    """The order's launches follow one another, whichever stream they are on; so do its releases."""
    owner, streams = StreamOrder(0), [fake.new_stream().cuda_stream for _ in range(2)]
    seen: list[int] = []
    owner.enter(streams[0])
    fake.driver.busy.add(streams[0])
    owner.release(lambda: seen.append(1), wait=False)
    owner.enter(streams[1])
    owner.release(lambda: seen.append(2), wait=False)
    assert seen == []
    fake.driver.busy.clear()
    owner.release(lambda: seen.append(3))
    assert seen == [1, 2, 3]
    owner.close()
    assert fake.driver.leaked() == {}


@pytest.mark.parametrize("last", ["wait", "capturing", "close", "gone"])
def test_what_was_put_off_is_made_up_for(fake: Torch, last: str) -> None:
    owner, stream = StreamOrder(0), fake.new_stream().cuda_stream
    owner.enter(stream)
    seen: list[int] = []
    fake.driver.busy.add(stream)
    owner.release(lambda: seen.append(1), wait=False)
    assert seen == []
    if last == "wait":
        owner.reap(wait=True)
    elif last == "capturing":
        with stream_order.capturing(owner):
            assert seen == [1], "its memory is there for what is captured"
    elif last == "close":
        owner.close()
    else:
        del owner
    assert seen == [1]


@pytest.mark.parametrize("wait", [True, False])
def test_nothing_is_asked_or_waited_for_inside_a_capture_of_the_callers(fake: Torch, wait: bool) -> None:
    """Asking for an event from a thread that captures invalidates its capture, whatever stream the event is of."""
    owner, stream, other = StreamOrder(0), fake.new_stream(), fake.new_stream()
    owner.enter(stream.cuda_stream)
    seen: list[int] = []
    with fake.on(other):
        fake_driver.begin_capture(other.cuda_stream)
        owner.release(lambda: seen.append(1), wait=wait)
        owner.reap(wait=wait)
        assert seen == []
        driver.call("cuGraphDestroy", driver.end_capture(other.cuda_stream))
        owner.reap()
    assert seen == [1]
    owner.close()
    assert fake.driver.leaked() == {}


@pytest.mark.parametrize("function", ["cuStreamQuery", "cuEventCreate", "cuEventRecord", "cuEventQuery"])
def test_a_release_that_could_not_be_guarded_is_made_up_for(fake: Torch, function: str) -> None:
    owner = StreamOrder(0)
    owner.enter(fake.new_stream().cuda_stream)
    seen: list[int] = []
    fake.driver.busy.add(owner.stream)
    fake.driver.fail(function)
    with pytest.raises(CudaError, match=function):
        owner.release(lambda: seen.append(1), wait=False)
    owner.reap()
    assert seen == []
    fake.driver.busy.clear()
    owner.reap()
    assert seen == [1]
    assert fake.driver.leaked() == {}


def test_a_closed_lane_can_be_used_again(fake: Torch) -> None:
    owner = StreamOrder(0)
    streams = [fake.new_stream().cuda_stream for _ in range(2)]
    for _ in range(2):
        for stream in streams:
            owner.enter(stream)
        assert fake.driver.leaked() == {"events": 1}
        owner.close()
        owner.close()
        assert owner.stream == -1
        assert fake.driver.leaked() == {}


def test_closing_while_captured_keeps_everything_for_the_capture(fake: Torch) -> None:
    owner = StreamOrder(0)
    work = Affine(fake, 4, owner)
    work.x.fill_(1)
    stream = fake.new_stream().cuda_stream
    owner.enter(stream)
    work.enqueue(stream)
    fake_driver.begin_capture(owner.stream)
    owner.close()
    assert owner._scratch is work.scratch
    driver.call("cuGraphDestroy", driver.end_capture(owner.stream))
    owner.close()
    assert owner._scratch is None


# ---- what there is one of


def test_own_streams(fake: Torch) -> None:
    capture, side = stream_order.own_stream(0, "capture"), stream_order.own_stream(0, "side")
    assert stream_order.own_stream(0, "capture") is capture
    assert len({capture.cuda_stream, side.cuda_stream, stream_order.own_stream(1, "side").cuda_stream, 0}) == 4
    for stream in (capture, side):
        assert not fake.driver.streams[stream.cuda_stream].blocking


def test_one_capture_lock_for_each_device() -> None:
    assert capture_lock(0) is capture_lock(0)
    assert capture_lock(0) is not capture_lock(1)


def test_the_stand_in_finds_what_is_not_ordered_by_events_of_others(fake: Torch) -> None:
    """An event orders what its own stream had waited for by then, and no more."""
    one, two, three = (fake.new_stream() for _ in range(3))
    shared, kernel = fake.driver.heap.empty(8), writer(fake)
    fake.driver.launch(kernel, [pointer(shared)], one.cuda_stream)
    two.wait_stream(one)
    three.wait_stream(two)
    memory = Memory(fake.driver, fake.driver.streams[three.cuda_stream])
    assert memory.read(shared.data_ptr(), 4) == b"1234"
    assert isinstance(fake.driver, Driver)
