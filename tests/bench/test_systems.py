import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bench import measure, networks, systems
from bench.systems.plain import PlainEngine, kernel_strategy
from bench.systems.torch_compile import Compiled
from bench.systems.torch_tensorrt_modules import TorchTensorRT
from tests.bench.fakes import CPU, bundle, right, sentences, work

CUDA = torch.device("cuda", 0)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens where there is no GPU")


@pytest.fixture(autouse=True)
def tf32_is_put_back(clean_context):
    """A network on a device multiplies in TF32, which is a setting of the process."""
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = convolutions


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_a_system_is_called_what_it_is_registered_as(name):
    peer = systems.SYSTEMS[name]()
    assert peer.name == name
    assert peer.kind in systems.FLOORS
    assert peer.burst >= 1
    assert systems.SYSTEMS[name]() is not peer


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_peers_are_compared_with_a_mode_of_graphcache_of_their_kind(name):
    peer = systems.SYSTEMS[name]()
    ours = name.startswith(("graphcache", "raw"))
    assert (peer.rival is None) is ours
    assert peer.exact is ours
    if not ours:
        rival = systems.SYSTEMS[peer.rival]()
        assert rival.name.startswith("graphcache")
        assert rival.kind == peer.kind
    for mode in peer.also:
        other = systems.SYSTEMS[mode]()
        assert other.name.startswith("graphcache")
        assert (other.kind, mode == peer.rival) == (peer.kind, False)


def test_tensorrt_rtxs_graphs_are_compared_with_both_ways_to_keep_buffers():
    peer = systems.SYSTEMS["rtx-graphs"]()
    assert (peer.rival, peer.also) == ("graphcache-into", ("graphcache-session",))
    assert [name for name in systems.SYSTEMS if systems.SYSTEMS[name]().also] == ["rtx-graphs"]


@pytest.mark.parametrize("kind", systems.FLOORS)
def test_each_kind_has_a_floor(kind):
    assert systems.SYSTEMS[systems.FLOORS[kind]]().kind == kind


@without_gpu
@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_a_system_that_cannot_run_says_why_in_a_line(name, tmp_path):
    made = bundle(tmp_path, "mlp8")
    on_cuda = measure.Work(made, [2], work(made).pool, CUDA, calls=50)
    found = measure.measure(systems.SYSTEMS[name](), on_cuda, [lambda: None])
    assert found["reason"]
    assert "\n" not in found["reason"]
    assert "closing" not in found
    assert "total_us" not in found


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_closing_what_was_never_loaded_does_nothing(name):
    peer = systems.SYSTEMS[name]()
    peer.close()
    peer.close()


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("torch-tensorrt-cpp", "torch_tensorrt"),
        ("torch-tensorrt-python", "torch_tensorrt"),
    ],
)
def test_a_peer_whose_package_is_absent_names_it(name, package, monkeypatch):
    # None in sys.modules is how Python marks a module that must not be found.
    monkeypatch.setitem(sys.modules, package, None)
    reason = systems.SYSTEMS[name]().available()
    assert reason is not None
    assert reason.startswith("not installed: ")
    assert package in reason


@pytest.fixture
def torch_tensorrt(monkeypatch):
    """As much of torch_tensorrt as is used, over :func:`right`; what happened is in ``log``."""
    log = []
    package, runtime, dynamo = (ModuleType(f"torch_tensorrt{name}") for name in ("", ".runtime", ".dynamo"))

    class Module:
        def __init__(self, **options):
            log.append((type(self).__name__, options))

        def __call__(self, x):
            return right(x)

    package.__version__ = "9.9"
    package.Device = lambda gpu_id: f"gpu {gpu_id}"
    dynamo.CompilationSettings = lambda device: f"settings for {device}"
    runtime.set_cudagraphs_mode = lambda mode: log.append(mode)
    runtime.TorchTensorRTModule = type("TorchTensorRTModule", (Module,), {})
    runtime.PythonTorchTensorRTModule = type("PythonTorchTensorRTModule", (Module,), {})
    package.runtime, package.dynamo, package.log = runtime, dynamo, log
    for module in (package, runtime, dynamo):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return package


@pytest.mark.parametrize("kind", ["cpp", "python"])
def test_torch_tensorrt_is_given_the_same_bytes_and_its_mode_is_put_back(torch_tensorrt, kind, tmp_path):
    peer, made = TorchTensorRT(kind), sentences(tmp_path)
    peer.load(made, CUDA, [2])
    peer.close()
    name = "TorchTensorRTModule" if kind == "cpp" else "PythonTorchTensorRTModule"
    on, (created, options), off = torch_tensorrt.log
    assert (on, created, off) == (True, name, False)
    assert options == {
        "serialized_engine": b"no engine",
        "input_binding_names": ["input_ids", "attention_mask"],
        "output_binding_names": ["sentence_embedding"],
        "name": "words",
        "settings": "settings for gpu 0",
    }


