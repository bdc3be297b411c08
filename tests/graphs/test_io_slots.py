"""A slot says where the graph may be pointed at the caller's tensor, and copies where it may not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcache.errors import CudaError
from graphcache.graphs.cuda import ALIGNMENT, IoSlot
from graphcache.graphs.param_patching import Pointer
from graphcache.graphs.stream_order import StreamOrder
from tests.graphs.fake_driver import Affine, Torch, installed
from tests.helpers import same


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(patch=monkeypatch) as fake:
        yield fake


SOMEWHERE = Pointer(None, 0, "", (), None)


@given(st.integers(0, 600), st.sampled_from([1, 16, 64, 256]))
def test_an_output_is_written_where_it_is_aligned_and_not_at_the_null_address(address: int, alignment: int) -> None:
    out: Any = type("Out", (), {"data_ptr": lambda self: address})()
    assert IoSlot(torch.zeros(4), [], alignment).target(out) == 0, "it is copied"
    slot = IoSlot(torch.zeros(4), [SOMEWHERE], alignment)
    if address > 0 and address % alignment == 0:
        assert slot.target(out) == address
    else:
        with pytest.raises(CudaError, match=f"is not aligned to {alignment} bytes"):
            slot.target(out)


def test_takes_an_aligned_tensor_where_it_is(fake: Torch) -> None:
    slot = IoSlot(fake.driver.heap.tensor([0, 0, 0, 0]), [SOMEWHERE], ALIGNMENT)
    x = fake.driver.heap.tensor([1, 2, 3, 4])
    assert slot.take(x) == x.data_ptr()
    assert slot.buffer.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("offset", [4, 16, 128])
def test_takes_an_unaligned_tensor_through_its_buffer(fake: Torch, offset: int) -> None:
    slot = IoSlot(fake.driver.heap.tensor([0, 0, 0, 0]), [SOMEWHERE], ALIGNMENT)
    assert slot.take(fake.driver.heap.tensor([5, 6, 7, 8], offset=offset)) == slot.buffer.data_ptr() == slot.address
    assert slot.buffer.tolist() == [5, 6, 7, 8]


def test_takes_everything_through_its_buffer_without_pointers(fake: Torch) -> None:
    slot = IoSlot(fake.driver.heap.tensor([0, 0, 0, 0]), [], 1)
    for values in ([1, 2, 3, 4], [5, 6, 7, 8]):
        assert slot.take(fake.driver.heap.tensor(values)) == 0
        assert slot.buffer.tolist() == values
    assert slot.take(torch.arange(8.0)[::2]) == slot.address == 0
    assert slot.buffer.tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.reshape(2, 2).t(), lambda x: x.to(torch.int64)])
def test_fresh_is_like_the_buffer_and_memory_of_its_own(fake: Torch, make: Any) -> None:
    buffer = make(fake.driver.heap.tensor([1, 2, 3, 4]))
    one, two = (IoSlot(buffer, [], 1).fresh() for _ in range(2))
    assert len({buffer.data_ptr(), one.data_ptr(), two.data_ptr()}) == 3
    assert same(one.copy_(buffer), buffer)


def test_what_native_code_is_told(fake: Torch) -> None:
    (slot,) = Affine(fake, 4, StreamOrder(0)).bound().inputs
    (pointer,) = slot.pointers
    kernel, node, params, context, word, offset = pointer.raw
    assert (kernel, context, offset) == (True, 0, 0)
    assert (node, params) == (int(pointer.arguments[0]), pointer.arguments[1].getPtr())
    assert word
