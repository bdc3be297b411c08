"""ONNX to engine.

What the caller says about shapes is checked against the model's inputs without TensorRT (:func:`profiles`), so that the
messages are ours; TensorRT sees only what passed.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphcache.engines.build_key import NotKeyed, build_key
from graphcache.engines.library import Library, join_messages, require_gpu
from graphcache.engines.library import library as find
from graphcache.engines.store import user_store
from graphcache.errors import ConfigError, EngineBuildError, shown

Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]
ShapeSpec = Sequence[int] | Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]]
Progress = Callable[[str, int, int], None]

_LARGEST_DIMENSION = 2**31 - 1
_VALUES = (-(2**63), 2**63 - 1)


@dataclass(frozen=True, slots=True)
class Input:
    """An input of the model.

    Args:
        name: Its name.
        dims: Its dimensions; -1 is one that the model leaves open.
        host: Whether TensorRT reads its values on the host, as shapes (a shape tensor). Its range is one of values.
        axes: The model's names for its dimensions, where it has them.
    """

    name: str
    dims: Shape
    host: bool = False
    axes: tuple[str | None, ...] = ()

    @property
    def values(self) -> int:
        """How many values it holds; only a host input is asked."""
        return self.dims[0] if self.dims else 1

    def __str__(self) -> str:
        axes = self.axes or (None,) * len(self.dims)
        sizes = [axis or "?" if size < 0 else str(size) for size, axis in zip(self.dims, axes, strict=True)]
        return f"{self.name} ({', '.join(sizes)}){' read on the host' if self.host else ''}"


def build(
    onnx: str | os.PathLike[str] | bytes | Any,
    *,
    shapes: Mapping[str, ShapeSpec] | None = None,
    weight_streaming: bool = False,
    refittable: bool | Sequence[str] = False,
    workspace: int | None = None,
    library: str | None = None,
    progress: Progress | None = None,
    cache: bool = False,
) -> bytes:
    """Builds a TensorRT engine from an ONNX model.

    TensorRT-RTX builds on a machine without a GPU, the full TensorRT needs one, the lean runtime cannot build. The
    engine runs only under the flavour and version that built it. Types are those of the model: nothing is lowered
    to fp16 or bf16 here, export the model that way instead.

    Args:
        onnx: The path of an ONNX file (external weights beside it are found), its bytes, or an ``onnx.ModelProto``.
        shapes: For each input with open dimensions ``(min, opt, max)``, three shapes of which the engine is fastest at
            ``opt``; one shape means just that one; a list of such triples makes one optimisation profile each, and
            then every input named has as many. For an input whose values are read on the host, values in place of
            shapes. Inputs of fixed shape may be left out.
        weight_streaming: Lets the engine keep part of its weights in host memory while it runs.
        refittable: ``True`` lets all weights be replaced later, names only those weights (ONNX initialisers). Slower
            kernels may result, and TensorRT-RTX needs a GPU to build them.
        workspace: Bound of the scratch memory that layers may use, in bytes; ``None`` is TensorRT's default.
        library: Which TensorRT, as in :func:`graphcache.engines.library.library`.
        progress: Called as ``progress(phase, done, steps)`` while TensorRT builds. Phases nest. An exception that it
            raises cancels the build and is raised from here. Of an engine that was kept nothing is reported.
        cache: Keep the engine in this user's cache folder, and take it from there if the same model was built before
            with the same options by the same TensorRT for the same device. Processes that build the same one at once
            build it once. See ``graphcache cache``.

    Returns:
        The engine, to be written to a file or loaded.

    Raises:
        EngineBuildError: If the model cannot be read, parsed or built, or the shapes do not fit it.
        NoGpuError: If the full TensorRT is to build without a GPU.
        ConfigError: For a bad ``workspace`` or ``cache``, or an unknown ``library``.
        TensorRTNotFoundError: If no TensorRT can be imported.

    Example:
        Needs TensorRT-RTX, and no GPU::

            engine = graphcache.build("m.onnx", shapes={"x": ((1, 3, 224, 224), (8, 3, 224, 224), (32, 3, 224, 224))})
            pathlib.Path("m.engine").write_bytes(engine)
    """
    if workspace is not None and (isinstance(workspace, bool) or not isinstance(workspace, int) or workspace < 1):
        raise ConfigError(f"workspace={workspace!r}: expected a number of bytes, 1 or more, or None")
    if type(cache) is not bool:
        raise ConfigError(f"cache={shown(cache)}: expected True or False")
    found = find(library)
    if not hasattr(found.module, "Builder"):
        raise EngineBuildError(
            f"{found.flavour} {found.version} runs engines but cannot build them; pass library='tensorrt_rtx', which "
            "needs no GPU to build, or library='tensorrt'"
        )
    if found.flavour == "tensorrt":
        require_gpu("building an engine with the full TensorRT")
    options = {
        "shapes": shapes,
        "weight_streaming": weight_streaming,
        "refittable": refittable,
        "workspace": workspace,
    }

    def make() -> bytes:
        return _build(found, onnx, progress, **options)  # type: ignore[arg-type]

    if not cache:
        return make()
    if not isinstance(onnx, str | os.PathLike):
        onnx = _serialized(onnx)
    try:
        key = build_key(found, onnx, options)
    except NotKeyed:
        return make()
    name = os.path.basename(onnx) if isinstance(onnx, str | os.PathLike) else ""
    return user_store().get_or_make("engine", key, make, {"name": str(name), found.flavour: found.version})


def _build(
    found: Library,
    onnx: Any,
    progress: Progress | None,
    *,
    shapes: Mapping[str, ShapeSpec] | None,
    weight_streaming: bool,
    refittable: bool | Sequence[str],
    workspace: int | None,
) -> bytes:
    trt: Any = found.module
    with found.logger.collect() as errors:
        if hasattr(trt, "init_libnvinfer_plugins"):
            trt.init_libnvinfer_plugins(found.logger, "")
        builder = trt.Builder(found.logger)
        # gone in releases in which every network is strongly typed
        typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if typed is None else 1 << int(typed))
        parser = trt.OnnxParser(network, found.logger)  # the network uses weights that the parser owns
        model = _parse(found, parser, onnx, errors)
        if network.num_outputs == 0:
            raise EngineBuildError(f"{model} has no outputs, so it is not an ONNX model, or an empty one")
        config = builder.create_builder_config()
        inputs = _inputs(network)
        for ranges in profiles(inputs, shapes):
            _add_profile(builder, config, inputs, ranges, errors)
        if workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        if weight_streaming:
            _set_flag(found, config, "WEIGHT_STREAMING")
        _allow_refit(found, config, network, refittable, errors)
        monitor = _watch(trt, config, progress)
        engine = builder.build_serialized_network(network, config)
        if monitor is not None and monitor.raised is not None:
            raise monitor.raised
        if engine is None:
            hint = _hint(found, errors, bool(refittable), workspace)
            raise EngineBuildError(
                f"{found.flavour} {found.version} could not build {model}: {join_messages(errors)}.{hint}"
            )
        return bytes(engine)


def _parse(found: Library, parser: Any, onnx: Any, errors: Sequence[str]) -> str:
    if isinstance(onnx, str | os.PathLike):
        path = os.fspath(onnx)
        if not os.path.isfile(path):
            raise EngineBuildError(f"there is no ONNX file at {path!r} (working directory {os.getcwd()!r})")
        model, parsed = path, parser.parse_from_file(path)
    else:
        data = _serialized(onnx)
        model, parsed = f"the ONNX model of {len(data)} bytes", parser.parse(data)
    if not parsed:
        seen = [each for each in map(parser.get_error, range(parser.num_errors)) if each.node_operator()]
        named = "; ".join(
            f"node {each.node_name()!r} ({each.node_operator()}): {join_messages([each.desc()])}" for each in seen
        )
        remedy = (
            "Take these operators out of the model, or load plugins that implement them"
            if named
            else "Check that it is a whole ONNX model (onnx.checker.check_model), with its external data beside it"
        )
        raise EngineBuildError(
            f"the ONNX parser of {found.flavour} {found.version} rejected {model}: {named or join_messages(errors)}. {remedy}"
        )
    return model


def _serialized(onnx: Any) -> bytes:
    if isinstance(onnx, bytes | bytearray | memoryview):
        return bytes(onnx)
    if not hasattr(onnx, "SerializeToString"):
        raise EngineBuildError(
            f"cannot build from a {type(onnx).__name__}; expected the path of an ONNX file, its bytes, or an "
            "onnx.ModelProto (torch.onnx.export makes one from a PyTorch module)"
        )
    try:
        return bytes(onnx.SerializeToString())
    except Exception as error:  # protobuf's own exception, for models above 2 GiB, is not importable from here
        raise EngineBuildError(
            f"the onnx.ModelProto cannot be serialised: {error}. Save it to a file with external data and pass its path"
        ) from error


def _inputs(network: Any) -> list[Input]:
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    return [
        Input(
            tensor.name,
            tuple(tensor.shape),
            bool(tensor.is_shape_tensor),
            tuple(tensor.get_dimension_name(axis) or None for axis in range(len(tensor.shape))),
        )
        for tensor in tensors
    ]


def _add_profile(
    builder: Any, config: Any, inputs: Sequence[Input], ranges: Mapping[str, Range], errors: Sequence[str]
) -> None:
    profile = builder.create_optimization_profile()
    host = {each.name for each in inputs if each.host}
    for name, (low, usual, high) in ranges.items():
        (profile.set_shape_input if name in host else profile.set_shape)(name, low, usual, high)
    if config.add_optimization_profile(profile) < 0:
        raise EngineBuildError(f"TensorRT refused the shapes {dict(ranges)}; it said: {join_messages(errors)}")


def _set_flag(found: Library, config: Any, name: str) -> None:
    flag = getattr(found.module.BuilderFlag, name, None)
    if flag is None:
        raise EngineBuildError(f"{found.flavour} {found.version} has no builder flag {name}; leave that option out")
    config.set_flag(flag)


def _allow_refit(
    found: Library, config: Any, network: Any, refittable: bool | Sequence[str], errors: Sequence[str]
) -> None:
    if isinstance(refittable, str):
        refittable = (refittable,)
    if refittable is True:
        _set_flag(found, config, "REFIT")
    elif refittable:
        _set_flag(found, config, "REFIT_INDIVIDUAL")
        for name in refittable:
            if not network.mark_weights_refittable(name):
                raise EngineBuildError(
                    f"refittable: the model has no weights named {name!r} that TensorRT could mark; expected names of "
                    f"its initialisers. TensorRT said: {join_messages(errors)}"
                )


def _watch(trt: Any, config: Any, progress: Progress | None) -> Any:
    if progress is None or not hasattr(trt, "IProgressMonitor"):
        return None
    report: Progress = progress

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.raised: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            self.tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.tell(phase_name, step + 1)
            return self.raised is None

        def phase_finish(self, phase_name: str) -> None:
            self.tell(phase_name, self.steps.get(phase_name, 0))

        def tell(self, phase: str, done: int) -> None:
            if self.raised is None:
                try:
                    report(phase, done, self.steps.get(phase, done))
                except BaseException as raised:  # TensorRT would print it and go on
                    self.raised = raised

    monitor = Monitor()
    config.progress_monitor = monitor
    return monitor


def _hint(found: Library, errors: Sequence[str], refittable: bool, workspace: int | None) -> str:
    said = join_messages(errors)
    if "no runners that implement it" in said:
        return f" {found.flavour} has no implementation of that layer: keep it out of the engine and run it in PyTorch."
    if "workspace" in said and workspace is not None:
        return f" workspace={workspace} bytes may be too little."
    if refittable and found.flavour == "tensorrt_rtx":
        return " TensorRT-RTX builds refittable engines only on a machine with a GPU; leave out refittable elsewhere."
    return ""


def profiles(inputs: Sequence[Input], shapes: Mapping[str, ShapeSpec] | None) -> list[dict[str, Range]]:
    """The optimisation profiles that ``shapes`` asks for, checked against the model's inputs.

    Args:
        inputs: The model's inputs.
        shapes: As in :func:`build`.

    Returns:
        One dictionary per profile, from the name of an input to its (min, opt, max). Empty if nothing was asked for
        and the model leaves nothing open.

    Raises:
        EngineBuildError: For a name that the model does not have, an open input without shapes, and a range that is
            malformed, of the wrong rank, out of order, or at odds with a dimension that the model fixes.

    Example:
        >>> profiles([Input("x", (-1, 64))], {"x": ((1, 64), (4, 64), (8, 64))})
        [{'x': ((1, 64), (4, 64), (8, 64))}]
        >>> profiles([Input("x", (-1, 64))], {"x": (4, 64)})
        [{'x': ((4, 64), (4, 64), (4, 64))}]
    """
    if shapes is not None and not isinstance(shapes, Mapping):
        raise EngineBuildError(f"shapes={shapes!r}: expected a dictionary from names of inputs to shapes")
    given = dict(shapes or {})
    by_name = {each.name: each for each in inputs}
    for name in given:
        if name not in by_name:
            known = ", ".join(map(str, inputs)) or "none"
            raise EngineBuildError(
                f"shapes names {name!r}, which is not an input of the model; its inputs are: {known}"
            )
    missing = [each for each in inputs if each.name not in given and (each.host or -1 in each.dims)]
    if missing:
        example = ", ".join(f"{each.name!r}: {_example(each)}" for each in missing)
        raise EngineBuildError(
            f"the model leaves open the shape or the value of {', '.join(map(str, missing))}: pass the range to build "
            f"for as (min, opt, max), such as shapes={{{example}}}"
        )
    ranges = {name: _ranges(by_name[name], spec) for name, spec in given.items()}
    counts = {name: len(each) for name, each in ranges.items()}
    if len(set(counts.values())) > 1:
        raise EngineBuildError(
            f"shapes gives different numbers of optimisation profiles: {counts}; expected as many (min, opt, max) "
            "triples for every input"
        )
    return [{name: each[index] for name, each in ranges.items()} for index in range(max(counts.values(), default=0))]


def _example(each: Input) -> Range:
    if each.host:
        return ((1,) * each.values, (8,) * each.values, (32,) * each.values)
    low, usual, high = (tuple(open_as if size < 0 else size for size in each.dims) for open_as in (1, 8, 32))
    return (low, usual, high)


def _ranges(each: Input, spec: ShapeSpec) -> list[Range]:
    name = f"shapes[{each.name!r}]"
    shape, triple = _shape(spec), _triple(spec)
    if shape is not None:
        found: list[Range | None] = [(shape, shape, shape)]
    elif triple is not None:
        found = [triple]
    else:
        found = [_triple(item) for item in spec] if _is_sequence(spec) else []
    if not found or None in found:
        raise EngineBuildError(
            f"{name}={spec!r}: expected a shape such as (1, 64), a (min, opt, max) triple of shapes, or a list of such "
            "triples, one for each optimisation profile"
        )
    ranges = [item for item in found if item is not None]
    for index, item in enumerate(ranges):
        _check(each, item, name if len(ranges) == 1 else f"{name}[{index}]")
    return ranges


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _shape(value: Any) -> Shape | None:
    if not _is_sequence(value) or any(isinstance(size, bool) for size in value):
        return None
    try:
        return tuple(operator.index(size) for size in value)
    except TypeError:
        return None


def _triple(value: Any) -> Range | None:
    if not _is_sequence(value) or len(value) != 3:
        return None
    low, usual, high = map(_shape, value)
    return None if low is None or usual is None or high is None else (low, usual, high)


def _number(count: int, unit: str) -> str:
    return f"{count} {unit}{'' if count == 1 else 's'}"


def _check(each: Input, item: Range, name: str) -> None:
    count, unit = (each.values, "value") if each.host else (len(each.dims), "dimension")
    least, most = _VALUES if each.host else (0, _LARGEST_DIMENSION)
    for which, sizes in zip(("min", "opt", "max"), item, strict=True):
        if len(sizes) != count:
            raise EngineBuildError(
                f"{name}: {which} is {sizes}, {_number(len(sizes), unit)}; the model's input is {each}, "
                f"{_number(count, unit)}"
            )
        for size in sizes:
            if not least <= size <= most:
                raise EngineBuildError(f"{name}: {which} is {sizes}; expected every {unit} in [{least}, {most}]")
    for axis, (low, usual, high) in enumerate(zip(*item, strict=True)):
        axis_name = each.axes[axis] if not each.host and axis < len(each.axes) else None
        where = f"{name}, axis {axis}{f' ({axis_name})' if axis_name else ''}: min {low}, opt {usual}, max {high}"
        if not low <= usual <= high:
            raise EngineBuildError(f"{where}; expected min <= opt <= max")
        fixed = -1 if each.host else each.dims[axis]
        if fixed >= 0 and (low, high) != (fixed, fixed):
            raise EngineBuildError(f"{where}; but the model fixes that axis at {fixed}")
