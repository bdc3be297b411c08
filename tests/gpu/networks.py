"""Small networks as ONNX bytes, with the shapes to build them for and references in torch."""

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

SIZE = 64


def _weights(count, seed=0):
    """The first at random, then negated permutations on a positive ground, plus noise.

    Random weights alone either collapse, so that a stale answer passes for a right one, or are chaotic under TF32.
    """
    draw = torch.Generator().manual_seed(seed)
    weights = [0.125 * torch.randn(SIZE, SIZE, generator=draw)]
    for _ in range(count - 1):
        permutation = torch.eye(SIZE)[torch.randperm(SIZE, generator=draw)]
        weights.append(2 + 2 * torch.randn(SIZE, SIZE, generator=draw) - SIZE * permutation)
    return weights


def _model(nodes, inputs, outputs, initializers=()):
    graph = helper.make_graph(list(nodes), "net", list(inputs), list(outputs), list(initializers))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _value(name, dims, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, dims)


def mlp8():
    """8 x (64x64 matmul, relu, softmax), batch 1 to 64."""
    nodes, last = [], "x"
    for index in range(8):
        out = "y" if index == 7 else f"s{index}"
        nodes += [
            helper.make_node("MatMul", [last, f"w{index}"], [f"m{index}"]),
            helper.make_node("Relu", [f"m{index}"], [f"r{index}"]),
            helper.make_node("Softmax", [f"r{index}"], [out], axis=-1),
        ]
        last = out
    tensors = [numpy_helper.from_array(w.numpy(), f"w{i}") for i, w in enumerate(_weights(8))]
    return _model(nodes, [_value("x", ["n", SIZE])], [_value("y", ["n", SIZE])], tensors), {
        "x": ((1, SIZE), (8, SIZE), (64, SIZE))
    }


def mlp8_streaming():
    """mlp8 whose weights may stay in host memory."""
    model, shapes = mlp8()
    return model, shapes, {"weight_streaming": True}


def mlp8_reference(x):
    """What mlp8 computes, in double precision on the CPU."""
    y = x.double().cpu()
    for w in _weights(8):
        y = (y @ w.double()).relu().softmax(-1)
    return y


def two_outputs():
    """a + b and a * b, of two inputs of equal shape with two dynamic axes."""
    nodes = [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Mul", ["a", "b"], ["product"])]
    shape = ["n", "m"]
    ranges = ((0, 1), (4, 8), (32, 32))
    return _model(nodes, [_value("a", shape), _value("b", shape)], [_value("sum", shape), _value("product", shape)]), {
        "a": ranges,
        "b": ranges,
    }


def typed(kind):
    """x + x in another dtype."""

    def make():
        nodes = [helper.make_node("Add", ["x", "x"], ["y"])]
        return _model(nodes, [_value("x", ["n"], kind)], [_value("y", ["n"], kind)]), {"x": ((1,), (8,), (64,))}

    return make


typed_float16 = typed(TensorProto.FLOAT16)
typed_bfloat16 = typed(TensorProto.BFLOAT16)
typed_int32 = typed(TensorProto.INT32)
typed_int64 = typed(TensorProto.INT64)


def logical():
    """not x, for booleans."""
    nodes = [helper.make_node("Not", ["x"], ["y"])]
    boolean = TensorProto.BOOL
    return _model(nodes, [_value("x", ["n"], boolean)], [_value("y", ["n"], boolean)]), {"x": ((1,), (8,), (64,))}


def scalar():
    """x * s, where s is 0-d."""
    nodes = [helper.make_node("Mul", ["x", "s"], ["y"])]
    return _model(nodes, [_value("x", ["n"]), _value("s", [])], [_value("y", ["n"])]), {"x": ((1,), (8,), (64,))}


def slice_by_value():
    """x[:n] along the first axis, where n is read by the host."""
    start = numpy_helper.from_array(np.array([0], np.int64), "start")
    axes = numpy_helper.from_array(np.array([0], np.int64), "axes")
    nodes = [
        helper.make_node("Slice", ["x", "start", "stop", "axes"], ["part"]),
        helper.make_node("Relu", ["part"], ["y"]),
    ]
    inputs = [_value("x", [16, 4]), _value("stop", [1], TensorProto.INT64)]
    return _model(nodes, inputs, [_value("y", ["k", 4])], [start, axes]), {"stop": ((1,), (8,), (16,))}


def two_profiles():
    """relu(x @ w) with one profile for small and one for large batches."""
    weight = numpy_helper.from_array(_weights(1)[0].numpy(), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Relu", ["m"], ["y"])]
    small = ((1, SIZE), (2, SIZE), (4, SIZE))
    large = ((8, SIZE), (16, SIZE), (32, SIZE))
    model = _model(nodes, [_value("x", ["n", SIZE])], [_value("y", ["n", SIZE])], [weight])
    return model, {"x": [small, large]}


def conditional():
    """relu(x) or -x, by whether the device finds sum(x) > 0: control flow, which cannot be captured.

    The optimum is the maximum: with an optimum of 4 rows, TensorRT-RTX 1.5.0.114 itself now and then left what lies
    beyond it unwritten on an H100 (up to 28 % of the calls), whether or not a graph was anywhere near.
    """
    yes = helper.make_graph([helper.make_node("Relu", ["x"], ["a"])], "yes", [], [_value("a", ["n", 4])])
    no = helper.make_graph([helper.make_node("Neg", ["x"], ["b"])], "no", [], [_value("b", ["n", 4])])
    zero = numpy_helper.from_array(np.array(0, np.float32), "zero")
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], then_branch=yes, else_branch=no),
    ]
    return _model(nodes, [_value("x", ["n", 4])], [_value("y", ["n", 4])], [zero]), {"x": ((1, 4), (16, 4), (16, 4))}
