"""Calls from what describes them; shapes of engines are in test_prepare.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphcache
from graphcache import Call
from graphcache.errors import ConfigError
from graphcache.modules.prepare import job_of, varied
from tests.helpers import DTYPES, shapes, structures, tensors

IDENTITY = graphcache.wrap(nn.Identity())


@given(structures(tensors()))
def test_arguments_are_those_given(value: Any) -> None:
    args, kwargs = job_of(Call((value,), {"also": value}), IDENTITY).make()
    assert args[0] is value
    assert kwargs == {"also": value} or kwargs["also"] is value


def test_a_tensor_or_a_tuple_will_do() -> None:
    x = torch.zeros(2, 3, dtype=torch.float16)
    for given_ in (x, (x,), Call([x])):
        found = job_of(given_, IDENTITY)
        assert (found.label, found.nbytes) == ("float16[2, 3]", 12)
        assert found.make()[0][0] is x
    assert job_of((), IDENTITY).label == "no tensors"


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (3, {}, r"^Call\(args=3\): expected a tuple of positional arguments"),
        (torch.zeros(1), {}, r"^Call\(args=tensor"),
        ("ab", {}, r"^Call\(args='ab'\)"),
        ((), None, r"^Call\(kwargs=None\): expected keyword arguments by name"),
        ((), {1: 2}, r"^Call\(kwargs=\{1: 2\}\)"),
    ],
)
def test_what_are_no_arguments(args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Call(args, kwargs)


@pytest.mark.parametrize("given_", [3, 2.5, None, b"x", [torch.zeros(2)], {"x": (2,)}, {1}, object(), nn.ReLU()])
def test_what_is_no_call(given_: Any) -> None:
    with pytest.raises(ConfigError, match=r"is no call of Identity; expected a tuple of its arguments, "):
        job_of(given_, IDENTITY)


@given(shapes, st.sampled_from(DTYPES))
def test_made_up_values_differ_where_they_may(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    one, other = (torch.zeros(shape, dtype=dtype) for _ in range(2))
    varied((one,), {})
    varied((), {"other": [other]})
    assert torch.equal(one, other), "always the same"
    if not dtype.is_floating_point:
        assert not one.any()
    elif one.numel() > 1:
        assert one.unique().numel() > 1


def test_what_cannot_be_written_one_by_one_stays() -> None:
    wide = torch.zeros(3).expand(2, 3)
    small = torch.zeros(4, dtype=torch.float8_e4m3fn)
    with torch.inference_mode():
        varied((wide, small), {})
    assert not wide.any()
    assert not small.float().any()
