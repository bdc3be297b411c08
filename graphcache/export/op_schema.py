"""What a traced program says of an engine: text beside the engine's bytes, the last argument of the operator."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch

from graphcache.engines.output_shapes import OutputShapes
from graphcache.errors import EngineFormatError
from graphcache.modules.engine import EngineModule
from graphcache.modules.portable import bytes_of

_VERSION = 1


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """A description of an engine.

    Args:
        version: Of this text.
        identity: Of the module that was traced, in the process that traced it.
        sha256: Of the engine's bytes.
        name: Used in messages.
        inputs: Names, in the order of the call.
        input_dtypes: As torch names them.
        input_ranks: Numbers of dimensions.
        host_inputs: Which of them TensorRT reads on the host.
        outputs: Names, in the order of the answer.
        output_dtypes: As torch names them.
        host_outputs: Which of them TensorRT writes on the host.
        output_shapes: The text of :class:`~graphcache.engines.output_shapes.OutputShapes`.
        requires_output_allocator: Whether TensorRT allocates the outputs.
        profile: The optimisation profile that was chosen, if any.
    """

    version: int
    identity: str
    sha256: str
    name: str
    inputs: list[str]
    input_dtypes: list[str]
    input_ranks: list[int]
    host_inputs: list[int]
    outputs: list[str]
    output_dtypes: list[str]
    host_outputs: list[int]
    output_shapes: str
    requires_output_allocator: bool
    profile: int | None

    @property
    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))


@lru_cache(maxsize=256)
def read_spec(text: str) -> tuple[EngineSpec, OutputShapes]:
    """The description in a traced program."""
    try:
        tree = json.loads(text)
        version = tree.get("version")
        spec = EngineSpec(**tree) if version == _VERSION else None
        shapes = None if spec is None else OutputShapes.read(spec.output_shapes)
    except (ValueError, TypeError, AttributeError) as error:
        raise EngineFormatError(
            f"the program does not describe its engine: {error}; export it again from the engine's module"
        ) from error
    if spec is None or shapes is None:
        raise EngineFormatError(
            f"the program's engine is described in version {version!r}, and this graphcache reads {_VERSION}; export "
            f"it again with this release, or install the release that exported it"
        )
    return spec, shapes


def describe_engine(module: EngineModule) -> str:
    """The text of an :class:`EngineSpec` for a program that calls a module now."""
    engine = module.engine
    return EngineSpec(
        version=_VERSION,
        identity=module.identity,
        sha256=hashlib.sha256(bytes_of(module.engine_tensor())).hexdigest(),
        name=module.name,
        inputs=list(module.input_binding_names),
        input_dtypes=[_name(binding.dtype) for binding in engine.inputs],
        input_ranks=[len(binding.shape) for binding in engine.inputs],
        host_inputs=list(module.host_inputs),
        outputs=list(module.output_binding_names),
        output_dtypes=[_name(binding.dtype) for binding in engine.outputs],
        host_outputs=[index for index, binding in enumerate(engine.outputs) if binding.on_host],
        output_shapes=module.output_shapes,
        requires_output_allocator=module.requires_output_allocator,
        profile=module.profile_choice,
    ).text


def _name(dtype: torch.dtype) -> str:
    """Such as ``"float32"``."""
    return str(dtype).removeprefix("torch.")
