"""What the writer writes the reader reads: every value, and of tensors all but their values."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphcache.cache.tree import DEEPEST, TreeError, contiguous, extent
from graphcache.cache.tree_reader import Reader
from graphcache.cache.tree_writer import Writer
from graphcache.errors import Refusal
from tests.helpers import constants, same, structures, tensors

more = st.one_of(
    constants,
    st.floats(),
    st.complex_numbers(allow_nan=True),
    st.text(max_size=4),
    st.binary(max_size=4),
    st.integers(-(2**1000), 2**1000),
    st.sampled_from(
        [
            torch.Size([2, 3]),
            slice(1, None, -1),
            slice((1, 2), "a"),
            range(3, 0, -1),
            torch.float8_e5m2,
            torch.quint8,
            torch.device("cuda:1"),
            torch.sparse_coo,
            torch.channels_last,
            {(1, 2.0): 3, None: 4},
            "\ud800",
        ]
    ),
)


def make(dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], host: bool) -> Tensor:
    return torch.zeros(extent(shape, stride), dtype=dtype).as_strided(shape, stride)


def through_text(value: Any) -> Any:
    text = json.dumps(Writer().write(value, "value"), allow_nan=False)
    return Reader(make).read(json.loads(text), "value")


@given(structures(more))
def test_values_come_back_as_they_were_with_their_types(value):
    again = through_text(value)
    assert same(again, value)
    assert _types(again) == _types(value)


def _types(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value), [_types(item) for item in value]
    if isinstance(value, dict):
        return type(value), [(_types(key), _types(item)) for key, item in value.items()]
    return type(value)


@given(tensors())
def test_tensors_come_back_as_zeros_laid_out_alike(tensor):
    again = through_text(tensor)
    assert (again.shape, again.dtype, again.stride()) == (tensor.shape, tensor.dtype, tensor.stride())
    assert not again.any()


@given(st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_one_tensor_given_twice_is_one_tensor_again(places):
    three = [torch.zeros(1), torch.zeros(1), torch.zeros(2)]
    again = through_text([three[place] for place in places])
    for one, first in zip(places, again, strict=True):
        for other, second in zip(places, again, strict=True):
            assert (first is second) == (one == other)


@given(tensors())
def test_contiguous_and_extent_are_those_of_torch(tensor):
    assert contiguous(tensor.shape) == torch.empty(tensor.shape).stride()
    memory = torch.zeros(extent(tensor.shape, tensor.stride()))
    assert memory.as_strided(tensor.shape, tensor.stride()).shape == tensor.shape
    if tensor.numel():
        with pytest.raises(RuntimeError, match="out of bounds"):
            memory[:-1].clone().as_strided(tensor.shape, tensor.stride())


def test_as_many_containers_in_one_another_as_are_written_are_read():
    deep: Any = 1
    for _ in range(DEEPEST):
        deep = (deep,)
    assert through_text(deep) == deep
    with pytest.raises(Refusal, match="containers in one another"):
        Writer().write((deep,), "value")


def test_an_error_says_where_what_and_what_else():
    error = TreeError("args[0]", "x" * 500, "a number")
    assert str(error).startswith("args[0] is 'xxx")
    assert str(error).endswith("...; expected a number")
    assert (error.where, error.expected) == ("args[0]", "a number")
