"""Loading a module from an engine file or a package."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from graphcache.config import GraphConfig
from graphcache.engines.build import build
from graphcache.engines.library import library
from graphcache.errors import ConfigError, EngineFormatError, EngineVersionError, PackageError, is_a, shown
from graphcache.graphs.buffers import packed
from graphcache.modules.cached_module import CachedModule
from graphcache.modules.engine import EngineModule
from graphcache.modules.packaging import Source
from graphcache.modules.portable import EngineState, tensor_of
from graphcache.modules.transparent import controls
from graphcache.persist.fingerprint import environment
from graphcache.persist.manifest import MOST_BYTES, Manifest, differences
from graphcache.persist.package_file import (
    BUILD_OPTIONS,
    HEADER,
    Container,
    PackagedEngine,
    PackageHeader,
    config_of,
    damaged,
)

Rebuild = Literal["never", "if_needed"]
_ZIP = b"PK\x03\x04"


def load(
    source: str | os.PathLike[str] | bytes,
    *,
    name: str = "",
    into: nn.Module | None = None,
    rebuild: Rebuild = "never",
    prepare: bool = False,
    keep_kernels: bool = False,
) -> Any:
    """A module from an engine file, from its bytes, or from a package that ``save`` wrote.

    A package is checked before anything of it is used: the version of the format, the size and SHA-256 of each part,
    and whether each engine was built for the TensorRT and the kind of GPU that are here. No code is run and no file is
    written. The check is against damage, not against malice: whoever can write the file can write the digests, and
    TensorRT trusts engines. Load packages of people you trust.

    Args:
        source: A path, or the bytes of an engine.
        name: What messages call it; the file's name, or the one in the package, if empty.
        into: For a package of a model, which holds weights and engines but no code: the model, with an
            ``EngineModule()`` wherever it has an engine. It is filled, and is as it was if the package is refused.
        rebuild: ``"if_needed"`` builds an engine of another TensorRT or GPU again, from the ONNX model in the package
            if there is one. ``"never"`` refuses it.
        prepare: Capture what the package's manifest lists, before returning. Costs that were measured on another
            device, driver or version are not used; the calls are.
        keep_kernels: As :class:`EngineModule` takes it. A model given as ``into`` brings its own.

    Returns:
        An :class:`EngineModule`, or the model given as ``into``; behind a :class:`CachedModule` with its options if it
        was saved so. Its ``manifest`` is the package's.

    Raises:
        EngineFormatError: If there is no such file, or it holds no engine (an ONNX model goes through
            :func:`graphcache.build` first).
        EngineVersionError: If another TensorRT built it, or it is for another GPU.
        PackageError: If a package is damaged, of another version of the format, or does not fit ``into``.
        EngineBuildError: If an engine cannot be built again.
        ConfigError: For a bad option.
        NoGpuError: If there is no CUDA device.
        TensorRTNotFoundError: If no flavour of TensorRT is installed.

    Example::

        engine = graphcache.load("model.engine")
        fast = graphcache.load("policy.gcache", prepare=True)
    """
    _check_options(name=name, into=into, rebuild=rebuild, prepare=prepare, keep_kernels=keep_kernels)
    if source is None:
        raise EngineFormatError("expected the path of a file or the bytes of an engine, got None")
    anything: Any = source
    if not is_a(anything, str, os.PathLike):
        return EngineModule(anything, name=name, keep_kernels=keep_kernels)
    try:
        path = Path(anything)
    except Exception as error:
        raise EngineFormatError(f"{shown(source)} is no path: {shown(error)}; expected that of a file") from error
    if _is_package(path):
        with Container(path) as container:
            package = _read(container, into, rebuild, prepare)
        return _made(package, EngineModule(keep_kernels=keep_kernels) if into is None else into, name, prepare)
    for option, given in (("into", into is not None), ("prepare", prepare)):
        if given:
            raise ConfigError(f"{option} is for packages, and {path} is none; save one with module.save('m.gcache')")
    return EngineModule(_engine_file(path), name=name or path.stem, keep_kernels=keep_kernels)


def _check_options(*, name: object, into: object, rebuild: object, prepare: object, keep_kernels: object) -> None:
    """Raise for an option of :func:`load` that is of another type."""
    if type(rebuild) is not str or rebuild not in get_args(Rebuild):
        raise ConfigError(f"rebuild={shown(rebuild)}: expected one of {', '.join(map(repr, get_args(Rebuild)))}")
    if into is not None and not is_a(into, nn.Module):
        raise ConfigError(f"into={shown(into)}: expected an nn.Module with an EngineModule() for each engine")
    if type(name) is not str:
        raise ConfigError(f"name={shown(name)}: expected text")
    for option, value in (("prepare", prepare), ("keep_kernels", keep_kernels)):
        if type(value) is not bool:
            raise ConfigError(f"{option}={shown(value)}: expected True or False")


def _engine_file(path: Path) -> bytes:
    """The contents of an engine file."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError, MemoryError) as error:
        raise EngineFormatError(
            f"{path} cannot be read ({getattr(error, 'strerror', '') or error}); expected a TensorRT engine file"
        ) from error
    if path.suffix == ".onnx":
        raise EngineFormatError(f"{path} is an ONNX model; make an engine of it first: graphcache.build({str(path)!r})")
    return data


