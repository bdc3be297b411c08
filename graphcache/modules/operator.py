"""``graphcache::execute_engine``: an engine as one operation of a traced program.

``torch.export`` and ``torch.compile`` record it in the place of a call of an
:class:`~graphcache.modules.engine.EngineModule`. It takes everything that it needs as arguments: the inputs, the
engine's bytes as a constant of the program, and text (:class:`Call`) with names, dtypes and the rules by which output
shapes follow from input shapes. So a program that was saved runs in any process that has imported graphcache.

Importing this registers the operator and does nothing else: neither CUDA nor TensorRT is looked for.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from graphcache.engines.output_shapes import OutputShapes
from graphcache.errors import (
    EngineExecutionError,
    EngineFormatError,
    InputCountError,
    InputDtypeError,
    InputRankError,
)
from graphcache.modules.engine_state import bytes_of

if TYPE_CHECKING:
    from graphcache.modules.engine import EngineModule

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Call:
    """What a traced program says of an engine besides its bytes.

    Args:
        version: Of this text.
        identity: Of the module that was traced, in the process that traced it.
        sha256: Of the engine's bytes.
        name: What messages call it.
        inputs: Names, in the order of the call.
        input_dtypes: As torch names them.
        input_ranks: Numbers of dimensions.
        host_inputs: Which of them TensorRT reads on the host.
        outputs: Names, in the order of the answer.
        output_dtypes: As torch names them.
        host_outputs: Which of them TensorRT writes on the host.
        output_shapes: As :class:`~graphcache.engines.output_shapes.OutputShapes` writes them.
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
def read_call(text: str) -> tuple[Call, OutputShapes]:
    """What a traced program says of an engine.

    Raises:
        EngineFormatError: If another release wrote it, or it is damaged.
    """
    try:
        tree = json.loads(text)
        version = tree.get("version")
        call = Call(**tree) if version == _VERSION else None
        shapes = None if call is None else OutputShapes.read(call.output_shapes)
    except (ValueError, TypeError, AttributeError) as error:
        raise EngineFormatError(
            f"the program does not describe its engine: {error}; export it again from the engine's module"
        ) from error
    if call is None or shapes is None:
        raise EngineFormatError(
            f"the program's engine is described in version {version!r}, and this graphcache reads {_VERSION}; export "
            f"it again with this release, or install the release that exported it"
        )
    return call, shapes


