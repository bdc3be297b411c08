"""Requests that are none end in a typed error, whatever they hold; those that are, in their tensors."""

import json
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcache.serving.protocol.problems import RequestError
from graphcache.serving.protocol.request import read_header_length, read_request
from graphcache.serving.protocol.tensors import to_binary
from tests.helpers import bits
from tests.serving.protocol.test_tensors import any_tensor

X = {"name": "x", "shape": [2], "datatype": "FP32", "data": [1, 2]}


def read(tree, binary=b""):
    head = json.dumps(tree).encode()
    return read_request(head + binary, len(head))


def with_x(**changes):
    return {"inputs": [{**X, **changes}]}


def binary_x(size, **changes):
    found = {**X, "parameters": {"binary_data_size": size}, **changes}
    del found["data"]
    return {"inputs": [found]}


@given(st.lists(st.tuples(any_tensor(), st.booleans()), max_size=4), st.binary(max_size=3))
def test_several_inputs_some_of_them_binary(given, spare):
    inputs, binary, tensors = [], [], {}
    for index, (tensor, as_binary) in enumerate(given):
        as_binary = as_binary or (tensor.is_floating_point() and not bool(tensor.isfinite().all()))
        name = f"x{index}"
        tensors[name] = tensor
        entry = {"name": name, "shape": list(tensor.shape), "datatype": NAMES[tensor.dtype]}
        if as_binary:
            binary.append(bytes(to_binary(tensor)))
            entry["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            entry["data"] = tensor.tolist() if tensor.dim() else [tensor.item()]
        inputs.append(entry)
    found = read({"inputs": inputs}, b"".join(binary)).inputs
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(bits(found[name]), bits(tensor))
    if spare:
        with pytest.raises(RequestError, match=f"the body has {len(spare)} bytes that belong to no input"):
            read({"inputs": inputs}, b"".join(binary) + spare)


NAMES = {
    torch.bool: "BOOL",
    torch.float16: "FP16",
    torch.bfloat16: "BF16",
    torch.float32: "FP32",
    torch.float64: "FP64",
    **{getattr(torch, f"int{size}"): f"INT{size}" for size in (8, 16, 32, 64)},
    **{getattr(torch, f"uint{size}"): f"UINT{size}" for size in (8, 16, 32, 64)},
}


def test_without_a_header_length_all_is_json():
    assert read_request(json.dumps(with_x()).encode()).inputs["x"].tolist() == [1, 2]


def test_outputs_the_identity_and_how_they_are_sent():
    tree = {
        **with_x(),
        "id": "seven",
        "outputs": [{"name": "a"}, {"name": "b", "parameters": {"binary_data": False}}],
        "parameters": {"binary_data_output": True, "priority": 3, "anything": [1]},
    }
    found = read(tree)
    assert (found.id, found.outputs, found.binary) == ("seven", {"a": True, "b": False}, True)
    plain = read(with_x())
    assert (plain.id, plain.outputs, plain.binary) == (None, None, False)
    assert read({**with_x(), "outputs": []}).outputs is None


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([], r"the request is \[\]; expected an object"),
        ({}, "inputs: None; expected a list of objects"),
        ({"inputs": {}}, r"inputs: \{\}; expected a list of objects"),
        ({"inputs": [1]}, r"inputs\[0\] is 1; expected an object"),
        ({"inputs": [{}]}, r"inputs\[0\]: name None; expected text"),
        ({"inputs": [X, X]}, "input 'x' is there twice"),
        (with_x(datatype="BYTES"), "text is not served"),
        (with_x(datatype=None), "there is no such datatype"),
        (with_x(shape=[-2]), "expected a list of whole numbers"),
        (with_x(parameters=[]), "the parameters of input 'x' is \\[\\]; expected an object"),
        (with_x(parameters={"binary_data_size": 8}), "has both data and the parameter binary_data_size"),
        (with_x(parameters={"shared_memory_region": "r"}), "parameter shared_memory_region: shared memory is not"),
        ({"inputs": [{key: X[key] for key in ("name", "shape", "datatype")}]}, "has neither data nor the parameter"),
        (binary_x(8), "input 'x': 8 bytes are announced, 0 are left in the body"),
        (binary_x(7), "binary_data_size 7; expected 8 for FP32"),
        (binary_x(-8), "binary_data_size -8; expected 8"),
        (binary_x(8.0), "binary_data_size 8.0; expected 8"),
        (binary_x(True), "binary_data_size True; expected 8"),
        (binary_x("8"), "binary_data_size '8'; expected 8"),
        (binary_x(2**62, shape=[2**60]), "4611686018427387904 bytes are announced, 0 are left"),
        ({**with_x(), "id": 7}, "id 7: expected text"),
        ({**with_x(), "outputs": 7}, "outputs: 7; expected a list of objects"),
        ({**with_x(), "outputs": [{"name": "y"}, {"name": "y"}]}, "output 'y' is there twice"),
        ({**with_x(), "outputs": [{"name": "y", "parameters": {"classification": 3}}]}, "classification is not served"),
        ({**with_x(), "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]}, "binary_data is 1; expected true"),
        ({**with_x(), "parameters": {"sequence_id": 7}}, "parameter sequence_id: sequences of requests are not served"),
        ({**with_x(), "parameters": {"binary_data_output": "yes"}}, "binary_data_output is 'yes'; expected true"),
    ],
)
def test_requests_that_break_the_protocol(tree, message):
    with pytest.raises(RequestError, match=message) as raised:
        read(tree)
    assert raised.value.status == 400
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the request is no JSON: "),
        (b"{", "the request is no JSON: "),
        (b"\xff\xfe\x00", "the request is no JSON: "),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"inputs":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
        (b'{"inputs": ' + b"9" * 5000 + b"}", "the request is no JSON: "),
    ],
)
def test_json_that_is_none(body, message):
    with pytest.raises(RequestError, match=message):
        read_request(body)


