"""A module as a package file: what it is made of, written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graphcache.config import REMOVED, GraphConfig
from graphcache.errors import ConfigError, is_a, shown
from graphcache.modules.engine_state import bytes_of
from graphcache.package.container import HEADER, sha256, write_parts
from graphcache.package.header import Header, PackagedEngine
from graphcache.package.tensors import written
from graphcache.version import __version__

if TYPE_CHECKING:
    from graphcache.modules.engine_carried import CarriedEngine
    from graphcache.persist.manifest import Manifest

BUILD_OPTIONS = ("shapes", "weight_streaming", "refittable", "workspace")
"""Keyword arguments of ``graphcache.build`` that a package may hold."""
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True, slots=True)
class Source:
    """What an engine was built from, to build it again elsewhere.

    Args:
        onnx: The model, without external data.
        options: Keyword arguments of ``graphcache.build``, as JSON has them.
    """

    onnx: bytes
    options: Mapping[str, Any]

    @classmethod
    def of(cls, onnx: Any, options: Any) -> Source:
        """From what :meth:`EngineModule.save` was given.

        Raises:
            ConfigError: For what is no ONNX model or no option.
        """
        if is_a(onnx, str, os.PathLike):
            try:
                onnx = Path(onnx).read_bytes()
            except Exception as error:
                why = getattr(error, "strerror", None) or shown(error)
                raise ConfigError(f"onnx={shown(onnx)} cannot be read: {why}; expected the path of a model") from error
        if not is_a(onnx, bytes, bytearray) or not onnx:
            raise ConfigError(f"onnx={shown(onnx)}: expected the path of an ONNX model, or its bytes")
        if b"\x0a\x08location\x12" in onnx:
            raise ConfigError(
                "onnx: the model has its weights in other files, which a package does not hold; save it as one file "
                "(onnx.save(..., save_as_external_data=False)), or leave it out"
            )
        options = {} if options is None else options
        if not is_a(options, Mapping) or any(type(name) is not str or name not in BUILD_OPTIONS for name in options):
            raise ConfigError(
                f"build={shown(options)}: expected keyword arguments of graphcache.build, of {', '.join(BUILD_OPTIONS)}"
            )
        try:
            return cls(bytes(onnx), json.loads(json.dumps(dict(options), allow_nan=False)))
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"build={shown(options)}: expected what JSON can hold: {error}") from error


def save(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    onnx: Any,
    build: Any,
    config: GraphConfig | None = None,
    name: str = "",
    manifest: Manifest | None = None,
) -> None:
    """What :meth:`EngineModule.save` and :meth:`CachedModule.save` do."""
    from graphcache.modules.engine_carried import CarriedEngine

    engines = {name: each for name, each in module.named_modules() if isinstance(each, CarriedEngine)}
    if onnx is None and build is not None:
        raise ConfigError("build says how to build from an ONNX model, and none was given; pass onnx too")
    if onnx is not None:
        if list(engines) != [""]:
            raise ConfigError("onnx is for a module that is an engine; of a model, give each engine its own source")
        engines[""].source = Source.of(onnx, build)
    parts: dict[str, bytes] = {}
    packaged = [_engine(index, name, each, parts) for index, (name, each) in enumerate(engines.items())]
    options = None if config is None else options_of(config)
    if list(engines) != [""]:
        tensors = _tensors(module, engines)
        if tensors:
            try:
                parts[WEIGHTS] = written(tensors)
            except Exception as error:
                # On the meta device, say, or of a dtype that safetensors does not hold.
                raise ConfigError(f"the module's tensors cannot be written: {shown(error)}; use torch.save") from error
    if manifest is not None and manifest.entries:
        parts[MANIFEST] = manifest.data
    header = Header(
        graphcache=__version__,
        kind="engine" if list(engines) == [""] else "module",
        engines=packaged,
        name=name,
        options=options,
        weights=WEIGHTS if WEIGHTS in parts else None,
        manifest=MANIFEST if MANIFEST in parts else None,
        parts={name: {"nbytes": len(data), "sha256": sha256(data)} for name, data in parts.items()},
    )
    try:
        write_parts(os.fspath(path), {HEADER: header.data, **parts})
    except Exception as error:
        why = getattr(error, "strerror", None) or shown(error)
        raise ConfigError(f"path={shown(path)} cannot be written: {why}; what was there is as it was") from error


def options_of(config: GraphConfig) -> dict[str, Any]:
    """The options of a wrapper, as JSON has them.

    Raises:
        ConfigError: For buckets that JSON cannot hold.
    """
    found = {field.name: getattr(config, field.name) for field in fields(config)}
    found["include"] = list(config.include)
    found["buckets"] = _plain("buckets", config.buckets)
    return found


def config_of(options: Mapping[str, Any]) -> GraphConfig:
    """The options that :func:`options_of` gave.

    Raises:
        ConfigError: For an unknown option, or a bad value.
    """
    known = {field.name for field in fields(GraphConfig)}
    kept = {name: value for name, value in options.items() if name not in REMOVED}
    if unknown := sorted(kept.keys() - known):
        raise ConfigError(f"unknown option {shown(unknown[0])}")
    return GraphConfig(**{**kept, "buckets": _unplain(kept.get("buckets"))})


def _engine(index: int, name: str, module: CarriedEngine, parts: dict[str, bytes]) -> PackagedEngine:
    engine, source = module.engine, module.source
    part, model = f"engines/{index}.engine", f"engines/{index}.onnx"
    parts[part] = bytes_of(module.engine_tensor())
    if source is not None:
        parts[model] = source.onnx
    capability = engine.capability
    return PackagedEngine(
        module=name,
        part=part,
        name=module.name,
        inputs=list(module.input_binding_names),
        outputs=list(module.output_binding_names),
        bindings=[
            {
                "name": binding.name,
                "input": binding.is_input,
                "dtype": str(binding.dtype).removeprefix("torch."),
                "shape": list(binding.shape),
                "host": binding.on_host,
                "ranges": [[list(bounds) for bounds in profile] for profile in binding.ranges],
            }
            for binding in (*engine.inputs, *engine.outputs)
        ],
        requires_output_allocator=module.requires_output_allocator,
        profile=module.profile_choice,
        output_shapes=module.output_shapes,
        flavour=engine.library.flavour,
        tensorrt=engine.library.version,
        capability=None if capability is None else list(capability),
        device=torch.cuda.get_device_name(module.device) if module.device.type == "cuda" else "",
        onnx=None if source is None else model,
        build={} if source is None else dict(source.options),
    )


def _tensors(module: nn.Module, engines: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a model's state, without its engines."""
    found = {}
    for name, value in module.state_dict().items():
        owner, _, last = name.rpartition(".")
        if last == "_extra_state":
            if module.get_submodule(owner) not in engines.values():
                raise ConfigError(f"{name} is a state of its own kind, which a package does not hold; use torch.save")
        elif not isinstance(value, Tensor) or value.layout is not torch.strided:
            raise ConfigError(f"{name} is no dense tensor, which is all that a package holds; use torch.save")
        else:
            found[name] = value
    return found


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {"map": [[_plain(name, key), _plain(name, each)] for key, each in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_plain(name, each) for each in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(
        f"{name} holds {shown(value)}, which a package does not; give plain lists, dictionaries and numbers, or wrap "
        f"the module after loading it"
    )


def _unplain(value: Any) -> Any:
    if isinstance(value, dict):
        try:
            return {_unplain(key): _unplain(each) for key, each in value["map"]}
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"buckets={shown(value)}: not as it was written") from error
    return [_unplain(each) for each in value] if isinstance(value, list) else value
