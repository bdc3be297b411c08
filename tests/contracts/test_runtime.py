"""The functions of ``graphcache.runtime`` are those of ``torch_tensorrt.runtime``, and do what they do there."""

import io

import pytest
import torch

import graphcache
from graphcache import Reason, runtime
from graphcache.errors import ClosedError, InputDeviceError, ModeConflictError
from tests.helpers import mlp, reason, replays
from tests.standins import in_a_new_process

NAMES = {
    "RuntimeCache",
    "RuntimeSettings",
    "enable_cudagraphs",
    "enable_output_allocator",
    "enable_pre_allocated_outputs",
    "get_cudagraphs_mode",
    "get_whole_cudagraphs_mode",
    "optimization_profile",
    "runtime_cache",
    "runtime_config",
    "set_cudagraphs_mode",
    "set_dynamic_shapes_kernel_strategy",
    "set_multi_device_safe_mode",
    "set_process_budget",
    "weight_streaming",
}


def test_the_names():
    assert set(runtime.__all__) == NAMES
    assert all(callable(getattr(runtime, name)) for name in NAMES)


def test_enable_cudagraphs_wraps_for_a_block():
    module, x = mlp(), torch.ones(1, 4)
    with runtime.enable_cudagraphs(module, max_graphs=2) as fast:
        assert runtime.get_whole_cudagraphs_mode()
        for _ in range(3):
            assert torch.equal(fast(x), module(x))
        assert (fast.cache_info().captures, fast.cache_info().hits) == (1, 2)
    assert not runtime.get_whole_cudagraphs_mode()
    assert fast.cache_info().graphs == 0
    with pytest.raises(ClosedError):
        fast(x)


def test_enable_cudagraphs_of_an_engine_is_subgraph_mode(load, rows):
    with runtime.enable_cudagraphs(load("affine"), cuda_graph_strategy="whole_graph_capture") as fast:
        assert runtime.get_cudagraphs_mode()
        fast(rows(2))
        assert replays(fast, rows(2))


def test_set_cudagraphs_mode_lets_bare_engines_use_graphs(load, rows, in_own_context, fake):
    engine = load("affine")
    for _ in range(2):
        engine(rows(2))
    assert "cuGraphLaunch" not in fake.driver.calls, "nobody asked for graphs"

    def calls():
        runtime.set_cudagraphs_mode(True)
        assert runtime.get_cudagraphs_mode()
        for _ in range(3):
            assert torch.equal(engine(rows(2)), rows(2) * 3 + 1)

    in_own_context(calls)
    assert not runtime.get_cudagraphs_mode(), "a mode ends with its context"
    assert fake.driver.calls.count("cuGraphLaunch") >= 2


def test_set_cudagraphs_mode_switches_wrapped_modules_off(in_own_context):
    fast, x = graphcache.wrap(mlp()), torch.ones(1, 4)

    def calls():
        runtime.set_cudagraphs_mode(False)
        assert reason(fast, x) is Reason.DISABLED

    in_own_context(calls)
    assert reason(fast, x) is None


def test_an_output_allocator_for_a_block(load, rows):
    engine = load("affine")
    fast = graphcache.wrap(engine)
    with runtime.enable_output_allocator(fast):
        assert reason(fast, rows(2)) is Reason.OUTPUT_ALLOCATOR
        assert torch.equal(fast(rows(2)), rows(2) * 3 + 1)
    assert not engine.uses_output_allocator
    assert reason(fast, rows(2)) is None


def test_graphs_and_an_output_allocator_refuse_each_other_when_strict(load):
    graphs, allocator = runtime.enable_cudagraphs, runtime.enable_output_allocator
    engine = load("affine")
    for outer, inner in ((allocator, graphs), (graphs, allocator)):
        with outer(engine), pytest.raises(ModeConflictError), inner(engine, strict=True):
            pass


def test_outputs_made_ahead_for_a_block(load, rows):
    engine = load("affine")
    with runtime.enable_pre_allocated_outputs(engine):
        answers = [engine(rows(2, start)) for start in range(3)]
    assert [answer[0, 0].item() for answer in answers] == [1, 4, 7]
    assert not engine.use_pre_allocated_outputs


def test_an_optimisation_profile_for_a_block(load, numbers):
    engine = load("overlapping")
    with runtime.optimization_profile(engine, 1):
        assert engine.profile_choice == 1
        assert engine(numbers(*range(5))).tolist() == [0, 2, 4, 6, 8]
    assert engine.profile_choice is None


def test_streamed_weights_for_a_block(load):
    engine = load("streaming")
    with runtime.weight_streaming(engine) as weights:
        weights.device_budget = weights.total_device_budget // 2
        assert engine.get_device_memory_budget() == 2048
        assert weights.get_automatic_weight_streaming_budget() > 0
    assert engine.get_device_memory_budget() == 4096


def test_how_kernels_are_compiled(load, rows, tmp_path):
    engine = load("affine")
    with runtime.runtime_config(engine, dynamic_shapes_kernel_specialization_strategy="none"):
        assert engine.runtime_choice == ("none", None)
    assert engine.runtime_choice == (None, None)
    runtime.set_dynamic_shapes_kernel_strategy(engine, "lazy")
    assert engine.runtime_choice == ("lazy", None)
    settings = runtime.RuntimeSettings(cuda_graph_strategy="whole_graph_capture")
    assert settings.merge(cuda_graph_strategy="disabled") == runtime.RuntimeSettings()


def test_kernels_are_kept_in_a_file_or_a_stream(load, rows, tmp_path):
    engine, path, stream = load("affine"), tmp_path / "kernels", io.BytesIO()
    for place in (str(path), stream):
        with runtime.runtime_cache(engine, place) as cache:
            assert isinstance(cache, runtime.RuntimeCache)
            engine(rows(2))
    assert path.read_bytes() == stream.getvalue() != b""


def test_inputs_elsewhere_are_refused_or_moved(load, rows, monkeypatch):
    engine = load("affine")
    with pytest.raises(InputDeviceError):
        engine(torch.empty(2, 4, device="meta"))
    with runtime.set_multi_device_safe_mode(True) as mode:
        assert isinstance(mode, runtime.set_multi_device_safe_mode)
        assert mode.old_mode is False
        assert torch.equal(engine(rows(2)), rows(2) * 3 + 1)


PROGRAM = """
module, x = torch.nn.Linear(4, 4).requires_grad_(False), torch.ones(2, 4)
first, second = graphcache.wrap(module), graphcache.wrap(torch.nn.Linear(4, 4).requires_grad_(False))
first(x)
graphcache.runtime.set_process_budget(first.cache_info().process_nbytes)
second(x)
print(first.cache_info().graphs, first.cache_info().evictions, second.cache_info().graphs)
graphcache.runtime.set_process_budget(1)
print(second.cache_info().graphs)
"""


def test_a_budget_of_the_process_evicts_the_coldest_graphs_of_any_module():
    assert in_a_new_process(PROGRAM).split() == ["0", "1", "1", "0"]
