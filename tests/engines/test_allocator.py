"""Outputs that TensorRT asks memory for while it runs: memory that grows, and answers that are the caller's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcache.engines import context, engine, library
from graphcache.engines.context import Context
from graphcache.engines.engine import Engine
from graphcache.errors import EngineExecutionError
from tests.engines import fake_tensorrt
from tests.engines.fake_tensorrt import Dims, IExecutionContext, serialize
from tests.graphs.fake_driver import Torch, installed


class Growing:
    """The outputs of an engine, and the side of TensorRT: asking for memory, and telling the shape."""

    def __init__(self) -> None:
        self.engine = Engine(serialize("positive"), name="net")
        self.outputs = Context(self.engine, torch.empty(0, dtype=torch.uint8))
        self.context: IExecutionContext = self.outputs._context

    def run(self, count: int) -> int | None:
        """An enqueue that gives as many numbers, counting up from that many; where they were written."""
        self.outputs.set_outputs([None])
        asked = self.context._allocators["y"]()
        place: int | None = asked.reallocate_output_async("y", 0, 4 * count, 256, 0)
        if place:
            fake_tensorrt._store(place, torch.arange(count, 2 * count, dtype=torch.float32))
            asked.notify_shape("y", Dims([count]))
        return place

    def take(self) -> torch.Tensor:
        return self.outputs.allocated_output(self.engine.outputs[0])

    def remove(self) -> None:
        self.outputs.set_outputs([self.outputs._nowhere])

    @property
    def allocator(self) -> Any:
        return self.outputs._allocators["y"]


@given(st.lists(st.integers(0, 2000), min_size=1, max_size=8))
def test_memory_grows_and_never_shrinks_and_answers_stay(counts: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch, installed(context, engine, library, patch=patch) as fake:
        fake_tensorrt.use(patch)
        patch.setattr(fake_tensorrt, "device", fake.driver)
        growing, kept, held = Growing(), [], 0
        for count in counts:
            place = growing.run(count)
            assert place is not None
            assert place % 256 == 0
            assert place == growing.allocator.buffer.data_ptr()
            size = growing.allocator.buffer.numel()
            if held and 4 * count <= held:
                assert size == held, "what is enough is not replaced"
            else:
                assert size >= max(2 * held, 256, 4 * count)
            held = size
            kept.append((count, growing.take()))
        for count, answer in kept:
            assert answer.tolist() == list(range(count, 2 * count))
            assert answer.dtype is torch.float32


def test_the_answer_is_a_copy(fake: Torch) -> None:
    growing = Growing()
    growing.run(3)
    one, two = growing.take(), growing.take()
    assert one.data_ptr() != two.data_ptr()
    one.zero_()
    assert two.tolist() == [3, 4, 5]


def test_shapes_of_several_dimensions_and_of_none(fake: Torch) -> None:
    growing = Growing()
    growing.run(6)
    growing.allocator.notify_shape("y", Dims([2, 3]))
    assert growing.take().tolist() == [[6, 7, 8], [9, 10, 11]]
    growing.allocator.notify_shape("y", Dims([]))
    assert growing.take().tolist() == 6
    growing.allocator.notify_shape("y", Dims([0, 7]))
    assert growing.take().shape == (0, 7)


def test_the_older_callback(fake: Torch) -> None:
    growing = Growing()
    growing.outputs.set_outputs([None])
    place = growing.allocator.reallocate_output("y", 0, 100, 256)
    assert place == growing.allocator.buffer.data_ptr()


def test_no_memory_is_told_by_the_null_address_and_raised_later(fake: Torch) -> None:
    growing = Growing()
    fake.driver.heap.refuse_after = 0
    assert growing.run(100) is None
    fake.driver.heap.refuse_after = None
    with pytest.raises(EngineExecutionError, match=r"^net: no memory for output 'y': CUDA out of memory\.") as caught:
        growing.take()
    assert isinstance(caught.value.__cause__, torch.cuda.OutOfMemoryError)
    growing.run(2)
    assert growing.take().tolist() == [2, 3], "a later call starts anew"


def test_no_memory_keeps_the_memory_there_was(fake: Torch) -> None:
    growing = Growing()
    growing.run(3)
    fake.driver.heap.refuse_after = 0
    assert growing.run(1000) is None
    assert growing.run(3) is not None


@pytest.mark.parametrize("error", [RuntimeError("x"), MemoryError(), KeyboardInterrupt(), SystemExit()])
def test_nothing_is_raised_into_tensorrt(fake: Torch, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    growing = Growing()

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(fake, "empty", fail)
    try:
        place = growing.run(3)
    except BaseException as raised:
        pytest.fail(f"{type(raised).__name__} crosses TensorRT, which ends the process")
    assert place is None


def test_a_shape_that_was_never_told(fake: Torch) -> None:
    growing = Growing()
    growing.run(3)
    growing.outputs.set_outputs([None])
    with pytest.raises(EngineExecutionError, match=r"^net: TensorRT did not tell the shape of output 'y'$"):
        growing.take()


def test_is_installed_once_and_removed(fake: Torch) -> None:
    growing = Growing()
    told: list[Any] = []
    real = growing.context.set_output_allocator
    growing.context.set_output_allocator = lambda name, given: told.append(given) or real(name, given)
    growing.remove()
    assert told == []
    for _ in range(2):
        growing.run(2)
        growing.run(3)
        growing.remove()
        growing.remove()
    assert [each is None for each in told] == [False, True, False, True]
    assert told[0] is told[2], "its memory is kept"


def test_each_flavour_has_a_class_of_its_own() -> None:
    class Other:
        class IOutputAllocator:
            def __init__(self) -> None:
                self.constructed = True

    one, two = context._allocator_class(fake_tensorrt), context._allocator_class(Other)
    assert issubclass(one, fake_tensorrt.IOutputAllocator)
    assert issubclass(two, Other.IOutputAllocator)
    assert context._allocator_class(fake_tensorrt) is one


@pytest.mark.parametrize("name", ["tensorrt_rtx", "tensorrt_lean", "tensorrt"])
def test_the_real_base_class_takes_it(name: str) -> None:
    trt = pytest.importorskip(name, exc_type=ImportError)
    made = context._allocator_class(trt)(torch.device("cpu"))
    assert isinstance(made, trt.IOutputAllocator)
    assert made.reallocate_output_async("y", 0, 10, 256, 0) == made.buffer.data_ptr()
