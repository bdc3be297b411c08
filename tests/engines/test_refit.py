"""Weights are replaced all together or not at all, and nothing is cast."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from graphcache.engines import bindings
from graphcache.engines.engine import Engine
from graphcache.engines.refit import refit
from graphcache.errors import EngineError
from tests.engines.fake_tensorrt import NETWORKS, DataType, Refitter, serialize
from tests.graphs.fake_driver import Torch

SCALE = {"scale.a": torch.tensor([5.0, 6.0]), "scale.b": torch.tensor([1.0, 1.0])}


def held(owner: Engine) -> dict[str, list[float]]:
    return {name: value.tolist() for name, value in owner.native_handles[1]._weights.items()}


BEFORE = {"scale.a": [2.0, 3.0], "scale.b": [0.0, 0.0], "shift": [1.0, 1.0]}


def test_some_weights_or_all(fake: Torch) -> None:
    owner = Engine(serialize("refittable"))
    refit(owner, {"shift": torch.tensor([7.0, 8.0])}, 0)
    assert held(owner) == {**BEFORE, "shift": [7.0, 8.0]}
    refit(owner, {**SCALE, "shift": torch.zeros(2)}, 0)
    assert held(owner) == {"scale.a": [5.0, 6.0], "scale.b": [1.0, 1.0], "shift": [0.0, 0.0]}


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([[7.0, 0.0], [8.0, 0.0]])[:, 0],
        torch.tensor([[7.0], [8.0]]),
        torch.nn.Parameter(torch.tensor([7.0, 8.0])),
    ],
    ids=["strided", "of another shape", "a parameter"],
)
def test_any_tensor_of_that_many_elements(fake: Torch, value: torch.Tensor) -> None:
    owner = Engine(serialize("refittable"))
    refit(owner, {"shift": value}, 0)
    assert held(owner)["shift"] == [7.0, 8.0]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"shfit": torch.zeros(2)}, r"net has no weights 'shfit' to replace; it has shift"),
        ({"zzz": torch.zeros(2)}, r"net has no weights 'zzz' to replace; it has scale.a, scale.b, shift"),
        ({5: torch.zeros(2)}, r"net has no weights 5 to replace"),
        ({"shift": [1.0, 2.0]}, r"net: weights 'shift' are of type list; expected a dense torch.Tensor"),
        ({"shift": torch.zeros(2).to_sparse()}, r"net: weights 'shift' are of type Tensor; expected"),
        (
            {"shift": torch.zeros(3)},
            r"net: weights 'shift' are 3 elements of torch.float32; the engine was built with 2 of torch.float32, and",
        ),
        (
            {"shift": torch.zeros(2, dtype=torch.float16)},
            r"net: weights 'shift' are 2 elements of torch.float16; the engine was built with 2 of torch.float32",
        ),
        ({"scale.a": torch.zeros(2)}, r"net: scale.b must be given together with (shift, )?scale.a; nothing"),
    ],
)
def test_what_does_not_fit_changes_nothing(fake: Torch, weights: dict[Any, Any], said: str) -> None:
    owner = Engine(serialize("refittable"), name="net")
    with pytest.raises(EngineError, match=f"^{said}"):
        refit(owner, weights, 0)
    with pytest.raises(EngineError, match=f"^{said}"):
        refit(owner, {"shift": torch.ones(2), **weights}, 0)
    assert held(owner) == BEFORE


def test_an_engine_that_takes_none(fake: Torch) -> None:
    with pytest.raises(EngineError, match=r"^Affine takes no new weights; build it with refittable=True, or with the"):
        refit(Engine(serialize("affine")), {"w": torch.zeros(1)}, 0)


def test_a_refitter_of_nothing(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Refitter, "get_all_weights", lambda self: [])
    with pytest.raises(EngineError, match=r"^net takes no new weights"):
        refit(Engine(serialize("refittable"), name="net"), {"shift": torch.ones(2)}, 0)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no weights", r"^net: weights 'shift' were refused: .*these weights are refused"),
        ("no refit", r"^net: TensorRT refused to refit: .*no memory to refit.*refit again with all of them, or load"),
    ],
)
def test_what_tensorrt_refuses(fake: Torch, monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    monkeypatch.setitem(NETWORKS, "refittable", replace(NETWORKS["refittable"], name=name))
    owner = Engine(serialize("refittable"), name="net")
    with pytest.raises(EngineError, match=said):
        refit(owner, {"shift": torch.ones(2)}, 0)
    assert held(owner) == BEFORE


def test_a_dtype_that_torch_lacks(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd:
        dtype, size = DataType.FLOAT, 2

    monkeypatch.setattr(Refitter, "get_weights_prototype", lambda self, weights_name: Odd)
    monkeypatch.setattr(bindings, "_DTYPES", {})
    with pytest.raises(EngineError, match=r"which torch .* cannot hold"):
        refit(Engine(serialize("refittable")), {"shift": torch.ones(2)}, 0)
