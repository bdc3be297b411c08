import gc
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcache.serving.protocol.dtypes import DTYPES
from graphcache.serving.protocol.problems import RequestError
from graphcache.serving.protocol.tensors import (
    MOST_DIMENSIONS,
    check_shape,
    from_binary,
    from_json,
    to_binary,
    to_json,
)
from tests.helpers import bits, same, tensors

ALL = tuple(DTYPES.values())
WHERE = "input 'x'"


def any_tensor():
    return st.one_of(tensors(), st.sampled_from(ALL).flatmap(one_of))


def one_of(dtype):
    """Any bits of a dtype, in any small shape."""
    shape = st.lists(st.integers(0, 3), max_size=4)

    def made(given):
        shape, data = given
        count = math.prod(shape) * dtype.itemsize
        raw = torch.tensor([(index * 37 + data) % 256 for index in range(count)], dtype=torch.uint8)
        if dtype is torch.bool:
            return raw.gt(99).reshape(shape)
        return raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)

    return st.tuples(shape, st.integers(0, 255)).map(made)


@given(any_tensor(), st.integers(0, 9), st.booleans())
def test_bytes_there_and_back_bit_for_bit(tensor, before, writable):
    data = bytes(before) + bytes(to_binary(tensor))
    view = memoryview(bytearray(data) if writable else data)[before:]
    found = from_binary(view, tensor.dtype, tuple(tensor.shape))
    assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
    assert torch.equal(bits(found), bits(tensor))
    assert found.data_ptr() % tensor.dtype.itemsize == 0


@given(any_tensor())
def test_json_there_and_back(tensor):
    found = from_json(to_json(tensor), tensor.dtype, tuple(tensor.shape), WHERE)
    assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
    if tensor.is_floating_point():
        # Of what is no number, JSON keeps no bits.
        assert torch.equal(found.isnan(), tensor.isnan())
        assert torch.equal(bits(found.nan_to_num()), bits(tensor.nan_to_num()))
    else:
        assert torch.equal(bits(found), bits(tensor))
    if tensor.dim():
        assert same(from_json(tensor.tolist(), tensor.dtype, tuple(tensor.shape), WHERE), found)


def test_aligned_bytes_are_used_in_place_and_kept():
    body = bytearray(64 + 16)
    found = from_binary(memoryview(body)[64:], torch.float32, (4,))
    body[64:68] = b"\x00\x00\x80\x3f"
    assert found.tolist() == [1, 0, 0, 0]
    del body
    gc.collect()
    assert found.tolist() == [1, 0, 0, 0]
    # Whoever holds the tensor holds the body: it cannot be made smaller meanwhile.
    body = bytearray(8)
    held = from_binary(memoryview(body), torch.int64, (1,))
    with pytest.raises(BufferError):
        body.clear()
    del held


def test_bytes_that_cannot_be_used_in_place_are_copied():
    for body in (bytearray(9), bytes(9)):
        found = from_binary(memoryview(body)[1:], torch.float64, (1,))
        found.fill_(1)
        assert body == bytes(9)


def test_bools_are_0_and_1_whatever_came():
    found = from_binary(memoryview(bytearray([0, 1, 2, 255])), torch.bool, (2, 2))
    assert found.view(torch.uint8).tolist() == [[0, 1], [1, 1]]


def test_outgoing_bytes_are_those_of_the_tensor_and_keep_it():
    tensor = torch.arange(4)
    view = to_binary(tensor)
    tensor[0] = 9
    assert bytes(view)[0] == 9
    del tensor
    gc.collect()
    assert bytes(view)[8] == 1
    turned = torch.arange(6).reshape(2, 3).t()
    assert bytes(to_binary(turned)) == bytes(to_binary(turned.contiguous()))
    negative = torch.randn(3, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    assert bytes(to_binary(negative)) == bytes(to_binary(negative.clone().resolve_neg()))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (None, "shape None: expected a list of whole numbers, 0 or more"),
        (3, "shape 3: expected a list"),
        ([1.0], "expected a list of whole numbers"),
        ([True], "expected a list of whole numbers"),
        ([-1], "expected a list of whole numbers"),
        (["1"], "expected a list of whole numbers"),
        ([1] * (MOST_DIMENSIONS + 1), "shape of 65 dimensions; expected at most 64"),
        ([2**40, 2**40], "is of more elements than there is memory for"),
        ([0, 2**63], "is of more elements than there is memory for"),
        ([10**400], "is of more elements than there is memory for"),
    ],
)
def test_shapes_that_are_none(shape, message):
    with pytest.raises(RequestError, match=message):
        check_shape(shape, WHERE)


