import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcache.errors import ServingError
from graphcache.serving.protocol.request import InferenceRequest, read_request
from graphcache.serving.protocol.response import write_response
from tests.helpers import bits
from tests.serving.protocol.test_tensors import any_tensor


def asked(outputs=None, *, binary=False, identity=None):
    return InferenceRequest(identity, {}, outputs, binary)


@given(st.dictionaries(st.text(max_size=5), any_tensor(), max_size=4), st.data())
def test_a_response_reads_as_a_request_would(outputs, data):
    wanted = None
    binary = data.draw(st.booleans())
    if outputs and data.draw(st.booleans()):
        names = data.draw(st.lists(st.sampled_from(list(outputs)), min_size=1, unique=True))
        wanted = {name: data.draw(st.booleans()) for name in names}
    response = write_response("m", "3", outputs, asked(wanted, binary=binary))
    head = json.loads(response.body[: response.header_length])
    assert (head["model_name"], head["model_version"], "id" in head) == ("m", "3", False)
    # Inputs and outputs are written alike, so that the reader of requests is the judge.
    again = json.dumps({"inputs": head["outputs"]}).encode()
    rest = b"" if response.header_length is None else response.body[response.header_length :]
    found = read_request(again + rest, len(again)).inputs
    assert list(found) == list(outputs if wanted is None else wanted)
    for name, tensor in found.items():
        sent = outputs[name]
        assert (tensor.shape, tensor.dtype) == (sent.shape, sent.dtype)
        assert torch.equal(bits(tensor), bits(sent)) or bool(sent.isnan().any())
    assert (response.header_length is None) == (
        not any(wanted.values() if wanted is not None else [binary] * len(outputs))
    )


def test_the_body_shares_nothing_with_the_tensors():
    tensor = torch.ones(4)
    response = write_response("m", "1", {"y": tensor}, asked(binary=True))
    tensor.zero_()
    assert response.body[response.header_length :] == bytes([0, 0, 128, 63]) * 4


def test_the_identity_is_repeated_and_what_is_no_number_is_named_as_python_does():
    response = write_response("m", "1", {"y": torch.tensor([float("nan"), float("-inf")])}, asked(identity="ü"))
    tree = json.loads(response.body)
    assert tree["id"] == "ü"
    assert b'"data":[NaN,-Infinity]' in response.body


def test_an_output_that_is_not_there_or_that_nobody_could_read():
    with pytest.raises(ServingError, match="m gave no output 'z'; it gave y"):
        write_response("m", "1", {"y": torch.zeros(1)}, asked({"z": True}))
    with pytest.raises(ServingError, match=r"the protocol has no datatype for torch\.complex64"):
        write_response("m", "1", {"y": torch.zeros(1, dtype=torch.complex64)}, asked())
