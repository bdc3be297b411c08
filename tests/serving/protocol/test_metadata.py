import pytest
import torch

from graphcache.errors import ServingError
from graphcache.serving.protocol.metadata import check_request, model_metadata
from graphcache.serving.protocol.problems import RequestError
from graphcache.serving.protocol.request import InferenceRequest
from tests.serving.models import POLICY, spec

EMPTY = spec("nothing", {}, {})


def asked(outputs=None, **inputs):
    return InferenceRequest(None, inputs, outputs, False)


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_what_fits(batch):
    check_request(POLICY, asked(x=torch.zeros(batch, 4)))
    check_request(POLICY, asked({"best": True}, x=torch.zeros(batch, 4)))
    check_request(EMPTY, asked())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (asked(), "input 'x' is missing; the inputs of policy are x"),
        (asked(x=torch.zeros(1, 4), z=torch.zeros(1)), "policy has no input 'z'; its inputs are x"),
        (asked({"z": True}, x=torch.zeros(1, 4)), "policy has no output 'z'; its outputs are action, best"),
        (asked(x=torch.zeros(1, 4).half()), "input 'x' of policy has the datatype FP16; expected FP32"),
        (asked(x=torch.zeros(1, 5)), r"has the shape \[1, 5\]; expected \[-1, 4\], where -1 is any size"),
        (asked(x=torch.zeros(4)), r"has the shape \[4\]; expected \[-1, 4\]"),
    ],
)
def test_what_does_not(request_, message):
    with pytest.raises(RequestError, match=message):
        check_request(POLICY, request_)


def test_a_model_without_inputs_says_so():
    with pytest.raises(RequestError, match="nothing has no input 'x'; its inputs are none"):
        check_request(EMPTY, asked(x=torch.zeros(1)))


def test_a_model_that_the_protocol_cannot_describe():
    with pytest.raises(ServingError, match="the protocol has no datatype for 'float8_e4m3fn'"):
        model_metadata(spec("m", {"x": ("float8_e4m3fn", (1,))}, {}))