def test_a_compilation_for_each_shape_has_pytorchs_limit(tmp_path):
    import torch._dynamo

    limit = torch._dynamo.config.recompile_limit
    with pytest.raises(RuntimeError, match=f"at most {limit} shapes"):
        Compiled(dynamic=False).load(bundle(tmp_path, "mlp8"), CPU, range(limit + 1))


@pytest.mark.parametrize(("version", "strategy"), [("1.4.0.76", "NONE"), ("1.5.0.114", "EAGER"), ("1.40.1", "EAGER")])
def test_kernels_are_graphcaches(version, strategy):
    strategies = SimpleNamespace(NONE="NONE", EAGER="EAGER")
    trt = SimpleNamespace(__version__=version, DynamicShapesKernelSpecializationStrategy=strategies)
    assert kernel_strategy(trt) == strategy


class _Context:
    def __init__(self, config):
        self.config, self.shapes, self.addresses = config, {}, {}

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return shape[0] != 13

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def get_tensor_shape(self, name):
        return (self.shapes["x"][0], 3)


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """A :class:`PlainEngine` over a TensorRT that only remembers what it was told."""
    strategies = SimpleNamespace(NONE="NONE", EAGER="EAGER")
    graphs = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")
    engine = SimpleNamespace(
        create_runtime_config=lambda: SimpleNamespace(
            create_runtime_cache=lambda: "cache", set_runtime_cache=lambda cache: None, cuda_graph_strategy="none"
        ),
        create_execution_context=_Context,
        num_io_tensors=2,
    )
    trt = SimpleNamespace(
        __name__="tensorrt_rtx",
        __version__="1.5.0",
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda data: engine if data else None),
        DynamicShapesKernelSpecializationStrategy=strategies,
        CudaGraphStrategy=graphs,
    )
    found = SimpleNamespace(module=trt, logger=None, flavour="tensorrt_rtx", version="1.5.0")
    monkeypatch.setattr("graphcache.engines.library.library", lambda: found)
    return PlainEngine(bundle(tmp_path), CPU)


def test_a_plain_engine_sets_what_a_call_needs(plain):
    context = plain.new_context()
    x = torch.zeros(5, 4)
    plain.set_inputs(context, [x])
    output = plain.new_output(context)
    assert context.shapes == {"x": (5, 4)}
    assert output.shape == (5, 3)
    assert context.addresses == {"x": x.data_ptr(), "y": output.data_ptr()}
    assert context.config.dynamic_shapes_kernel_specialization_strategy == "EAGER"
    assert context.config.cuda_graph_strategy == "none"


def test_a_refused_shape_is_an_error(plain):
    with pytest.raises(RuntimeError, match=r"shape \(13, 4\) of x was refused"):
        plain.set_inputs(plain.new_context(), [torch.zeros(13, 4)])


def test_whole_graphs_are_asked_for_where_there_are_any(plain):
    assert plain.new_context(whole_graphs=True).config.cuda_graph_strategy == "whole"
    del plain.trt.CudaGraphStrategy
    with pytest.raises(RuntimeError, match=r"tensorrt_rtx 1\.5\.0 captures no graphs itself"):
        plain.new_context(whole_graphs=True)


def test_networks_are_ones_own_and_frozen():
    one, other = networks.torch_network("policy"), networks.torch_network("policy")
    assert one is not other
    assert not one.training
    x = torch.randn(3, 48)
    assert torch.equal(one(x), other(x))
    with torch.no_grad():
        next(one.parameters()).zero_()
    assert not torch.equal(one(x), other(x))
    assert not any(parameter.requires_grad for parameter in other.parameters())


def test_a_model_without_a_network_is_refused():
    with pytest.raises(SystemExit, match="resnet has no torch network here"):
        networks.torch_network("resnet")


def test_the_vision_transformer_answers_each_image_by_itself():
    network = networks.torch_network("vit")
    x = networks.images(2, seed=1)
    with torch.no_grad():
        both, one = network(x), network(x[:1])
    assert both.shape == (2, 1000)
    torch.testing.assert_close(both[:1], one, rtol=1e-4, atol=1e-5)
    assert (both[0] - both[1]).norm() > 0.1 * both[0].norm()
