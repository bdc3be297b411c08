"""Modules as ONNX models with open sizes; the models are run by onnxruntime."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

import graphcache
from graphcache.errors import ConfigError, EngineBuildError
from graphcache.export.onnx_export import Exported, export, open_sizes, resized
from tests.helpers import Fn, mlp, tensors

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Pair(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Any:
        return a + b, a * 2


def exported(module: nn.Module, *inputs: Tensor, dynamic: Any = None) -> Exported:
    return export(module, inputs, open_sizes(module, inputs, dynamic))


def ran(made: Exported, *inputs: Tensor) -> list[Tensor]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(made.onnx, providers=["CPUExecutionProvider"])
    given_arrays = dict(zip(made.inputs, (value.numpy() for value in inputs), strict=True))
    return [torch.from_numpy(each) for each in session.run(made.outputs, given_arrays)]


def test_open_sizes_and_what_they_are_built_for() -> None:
    module = mlp()
    made = exported(module, torch.randn(8, 4), dynamic={0: {0: (1, 64)}})
    assert made.shapes == {made.inputs[0]: ((1, 4), (8, 4), (64, 4))}
    for count in (1, 3, 64):
        x = torch.randn(count, 4)
        (answer,) = ran(made, x)
        assert torch.allclose(answer, module(x), atol=1e-5)


def test_an_example_of_one_is_no_fixed_size() -> None:
    made = exported(mlp(), torch.randn(1, 4), dynamic={0: {0: (1, 8)}})
    assert list(made.shapes.values()) == [((1, 4), (1, 4), (8, 4))]
    assert ran(made, torch.randn(5, 4))[0].shape == (5, 4)


def test_several_inputs_and_outputs_that_share_a_size() -> None:
    n = Dim("n", min=1, max=16)
    made = exported(Pair(), torch.ones(2, 3), torch.ones(2, 3), dynamic={"a": {0: n}, "b": {-2: n}})
    assert (made.inputs, len(made.outputs)) == (["a", "b"], 2)
    assert made.shapes == dict.fromkeys(("a", "b"), ((1, 3), (2, 3), (16, 3)))
    a, b = torch.randn(7, 3), torch.randn(7, 3)
    total, double = ran(made, a, b)
    assert torch.allclose(total, a + b)
    assert torch.allclose(double, a * 2)


def test_fixed_sizes() -> None:
    assert exported(mlp(), torch.randn(2, 4)).shapes == {}
    assert exported(mlp(), torch.randn(2, 4), dynamic={0: {0: (2, 2)}}).shapes == {}


def test_the_same_module_gives_the_same_bytes() -> None:
    module, x = mlp(), torch.randn(2, 4)
    assert exported(module, x).onnx == exported(module, x).onnx


def test_tensorrt_builds_what_was_exported() -> None:
    pytest.importorskip("tensorrt_rtx")
    n = Dim("n", min=1, max=16)
    made = exported(Pair(), torch.ones(2, 3), torch.ones(2, 3), dynamic={"a": {0: n}, "b": {0: n}})
    assert graphcache.build(made.onnx, shapes=made.shapes)[:4] == b"vtrt"


def test_any_number_of_arguments() -> None:
    module = Fn(lambda _, *given: given[0] + given[1])
    made = exported(module, torch.ones(2), torch.ones(2), dynamic={0: {0: (n := Dim("n", min=1, max=9))}, 1: {0: n}})
    assert torch.equal(ran(made, torch.ones(5), torch.ones(5))[0], torch.full((5,), 2.0))


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (Fn(lambda _, x: {"y": x + 1}), ConfigError, "expected a tensor, or a tuple or list of tensors"),
        (Fn(lambda _, x: (x, (x + 1,))), ConfigError, "expected a tensor, or a tuple or list of tensors"),
        (Fn(lambda _, x: x + 1 if x.sum() > 0 else x), EngineBuildError, "torch.export cannot take Fn: "),
        (Fn(lambda _, x, y: x), EngineBuildError, "torch.export cannot take Fn: "),
    ],
)
def test_what_cannot_be_exported(module: nn.Module, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        exported(module, torch.ones(3))


X = torch.ones(4, 3)
WRONG: list[tuple[Any, str]] = [
    (5, "dynamic=5: expected inputs with their open axes"),
    ({"y": {0: (1, 2)}}, r"dynamic\['y'\]: there is no such input; expected one of x, or a position"),
    ({1: {0: (1, 2)}}, r"dynamic\[1\]: there is no such input"),
    ({True: {0: (1, 2)}}, r"dynamic\[True\]: there is no such input"),
    ({"x": 5}, r"dynamic\['x'\]=5: expected axes with their sizes"),
    ({"x": {2: (1, 2)}}, r"dynamic\['x'\]\[2\]: the input has 2 axes"),
    ({"x": {"n": (1, 2)}}, r"dynamic\['x'\]\['n'\]: the input has 2 axes"),
    ({"x": {0: 5}}, r"dynamic\['x'\]\[0\]=5: expected \(smallest, largest\)"),
    ({"x": {0: (1, 2, 3)}}, r"expected \(smallest, largest\)"),
    ({"x": {0: "12"}}, r"expected \(smallest, largest\)"),
    ({"x": {0: (0, 8)}}, r"expected 1 <= smallest <= largest"),
    ({"x": {0: (8, 5)}}, r"expected 1 <= smallest <= largest"),
    ({"x": {0: (5, 8)}}, r"the example has 4 there, outside of 5 to 8"),
    ({"x": {0: Dim("n")}}, r"an engine is built for a largest size; give the Dim a max"),
]


class Named(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(("dynamic", "message"), WRONG, ids=[str(wrong) for wrong, _ in WRONG])
def test_sizes_that_mean_nothing(dynamic: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_sizes(Named(), [X], dynamic)


@given(tensors().filter(lambda value: value.numel() > 0), st.data())
def test_other_sizes_hold_the_same_values(value: Tensor, data: st.DataObject) -> None:
    sizes = {axis: data.draw(st.integers(1, 9)) for axis in range(value.dim())}
    found = resized(value, sizes)
    assert found.shape == tuple(sizes.values())
    assert found.dtype == value.dtype
    overlap = tuple(slice(0, min(size, value.shape[axis])) for axis, size in sizes.items())
    assert torch.equal(found[overlap], value[overlap])