def _is_package(path: Path) -> bool:
    """By its name, or by how it begins."""
    if path.suffix == ".gcache":
        return True
    try:
        # Nothing else is opened to look, as a pipe would be waited for.
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(_ZIP)) == _ZIP
    except (OSError, ValueError):
        return False


@dataclass(frozen=True, slots=True)
class _Package:
    """A package that was read and checked; nothing of it is in use yet."""

    path: str
    header: PackageHeader
    config: GraphConfig | None
    engines: list[tuple[EngineState, Source | None]]
    weights: dict[str, Tensor]
    manifest: Manifest | None


def _read(container: Container, into: nn.Module | None, rebuild: Rebuild, prepare: bool) -> _Package:
    """All of a package, checked against itself, the TensorRT and GPU that are here, and what the caller asked for."""
    header, path = container.header(), container.path
    if header.kind == "module" and into is None:
        raise ConfigError(
            f"{path} holds the weights and engines of a model, not its code; pass the model as into, with an "
            f"EngineModule() wherever it has an engine"
        )
    if header.kind == "engine" and into is not None and not isinstance(into, EngineModule):
        raise ConfigError(f"{path} holds one engine; load it without into, or into an EngineModule()")
    if prepare and (header.options is None or header.manifest is None):
        raise ConfigError(
            f"{path} has no manifest to prepare; save the wrapped module after it has served or prepared calls"
        )
    for name in sorted({*header.parts, HEADER} ^ {*container.names}):
        missing = name in header.parts
        raise damaged(path, name, "it is missing" if missing else "the header does not list it")
    try:
        config = None if header.options is None else config_of(header.options)
    except (ConfigError, TypeError) as error:
        raise PackageError(
            f"{path}: part '{HEADER}': options: {error}; save the package again with this release"
        ) from error
    engines = [_engine(container, header, each, rebuild) for each in header.engines]
    weights, manifest = {}, None
    if header.weights is not None:
        data = container.read(header.weights, header.parts[header.weights])
        from safetensors.torch import load as tensors_of

        try:
            weights = tensors_of(data)
        except Exception as error:  # safetensors raises several kinds
            raise damaged(path, header.weights, f"it holds no tensors ({shown(error)})") from error
    if header.manifest is not None:
        part = header.parts[header.manifest]
        if part.nbytes > MOST_BYTES:
            raise damaged(path, header.manifest, f"it has {part.nbytes} bytes; expected at most {MOST_BYTES}")
        # One that is damaged is empty, and says so in its problems.
        manifest = Manifest.of_data(container.read(header.manifest, part), f"{path}: {header.manifest}")
    return _Package(path, header, config, engines, weights, manifest)


def _engine(
    container: Container, header: PackageHeader, packaged: PackagedEngine, rebuild: Rebuild
) -> tuple[EngineState, Source | None]:
    """An engine that fits what is here, built again if it does not and may be."""
    data, source = container.read(packaged.part, header.parts[packaged.part]), None
    output_shapes = packaged.output_shapes
    if packaged.onnx is not None:
        known = {name: value for name, value in packaged.build.items() if name in BUILD_OPTIONS}
        source = Source(container.read(packaged.onnx, header.parts[packaged.onnx]), known)
    if unfit := _unfit(packaged):
        label = f"{container.path}: {packaged.name!r} ({packaged.part})"
        if source is None:
            raise EngineVersionError(
                f"{label} {unfit}, and the package holds no ONNX model to build it again from. Build it here with "
                f"graphcache.build, or save the package with onnx=..."
            )
        if rebuild == "never":
            raise EngineVersionError(
                f"{label} {unfit}. The package holds its ONNX model: load it with rebuild='if_needed'"
            )
        data, output_shapes = build(source.onnx, **source.options, cache=True), ""
    state = EngineState(
        engine=tensor_of(data),
        inputs=packaged.inputs,
        outputs=packaged.outputs,
        name=packaged.name,
        requires_output_allocator=packaged.requires_output_allocator,
        profile=packaged.profile,
        output_shapes=output_shapes,
    )
    return state, source


