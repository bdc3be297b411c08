"""Code that was written for ``torch_tensorrt.runtime`` finds its names, its arguments and its ways here.

What is listed is what its versions 2.11 and 2.14 export, read from their sources.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import graphcache
import graphcache.runtime as runtime
from graphcache import EngineModule

ARGUMENTS = {
    "enable_cudagraphs": ["compiled_module", "cuda_graph_strategy"],
    "enable_output_allocator": ["module"],
    "enable_pre_allocated_outputs": ["module"],
    "get_cudagraphs_mode": [],
    "get_whole_cudagraphs_mode": [],
    "optimization_profile": ["module", "profile"],
    "runtime_cache": ["target_or_targets", "path", "autosave"],
    "runtime_config": ["target_or_targets"],
    "set_cudagraphs_mode": ["mode"],
    "set_dynamic_shapes_kernel_strategy": ["target_or_targets", "strategy"],
    "set_multi_device_safe_mode": ["mode"],
    "weight_streaming": ["module"],
}
METHODS = {
    "are_output_tensors_unowned",
    "disable_profiling",
    "enable_profiling",
    "get_automatic_device_memory_budget",
    "get_device_memory_budget",
    "get_layer_info",
    "get_streamable_device_memory_budget",
    "set_device_memory_budget",
    "set_optimization_profile",
    "set_output_tensors_as_unowned",
    "set_pre_allocated_outputs",
    "set_use_output_allocator",
    "setup_engine",
}
SETTINGS = ["dynamic_shapes_kernel_specialization_strategy", "cuda_graph_strategy", "runtime_cache"]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_function_has_its_name_and_takes_its_arguments(name):
    found = getattr(runtime, name)
    assert name in runtime.__all__
    parameters = inspect.signature(found).parameters
    assert [each for each in parameters if each in ARGUMENTS[name]] == ARGUMENTS[name]
    positional = [each for each in ARGUMENTS[name] if each != "cuda_graph_strategy"]
    assert list(parameters)[: len(positional)] == positional
    others = [each for key, each in parameters.items() if key not in ARGUMENTS[name]]
    assert all(each.default is not each.empty or each.kind is each.VAR_KEYWORD for each in others)


def test_engines_have_the_methods():
    assert {name for name in METHODS if callable(getattr(EngineModule, name, None))} == METHODS


def test_settings_have_the_fields():
    assert list(runtime.RuntimeSettings.__dataclass_fields__) == SETTINGS


def test_the_constructor_takes_what_theirs_does():
    theirs = ["serialized_engine", "input_binding_names", "output_binding_names", "name", "settings", "weight_name_map"]
    assert list(inspect.signature(EngineModule).parameters)[:6] == theirs
    assert "requires_output_allocator" in inspect.signature(EngineModule).parameters


def test_a_program_of_theirs_runs():
    module = nn.Linear(4, 2).requires_grad_(False)
    x = torch.zeros(1, 4)
    runtime.set_cudagraphs_mode(True)
    assert runtime.get_cudagraphs_mode() is True
    assert runtime.get_whole_cudagraphs_mode() is False
    with runtime.enable_cudagraphs(module) as cudagraphs_module:
        assert runtime.get_whole_cudagraphs_mode() is True
        cudagraphs_module(x)
    with runtime.set_multi_device_safe_mode(True) as safe:
        assert isinstance(safe, runtime.set_multi_device_safe_mode)
        module(x)
    with runtime.enable_output_allocator(module), runtime.enable_pre_allocated_outputs(module):
        module(x)
    with runtime.optimization_profile(module, 0), runtime.weight_streaming(module) as weight_streaming_ctx:
        assert weight_streaming_ctx.device_budget == weight_streaming_ctx.total_device_budget == 0
    runtime.set_cudagraphs_mode(False)
    assert runtime.get_cudagraphs_mode() is False
    graphcache.config.modes.set(graphcache.config.Modes())


def test_the_strategy_of_tensorrt_rtx_is_looked_at_and_not_needed():
    module = nn.Linear(4, 2).requires_grad_(False)
    with runtime.enable_cudagraphs(module, cuda_graph_strategy="whole_graph_capture") as fast:
        assert isinstance(fast, graphcache.CachedModule)
    with pytest.raises(graphcache.errors.ConfigError, match="cuda_graph_strategy='quick' is not an option"):
        runtime.enable_cudagraphs(module, cuda_graph_strategy="quick").__enter__()
