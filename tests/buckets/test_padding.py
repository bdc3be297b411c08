from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphcache.buckets.padding import cropped, holds, padded, varied
from graphcache.graphs.buffers import is_dense
from tests.helpers import DTYPES, same, strides, tensors


def expected(tensor: Tensor, shape: tuple[int, ...], fills: Mapping[int, int]) -> Tensor:
    """The definition, one axis after the other."""
    result = tensor.contiguous()
    for axis in sorted(fills):
        margin = list(result.shape)
        margin[axis] = shape[axis] - result.shape[axis]
        result = torch.cat([result, torch.full(margin, fills[axis], dtype=tensor.dtype)], axis)
    return result


@given(tensors(), st.data())
def test_the_real_part_is_kept_and_only_the_margin_is_filled(tensor, data):
    shape = tuple(size + data.draw(st.integers(0, 3)) for size in tensor.shape)
    grown = [axis for axis in range(tensor.dim()) if shape[axis] > tensor.shape[axis]]
    fills = {axis: data.draw(st.integers(0, 1)) for axis in grown}
    got = padded(tensor, shape, fills)
    assert got.is_contiguous() or not tensor.is_contiguous()
    assert is_dense(got) or not got.numel()
    assert same(got.contiguous(), expected(tensor, shape, fills))
    assert torch.equal(got[tuple(map(slice, tensor.shape))], tensor)


@given(tensors(), st.data())
def test_cropping_takes_padding_back(tensor, data):
    shape = tuple(size + data.draw(st.integers(0, 3)) for size in tensor.shape)
    fills = {axis: 0 for axis in range(tensor.dim()) if shape[axis] > tensor.shape[axis]}
    again = cropped(padded(tensor, shape, fills), {axis: tensor.shape[axis] for axis in fills})
    assert same(again.contiguous(), tensor.contiguous())
    assert is_dense(again) or not again.numel()


@given(st.permutations(range(4)), st.lists(st.integers(2, 4), min_size=4, max_size=4), st.integers(0, 3))
def test_the_dimensions_lie_in_memory_as_they_did(order, shape, axis):
    tensor = torch.empty_permuted(shape, order)
    larger = [size + 2 * (place == axis) for place, size in enumerate(shape)]
    assert padded(tensor.fill_(1), larger, {axis: 0}).stride() == torch.empty_permuted(larger, order).stride()


@pytest.mark.parametrize(
    ("tensor", "stride"),
    [
        (torch.ones(1, 4).expand(3, 4), (4, 1)),
        (torch.ones(3, 1).expand(3, 4), (4, 1)),
        (torch.ones(1, 3, 4, 4).contiguous(memory_format=torch.channels_last), (48, 1, 12, 3)),
        (torch.ones(8, 4)[::2, ::2], (2, 1)),
        (torch.ones(2, 5).t()[:, :1], (1, 1)),
        (torch.ones(6).as_strided((1, 2, 3), (1, 1, 2)), (6, 1, 2)),
    ],
    ids=["expanded rows", "expanded columns", "channels last", "gaps", "one column", "one row"],
)
def test_strides_that_say_nothing_give_the_usual_order(tensor, stride):
    larger = padded(tensor, (tensor.shape[0] + 1, *tensor.shape[1:]), {0: 0})
    assert strides(larger) == [each for each, size in zip(stride, larger.shape, strict=True) if size > 1]


def test_padding_allocates_once_and_writes_every_element_once():
    events = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            if name.startswith("empty"):
                events.append((name, result.numel()))
            elif name in ("copy_", "fill_", "zero_"):
                events.append((name, args[0].numel()))
            return result

    tensor = torch.ones(3, 5)
    with Watch():
        padded(tensor, (4, 8), {0: 0, 1: 0})
    assert events == [("empty", 32), ("copy_", 15), ("fill_", 5), ("fill_", 12)]


def test_where_margins_meet_the_later_axis_has_its_fill():
    assert padded(torch.zeros(1, 1), (2, 2), {0: 5, 1: 7}).tolist() == [[0, 7], [5, 7]]


def test_the_first_axis_is_cropped_in_place_and_others_to_a_tensor_of_its_own():
    tensor = torch.arange(24.0).reshape(4, 6)
    rows, columns = cropped(tensor, {0: 2}), cropped(tensor, {1: 2})
    assert rows.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    assert columns.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    assert (rows.stride(), columns.stride()) == ((6, 1), (2, 1))
    assert columns.view(-1).tolist() == [0, 1, 6, 7, 12, 13, 18, 19]


def test_what_was_expanded_is_cropped_in_place():
    tensor = torch.ones(1, 4).expand(3, 4)
    assert cropped(tensor, {1: 2}).stride() == (0, 1)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.complex64, torch.uint16, torch.uint64])
def test_every_dtype_is_padded(dtype):
    got = padded(torch.ones(2, dtype=dtype), (4,), {0: 0})
    assert got.dtype is dtype
    assert got.to(torch.complex64).tolist() == [1, 1, 0, 0]


def test_a_pending_conjugation_is_done():
    assert padded(torch.ones(1, dtype=torch.complex64).mul(1j).conj(), (2,), {0: 0}).tolist() == [-1j, 0]


@given(st.sampled_from(DTYPES), st.floats() | st.integers(-(2**63), 2**63 - 1) | st.booleans())
def test_what_a_dtype_holds_can_be_filled_and_read_again(dtype, number):
    if not holds(dtype, number):
        return
    got = torch.empty(1, dtype=dtype).fill_(number).item()
    if dtype.is_floating_point:
        rounded = torch.tensor([number], dtype=torch.float64).to(dtype).item()
        assert got == rounded or (got != got and number != number)
        assert abs(got) < float("inf") or not abs(number) < float("inf")
    else:
        assert got == number


@pytest.mark.parametrize(
    ("dtype", "number"),
    [
        (torch.uint8, 256),
        (torch.int32, 2**31),
        (torch.int64, float("nan")),
        (torch.int64, float("-inf")),
        (torch.bool, 2),
        (torch.float16, 70000),
    ],
)
def test_what_a_dtype_does_not_hold(dtype, number):
    assert not holds(dtype, number)


@given(tensors())
def test_varied_values_are_of_the_same_kind(tensor: Tensor) -> None:
    before = tensor.clone()
    other = varied(tensor)
    assert (other.shape, other.dtype) == (tensor.shape, tensor.dtype)
    assert torch.equal(tensor, before)
    assert torch.equal(other, varied(tensor))
    if tensor.dtype in (torch.int64, torch.int32, torch.uint8) and tensor.numel():
        assert int(tensor.min()) - 1 <= int(other.min())
        assert other.max() <= tensor.max()
    if tensor.is_floating_point() and tensor.numel() > 1:
        assert other.unique().numel() > 1


@pytest.mark.parametrize("value", [0.0, 1.0, -2.0, float("nan"), float("inf")])
def test_varied_values_have_either_sign_unless_all_are_positive(value: float) -> None:
    other = varied(torch.full((64,), value))
    assert other.isfinite().all()
    assert other.unique().numel() == 64
    assert bool((other > 0).any())
    assert bool((other < 0).any()) is (value not in (1.0, float("inf")))
