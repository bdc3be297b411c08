"""Libraries of TensorRT plugins."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path
from typing import Any

from graphcache.engines.library import Flavour, Library, library, log, one_line
from graphcache.errors import EngineError, shown

_lock = threading.Lock()
_plugins: set[tuple[Flavour, Path]] = set()


def load_plugin_library(path: str | os.PathLike[str], name: str | None = None) -> None:
    """Loads a shared library of TensorRT plugins, so that engines and ONNX models that use them can be loaded.

    The library may register its plugins when it is loaded, or export ``getCreators`` (or the older
    ``getPluginCreators``) for TensorRT's plugin registry. TensorRT's standard plugins are registered too where the
    flavour has them. Loading the same library again does nothing. It stays loaded until the process ends.

    Args:
        path: The ``.so`` or ``.dll``. It must have been built against the same flavour and version of TensorRT: one
            that registers nothing with this flavour is loaded all the same, with a warning.
        name: Which TensorRT, as in :func:`library`.

    Raises:
        EngineError: If there is no such file, it cannot be loaded, or TensorRT's registry refuses its plugins.
        ConfigError: As :func:`library`.
        TensorRTNotFoundError: As :func:`library`.
    """
    found = library(name)
    try:
        file = Path(path).expanduser().resolve(strict=True)
    except (TypeError, ValueError, RuntimeError, OSError, LookupError) as error:
        why = one_line(str(error))
        raise EngineError(f"{shown(path)} is no plugin library: {why}; pass the path of a .so or .dll") from error
    if not file.is_file():
        raise EngineError(f"{file} is no file; pass the path of a .so or .dll")
    with _lock:
        if (found.flavour, file) not in _plugins:
            _load_plugins(found, file)
            _plugins.add((found.flavour, file))


def loaded_plugins(flavour: str) -> list[str]:
    """The plugin libraries that were loaded here for a flavour, sorted."""
    with _lock:
        return sorted(str(path) for each, path in _plugins if each == flavour)


def _load_plugins(found: Library, file: Path) -> None:
    """Load a library that was not loaded before, and let TensorRT's registry collect what it exports."""
    trt: Any = found.module
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(found.logger, "")
    registry = trt.get_plugin_registry()
    before = len(registry.all_creators)
    try:
        loaded = ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise EngineError(
            f"the plugin library {file} cannot be loaded: {one_line(str(error))}. It must be a shared library for "
            f"this platform, built against {found.flavour} {found.version}, and what it links to must be found as well"
        ) from error
    if len(registry.all_creators) > before:
        return
    if any(hasattr(loaded, entry) for entry in ("getCreators", "getPluginCreators")):
        with found.logger.collect():
            if registry.load_library(str(file)) is None:
                raise EngineError(
                    f"{found.flavour} {found.version} registered no plugin of {file}; it said: {found.logger.said()}. "
                    f"It refuses a library of which a plugin is registered already, or that was built against another "
                    f"version"
                )
    else:
        log.warning(
            "%s was loaded but registered no new plugin with %s %s: it was loaded before by other means, or built "
            "against another flavour of TensorRT",
            file,
            found.flavour,
            found.version,
        )
