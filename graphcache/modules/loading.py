"""A module from a file: an engine, or a package."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from graphcache.config import GraphConfig
from graphcache.engines.build import build
from graphcache.engines.library import library
from graphcache.errors import ConfigError, EngineFormatError, EngineVersionError, PackageError, is_a, shown
from graphcache.modules.cached import CachedModule
from graphcache.modules.controls import controls
from graphcache.modules.engine import EngineModule
from graphcache.modules.engine_state import EngineState, tensor_of
from graphcache.modules.fingerprint import environment
from graphcache.modules.packaging import BUILD_OPTIONS, Source, config_of
from graphcache.package.container import Container
from graphcache.package.header import FormatVersionError, Header, HeaderError, PackagedEngine, read_header
from graphcache.package.tensors import read
from graphcache.persist.manifest import MOST_BYTES, Manifest, differences
from graphcache.version import __version__

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
    if type(rebuild) is not str or rebuild not in get_args(Rebuild):
        raise ConfigError(f"rebuild={shown(rebuild)}: expected one of {', '.join(map(repr, get_args(Rebuild)))}")
    if into is not None and not is_a(into, nn.Module):
        raise ConfigError(f"into={shown(into)}: expected an nn.Module with an EngineModule() for each engine")
    if type(name) is not str:
        raise ConfigError(f"name={shown(name)}: expected text")
    for option, value in (("prepare", prepare), ("keep_kernels", keep_kernels)):
        if type(value) is not bool:
            raise ConfigError(f"{option}={shown(value)}: expected True or False")
    if source is None:
        raise EngineFormatError("expected the path of a file or the bytes of an engine, got None")
    if not is_a(source, str, os.PathLike):
        return EngineModule(source, name=name, keep_kernels=keep_kernels)
    try:
        path = Path(source)
    except Exception as error:
        raise EngineFormatError(f"{shown(source)} is no path: {shown(error)}; expected that of a file") from error
    if _is_package(path):
        return _Loading(path, name, into, rebuild, keep_kernels).module(prepare)
    for option, given in (("into", into is not None), ("prepare", prepare)):
        if given:
            raise ConfigError(f"{option} is for packages, and {path} is none; save one with module.save('m.gcache')")
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise EngineFormatError(
            f"{path} cannot be read ({getattr(error, 'strerror', '') or error}); expected a TensorRT engine file"
        ) from error
    if path.suffix == ".onnx":
        raise EngineFormatError(f"{path} is an ONNX model; make an engine of it first: graphcache.build({str(path)!r})")
    return EngineModule(data, name=name or path.stem, keep_kernels=keep_kernels)


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
class _Checked:
    """An engine of a package that fits what is here."""

    packaged: PackagedEngine
    data: bytes
    source: Source | None


class _Loading:
    """One package on its way to a module: everything is read and checked before anything is made."""

    def __init__(self, path: Path, name: str, into: nn.Module | None, rebuild: Rebuild, keep_kernels: bool) -> None:
        self._path = path
        self._name = name
        self._into = into
        self._rebuild = rebuild
        self._keep_kernels = keep_kernels

    def module(self, prepare: bool) -> Any:
        with Container(self._path) as container:
            header = self._header(container)
            if header.kind == "module" and self._into is None:
                raise ConfigError(
                    f"{self._path} holds the weights and engines of a model, not its code; pass the model as into, "
                    f"with an EngineModule() wherever it has an engine"
                )
            if header.kind == "engine" and self._into is not None and not isinstance(self._into, EngineModule):
                raise ConfigError(f"{self._path} holds one engine; load it without into, or into an EngineModule()")
            if prepare and (header.options is None or header.manifest is None):
                raise ConfigError(
                    f"{self._path} has no manifest to prepare; save the wrapped module after it has served or prepared "
                    f"calls"
                )
            for name in header.parts:
                if name not in container.names:
                    raise container.wrong(name, "it is missing")
            if more := sorted({*container.names} - {*header.parts, "header.json"}):
                raise container.wrong(more[0], "the header does not list it")
            config = self._config(header)
            engines = [self._engine(container, header, each) for each in header.engines]
            weights = self._weights(container, header)
            manifest = self._manifest(container, header)
        fast = self._made(header, engines, weights, config)
        if not isinstance(fast, CachedModule):
            return fast
        fast.__dict__["_manifest"] = found = None if manifest is None else for_here(manifest, fast)
        if prepare:
            controls(fast).prepare(found)
        return fast

    def _header(self, container: Container) -> Header:
        try:
            return read_header(container.header())
        except FormatVersionError as error:
            raise PackageError(
                f"{self._path} is a package in format version {error}, and graphcache {__version__} reads version 1: "
                f"pip install --upgrade graphcache, or save it again with this release"
            ) from error
        except HeaderError as error:
            raise container.wrong("header.json", str(error)) from error

    def _config(self, header: Header) -> GraphConfig | None:
        if header.options is None:
            return None
        try:
            return config_of(header.options)
        except (ConfigError, TypeError) as error:
            raise PackageError(
                f"{self._path}: part 'header.json': options: {error}; save the package again with this release"
            ) from error

    def _part(self, container: Container, header: Header, name: str) -> bytes:
        told = header.parts[name]
        return container.read(name, told["nbytes"], told["sha256"])

    def _engine(self, container: Container, header: Header, packaged: PackagedEngine) -> _Checked:
        data = self._part(container, header, packaged.part)
        source = None
        if packaged.onnx is not None:
            known = {name: value for name, value in packaged.build.items() if name in BUILD_OPTIONS}
            source = Source(self._part(container, header, packaged.onnx), known)
        if unfit := _unfit(packaged):
            label = f"{self._path}: {packaged.name!r} ({packaged.part})"
            if source is None:
                raise EngineVersionError(
                    f"{label} {unfit}, and the package holds no ONNX model to build it again from. Build it here with "
                    f"graphcache.build, or save the package with onnx=..."
                )
            if self._rebuild == "never":
                raise EngineVersionError(
                    f"{label} {unfit}. The package holds its ONNX model: load it with rebuild='if_needed'"
                )
            data = build(source.onnx, **source.options, cache=True)
            packaged = replace(packaged, output_shapes="")
        return _Checked(packaged, data, source)

    def _weights(self, container: Container, header: Header) -> dict[str, Tensor]:
        if header.weights is None:
            return {}
        data = self._part(container, header, header.weights)
        try:
            return read(data)
        except ValueError as error:
            raise container.wrong(header.weights, f"it holds no tensors ({error})") from error

    def _manifest(self, container: Container, header: Header) -> Manifest | None:
        if header.manifest is None:
            return None
        if (nbytes := header.parts[header.manifest]["nbytes"]) > MOST_BYTES:
            raise container.wrong(header.manifest, f"it has {nbytes} bytes; expected at most {MOST_BYTES}")
        return Manifest.of_data(self._part(container, header, header.manifest), f"{self._path}: {header.manifest}")

    def _made(
        self,
        header: Header,
        engines: list[_Checked],
        weights: Mapping[str, Tensor],
        config: GraphConfig | None,
    ) -> nn.Module:
        """The module, wrapped if it was saved so. What was given as ``into`` is as it was if anything raises."""
        if header.kind == "engine":
            given = self._into if isinstance(self._into, EngineModule) else None
            module = EngineModule(keep_kernels=self._keep_kernels) if given is None else given
            with ExitStack() as undo:
                self._fill(module, engines[0], self._name, undo)
                whole = module if config is None else self._wrapped(module, config, header)
                undo.pop_all()
            return whole
        assert self._into is not None
        targets = self._targets(self._into, engines, weights)
        # Before anything is written, as the options may be those of another module.
        made: nn.Module = self._into if config is None else self._wrapped(self._into, config, header)
        with ExitStack() as undo:
            for each in engines:
                self._fill(targets[each.packaged.module], each, "", undo)
            try:
                self._into.load_state_dict(weights, strict=False)
            except RuntimeError as error:
                raise PackageError(f"{self._path}: the model does not take the weights: {shown(error)}") from error
            undo.pop_all()
        return made

    def _fill(self, module: EngineModule, engine: _Checked, name: str, undo: ExitStack) -> None:
        """Put an engine into a module; ``undo`` puts back what was there."""
        state = module.get_extra_state() if "engine" in vars(module) else None
        attributes = vars(module).copy()
        module.set_extra_state(_state(engine, name))
        undo.callback(_put_back, module, state, attributes)
        module.source = engine.source

    def _wrapped(self, module: nn.Module, config: GraphConfig, header: Header) -> CachedModule:
        try:
            return CachedModule(module, config, name=self._name or header.name)
        except ConfigError as error:
            raise PackageError(
                f"{self._path}: the options of the package do not fit the module: {error}; pass the model that was "
                f"saved, or save the package again with this release"
            ) from error

    def _targets(
        self, model: nn.Module, engines: list[_Checked], weights: Mapping[str, Tensor]
    ) -> dict[str, EngineModule]:
        """Where the engines go, if all of the package has a place of its kind in the model, and the other way round."""
        places = {name: each for name, each in model.named_modules() if isinstance(each, EngineModule)}
        for name, value in model.state_dict().items():
            if isinstance(value, Tensor) and (value.is_meta or value.is_inference()):
                what = "on the meta device" if value.is_meta else "an inference tensor"
                raise PackageError(f"{self._path}: {name!r} of the model is {what}, which takes no weights")
        _same(self._path, "engines", {each.packaged.module: "" for each in engines}, dict.fromkeys(places, ""))
        shapes = {
            name: f"{value.dtype} {list(value.shape)}"
            for name, value in model.state_dict().items()
            if isinstance(value, Tensor)
        }
        _same(
            self._path,
            "tensors",
            {name: f"{value.dtype} {list(value.shape)}" for name, value in weights.items()},
            shapes,
        )
        return places


def _put_back(module: EngineModule, state: Any, attributes: dict[str, Any]) -> None:
    """Give a module the engine that it had, or none if it was empty."""
    if state is not None:
        module.set_extra_state(state)
        module.source = attributes["source"]
        return
    module.close()
    vars(module).clear()
    vars(module).update(attributes)


def _same(path: Path, what: str, there: Mapping[str, str], here: Mapping[str, str]) -> None:
    for name, left, right in differences(there, here):
        raise PackageError(
            f"{path}: the {what} of the package are not those of the model: {name!r} is {left} in the package, {right} "
            f"in the model; pass the model that was saved, with an EngineModule() for each engine"
        )


def _state(engine: _Checked, name: str) -> dict[str, Any]:
    packaged = engine.packaged
    return EngineState(
        tensor_of(engine.data),
        tuple(packaged.inputs),
        tuple(packaged.outputs),
        name or packaged.name,
        packaged.requires_output_allocator,
        packaged.profile,
        packaged.output_shapes,
    ).tree


def _unfit(packaged: PackagedEngine) -> str:
    """Why an engine does not run here, as far as the package tells; empty if nothing is known against it."""
    here = library()
    if (packaged.flavour, packaged.tensorrt) != (here.flavour, here.version):
        return (
            f"was built by {packaged.flavour} {packaged.tensorrt}, and {here.flavour} {here.version} is used here; an "
            f"engine runs only under the version that built it"
        )
    if packaged.capability is not None and torch.cuda.is_available():
        found = list(torch.cuda.get_device_capability())
        if found != packaged.capability:
            there, seen = (".".join(map(str, each)) for each in (packaged.capability, found))
            return (
                f"was built for GPUs of compute capability {there}"
                f"{f' ({packaged.device})' if packaged.device else ''}, and this one has {seen}"
            )
    return ""


def for_here(manifest: Manifest, fast: CachedModule) -> Manifest:
    """The calls of a package's manifest for this environment; with what they cost if it was measured in the same one.

    The package has been checked, so the module is the same one, whatever an engine's bytes are after a rebuild.
    """
    here = environment(fast._module)
    if not list(differences(manifest.environment, here)):
        return manifest
    entries = [
        replace(entry, nbytes=0, eager_seconds=None, replay_seconds=None, capture_seconds=None)
        for entry in manifest.entries
    ]
    return Manifest(here, entries, manifest.problems)
