"""Builds TensorRT engines from ONNX models."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graphcache.engines.build_key import NotKeyed, build_key
from graphcache.engines.library import Library, join_messages, require_gpu
from graphcache.engines.library import library as find
from graphcache.engines.profiles import Input, ShapeSpec, profiles
from graphcache.engines.store import user_store
from graphcache.errors import ConfigError, EngineBuildError, shown

Progress = Callable[[str, int, int], None]


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

    TensorRT-RTX builds without a GPU, the full TensorRT needs one, the lean runtime cannot build. The engine runs only
    under the flavour and version that built it. Types are those of the model: to use fp16 or bf16, export it that way.

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
    found = _builder(library)
    options = {
        "shapes": shapes,
        "weight_streaming": weight_streaming,
        "refittable": refittable,
        "workspace": workspace,
    }
    is_path = isinstance(onnx, str | os.PathLike)
    model = onnx if is_path else _serialized(onnx)
    if not cache:
        return _build(found, model, options, progress)
    try:
        key = build_key(found, model, options)
    except NotKeyed:
        return _build(found, model, options, progress)
    note = {"name": str(os.path.basename(onnx)) if is_path else "", found.flavour: found.version}
    return user_store().get_or_make("engine", key, lambda: _build(found, model, options, progress), note)


def _builder(name: str | None) -> Library:
    """The TensorRT to build with."""
    found = find(name)
    if not hasattr(found.module, "Builder"):
        raise EngineBuildError(
            f"{found.flavour} {found.version} runs engines but cannot build them; pass library='tensorrt_rtx', which "
            "needs no GPU to build, or library='tensorrt'"
        )
    if found.flavour == "tensorrt":
        require_gpu("building an engine with the full TensorRT")
    return found


def _build(
    found: Library, onnx: str | os.PathLike[str] | bytes, options: Mapping[str, Any], progress: Progress | None
) -> bytes:
    """Build an engine, with the options of :func:`build`."""
    trt: Any = found.module
    with found.logger.collect():
        if hasattr(trt, "init_libnvinfer_plugins"):
            trt.init_libnvinfer_plugins(found.logger, "")
        builder = trt.Builder(found.logger)
        # Absent from releases in which every network is strongly typed.
        typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if typed is None else 1 << int(typed))
        # The network uses weights that the parser owns.
        parser = trt.OnnxParser(network, found.logger)
        model = _parse(found, parser, onnx)
        if network.num_outputs == 0:
            raise EngineBuildError(f"{model} has no outputs, so it is not an ONNX model, or an empty one")
        config = builder.create_builder_config()
        _add_profiles(found, builder, config, network, options["shapes"])
        if options["workspace"] is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options["workspace"])
        if options["weight_streaming"]:
            _set_flag(found, config, "WEIGHT_STREAMING")
        _allow_refit(found, config, network, options["refittable"])
        monitor = _watch(trt, config, progress)
        engine = builder.build_serialized_network(network, config)
        if monitor is not None and monitor.raised is not None:
            raise monitor.raised
        if engine is None:
            raise EngineBuildError(_failure(found, model, options))
        return bytes(engine)


def _parse(found: Library, parser: Any, onnx: str | os.PathLike[str] | bytes) -> str:
    """Let TensorRT parse a model; how messages call it."""
    if not isinstance(onnx, bytes):
        model = os.fspath(onnx)
        if not os.path.isfile(model):
            raise EngineBuildError(f"there is no ONNX file at {model!r} (working directory {os.getcwd()!r})")
        parsed = parser.parse_from_file(model)
    else:
        model, parsed = f"the ONNX model of {len(onnx)} bytes", parser.parse(onnx)
    if not parsed:
        named = "; ".join(
            f"node {each.node_name()!r} ({each.node_operator()}): {join_messages([each.desc()])}"
            for each in map(parser.get_error, range(parser.num_errors))
            if each.node_operator()
        )
        remedy = (
            "Take these operators out of the model, or load plugins that implement them"
            if named
            else "Check that it is a whole ONNX model (onnx.checker.check_model), with its external data beside it"
        )
        why = named or found.logger.said()
        raise EngineBuildError(f"the ONNX parser of {found.flavour} {found.version} rejected {model}: {why}. {remedy}")
    return model


def _serialized(onnx: Any) -> bytes:
    """The bytes of a model."""
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


def _add_profiles(found: Library, builder: Any, config: Any, network: Any, shapes: Any) -> None:
    """Add the optimisation profiles that ``shapes`` asks for."""
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    inputs = [
        Input(
            tensor.name,
            tuple(tensor.shape),
            bool(tensor.is_shape_tensor),
            tuple(tensor.get_dimension_name(axis) or None for axis in range(len(tensor.shape))),
        )
        for tensor in tensors
    ]
    host = {each.name for each in inputs if each.host}
    for ranges in profiles(inputs, shapes):
        profile = builder.create_optimization_profile()
        for name, (low, usual, high) in ranges.items():
            (profile.set_shape_input if name in host else profile.set_shape)(name, low, usual, high)
        if config.add_optimization_profile(profile) < 0:
            raise EngineBuildError(f"TensorRT refused the shapes {dict(ranges)}; it said: {found.logger.said()}")


def _set_flag(found: Library, config: Any, name: str) -> None:
    """Set a builder flag that not every TensorRT has."""
    flag = getattr(found.module.BuilderFlag, name, None)
    if flag is None:
        raise EngineBuildError(f"{found.flavour} {found.version} has no builder flag {name}; leave that option out")
    config.set_flag(flag)


def _allow_refit(found: Library, config: Any, network: Any, refittable: bool | Sequence[str]) -> None:
    """Mark all weights, or some, as refittable."""
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
                    f"its initialisers. TensorRT said: {found.logger.said()}"
                )


def _watch(trt: Any, config: Any, progress: Progress | None) -> Any:
    """A progress monitor that calls ``progress``, if there is one."""
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


def _failure(found: Library, model: str, options: Mapping[str, Any]) -> str:
    """What is said of a failed build, and what may help."""
    said = found.logger.said()
    text = f"{found.flavour} {found.version} could not build {model}: {said}."
    if "no runners that implement it" in said:
        return f"{text} It has no implementation of that layer: keep it out of the engine and run it in PyTorch."
    if "workspace" in said and options["workspace"] is not None:
        return f"{text} workspace={options['workspace']} bytes may be too little."
    if options["refittable"] and found.flavour == "tensorrt_rtx":
        return f"{text} It builds refittable engines only on a machine with a GPU; leave out refittable elsewhere."
    return text
