"""``wrap``, ``load``, ``build`` and ``compile`` exist and do their work."""

import inspect

import pytest
import torch
from torch import nn

import graphcache
from graphcache import CachedModule, EngineModule, GraphConfig
from graphcache.errors import EngineBuildError, EngineFormatError, NoGpuError
from tests.helpers import mlp, same

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def test_wrap_answers_as_the_module_does_from_one_graph_per_shape():
    module = mlp()
    fast = graphcache.wrap(module, max_graphs=8)
    for count in (1, 2, 1, 2, 1):
        x = torch.randn(count, 4)
        assert same(fast(x), module(x))
    info = fast.cache_info()
    assert (info.captures, info.hits, info.graphs, info.eager) == (2, 3, 2, {})
    assert isinstance(fast, CachedModule)
    assert fast.config.max_graphs == 8


def test_wrap_takes_the_fields_of_a_config_as_options():
    for name, field in GraphConfig.__dataclass_fields__.items():
        fast = graphcache.wrap(mlp(), **{name: field.default})
        assert getattr(fast.config, name) == field.default


def test_wrap_leaves_the_module_as_it_was():
    module = mlp()
    before, names = dict(vars(module)), sorted(module.state_dict())
    with graphcache.wrap(module) as fast:
        fast(torch.ones(1, 4))
        assert fast.module is module
        assert sorted(fast.state_dict()) == names
    assert vars(module) == before


def test_wrap_puts_an_engine_behind_graphs(load, rows):
    fast = graphcache.wrap(load("affine"))
    for count in (2, 3, 2, 3, 2):
        x = rows(count, start=count)
        assert torch.equal(fast(x), x * 3 + 1)
    assert (fast.cache_info().captures, fast.cache_info().hits) == (2, 3)


@pytest.mark.parametrize("kind", ["bytes", "str", "path"])
def test_load_takes_bytes_and_paths(load, rows, tmp_path, kind):
    data = load("affine").serialized_engine
    path = tmp_path / "net.engine"
    path.write_bytes(data)
    engine = graphcache.load({"bytes": data, "str": str(path), "path": path}[kind])
    assert isinstance(engine, EngineModule)
    assert torch.equal(engine(rows(2)), rows(2) * 3 + 1)


def test_load_refuses_what_is_no_engine(fake):
    with pytest.raises(EngineFormatError):
        graphcache.load(b"no engine" * 20)


def test_build_makes_an_engine_of_a_model_without_a_gpu():
    pytest.importorskip("tensorrt_rtx", reason="building needs TensorRT-RTX, which is not installed")
    helper = pytest.importorskip("onnx.helper", reason="the model is made with onnx")
    io = [helper.make_tensor_value_info(name, 1, ["n", 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "net", io[:1], io[1:])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    data = graphcache.build(model, shapes={"x": ((1, 4), (2, 4), (8, 4))})
    assert isinstance(data, bytes)
    assert len(data) > 100


def test_build_takes_its_options_by_name():
    parameters = inspect.signature(graphcache.build).parameters
    assert next(iter(parameters)) == "onnx"
    assert {"shapes", "weight_streaming", "refittable", "workspace", "library", "progress", "cache"} <= set(parameters)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compile_makes_an_engine_behind_graphs_of_a_module(builds):
    class Net(nn.Module):
        def forward(self, x):
            return x * 3 + 1

    built = builds(lambda x: x * 3 + 1)
    fast = graphcache.compile(Net().eval(), torch.ones(2, 4), dynamic={"x": {0: (1, 4)}}, max_graphs=3)
    assert built == [{"x": ((1, 4), (2, 4), (4, 4))}]
    assert isinstance(fast, CachedModule)
    assert isinstance(fast.module, EngineModule)
    assert fast.config.max_graphs == 3


def test_compile_throws_an_engine_away_that_answers_otherwise(builds):
    builds(lambda x: x * 3 + 2)
    with pytest.raises(EngineBuildError, match="differs from the module's"):
        graphcache.compile(mlp(), torch.ones(2, 4))


def test_compile_says_that_it_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(NoGpuError, match="CUDA device"):
        graphcache.compile(mlp(), torch.ones(1, 4))
