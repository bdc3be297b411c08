"""Who makes the memory of an engine's outputs, and when."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from graphcache.config import modes
from graphcache.errors import ModeConflictError
from graphcache.runtime.engines import check_bool, engines_of


@contextmanager
def enable_output_allocator(module: nn.Module, *, strict: bool = False) -> Iterator[nn.Module]:
    """Let TensorRT allocate the outputs of every engine in the module, for the length of a ``with`` block.

    Their calls run eagerly meanwhile, with the reason ``output_allocator``.

    Args:
        module: An engine or a module with engines at any depth.
        strict: Refuse while graphs are switched on, as Torch-TensorRT does.

    Yields:
        The module.

    Raises:
        ModeConflictError: If ``strict``, and graphs are on in this context.
        ConfigError: For what is no module.
    """
    check_bool("enable_output_allocator(strict=...)", strict)
    if strict and modes.get().graphs in ("subgraph", "whole_graph"):
        raise ModeConflictError(
            "CUDA graphs and a dynamic output allocator are incompatible, and graphs are switched on here; leave "
            "strict=False to run the engines eagerly, or call set_cudagraphs_mode(False) first"
        )
    with ExitStack() as undo:
        for _, engine in engines_of(module):
            undo.callback(engine.set_use_output_allocator, engine.set_use_output_allocator(True))
        yield module


@contextmanager
def enable_pre_allocated_outputs(module: nn.Module) -> Iterator[nn.Module]:
    """Make the outputs of each engine's next eager call at the end of the one before, for the length of a block.

    What a call returns is the caller's all the same, and no two calls return the same memory.

    Args:
        module: An engine or a module with engines at any depth; one without any is left alone.

    Yields:
        The module.

    Raises:
        ConfigError: For what is no module.

    Example:
        >>> with enable_pre_allocated_outputs(nn.ReLU()) as module:
        ...     module
        ReLU()
    """
    with ExitStack() as undo:
        for _, engine in engines_of(module):
            undo.callback(engine.set_pre_allocated_outputs, engine.set_pre_allocated_outputs(True))
        yield module
