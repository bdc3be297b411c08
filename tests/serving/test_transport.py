"""Tensors and errors between processes."""

import pickle

import pytest
import torch
from hypothesis import given

from graphcache.errors import InputDtypeError, ServingError, UnavailableError
from graphcache.serving.transport import pack, told, unpack
from tests.helpers import bits, tensors

pytest.importorskip("numpy")


@given(tensors())
def test_tensors_go_there_and_back(tensor):
    [there] = unpack(pickle.loads(pickle.dumps(pack({"x": tensor}), protocol=5))).values()
    assert (there.dtype, there.shape, there.is_contiguous()) == (tensor.dtype, tensor.shape, True)
    assert torch.equal(bits(there), bits(tensor))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "uint16", "complex64"])
def test_types_that_numpy_has_and_has_not(name):
    tensor = torch.arange(1, 7).reshape(2, 3).to(getattr(torch, name))
    [there] = unpack(pack({"x": tensor})).values()
    assert there.dtype is tensor.dtype
    assert torch.equal(bits(there), bits(tensor))


def test_a_view_takes_no_more_than_it_shows_and_what_comes_out_can_be_written_to():
    whole = torch.zeros(1000, 1000)
    packed = pack({"x": whole[:2, :3]})
    assert len(pickle.dumps(packed, protocol=5)) < 1000
    packed["x"][1].flags.writeable = False
    unpack(packed)["x"].fill_(1)
    assert whole.sum() == 0


class Wrapped(Exception):
    """As Ray wraps what a task raised."""

    def __init__(self, cause):
        super().__init__("somewhere")
        self.cause = cause


def test_errors_are_what_they_were():
    cause = InputDtypeError("input 'x' is torch.float64")
    assert told(Wrapped(Wrapped(cause))) is cause
    assert told(cause) is cause
    away = pickle.loads(pickle.dumps(UnavailableError("later", 7.0)))
    assert (type(told(Wrapped(away))), told(Wrapped(away)).retry_after) == (UnavailableError, 7.0)
    other = told(Wrapped(IndexError("out\n of range")))
    assert type(other) is ServingError
    assert str(other) == "the model raised IndexError: out of range"
    itself = Wrapped(None)
    itself.cause = itself
    assert "Wrapped" in str(told(itself))
