"""The demo's network as a file: what ONNX itself makes of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcache.cli.network import OBSERVATION, Confident, Policy, observations
from tests.cli.onnx_file import OnnxNode, policy_model, serialize


@given(st.integers(0, 2**40))
def test_sizes_are_written_as_protocol_buffers_write_them(size):
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(serialize([OnnxNode("Relu", ["x"], "y")], {}, {"x": [size, "n"]}, {"y": [size, "n"]}))
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert (dims[0].dim_value, dims[1].dim_param) == (size, "n")


def test_the_network_is_a_valid_model_with_the_weights_of_the_module():
    onnx = pytest.importorskip("onnx")
    policy = Policy(3)
    model = onnx.load_from_string(policy_model(policy))
    onnx.checker.check_model(model, full_check=True)
    for weight, stored in zip(policy.weights, model.graph.initializer, strict=True):
        assert torch.equal(weight, torch.from_numpy(onnx.numpy_helper.to_array(stored).copy()))


def test_the_model_computes_what_the_module_computes():
    onnxruntime = pytest.importorskip("onnxruntime")
    policy = Policy(1)
    x = observations(5, torch.Generator().manual_seed(0), torch.device("cpu"))
    session = onnxruntime.InferenceSession(policy_model(policy), providers=["CPUExecutionProvider"])
    [action] = session.run(None, {"observation": x.numpy()})
    assert torch.allclose(torch.from_numpy(action), policy(x), atol=1e-5)


def test_tensorrt_builds_it_without_a_gpu():
    pytest.importorskip("tensorrt_rtx")
    import graphcache

    shapes = {"observation": ((1, OBSERVATION), (8, OBSERVATION), (64, OBSERVATION))}
    assert len(graphcache.build(policy_model(Policy()), shapes=shapes, library="tensorrt_rtx")) > 10_000


def test_confident_keeps_rows_by_value():
    policy = Policy()
    x = observations(40, torch.Generator().manual_seed(0), torch.device("cpu"))
    action = policy(x)
    kept = Confident(policy)(x)
    assert 0 < len(kept) < 40
    assert torch.equal(kept, torch.stack([row for row in action if row[0] > 0]))