def test_the_header_length():
    assert read_header_length(None) is None
    assert read_header_length("0") == 0
    for text in ("", "-1", "1.0", " 1", "0x1", "²", "9" * 30, "one"):
        with pytest.raises(RequestError, match=r"Inference-Header-Content-Length: .*; expected a whole number"):
            read_header_length(text)
    with pytest.raises(RequestError, match="Inference-Header-Content-Length is 99, but the body has 2 bytes"):
        read_request(b"{}", 99)
    with pytest.raises(RequestError, match="Inference-Header-Content-Length is -1"):
        read_request(b"{}", -1)


def test_no_memory_is_taken_for_what_is_only_claimed():
    tracemalloc.start()
    try:
        for tree in (binary_x(2**34, shape=[2**32]), with_x(shape=[2**32])):
            with pytest.raises(RequestError):
                read(tree)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["inputs", "outputs", "parameters", "id", "name", "shape", "datatype", "data", "binary_data_size"]


@st.composite
def spoilt(draw):
    """A request in which something is something else, or is gone."""
    tree = {**with_x(), "outputs": [{"name": "y", "parameters": {"binary_data": True}}], "parameters": {}}
    where = draw(st.sampled_from([tree, tree["inputs"][0], tree["outputs"][0], tree["outputs"][0]["parameters"]]))
    field = draw(st.sampled_from(FIELDS))
    if draw(st.booleans()):
        where[field] = draw(values)
    else:
        where.pop(field, None)
    return tree


@given(spoilt() | values, st.binary(max_size=9), st.none() | st.integers(-3, 300))
def test_whatever_is_read_is_a_request_or_a_typed_error(tree, binary, length):
    body = json.dumps(tree).encode() + binary
    try:
        found = read_request(body, length)
    except RequestError as error:
        assert error.status == 400  # noqa: PT017 - either outcome is right
    else:
        assert all(isinstance(each, torch.Tensor) for each in found.inputs.values())


@given(st.binary(max_size=200), st.none() | st.integers(0, 200))
def test_arbitrary_bytes_are_refused(body, length):
    with pytest.raises(RequestError):
        read_request(body, length)
