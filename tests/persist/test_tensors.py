"""Tensors of a model in a package."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphcache.persist.tensors import read_tensors, write_tensors
from tests.helpers import bits, tensors


@given(st.dictionaries(st.text(min_size=1, max_size=5).filter(lambda name: name != "__metadata__"), tensors()))
def test_tensors_come_back(given_tensors: dict[str, Tensor]) -> None:
    found = read_tensors(write_tensors(given_tensors))
    assert found.keys() == given_tensors.keys()
    for name, value in given_tensors.items():
        assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype)
        assert torch.equal(bits(found[name]), bits(value))


def test_tensors_that_share_memory() -> None:
    weight = torch.arange(6.0)
    found = read_tensors(write_tensors({"a": weight, "b": weight[2:4], "c": weight.view(2, 3).t()}))
    assert torch.equal(found["b"], weight[2:4])
    assert torch.equal(found["c"], weight.view(2, 3).t())


@given(st.binary(max_size=80))
def test_what_is_none(data: bytes) -> None:
    with pytest.raises(ValueError):
        read_tensors(data)
