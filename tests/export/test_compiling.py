"""``graphcache.compile`` over the stand-ins: what is built, what is compared, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphcache
from graphcache.errors import ConfigError, EngineBuildError, NoGpuError
from graphcache.export import compiling
from graphcache.export.compiling import distance
from tests.engines.fake_tensorrt import IO, NETWORKS, Network, serialize
from tests.graphs.fake_driver import Torch
from tests.helpers import mlp, outcomes, tensors
from tests.standins import engines

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Affine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 3 + 1


Built = Callable[[Callable[[Tensor], Tensor]], list[dict[str, Any]]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Torch]:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    monkeypatch.setenv("GRAPHCACHE_CACHE_DIR", str(tmp_path))
    with engines(monkeypatch, streams=False) as fake:
        yield fake


@pytest.fixture
def built(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> Built:
    """Puts a builder in place whose engines compute a function, whatever the model."""
    import onnx

    def install(function: Callable[[Tensor], Tensor]) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def build(model: bytes, **options: Any) -> bytes:
            graph = onnx.load_from_string(model).graph
            x, y = graph.input[0].name, graph.output[0].name
            low, usual, high = (options["shapes"] or {x: ((2, 4),) * 3})[x]
            calls.append({**options, "model": model})
            monkeypatch.setitem(
                NETWORKS,
                "made",
                Network(
                    (IO(x, True, (-1, 4), ranges=((low, usual, high),)), IO(y, False, (-1, 4))),
                    lambda shapes, _: {y: shapes[x]},
                    lambda given: {y: function(given[x])},
                ),
            )
            return serialize("made")

        monkeypatch.setattr(compiling, "build", build)
        return calls

    return install


def test_one_call(built: Built, tmp_path: Path) -> None:
    calls = built(lambda x: x * 3 + 1)
    fast = graphcache.compile(Affine().eval(), torch.randn(2, 4), dynamic={"x": {0: (1, 8)}}, max_graphs=3)
    assert calls[0]["shapes"] == {"x": ((1, 4), (2, 4), (8, 4))}
    assert calls[0]["cache"] is True
    for count in (1, 5, 8):
        x = torch.randn(count, 4)
        assert torch.allclose(fast.module(x), x * 3 + 1)
    assert (fast.config.max_graphs, fast.ledger.name, outcomes(fast)) == (3, "Affine", (0, 0, {}))
    fast.save(tmp_path / "m.gcache")
    again = graphcache.load(tmp_path / "m.gcache")
    assert again.module.source.onnx == calls[0]["model"]
    assert again.module.source.options["shapes"] == {"x": [[1, 4], [2, 4], [8, 4]]}


def test_an_engine_that_is_wrong_is_thrown_away(built: Built) -> None:
    built(lambda x: x * 3 + 1.1)
    with pytest.raises(
        EngineBuildError, match=r"Affine: output '\w+' for inputs of \(2, 4\) differs from the module's by"
    ):
        graphcache.compile(Affine().eval(), torch.ones(2, 4))
    fast = graphcache.compile(Affine().eval(), torch.ones(2, 4), tolerance=0.1, name="near")
    assert fast.ledger.name == "near"


@pytest.mark.parametrize("rows", [1, 8])
def test_the_ends_of_open_sizes_are_compared_too(built: Built, rows: int) -> None:
    built(lambda x: x * 3 + (5 if x.shape[0] == rows else 1))
    with pytest.raises(EngineBuildError, match=rf"for inputs of \({rows}, 4\) differs"):
        graphcache.compile(Affine().eval(), torch.ones(2, 4), dynamic={"x": {0: (1, 8)}})


def test_nothing_is_left_of_what_failed(built: Built, fake: Torch) -> None:
    made: list[Any] = []
    build = compiling.EngineModule
    built(lambda x: x)

    class Seen(build):  # type: ignore[misc, valid-type]
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options)
            made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "EngineModule", Seen)
        with pytest.raises(EngineBuildError):
            graphcache.compile(Affine().eval(), torch.ones(2, 4))
    assert [each.engine.closed for each in made] == [True]


def test_the_module_is_left_as_it_was(built: Built) -> None:
    built(lambda x: x * 3 + 1)
    module = Affine().eval()
    before = dict(module.__dict__)
    graphcache.compile(module, (torch.ones(2, 4),), cache=False)
    assert module.__dict__ == before


def test_without_a_gpu_nothing_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(compiling, "export", lambda *_: pytest.fail("it was exported"))
    with pytest.raises(NoGpuError, match="compiling Sequential needs a CUDA device"):
        graphcache.compile(mlp(), torch.ones(2, 4))


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (5, {}, "cannot compile 5: expected an nn.Module"),
        (graphcache.wrap(mlp()), {}, "expected an nn.Module of PyTorch that is not wrapped"),
        (nn.Linear(4, 4), {}, r"Linear is in training mode; call module.eval\(\) first"),
        (mlp(), {"example_inputs": []}, r"example_inputs=\[\]: expected a tensor"),
        (mlp(), {"example_inputs": [5]}, r"example_inputs=\[5\]: expected a tensor"),
        (mlp(), {"tolerance": 1.0}, "tolerance=1.0: expected a part of the norm"),
        (mlp(), {"tolerance": True}, "tolerance=True"),
        (mlp(), {"tolerance": "high"}, "tolerance='high'"),
        (mlp(), {"speed": 1}, "unknown option 'speed'"),
        (mlp(), {"dynamic": 1}, "dynamic=1: expected"),
    ],
)
def test_bad_arguments(module: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        graphcache.compile(module, **{"example_inputs": torch.ones(2, 4), **options})


def test_outputs_of_another_kind(built: Built) -> None:
    built(lambda x: x * 3 + 1)
    engine = graphcache.compile(Affine().eval(), torch.ones(2, 4)).module
    for module, message in (
        (lambda x: (x * 3 + 1).half(), r"is torch.float32 \[2, 4\], and the module's torch.float16 \[2, 4\]"),
        (lambda x: (x * 3 + 1)[:1], r"and the module's torch.float32 \[1, 4\]"),
        (lambda x: (x, x), r"gives 1 outputs for inputs of \(2, 4\), the module 2"),
    ):
        with pytest.raises(EngineBuildError, match=message):
            compiling.compare(module, engine, [torch.ones(2, 4)], 0.1)  # type: ignore[arg-type]


@given(tensors(), st.floats(1e-6, 0.5))
def test_how_far_two_tensors_are_apart(value: Tensor, factor: float) -> None:
    assert distance(value, value) == 0
    if value.dtype is torch.float64 and value.any():
        assert distance(value * (1 + factor), value) == pytest.approx(factor)
    if not value.dtype.is_floating_point and value.numel():
        other = value.flatten().clone()
        other[0] = not bool(other[0])
        other = other.reshape(value.shape)
        assert distance(other, value) == float("inf")


def test_what_is_not_finite() -> None:
    nan, inf = float("nan"), float("inf")
    assert distance(torch.tensor([nan, inf, 1.0]), torch.tensor([nan, inf, 1.0])) == 0
    for one, other in ((nan, 1.0), (1.0, nan), (inf, -inf), (inf, 1.0)):
        assert distance(torch.tensor([one]), torch.tensor([other])) == inf
    assert distance(torch.tensor([1e-30]), torch.tensor([0.0])) < 1e-6
    assert distance(torch.tensor([1.0]), torch.tensor([0.0])) > 1
