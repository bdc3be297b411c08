import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcache.errors import ServingError
from graphcache.serving.protocol.dtypes import DTYPES, datatype_of, dtype_of
from graphcache.serving.protocol.problems import RequestError


def test_every_datatype_of_the_protocol_but_text():
    sizes = {name: dtype.itemsize for name, dtype in DTYPES.items()}
    assert sizes == {
        "BOOL": 1,
        **{f"{sign}INT{bits}": bits // 8 for sign in ("", "U") for bits in (8, 16, 32, 64)},
        "FP16": 2,
        "BF16": 2,
        "FP32": 4,
        "FP64": 8,
    }


@pytest.mark.parametrize("name", DTYPES)
def test_there_and_back(name):
    dtype = dtype_of(name, "input 'x'")
    assert datatype_of(dtype) == datatype_of(str(dtype).removeprefix("torch.")) == name


def test_text_is_refused_by_its_name():
    with pytest.raises(RequestError, match=r"^input 'x': datatype 'BYTES': text is not served; expected one of BOOL, "):
        dtype_of("BYTES", "input 'x'")


@given(st.none() | st.integers() | st.text() | st.lists(st.text()) | st.sampled_from(["fp32", "FP8", "FP32 "]))
def test_anything_else_is_refused(datatype):
    if datatype in list(DTYPES):
        return
    with pytest.raises(RequestError, match="expected one of BOOL, UINT8"):
        dtype_of(datatype, "input 'x'")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, "complex64", "relu", "nothing", "", None])
def test_dtypes_that_the_protocol_lacks(dtype):
    with pytest.raises(ServingError, match=r"the protocol has no datatype for .*: cast it inside the model"):
        datatype_of(dtype)
