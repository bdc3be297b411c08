"""A slot points the graph at the caller's tensor where it can, copies where it cannot, and knows which it did."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcache.errors import CudaError
from graphcache.graphs import driver
from graphcache.graphs.lane import Lane
from graphcache.graphs.pointers import Pointer, find_pointers
from graphcache.graphs.slots import ALIGNMENT, Slot
from tests.graphs.fake_driver import Torch, address, installed, pointer
from tests.helpers import same

SETTER = "cuGraphExecKernelNodeSetParams"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(patch=monkeypatch) as fake:
        yield fake


class Node:
    """A graph whose kernels (one per place) note the addresses they were given."""

    def __init__(self, fake: Torch, places: int = 1) -> None:
        self.fake = fake
        self.seen: list[int] = []
        self.buffer = fake.driver.heap.tensor([0, 0, 0, 0])
        other = fake.empty_like(self.buffer)
        kernel = fake.driver.kernel([8], lambda memory, x: self.seen.append(address(x)))
        self.stream = driver.new_stream()
        graphs = []
        for tensor in (self.buffer, other):
            driver.begin_capture(self.stream)
            for place in range(places):
                fake.driver.launch(kernel, [pointer(tensor, 4 * place)], int(self.stream))
            graphs.append(driver.end_capture(self.stream))
        self.pointers: list[Pointer] = find_pointers(*graphs, [self.buffer], [other])[0]
        self.executable = driver.instantiate(graphs[0], int(self.stream))
        fake.driver.calls.clear()

    def reads(self) -> list[int]:
        self.seen.clear()
        driver.call("cuGraphLaunch", self.executable, self.stream)
        return self.seen

    def set_calls(self) -> int:
        return self.fake.driver.calls.count(SETTER)


@pytest.mark.parametrize("places", [1, 2, 3])
def test_points_all_places_and_asks_the_driver_once_for_each(fake: Torch, places: int) -> None:
    node = Node(fake, places)
    slot = Slot(node.buffer, node.pointers, ALIGNMENT)
    assert slot.address == -1
    target = fake.empty_like(node.buffer)
    assert slot.point(node.executable, target.data_ptr())
    assert (slot.address, node.set_calls()) == (target.data_ptr(), places)
    assert node.reads() == [target.data_ptr() + 4 * place for place in range(places)]


@given(st.integers(0, 600), st.sampled_from([1, 16, 64, 256]))
def test_what_is_not_aligned_changes_nothing(offset: int, alignment: int) -> None:
    with installed() as fake:
        node = Node(fake)
        slot = Slot(node.buffer, node.pointers, alignment)
        before = fake.empty_like(node.buffer)
        slot.point(node.executable, before.data_ptr())
        target = fake.driver.heap.empty(300)
        wanted = target.data_ptr() + offset
        fits = wanted % alignment == 0
        assert slot.point(node.executable, wanted) is fits
        kept = wanted if fits else before.data_ptr()
        assert (slot.address, node.reads()) == (kept, [kept])


def test_the_null_address_is_none(fake: Torch) -> None:
    node = Node(fake)
    slot = Slot(node.buffer, node.pointers, 1)
    assert not slot.point(node.executable, 0)
    assert (slot.address, node.set_calls()) == (-1, 0)


def test_without_pointers_there_is_nothing_to_point(fake: Torch) -> None:
    slot = Slot(fake.driver.heap.empty(4), [], 1)
    assert not slot.point(None, 1024)
    assert slot.address == -1
    assert slot.pointers == ()


@pytest.mark.parametrize("places", [1, 3])
def test_a_failing_driver_leaves_it_knowing_that_it_does_not_know(fake: Torch, places: int) -> None:
    node = Node(fake, places)
    slot = Slot(node.buffer, node.pointers, ALIGNMENT)
    first, second = fake.empty_like(node.buffer), fake.empty_like(node.buffer)
    slot.point(node.executable, first.data_ptr())
    fake.driver.fail(SETTER, after=places - 1)
    with pytest.raises(CudaError, match=rf"^{SETTER} failed with CUDA_ERROR_UNKNOWN \(999\)$"):
        slot.point(node.executable, second.data_ptr())
    assert slot.address == -1
    assert slot.point(node.executable, first.data_ptr()), "no address is taken for the one that is set"
    assert node.reads() == [first.data_ptr() + 4 * place for place in range(places)]


def test_takes_an_aligned_tensor_where_it_is(fake: Torch) -> None:
    node = Node(fake)
    slot = Slot(node.buffer, node.pointers, ALIGNMENT)
    given_tensor = fake.driver.heap.tensor([1, 2, 3, 4])
    slot.take(node.executable, given_tensor)
    assert node.reads() == [given_tensor.data_ptr()]
    assert node.buffer.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("offset", [4, 16, 128])
def test_takes_an_unaligned_tensor_through_its_buffer(fake: Torch, offset: int) -> None:
    node = Node(fake)
    slot = Slot(node.buffer, node.pointers, ALIGNMENT)
    slot.take(node.executable, fake.driver.heap.tensor([1, 2, 3, 4]))
    slot.take(node.executable, fake.driver.heap.tensor([5, 6, 7, 8], offset=offset))
    assert node.reads() == [node.buffer.data_ptr()]
    assert node.buffer.tolist() == [5, 6, 7, 8]
    assert slot.address == node.buffer.data_ptr()


def test_takes_everything_through_its_buffer_without_pointers(fake: Torch) -> None:
    buffer = fake.driver.heap.tensor([0, 0, 0, 0])
    slot = Slot(buffer, [], 1)
    for values in ([1, 2, 3, 4], [5, 6, 7, 8]):
        slot.take(None, fake.driver.heap.tensor(values))
        assert buffer.tolist() == values
    slot.take(None, torch.arange(8.0)[::2])
    assert buffer.tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.reshape(2, 2).t(), lambda x: x.to(torch.int64)])
def test_fresh_is_like_the_buffer_and_memory_of_its_own(fake: Torch, make: Any) -> None:
    buffer = make(fake.driver.heap.tensor([1, 2, 3, 4]))
    one, two = (Slot(buffer, [], 1).fresh() for _ in range(2))
    assert len({buffer.data_ptr(), one.data_ptr(), two.data_ptr()}) == 3
    assert same(one.copy_(buffer), buffer)


def test_pointing_needs_no_lane(fake: Torch) -> None:
    node, lane = Node(fake), Lane(0)
    Slot(node.buffer, node.pointers, 1).point(node.executable, node.buffer.data_ptr())
    assert (lane.stream, fake.driver.leaked().get("events")) == (-1, None)
