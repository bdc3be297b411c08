"""Real engines saved in every form, and loaded in other processes."""

import copy
import os
import pickle
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

import graphcache
from graphcache import EngineModule
from graphcache.engines.output_shapes import output_shapes
from graphcache.errors import EngineVersionError, PackageError
from graphcache.export.op_kernel import call_engine, unload_engines
from tests.gpu.test_refit_gpu import outside_support

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
networks = pytest.importorskip("tests.gpu.networks")
pytest.importorskip("safetensors")
ROOT = Path(__file__).parents[2]
FROM_TORCH = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def close(got, wanted, bound=5e-3):
    got, wanted = got.double().cpu(), wanted.double().cpu()
    return (got - wanted).norm() <= bound * wanted.norm()


def rows(count):
    return torch.randn(count, networks.SIZE, device="cuda")


def fresh(code, *arguments, **environment):
    """What some code prints in a new process."""
    lines = ["import sys, time, torch, graphcache", "from tests.gpu import networks", "arguments = sys.argv[1:]", code]
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *filter(None, sys.path)))), **environment},
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


class Mixed(nn.Module):
    """An engine between torch operations."""

    def __init__(self, engine=None):
        super().__init__()
        self.first = nn.Linear(networks.SIZE, networks.SIZE)
        self.engine = engine if engine is not None else EngineModule()

    def forward(self, x):
        return self.engine(self.first(x).tanh()) * 2


def mixed(engine):
    return Mixed(engine).cuda().eval().requires_grad_(False)


# ---- packages


def test_the_first_request_of_a_new_process_is_a_hit(load, tmp_path):
    """Prints how long loading and preparing take there, and the first request."""
    fast = graphcache.wrap(load("mlp8"), max_graphs=40)
    with torch.inference_mode():
        for size in (1, 3, 8, 8):
            fast(rows(size))
    fast.save(tmp_path / "mlp8.gcache")
    code = """
start = time.perf_counter()
fast = graphcache.load(arguments[0], prepare=True)
torch.cuda.synchronize()
loaded = time.perf_counter()
with torch.inference_mode():
    x = torch.randn(8, networks.SIZE, device="cuda")
    torch.cuda.synchronize()
    before = time.perf_counter()
    y = fast(x)
    torch.cuda.synchronize()
    after = time.perf_counter()
wanted = networks.mlp8_reference(x)
assert (y.double().cpu() - wanted).norm() <= 5e-3 * wanted.norm()
info = fast.cache_info()
assert (info.hits, info.captures, info.eager) == (1, 3, {}), info
assert fast.config.max_graphs == 40
print(f"loaded and prepared in {loaded - start:.3f} s, first request {(after - before) * 1e6:.0f} us")
"""
    print(fresh(code, tmp_path / "mlp8.gcache"))


def test_a_model_with_an_engine(load, tmp_path):
    model, x = mixed(load("mlp8")), rows(5)
    wanted = model(x)
    graphcache.wrap(model).save(tmp_path / "m.gcache")
    again = graphcache.load(tmp_path / "m.gcache", into=mixed(None))
    assert close(again(x), wanted)
    assert close(again(x), wanted)
    assert again.cache_info().hits == 1


def test_an_engine_of_another_version_is_built_again(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPHCACHE_CACHE_DIR", str(tmp_path / "cache"))
    model, shapes = networks.mlp8()
    engine = graphcache.load(graphcache.build(model, shapes=shapes), name="mlp8")
    engine.save(tmp_path / "m.gcache", onnx=model, build={"shapes": shapes})
    with zipfile.ZipFile(tmp_path / "m.gcache") as archive:
        parts = {each.filename: archive.read(each) for each in archive.infolist()}
    version = engine.engine.library.version.encode()
    parts["header.json"] = parts["header.json"].replace(b'"tensorrt": "' + version, b'"tensorrt": "9.9.9')
    with zipfile.ZipFile(tmp_path / "other.gcache", "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    with pytest.raises(EngineVersionError, match="load it with rebuild='if_needed'"):
        graphcache.load(tmp_path / "other.gcache")
    again = graphcache.load(tmp_path / "other.gcache", rebuild="if_needed")
    x = rows(4)
    assert close(again(x), networks.mlp8_reference(x))
    parts["engines/0.engine"] = parts["engines/0.engine"][:-1] + b"\0"
    with zipfile.ZipFile(tmp_path / "other.gcache", "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    with pytest.raises(PackageError, match=r"engines/0\.engine"):
        graphcache.load(tmp_path / "other.gcache", rebuild="if_needed")


# ---- state_dict, copies


def test_states_copies_and_pickles_give_the_same_answers(load, tmp_path):
    model, x = mixed(load("mlp8")), rows(7)
    fast = graphcache.wrap(model)
    wanted = fast(x)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    empty = mixed(None)
    empty.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.save(model, tmp_path / "model.pt")
    copies = [
        empty,
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
        graphcache.wrap(pickle.loads(pickle.dumps(fast)).module),
        copy.deepcopy(fast),
    ]
    for again in copies:
        assert close(again(x), wanted)
        assert close(again(x), wanted)
    assert copies[1].engine.engine_tensor().data_ptr() == model.engine.engine_tensor().data_ptr()


def test_an_engine_takes_the_place_of_another_with_graphs_of_it(load):
    module, other = load("mlp8"), load("two_profiles")
    fast = graphcache.wrap(module)
    x = rows(4)
    before = fast(x)
    assert close(fast(x), before)
    module.load_state_dict(other.state_dict())
    wanted = other(x)
    assert close(fast(x), wanted)
    assert close(fast(x), wanted)
    assert not close(before, wanted)


def test_weights_that_were_refitted_are_saved():
    if outside_support():
        pytest.skip("this TensorRT builds no engine that takes new weights here")
    model, shapes = networks.mlp8()
    module = graphcache.load(graphcache.build(model, shapes=shapes, refittable=True))
    x = rows(4)
    before = module(x)
    module.refit({"w7": networks._weights(8)[7].flip(0).contiguous()})
    wanted = module(x)
    assert not close(wanted, before)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert close(again(x), wanted)


# ---- export and compile


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        ("mlp8", [(1, 64), (7, 64), (64, 64)]),
        ("two_profiles", [(1, 64), (4, 64), (9, 64), (32, 64)]),
    ],
)
def test_rules_of_output_shapes(load, network, inputs):
    module = load(network)
    rules = output_shapes(module.engine)
    for shape in inputs:
        assert rules.of([shape]) == [tuple(module(torch.randn(shape, device="cuda")).shape)]


def test_rules_of_two_inputs_and_of_values(load):
    pair = output_shapes(load("two_outputs").engine)
    assert pair.of([(3, 5), (3, 5)]) == [(3, 5), (3, 5)]
    cut = output_shapes(load("slice_by_value").engine)
    assert cut.of([(16, 4), (1,)]) == [(None, 4)]


@FROM_TORCH
def test_an_exported_program_in_a_new_process(load, tmp_path):
    model, x = mixed(load("mlp8")), rows(8)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: Dim("n", min=1, max=64)}})
    assert sum(node.target is call_engine for node in program.graph.nodes) == 1
    torch.export.save(program, tmp_path / "model.pt2")
    others = [rows(size) for size in (1, 9, 64)]
    torch.save([(each, model(each)) for each in others], tmp_path / "answers.pt")
    code = """
module = torch.export.load(arguments[0]).module()
fast = graphcache.wrap(module)
for x, wanted in torch.load(arguments[1], weights_only=True):
    for answer in (module(x), fast(x), fast(x)):
        assert (answer - wanted).norm() <= 5e-3 * wanted.norm()
info = fast.cache_info()
assert (info.hits, info.captures, info.eager) == (3, 3, {}), info
"""
    fresh(code, tmp_path / "model.pt2", tmp_path / "answers.pt")


