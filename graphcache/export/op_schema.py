"""What a traced program says of an engine: text beside the engine's bytes, the last argument of the operator."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Literal

from graphcache.engines.output_shapes import OutputShapes
from graphcache.errors import EngineFormatError
from graphcache.fields import read_fields
from graphcache.keys.call_spec import short_name
from graphcache.modules.engine import EngineModule
from graphcache.modules.portable import bytes_of


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """A description of an engine. Names, dtypes and ranks are in the order of the call or of the answer."""

    identity: str
    """Of the module that was traced, in the process that traced it."""
    sha256: str
    """Of the engine's bytes."""
    name: str
    inputs: list[str]
    input_dtypes: list[str]
    input_ranks: list[int]
    host_inputs: list[int]
    """Positions of the inputs that TensorRT reads on the host."""
    outputs: list[str]
    output_dtypes: list[str]
    host_outputs: list[int]
    output_shapes: str
    """The text of :class:`~graphcache.engines.output_shapes.OutputShapes`."""
    requires_output_allocator: bool
    profile: int | None
    version: Literal[1] = 1

    @property
    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))


@lru_cache(maxsize=256)
def read_spec(text: str) -> tuple[EngineSpec, OutputShapes]:
    """The description in a traced program."""
    try:
        spec = read_fields(EngineSpec, json.loads(text))
        return spec, OutputShapes.read(spec.output_shapes)
    except ValueError as error:
        raise EngineFormatError(
            f"the program does not describe its engine: {error}; export it again with this release, or install the "
            f"release that exported it"
        ) from error


def describe_engine(module: EngineModule) -> str:
    """The text of an :class:`EngineSpec` for a program that calls a module now."""
    engine = module.engine
    return EngineSpec(
        identity=module.identity,
        sha256=hashlib.sha256(bytes_of(module.engine_tensor())).hexdigest(),
        name=module.name,
        inputs=list(module.input_binding_names),
        input_dtypes=[short_name(binding.dtype) for binding in engine.inputs],
        input_ranks=[len(binding.shape) for binding in engine.inputs],
        host_inputs=list(module.host_inputs),
        outputs=list(module.output_binding_names),
        output_dtypes=[short_name(binding.dtype) for binding in engine.outputs],
        host_outputs=[index for index, binding in enumerate(engine.outputs) if binding.on_host],
        output_shapes=module.output_shapes,
        requires_output_allocator=module.requires_output_allocator,
        profile=module.profile_choice,
    ).text