@given(st.lists(st.sampled_from([0, 1, 2, 2**20, 2**62, 2**63]), max_size=MOST_DIMENSIONS), st.sampled_from(ALL))
def test_a_shape_that_is_taken_makes_a_tensor_if_it_is_empty(shape, dtype):
    try:
        found = check_shape(shape, WHERE)
    except RequestError:
        return
    if 0 in found:
        assert from_json([], dtype, found, WHERE).shape == from_binary(memoryview(b""), dtype, found).shape == found
    else:
        with pytest.raises(RequestError, match="data has 2 elements; expected"):
            from_json([1, 2], dtype, (*found, 3), WHERE)


@pytest.mark.parametrize(
    ("data", "datatype", "shape", "message"),
    [
        (None, "FP32", (1,), "data is of type NoneType; expected a list"),
        ({"a": 1}, "FP32", (1,), "data is of type dict; expected a list"),
        ([1, 2], "FP32", (3,), r"data has 2 elements; expected 3 for shape \[3\]"),
        ([1], "FP32", (2**61,), "data has 1 elements; expected 2305843009213693952"),
        ([[1], [2]], "FP32", (2,), "data holds \\[1\\]; expected numbers"),
        ([[1, 2], [3]], "FP32", (2, 2), r"data is not nested as shape \[2, 2\] is, at axis 1"),
        ([[1, 2], 3], "FP32", (2, 2), "at axis 1"),
        ([[[1]]], "FP32", (1,), "expected numbers"),
        ([None], "FP32", (1,), "data holds None; expected numbers"),
        ([True], "FP32", (1,), "data holds True; expected numbers"),
        (["1"], "INT8", (1,), "data holds '1'; expected whole numbers"),
        ([1.0], "INT8", (1,), "data holds 1.0; expected whole numbers"),
        ([1], "BOOL", (1,), "data holds 1; expected true and false"),
        ([300], "INT8", (1,), "data holds a number that int8 cannot"),
        ([-1], "UINT64", (1,), "data holds a number that uint64 cannot"),
        ([2**63], "INT64", (1,), "data holds a number that int64 cannot"),
        ([70_000], "FP16", (1,), "data holds a number that float16 cannot: it would be infinite"),
        ([1e39], "FP32", (1,), "data holds a number that float32 cannot: it would be infinite"),
        ([10**400], "FP64", (1,), "data holds a number that float64 cannot"),
    ],
)
def test_data_that_does_not_fit(data, datatype, shape, message):
    with pytest.raises(RequestError, match=f"^input 'x': .*{message}"):
        from_json(data, DTYPES[datatype], shape, WHERE)


def test_what_is_no_number_is_taken_as_clients_write_it():
    found = from_json([float("nan"), float("inf"), float("-inf")], torch.float16, (3,), WHERE)
    assert found.isnan().tolist() == [True, False, False]
    assert found[1:].tolist() == [math.inf, -math.inf]


@pytest.mark.parametrize("name", [name for name in DTYPES if "INT" in name])
def test_the_largest_and_the_smallest_numbers_arrive(name):
    bounds = torch.iinfo(DTYPES[name])
    assert from_json([bounds.min, bounds.max], DTYPES[name], (2,), WHERE).tolist() == [bounds.min, bounds.max]
    for beyond in (bounds.min - 1, bounds.max + 1):
        with pytest.raises(RequestError, match="cannot"):
            from_json([beyond], DTYPES[name], (1,), WHERE)
