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
from graphcache.graphs.stream_order import StreamOrder
from tests.graphs.fake_driver import Affine, Torch, installed
from tests.helpers import same


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(patch=monkeypatch) as fake:
        yield fake


@given(st.sampled_from(["bound", "copying"]), st.integers(0, 150).map(lambda words: 4 * words))
def test_an_output_is_written_where_it_is_aligned(kind: str, offset: int) -> None:
    with installed() as fake:
        graph = getattr(Affine(fake, 4, StreamOrder(0)), kind)()
        x, out = fake.driver.heap.tensor([1, 2, 3, 4]), [fake.driver.heap.empty(4, offset=offset)]
        if kind == "copying" or out[0].data_ptr() % ALIGNMENT == 0:
            assert graph.replay([x], out) is out
            assert out[0].tolist() == [4, 7, 10, 13]
            assert graph.pointed[1] == out[0].data_ptr()
        else:
            with pytest.raises(CudaError, match=f"is not aligned to {ALIGNMENT} bytes"):
                graph.replay([x], out)


@pytest.mark.parametrize("kind", ["bound", "copying"])
def test_nothing_is_written_at_the_null_address(fake: Torch, kind: str) -> None:
    graph = getattr(Affine(fake, 4, StreamOrder(0)), kind)()
    with pytest.raises(CudaError, match="an output at 0x0 is not aligned"):
        graph.replay([fake.driver.heap.tensor([1, 2, 3, 4])], [torch.empty(0)])


@pytest.mark.parametrize("offset", [0, 4, 16, 128])
def test_an_input_is_read_where_it_is_aligned_and_copied_elsewhere(fake: Torch, offset: int) -> None:
    graph = Affine(fake, 4, StreamOrder(0)).bound()
    (slot,) = graph.inputs
    slot.buffer.zero_()
    x = fake.driver.heap.tensor([5, 6, 7, 8], offset=offset)
    assert graph.replay([x])[0].tolist() == [16, 19, 22, 25]
    assert graph.pointed[0] == (slot.address if offset else x.data_ptr())
    assert slot.buffer.tolist() == ([5, 6, 7, 8] if offset else [0] * 4)


def test_every_input_goes_through_its_buffer_without_pointers(fake: Torch) -> None:
    graph = Affine(fake, 4, StreamOrder(0)).staged()
    (slot,) = graph.inputs
    for x in (fake.driver.heap.tensor([1, 2, 3, 4]), torch.arange(8.0)[::2]):
        assert torch.equal(graph.replay([x])[0], x * 3 + 1)
        assert torch.equal(slot.buffer, x)
        assert graph.pointed[0] == slot.address == 0


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
