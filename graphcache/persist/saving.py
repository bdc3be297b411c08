"""Writing a module as a package."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphcache.config import GraphConfig
from graphcache.engines.build_key import external_files
from graphcache.errors import ConfigError, is_a, shown
from graphcache.keys.call_spec import short_name
from graphcache.modules.engine import EngineModule
from graphcache.modules.packaging import Source
from graphcache.modules.portable import bytes_of
from graphcache.persist.manifest import Manifest
from graphcache.persist.package_file import (
    BUILD_OPTIONS,
    HEADER,
    PackagedEngine,
    PackageHeader,
    options_of,
    part_of,
    write_parts,
)
from graphcache.version import __version__

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"


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
    """Write a module as a package, as :meth:`EngineModule.save` and :meth:`CachedModule.save` describe it.

    ``config``, ``name`` and ``manifest`` are those of its wrapper, if it is wrapped.
    """
    parts: dict[str, bytes] = {}
    engines = {place: each for place, each in module.named_modules() if isinstance(each, EngineModule)}
    alone = list(engines) == [""]
    _take_source(engines, alone, onnx, build)
    packaged = [_engine(index, place, each, parts) for index, (place, each) in enumerate(engines.items())]
    if not alone and (tensors := _tensors(module, engines)):
        from safetensors.torch import save as data_of

        try:
            # Copies, as safetensors refuses tensors that share memory.
            copies = {place: value.detach().cpu().clone().contiguous() for place, value in tensors.items()}
            parts[WEIGHTS] = data_of(copies)
        except Exception as error:
            # On the meta device, say, or of a dtype that safetensors does not hold.
            raise ConfigError(f"the module's tensors cannot be written: {shown(error)}; use torch.save") from error
    if manifest is not None and manifest.entries:
        parts[MANIFEST] = manifest.data
    header = PackageHeader(
        graphcache=__version__,
        kind="engine" if alone else "module",
        engines=packaged,
        name=name,
        options=None if config is None else options_of(config),
        weights=WEIGHTS if WEIGHTS in parts else None,
        manifest=MANIFEST if MANIFEST in parts else None,
        parts={part: part_of(data) for part, data in parts.items()},
    )
    try:
        write_parts(os.fspath(path), {HEADER: header.data, **parts})
    except Exception as error:
        why = getattr(error, "strerror", None) or shown(error)
        raise ConfigError(f"path={shown(path)} cannot be written: {why}; what was there is as it was") from error


def _take_source(engines: Mapping[str, EngineModule], alone: bool, onnx: Any, build: Any) -> None:
    """Give an engine the model that the caller says it was built from."""
    if onnx is None and build is not None:
        raise ConfigError("build says how to build from an ONNX model, and none was given; pass onnx too")
    if onnx is not None:
        if not alone:
            raise ConfigError("onnx is for a module that is an engine; of a model, give each engine its own source")
        engines[""].source = _source(onnx, {} if build is None else build)


def _source(onnx: Any, options: Any) -> Source:
    """What an engine was built from, checked."""
    if is_a(onnx, str, os.PathLike):
        try:
            onnx = Path(onnx).read_bytes()
        except Exception as error:
            why = getattr(error, "strerror", None) or shown(error)
            raise ConfigError(f"onnx={shown(onnx)} cannot be read: {why}; expected the path of a model") from error
    if not is_a(onnx, bytes, bytearray) or not onnx:
        raise ConfigError(f"onnx={shown(onnx)}: expected the path of an ONNX model, or its bytes")
    if external_files(onnx):
        raise ConfigError(
            "onnx: the model has its weights in other files, which a package does not hold; save it as one file "
            "(onnx.save(..., save_as_external_data=False)), or leave it out"
        )
    if not is_a(options, Mapping) or any(type(name) is not str or name not in BUILD_OPTIONS for name in options):
        raise ConfigError(
            f"build={shown(options)}: expected keyword arguments of graphcache.build, of {', '.join(BUILD_OPTIONS)}"
        )
    try:
        return Source(bytes(onnx), json.loads(json.dumps(dict(options), allow_nan=False)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"build={shown(options)}: expected what JSON can hold: {error}") from error


def _engine(index: int, place: str, module: EngineModule, parts: dict[str, bytes]) -> PackagedEngine:
    """An engine in the header; its bytes and its model are added to the parts."""
    engine, source = module.engine, module.source
    part, model = f"engines/{index}.engine", f"engines/{index}.onnx"
    parts[part] = bytes_of(module.engine_tensor())
    if source is not None:
        parts[model] = source.onnx
    return PackagedEngine(
        module=place,
        part=part,
        name=module.name,
        inputs=list(module.input_binding_names),
        outputs=list(module.output_binding_names),
        bindings=[
            {
                "name": binding.name,
                "input": binding.is_input,
                "dtype": short_name(binding.dtype),
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
        capability=engine.capability,
        device=torch.cuda.get_device_name(module.device) if module.device.type == "cuda" else "",
        onnx=None if source is None else model,
        build={} if source is None else dict(source.options),
    )


def _tensors(module: nn.Module, engines: Mapping[str, EngineModule]) -> dict[str, Tensor]:
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
