"""``graphcache::execute_engine``: an engine as one operation of a traced program; its bytes are a constant of it.

Importing this file registers the operator and loads neither CUDA nor TensorRT.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphcache.capture.engine_like import alive
from graphcache.errors import (
    EngineExecutionError,
    EngineFormatError,
    InputCountError,
    InputDtypeError,
    InputRankError,
)
from graphcache.export.op_schema import EngineSpec, read_spec
from graphcache.modules.engine import EngineModule
from graphcache.modules.portable import bytes_of, on_index

_loaded: dict[tuple[object, ...], EngineModule] = {}
_loading = threading.Lock()


def execute_engine(inputs: list[Tensor], engine: Tensor, call: str) -> list[Tensor]:
    """Run an engine.

    In the process that traced the program the traced module runs, as long as it is open and the program refers to its
    bytes: its new weights are used. Elsewhere the engine is deserialised at its first call, once for each device, and
    stays until :func:`unload_engines`.
    """
    spec, rules = read_spec(call)
    module = _module_of(spec, engine, inputs)
    answer = module(*inputs)
    outputs = [answer] if isinstance(answer, Tensor) else list(answer)
    wanted = rules.of([tuple(value.shape) for value in inputs])
    fits = len(outputs) == len(wanted) and all(
        got.dim() == len(shape)
        and str(got.dtype) == f"torch.{dtype}"
        and all(right is None or size == right for size, right in zip(got.shape, shape, strict=True))
        for got, shape, dtype in zip(outputs, wanted, spec.output_dtypes, strict=True)
    )
    if not fits:
        seen = ", ".join(f"{got.dtype} {list(got.shape)}" for got in outputs)
        due = ", ".join(f"{dtype} {list(shape)}" for dtype, shape in zip(spec.output_dtypes, wanted, strict=False))
        raise EngineExecutionError(
            f"{spec.name} answered with {seen}, and the program was traced for {due}: the module has another engine "
            f"since, or its shapes follow a rule that was not found; trace it again, with sizes as they are served"
        )
    return outputs


def unload_engines() -> int:
    """Close the engines of programs from other processes; a later call deserialises its engine again.

    Returns:
        How many there were.
    """
    with _loading:
        gone = list(_loaded.values())
        _loaded.clear()
    for module in gone:
        module.close()
    return len(gone)


def _module_of(spec: EngineSpec, engine: Tensor, inputs: Sequence[Tensor]) -> EngineModule:
    """The module that runs an engine of a program."""
    module: EngineModule | None = alive.get(spec.identity)
    if module is not None and module.lies_at((engine.data_ptr(), engine.numel())) and not module.engine.closed:
        return module
    device = next((value.device for value in inputs if value.is_cuda), None)
    key = (spec.sha256, device, *spec.inputs, None, *spec.outputs, spec.requires_output_allocator, spec.profile)
    found = _loaded.get(key)
    if found is None:
        with _loading:
            found = _loaded.get(key)
            if found is None:
                found = _loaded[key] = _load(spec, engine, device)
    return found


def _load(spec: EngineSpec, engine: Tensor, device: torch.device | None) -> EngineModule:
    """Deserialise the engine of a program."""
    data = bytes_of(engine.detach().cpu().contiguous())
    if (found := hashlib.sha256(data).hexdigest()) != spec.sha256:
        raise EngineFormatError(
            f"{spec.name}: the program's constant is not the engine that was exported (sha256 {found[:16]}, expected "
            f"{spec.sha256[:16]}); export it again, or copy the file again"
        )
    with on_index(device):
        module = EngineModule(
            data,
            spec.inputs,
            spec.outputs,
            name=spec.name,
            requires_output_allocator=spec.requires_output_allocator,
        )
    module.set_optimization_profile(spec.profile)
    return module


def _without_gradients(inputs: list[Tensor], engine: Tensor, call: str) -> Any:
    """The operator under autograd: the outputs of an engine never require gradients."""
    with torch._C._AutoDispatchBelowAutograd():
        return call_engine(inputs, engine, call)


def _fake(inputs: list[Tensor], engine: Tensor, call: str) -> list[Tensor]:
    """Outputs without values, for tracers, from the rules in the program."""
    spec, rules = read_spec(call)
    if len(inputs) != len(spec.inputs):
        names = ", ".join(spec.inputs)
        raise InputCountError(f"{spec.name} takes {len(spec.inputs)} inputs ({names}), {len(inputs)} were given")
    for name, value, dtype, rank in zip(spec.inputs, inputs, spec.input_dtypes, spec.input_ranks, strict=True):
        if str(value.dtype) != f"torch.{dtype}":
            raise InputDtypeError(
                f"input {name!r} of {spec.name} is {value.dtype}, the engine takes torch.{dtype}; nothing is cast"
            )
        if value.dim() != rank:
            raise InputRankError(f"input {name!r} of {spec.name} has {value.dim()} dimensions, the engine takes {rank}")
    device = next(
        (value.device for index, value in enumerate(inputs) if index not in spec.host_inputs), torch.device("cuda")
    )
    made = []
    for index, (shape, dtype) in enumerate(zip(rules.of([v.shape for v in inputs]), spec.output_dtypes, strict=True)):
        sizes = [torch.library.get_ctx().new_dynamic_size() if size is None else size for size in shape]
        where = torch.device("cpu") if index in spec.host_outputs else device
        made.append(torch.empty(sizes, dtype=getattr(torch, dtype), device=where))
    return made


# Typed as little as torch types them.
_library: Any = torch.library.Library("graphcache", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "execute_engine(Tensor[] inputs, Tensor engine, str call) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
)
_library.impl("execute_engine", execute_engine, "CompositeExplicitAutograd")
_library.impl("execute_engine", _without_gradients, "Autograd")
torch.library.register_fake("graphcache::execute_engine", _fake, lib=_library)
call_engine: Any = torch.ops.graphcache.execute_engine.default
"""The operator, as programs call it."""
