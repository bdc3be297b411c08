"""Modes and context managers, named as in ``torch_tensorrt.runtime``.

A mode belongs to the current context (:mod:`contextvars`): it nests, it is restored on every exit, and it does not leak
into other threads or tasks. In Torch-TensorRT a mode is global to the process. Settings of engines concern all engines
of a module at any depth, and every block restores what it found.
"""

from graphcache.cache.graph_cache import set_process_budget
from graphcache.engines.kernel_cache import RuntimeCache
from graphcache.runtime.engines import (
    enable_output_allocator,
    enable_pre_allocated_outputs,
    optimization_profile,
    weight_streaming,
)
from graphcache.runtime.modes import (
    enable_cudagraphs,
    get_cudagraphs_mode,
    get_whole_cudagraphs_mode,
    set_cudagraphs_mode,
    set_multi_device_safe_mode,
)
from graphcache.runtime.settings import (
    RuntimeSettings,
    runtime_cache,
    runtime_config,
    set_dynamic_shapes_kernel_strategy,
)

__all__ = [
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
]