def describe_call(module: EngineModule) -> str:
    """What a program that calls a module now has to say of it.

    Args:
        module: With an engine.

    Returns:
        A :class:`Call` as text.
    """
    engine = module.engine
    return Call(
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


alive: WeakValueDictionary[str, EngineModule] = WeakValueDictionary()
"""The modules of this process, by identity."""
_loaded: dict[tuple[object, ...], EngineModule] = {}
_loading = threading.Lock()


def execute_engine(inputs: list[Tensor], engine: Tensor, call: str) -> list[Tensor]:
    """Run an engine.

    In the process that traced the program this is the module that was traced, until it is closed, and as long as the
    program refers to its bytes: new weights show, as those of any module do. Elsewhere the engine is deserialised at
    its first call, once for each device, and stays until :func:`unload_engines`.

    Raises:
        EngineFormatError: If the bytes are not those that were exported.
        EngineExecutionError: If outputs have other shapes than the program was compiled for.
        EngineError: As :class:`~graphcache.modules.engine.EngineModule`.
        InputError: Likewise.
    """
    told, rules = read_call(call)
    module = _module_of(told, engine, inputs)
    answer = module(*inputs)
    outputs = [answer] if isinstance(answer, Tensor) else list(answer)
    wanted = rules.of([tuple(value.shape) for value in inputs])
    fits = len(outputs) == len(wanted) and all(
        got.dim() == len(shape)
        and str(got.dtype) == f"torch.{dtype}"
        and all(right is None or size == right for size, right in zip(got.shape, shape, strict=True))
        for got, shape, dtype in zip(outputs, wanted, told.output_dtypes, strict=True)
    )
    if not fits:
        seen = ", ".join(f"{got.dtype} {list(got.shape)}" for got in outputs)
        due = ", ".join(f"{dtype} {list(shape)}" for dtype, shape in zip(told.output_dtypes, wanted, strict=False))
        raise EngineExecutionError(
            f"{told.name} answered with {seen}, and the program was traced for {due}: the module has another engine "
            f"since, or its shapes follow a rule that was not found; trace it again, with sizes as they are served"
        )
    return outputs


def traced_engines(module: nn.Module) -> list[EngineModule]:
    """The modules of this process whose engines a traced program runs, which it holds as constants."""
    engines = list(alive.values())
    if not engines:
        return []
    own = {id(each) for each in engines}
    # An engine's module refers to its bytes itself, which its deep copies share.
    places = {
        (tensor.data_ptr(), tensor.numel())
        for each in module.modules()
        if id(each) not in own
        for tensor in (*each.__dict__.values(), *each._buffers.values())
        if type(tensor) is Tensor and tensor.dtype is torch.uint8 and tensor.device.type == "cpu"
    }
    return [each for each in engines if any(each.lies_at(place) for place in places)]


def unload_engines() -> int:
    """Close the engines that programs of other processes have brought; a later call deserialises its engine again.

    Returns:
        How many there were.
    """
    with _loading:
        gone = list(_loaded.values())
        _loaded.clear()
    for module in gone:
        module.close()
    return len(gone)


def _module_of(told: Call, engine: Tensor, inputs: Sequence[Tensor]) -> EngineModule:
    module = alive.get(told.identity)
    if module is not None and module.lies_at((engine.data_ptr(), engine.numel())) and not module.engine.closed:
        return module
    device = next((value.device for value in inputs if value.is_cuda), None)
    key = (told.sha256, device, *told.inputs, None, *told.outputs, told.requires_output_allocator, told.profile)
    found = _loaded.get(key)
    if found is None:
        with _loading:
            found = _loaded.get(key)
            if found is None:
                found = _loaded[key] = _load(told, engine, device)
    return found


def _load(told: Call, engine: Tensor, device: torch.device | None) -> EngineModule:
    from graphcache.modules.engine import EngineModule
    from graphcache.modules.engine_carried import on_index

    data = bytes_of(engine.detach().cpu().contiguous())
    if (found := hashlib.sha256(data).hexdigest()) != told.sha256:
        raise EngineFormatError(
            f"{told.name}: the program's constant is not the engine that was exported (sha256 {found[:16]}, expected "
            f"{told.sha256[:16]}); export it again, or copy the file again"
        )
    with on_index(device):
        module = EngineModule(
            data,
            told.inputs,
            told.outputs,
            name=told.name,
            requires_output_allocator=told.requires_output_allocator,
        )
    module.set_optimization_profile(told.profile)
    return module


def _without_gradients(inputs: list[Tensor], engine: Tensor, call: str) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return call_engine(inputs, engine, call)


def _fake(inputs: list[Tensor], engine: Tensor, call: str) -> list[Tensor]:
    """Outputs without values, for tracers: from the rules that the program carries, asking nobody."""
    told, rules = read_call(call)
    if len(inputs) != len(told.inputs):
        names = ", ".join(told.inputs)
        raise InputCountError(f"{told.name} takes {len(told.inputs)} inputs ({names}), {len(inputs)} were given")
    for name, value, dtype, rank in zip(told.inputs, inputs, told.input_dtypes, told.input_ranks, strict=True):
        if str(value.dtype) != f"torch.{dtype}":
            raise InputDtypeError(
                f"input {name!r} of {told.name} is {value.dtype}, the engine takes torch.{dtype}; nothing is cast"
            )
        if value.dim() != rank:
            raise InputRankError(f"input {name!r} of {told.name} has {value.dim()} dimensions, the engine takes {rank}")
    device = next(
        (value.device for index, value in enumerate(inputs) if index not in told.host_inputs), torch.device("cuda")
    )
    made = []
    for index, (shape, dtype) in enumerate(zip(rules.of([v.shape for v in inputs]), told.output_dtypes, strict=True)):
        sizes = [torch.library.get_ctx().new_dynamic_size() if size is None else size for size in shape]
        where = torch.device("cpu") if index in told.host_outputs else device
        made.append(torch.empty(sizes, dtype=getattr(torch, dtype), device=where))
    return made


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Typed as little as torch types them.
_library: Any = torch.library.Library("graphcache", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "execute_engine(Tensor[] inputs, Tensor engine, str call) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
)
_library.impl("execute_engine", execute_engine, "CompositeExplicitAutograd")
# The answers of an engine never require gradients, however it is called.
_library.impl("execute_engine", _without_gradients, "Autograd")
torch.library.register_fake("graphcache::execute_engine", _fake, lib=_library)
call_engine: Any = torch.ops.graphcache.execute_engine.default
"""The operator, as programs call it."""
