"""What is set on engines, on CUDA: compiled kernels, profiling, outputs made ahead, profiles."""

import json

import pytest
import torch

import graphcache
from graphcache import Reason
from graphcache.runtime import (
    enable_pre_allocated_outputs,
    optimization_profile,
    runtime_cache,
    runtime_config,
    set_dynamic_shapes_kernel_strategy,
)
from tests.helpers import graphs_of

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
networks = pytest.importorskip("tests.gpu.networks")
SIZE, mlp8_reference = networks.SIZE, networks.mlp8_reference


def right(y, x):
    return torch.allclose(y.double().cpu(), mlp8_reference(x), rtol=1e-2, atol=1e-4)


def xs():
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, SIZE, generator=draw).cuda() for n in (1, 5, 2, 8, 3)]


def test_kernels_of_two_engines_in_a_file(load, tmp_path):
    path = tmp_path / "kernels.bin"
    first, second = load("mlp8"), load("two_outputs")
    with runtime_cache([first, second], path) as cache:
        for x in xs():
            assert right(first(x), x)
        a = torch.randn(4, 8, device="cuda")
        assert torch.equal(second(a, a)[0], a * 2)
        assert cache.has_cache()
    assert first.runtime_choice == (None, None)
    if path.exists():
        with runtime_cache(first, path):
            for x in xs():
                assert right(first(x), x)


def test_every_way_of_compiling_answers_right(load):
    engine = load("mlp8")
    fast = graphcache.wrap(engine)
    for strategy in ("none", None):
        with runtime_config(engine, dynamic_shapes_kernel_specialization_strategy=strategy):
            for _ in range(2):
                for x in xs():
                    assert right(fast(x), x)
                    assert right(engine(x), x)
    set_dynamic_shapes_kernel_strategy(engine, "none")
    assert all(right(fast(x), x) for x in xs())


def test_profiling_reports_layers_and_graphs_come_back(load):
    engine = load("mlp8")
    trt = engine.engine.trt
    fast, x = graphcache.wrap(engine), xs()[1]
    fast(x)

    class Times(trt.IProfiler):
        def __init__(self):
            trt.IProfiler.__init__(self)
            self.layers = {}

        def report_layer_time(self, layer_name, ms):
            self.layers[layer_name] = ms

    times = Times()
    engine.enable_profiling(times)
    for _ in range(2):
        assert right(fast(x), x)
    torch.cuda.synchronize()
    assert times.layers
    assert fast.cache_info().eager == {Reason.PROFILING: 2}
    engine.disable_profiling()
    for _ in range(2):
        assert right(fast(x), x)
    assert fast.cache_info().eager == {Reason.PROFILING: 2}
    assert len(graphs_of(fast).entries) == 1


def test_layers_are_told_as_json(load):
    told = json.loads(load("mlp8").get_layer_info())
    assert told


def test_outputs_made_ahead_are_right_and_the_callers(load):
    engine = load("mlp8")
    with enable_pre_allocated_outputs(engine):
        kept = [(engine(x), x) for _ in range(3) for x in xs()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            kept += [(engine(x), x) for x in xs()]
        torch.cuda.current_stream().wait_stream(side)
    assert all(right(y, x) for y, x in kept)
    assert len({y.data_ptr() for y, _ in kept}) == len(kept)


def test_one_profile_for_a_block(load):
    engine = load("two_profiles")
    fast = graphcache.wrap(engine)
    small, large = (torch.randn(n, SIZE, device="cuda") for n in (2, 16))
    wanted = [engine(small), engine(large)]
    with optimization_profile(fast, 1):
        for _ in range(2):
            assert torch.allclose(fast(large), wanted[1], rtol=1e-3, atol=1e-4)
    for _ in range(2):
        assert torch.allclose(fast(small), wanted[0], rtol=1e-3, atol=1e-4)
        assert torch.allclose(fast(large), wanted[1], rtol=1e-3, atol=1e-4)
