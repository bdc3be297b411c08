"""Models that Torch-TensorRT compiled, where it is installed and its TensorRT runs here."""

import pytest
import torch
from torch import nn

import graphcache
from graphcache.capture.engine_like import is_foreign
from graphcache.integrations.torch_tensorrt.adopted_engine import AdoptedEngine

torch_tensorrt = pytest.importorskip("torch_tensorrt")

# Of its own settings, which nobody here chose.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

SIZE = 64
SHAPES = (2, 7, 1, 16, 5, 3, 12, 9, 4, 8, 6, 11)


class Broken(nn.Module):
    """Two engines with a cumulative sum in torch between them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh())

    def forward(self, x):
        return self.second(torch.cumsum(self.first(x), dim=-1) * 0.1)


@pytest.fixture(scope="module", params=["cpp", "python"])
def compiled(request):
    torch.manual_seed(0)
    network = Broken().eval().requires_grad_(False).cuda()
    batch = torch.export.Dim("batch", min=1, max=16)
    program = torch.export.export(network, (torch.randn(8, SIZE, device="cuda"),), dynamic_shapes={"x": {0: batch}})
    options = {"use_python_runtime": True} if request.param == "python" else {}
    module = torch_tensorrt.dynamo.compile(
        program,
        [torch_tensorrt.Input(min_shape=(1, SIZE), opt_shape=(8, SIZE), max_shape=(16, SIZE), dtype=torch.float32)],
        torch_executed_ops={"torch.ops.aten.cumsum.default"},
        min_block_size=1,
        **options,
    )
    return network, module


def xs():
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(n, SIZE, generator=draw).cuda() for n in SHAPES]


def close(left, right):
    return torch.allclose(left, right, rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"strategy": "per_submodule"}, {"runtime": "graphcache"}], ids=["auto", "per_submodule", "must"]
)
def test_twelve_shapes_and_everything_as_it_was_afterwards(compiled, options):
    network, module = compiled
    before = dict(module._modules)
    assert any(map(is_foreign, before.values()))
    with torch.no_grad(), graphcache.wrap(module, **options) as fast:
        assert any(isinstance(each, AdoptedEngine) for each in module.modules())
        kept = [(fast(x), network(x)) for _ in range(4) for x in xs()]
        info = fast.cache_info()
    assert all(close(got, wanted) for got, wanted in kept)
    assert info.hits > 0
    assert info.eager == {}
    assert all(module._modules[name] is each for name, each in before.items())
    with torch.no_grad():
        assert all(close(module(x), network(x)) for x in xs())


def test_left_to_their_own_runtime_inside_a_graph_of_the_whole(compiled):
    network, module = compiled
    before = dict(module._modules)
    with torch.no_grad(), graphcache.wrap(module, strategy="whole_graph", runtime="torch_tensorrt") as fast:
        kept = [(fast(x), network(x)) for _ in range(3) for x in xs()]
    assert all(close(got, wanted) for got, wanted in kept), "whether by graphs or eagerly"
    assert dict(module._modules) == before


def test_for_the_length_of_a_block(compiled):
    network, module = compiled
    before = dict(module._modules)
    with torch.no_grad(), graphcache.runtime.enable_cudagraphs(module) as fast:
        assert graphcache.runtime.get_whole_cudagraphs_mode()
        assert all(close(fast(x), network(x)) for _ in range(2) for x in xs())
    assert dict(module._modules) == before