@FROM_TORCH
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_a_break(load, backend):
    if backend == "inductor":
        pytest.importorskip("triton")
    model = mixed(load("mlp8"))
    fast = torch.compile(model, fullgraph=True, backend=backend)
    try:
        for size in (2, 3, 64):
            x = rows(size)
            assert close(fast(x), model(x))
    finally:
        torch._dynamo.reset()


@FROM_TORCH
def test_a_program_whose_module_is_gone_brings_its_engine(engine_bytes):
    module = graphcache.load(engine_bytes("mlp8"))
    x = rows(4)
    program = torch.export.export(module, (x,)).module()
    wanted = program(x)
    module.close()
    del module
    try:
        assert close(program(x), wanted)
    finally:
        unload_engines()


# ---- kernels, and all of it in one call


def test_kernels_that_were_kept_make_the_first_call_faster(engine_bytes, tmp_path):
    """Prints the time of the first calls of three shapes in processes without, filling, and with kept kernels."""
    (tmp_path / "mlp8.engine").write_bytes(engine_bytes("mlp8"))
    code = """
module = graphcache.load(arguments[0], keep_kernels=arguments[1] == "keep")
if not hasattr(module.engine.trt, "DynamicShapesKernelSpecializationStrategy"):
    print("none")
    raise SystemExit
inputs = [torch.randn(size, networks.SIZE, device="cuda") for size in (1, 5, 33)]
torch.cuda.synchronize()
start = time.perf_counter()
answers = [module(x) for x in inputs]
torch.cuda.synchronize()
print(time.perf_counter() - start)
for x, y in zip(inputs, answers):
    wanted = networks.mlp8_reference(x)
    assert (y.double().cpu() - wanted).norm() <= 5e-3 * wanted.norm()
"""
    cache = {"GRAPHCACHE_CACHE_DIR": str(tmp_path / "cache")}
    printed = [fresh(code, tmp_path / "mlp8.engine", way, **cache).strip() for way in ("not", "keep", "keep")]
    if printed[0] == "none":
        pytest.skip("this TensorRT compiles when it builds")
    without, filling, kept = map(float, printed)
    print(f"first calls of three shapes: {without:.3f} s, filling {filling:.3f} s, kept {kept:.3f} s")
    assert list((tmp_path / "cache" / "built").glob("*.kernels"))
    assert kept < without


@FROM_TORCH
def test_a_module_of_torch_in_one_call(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setenv("GRAPHCACHE_CACHE_DIR", str(tmp_path / "cache"))
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(48, 256), nn.ELU(), nn.Linear(256, 256), nn.ELU(), nn.Linear(256, 12))
    policy = policy.cuda().eval().requires_grad_(False)
    start = time.perf_counter()
    example = torch.randn(8, 48, device="cuda")
    with graphcache.compile(policy, example, dynamic={0: {0: (1, 64)}}) as fast:
        first = time.perf_counter() - start
        for size in (1, 8, 64):
            x = torch.randn(size, 48, device="cuda")
            for _ in range(2):
                assert close(fast(x), policy(x))
        assert (fast.cache_info().hits, fast.cache_info().captures) == (3, 3)
        fast.save(tmp_path / "policy.gcache")
    start = time.perf_counter()
    with graphcache.compile(policy, example, dynamic={0: {0: (1, 64)}}) as fast:
        second = time.perf_counter() - start
        assert close(fast(example), policy(example))
    print(f"compiled in {first:.2f} s, from the cache in {second:.2f} s")
    again = graphcache.load(tmp_path / "policy.gcache", prepare=True)
    assert close(again(example), policy(example))
    assert again.cache_info().hits == 1
