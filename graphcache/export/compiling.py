"""``graphcache.compile``: from a PyTorch module to a cached engine in one call."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphcache.config import GraphConfig
from graphcache.engines.build import build
from graphcache.engines.library import require_gpu
from graphcache.errors import ConfigError, EngineBuildError, is_a, shown
from graphcache.export.onnx_export import export, open_sizes, resized
from graphcache.modules.cached_module import CachedModule
from graphcache.modules.engine import EngineModule
from graphcache.modules.packaging import Source
from graphcache.modules.prepare import counting

TOLERANCE = 5e-3
"""Relative error of the norm. TensorRT multiplies in TF32 where torch may not, which alone makes 1e-3."""


def compile(
    module: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    dynamic: Mapping[Any, Any] | None = None,
    tolerance: float | None = None,
    cache: bool = True,
    workspace: int | None = None,
    progress: bool | None = None,
    name: str = "",
    **options: Any,
) -> CachedModule:
    """A TensorRT engine of a module, behind a cache of CUDA graphs.

    The module is exported (``torch.export``, then ONNX), and the engine built, loaded, and compared with the module on
    the examples and on the smallest and largest open sizes. The module is left as it was. Types are those of the
    module: for fp16 call ``module.half()`` before.

    It needs a CUDA device, to compare. Without one, ``torch.onnx.export`` and :func:`graphcache.build` make an engine
    to be loaded elsewhere.

    Args:
        module: In ``eval`` mode. It takes tensors, and returns a tensor or a tuple or list of tensors.
        example_inputs: One call's inputs, on the module's device; their sizes are those that the engine is fastest at.
        dynamic: Name or position of an input -> axis -> ``(smallest, largest)``, or a ``torch.export.Dim``, which axes
            that always have the same size share. Other sizes are fixed.
        tolerance: How far an answer may be off, as a part of its norm; ``None`` is 0.005, which leaves room for TF32.
            Integers must be equal.
        cache: Keep the engine, and the kernels that are compiled for it, in this user's cache folder.
        workspace: As :func:`graphcache.build` takes it.
        progress: Count the steps on stderr where that is a terminal; ``None`` means ``True``.
        name: What messages call it; the module's class if empty.
        **options: As :func:`graphcache.wrap` takes them.

    Returns:
        The engine's module behind a cache. Its ``save`` writes a package that can be built again elsewhere.

    Raises:
        NoGpuError: If there is no CUDA device; before anything is exported.
        ConfigError: For a bad option, examples that are no tensors, or a module in training mode.
        EngineBuildError: If it cannot be exported or built, or the engine's answers are not the module's.
        TensorRTNotFoundError: If no flavour of TensorRT is installed.

    Example::

        policy = Policy().eval().cuda()
        fast = graphcache.compile(policy, torch.randn(8, 48, device="cuda"), dynamic={"x": {0: (1, 64)}})
        y = fast(torch.randn(3, 48, device="cuda"))
    """
    inputs = _checked_inputs(module, example_inputs)
    bound = TOLERANCE if tolerance is None else tolerance
    if type(bound) not in (int, float) or not 0 <= bound < 1:
        raise ConfigError(f"tolerance={shown(tolerance)}: expected a part of the norm, from 0 to below 1")
    if type(name) is not str:
        raise ConfigError(f"name={shown(name)}: expected text")
    config, dims = GraphConfig.of(options), open_sizes(module, inputs, dynamic)
    label = name or type(module).__name__
    require_gpu(f"compiling {label}")
    with counting(f"Compiling {label}", 4, progress) as step:
        exported = export(module, inputs, dims)
        step()
        built: Any = {"shapes": exported.shapes or None, "workspace": workspace}
        data = build(exported.onnx, cache=cache, **built)
        step()
        engine = EngineModule(data, exported.inputs, exported.outputs, name=label, keep_kernels=cache)
        engine.source = Source(exported.onnx, json.loads(json.dumps(built)))
        step()
        _compare_at_all_sizes(module, engine, inputs, dims, bound)
        step()
    return CachedModule(engine, config, name=label)


def _checked_inputs(module: object, example_inputs: Any) -> Sequence[Tensor]:
    """The inputs of a call of a module that can be compiled."""
    if not is_a(module, nn.Module) or is_a(module, CachedModule, EngineModule):
        raise ConfigError(f"cannot compile {shown(module)}: expected an nn.Module of PyTorch that is not wrapped")
    assert isinstance(module, nn.Module)
    if any(getattr(each, "training", False) for each in module.modules()):
        raise ConfigError(f"{type(module).__name__} is in training mode; call module.eval() first")
    inputs = (example_inputs,) if is_a(example_inputs, Tensor) else example_inputs
    if not is_a(inputs, tuple, list) or not inputs or not all(is_a(each, Tensor) for each in inputs):
        raise ConfigError(f"example_inputs={shown(example_inputs)}: expected a tensor, or a sequence of tensors")
    found: Sequence[Tensor] = inputs
    return found


def _compare_at_all_sizes(
    module: nn.Module, engine: EngineModule, inputs: Sequence[Tensor], dims: Sequence[Mapping[int, Any]], bound: float
) -> None:
    """Compare the examples, and the smallest and largest sizes; an engine that differs is closed."""
    examples = [list(inputs)]
    if any(dims):
        examples += [
            [
                resized(value, {axis: max(int(getattr(dim, end)), 1) for axis, dim in axes.items()})
                for value, axes in zip(inputs, dims, strict=True)
            ]
            for end in ("min", "max")
        ]
    try:
        for each in examples:
            compare(module, engine, each, bound)
    except BaseException:
        engine.close()
        raise


def compare(module: nn.Module, engine: EngineModule, inputs: Sequence[Tensor], tolerance: float) -> None:
    """Compare an engine's answers with those of the module it was made of."""
    with torch.no_grad():
        wanted = _flat(module(*inputs))
        got = _flat(engine(*(value.to(engine.device) for value in inputs)))
    sizes = ", ".join(str(tuple(value.shape)) for value in inputs)
    if len(got) != len(wanted):
        raise EngineBuildError(
            f"{engine.name} gives {len(got)} outputs for inputs of {sizes}, the module {len(wanted)}"
        )
    for output, one, other in zip(engine.output_binding_names, got, wanted, strict=True):
        other = other.to(one.device)
        where = f"{engine.name}: output {output!r} for inputs of {sizes}"
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            raise EngineBuildError(
                f"{where} is {one.dtype} {list(one.shape)}, and the module's {other.dtype} {list(other.shape)}"
            )
        if (error := distance(one, other)) > tolerance:
            raise EngineBuildError(
                f"{where} differs from the module's by {error:.3g} of its norm, and {tolerance:.3g} is allowed; it is "
                f"thrown away. If that is how precise the module is, pass tolerance={min(2 * error, 0.99):.2g}"
            )


def distance(one: Tensor, other: Tensor) -> float:
    """The norm of a difference as a part of the norm of ``other``; infinite where only one of the two is finite."""
    if not other.dtype.is_floating_point:
        return 0.0 if torch.equal(one, other) else float("inf")
    one, other = one.double(), other.double()
    alike = (one == other) | (one.isnan() & other.isnan())
    if not (alike | (one.isfinite() & other.isfinite())).all():
        return float("inf")
    off = torch.where(alike, 0.0, one - other).norm().item()
    return off / max(torch.where(other.isfinite(), other, 0.0).norm().item(), 1e-12) if off else 0.0


def _flat(answer: Any) -> list[Tensor]:
    """The outputs as a list."""
    return [answer] if isinstance(answer, Tensor) else list(answer)
