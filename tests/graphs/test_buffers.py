from __future__ import annotations

import pytest
import torch
from hypothesis import given

from graphcache.graphs.buffers import nbytes_of, packed, poison, put, static_copies, static_copy
from tests.helpers import DTYPES, same, tensors

EVERY_DTYPE = (*DTYPES, torch.int8, torch.int16, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.uint16)


@given(tensors())
def test_a_static_copy_holds_the_same_values_in_memory_of_its_own(tensor):
    copy = static_copy(tensor)
    assert torch.equal(copy, tensor)
    assert (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
    assert copy.untyped_storage()._cdata != tensor.untyped_storage()._cdata


@given(tensors())
def test_a_static_copy_can_be_written_again(tensor):
    copy = static_copy(tensor)
    assert packed(copy).untyped_storage()._cdata == copy.untyped_storage()._cdata
    with_other_values = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = packed(with_other_values)
    memory.copy_(torch.arange(memory.numel()).reshape(memory.shape).to(tensor.dtype))
    put(packed(copy), with_other_values)
    assert torch.equal(copy, with_other_values)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 4).t(),
        torch.zeros(4, 6)[:, ::2],
        torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.zeros(2, 3, 4).permute(2, 0, 1),
        torch.zeros(5)[2:],
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)}, {tensor.stride()}",
)
def test_strides_are_kept(tensor):
    copy = static_copy(tensor)
    assert copy.stride() == tensor.stride()
    assert packed(copy) is copy


@pytest.mark.parametrize(
    "tensor",
    [
        torch.full((1,), 2.0).expand(3),
        torch.arange(3.0).reshape(3, 1).expand(3, 4),
        torch.arange(5.0).unfold(0, 3, 1),
        torch.arange(5.0).unfold(0, 3, 1).unsqueeze(0).expand(2, 3, 3),
        torch.tensor([1 + 2j, 3 - 1j]).conj().reshape(2, 1).expand(2, 3),
        torch.arange(4.0)[1:2].expand(0, 3, 1),
    ],
    ids=["0-d", "column", "unfolded", "unfolded and expanded", "conjugate", "empty"],
)
def test_elements_that_overlap_overlap_in_the_copy_too(tensor):
    copy = static_copy(tensor)
    assert copy.stride() == tensor.stride()
    assert torch.equal(copy, tensor)
    poison([packed(copy)])
    assert not tensor.numel() or copy.isnan().all()
    put(packed(copy), tensor)
    assert torch.equal(copy, tensor)


def test_one_tensor_given_several_times_has_one_buffer():
    x, y = torch.ones(2), torch.ones(2)
    first, second, third = static_copies([x, y, x])
    assert first is third
    assert first is not second
    assert same([first, second], [x, y])


def test_a_static_copy_is_no_part_of_a_gradient_and_no_inference_tensor():
    for value in (torch.zeros(2, requires_grad=True), torch.nn.Parameter(torch.zeros(2))):
        assert not static_copy(value).requires_grad
        assert static_copy(value).grad_fn is None
    with torch.inference_mode():
        assert not static_copy(torch.zeros(2)).is_inference()


def test_a_conjugate_view_is_copied_as_what_it_shows():
    tensor = torch.tensor([1 + 2j, 3 - 1j]).conj()
    copy = static_copy(tensor)
    assert not copy.is_conj()
    assert same(copy, tensor.resolve_conj())


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_poison_leaves_no_right_answer_in_any_dtype(dtype):
    buffer = torch.zeros(2, 3).to(dtype)
    poison([buffer])
    poisoned = buffer.to(torch.complex128) if dtype.is_complex else buffer.to(torch.float64)
    if dtype.is_floating_point or dtype.is_complex:
        assert poisoned.isnan().all()
    else:
        assert not (poisoned == 0).any()


def test_poisoned_indices_can_be_valid_ones():
    buffers = [torch.full((2,), 9), torch.full((2,), 9, dtype=torch.uint8), torch.ones(2, dtype=torch.bool)]
    poison([], buffers)
    assert [buffer.tolist() for buffer in buffers] == [[0, 0], [0, 0], [False, False]]


def test_poison_stays_within_the_tensor():
    whole = torch.zeros(4, 4)
    poison([whole[1:3, ::2]])
    assert whole.isnan().sum() == 4
    assert whole[0].tolist() == [0.0] * 4
    poison([torch.zeros(0, 3)])


def test_bytes_count_each_storage_once():
    whole = torch.zeros(8)
    assert nbytes_of([whole, whole[:2], whole.view(2, 4)]) == 32
    assert nbytes_of([whole, torch.zeros(2)]) == 40
    assert nbytes_of([torch.zeros(0)]) == nbytes_of([]) == 0