def _unfit(packaged: PackagedEngine) -> str:
    """Why an engine does not run here, as far as the package tells; empty if nothing is known against it."""
    here = library()
    if (packaged.flavour, packaged.tensorrt) != (here.flavour, here.version):
        return (
            f"was built by {packaged.flavour} {packaged.tensorrt}, and {here.flavour} {here.version} is used here; an "
            f"engine runs only under the version that built it"
        )
    if packaged.capability is not None and torch.cuda.is_available():
        found = torch.cuda.get_device_capability()
        if found != packaged.capability:
            there, seen = (".".join(map(str, each)) for each in (packaged.capability, found))
            return (
                f"was built for GPUs of compute capability {there}"
                f"{f' ({packaged.device})' if packaged.device else ''}, and this one has {seen}"
            )
    return ""


def _made(package: _Package, module: nn.Module, name: str, prepare: bool) -> nn.Module:
    """The module with all of a package in it; it is as it was if anything raises."""
    path, single = package.path, package.header.kind == "engine"
    targets = [module] if isinstance(module, EngineModule) and single else _targets(package, module)
    made = module
    with ExitStack() as restored:
        for target, (state, source) in zip(targets, package.engines, strict=True):
            restored.enter_context(_restored_on_error(target))
            target.set_extra_state(replace(state, name=name if name and single else state.name).tree)
            target.source = source
        if package.config is not None:
            try:
                manifest = None if package.manifest is None else _for_here(package.manifest, module)
                made = CachedModule(module, package.config, name=name or package.header.name, manifest=manifest)
            except ConfigError as error:
                raise PackageError(
                    f"{path}: the options of the package do not fit the module: {error}; pass the model that was "
                    f"saved, or save the package again with this release"
                ) from error
        if not single:
            # Last, as nothing puts weights back; their names, shapes and dtypes were checked.
            try:
                module.load_state_dict(package.weights, strict=False)
            except Exception as error:  # hooks of the model may raise anything
                raise PackageError(f"{path}: the model does not take the weights: {shown(error)}") from error
    if prepare and isinstance(made, CachedModule) and (manifest := controls(made).manifest) is not None:
        controls(made).prepare(manifest)
    return made


@contextmanager
def _restored_on_error(module: EngineModule) -> Iterator[None]:
    """Inside, another engine may be loaded; if the block raises, engine, names and options are what they were."""
    state = module.get_extra_state() if module.holds_engine else None
    before = vars(module).copy()
    try:
        yield
    except BaseException:
        if state is not None:
            module.set_extra_state(state)
            module.source = before["source"]
        else:
            module.close()
            vars(module).clear()
            vars(module).update(before)
        raise


def _targets(package: _Package, model: nn.Module) -> list[EngineModule]:
    """Where the engines go, if the package and the model have the same engines and tensors."""
    places = {name: each for name, each in model.named_modules() if isinstance(each, EngineModule)}
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        why = {
            "on the meta device": value.is_meta,
            "an inference tensor": value.is_inference(),
            f"of layout {value.layout}": value.layout is not torch.strided,
        }
        what = next((text for text, is_so in why.items() if is_so), "")
        if not what and packed(value) is not value:
            what = "a tensor whose elements share memory"
        if what:
            raise PackageError(f"{package.path}: {name!r} of the model is {what}, which takes no weights")
    there = _described([each.module for each in package.header.engines], package.weights)
    for name, left, right in differences(there, _described(places, tensors)):
        raise PackageError(
            f"{package.path} is no package of this model: {name!r} is {left} in the package, {right} in the model; "
            f"pass the model that was saved, with an EngineModule() for each engine"
        )
    return [places[each.module] for each in package.header.engines]


def _described(engines: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What a model has under each name: an engine, or a tensor of some dtype and shape."""
    described = {name: f"{value.dtype} {list(value.shape)}" for name, value in tensors.items()}
    return {**described, **dict.fromkeys(engines, "an engine")}


def _for_here(manifest: Manifest, module: nn.Module) -> Manifest:
    """The manifest for this environment; costs that were measured in another one are dropped.

    The package was checked, so the module is the same one, whatever an engine's bytes are after a rebuild.
    """
    here = environment(module)
    if not list(differences(manifest.environment, here)):
        return manifest
    entries = [
        replace(entry, nbytes=0, eager_seconds=None, replay_seconds=None, capture_seconds=None)
        for entry in manifest.entries
    ]
    return Manifest(here, entries, manifest.problems)
