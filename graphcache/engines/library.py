"""Finding TensorRT, hearing what it says, and loading its plugins.

NVIDIA ships TensorRT in three flavours with almost one API. Which one is used is decided at first use, never at import.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from graphcache.errors import ConfigError, EngineError, NoGpuError, TensorRTNotFoundError, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from contextlib import AbstractContextManager
    from types import ModuleType

log = logging.getLogger("graphcache.tensorrt")

Flavour = Literal["tensorrt", "tensorrt_rtx", "tensorrt_lean"]

_FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
_ALIASES: dict[str, Flavour] = {"rtx": "tensorrt_rtx", "lean": "tensorrt_lean"}
_EXTRAS: dict[Flavour, str] = {
    "tensorrt": 'pip install "graphcache[tensorrt]" (the full TensorRT)',
    "tensorrt_rtx": 'pip install "graphcache[rtx]" (TensorRT-RTX, which also builds engines without a GPU)',
    "tensorrt_lean": 'pip install "graphcache[lean]" (runs engines, builds none)',
}
_REMEMBERED_WARNINGS = 1024

_lock = threading.RLock()
_found: dict[Flavour, Library] = {}
_plugins: set[tuple[Flavour, Path]] = set()


@dataclass(frozen=True, slots=True)
class Library:
    """One flavour of TensorRT, imported.

    Args:
        module: The Python module, such as ``tensorrt_rtx``.
        flavour: Its name.
        version: Its ``__version__``; an engine runs only under the version that built it.
        logger: The one ``ILogger`` to give to everything of this flavour. ``with logger.collect() as errors`` gathers
            the errors that TensorRT logs on this thread, see :class:`MessageLog`.
    """

    module: ModuleType
    flavour: Flavour
    version: str
    logger: Any


def library(name: str | None = None) -> Library:
    """The TensorRT to use: ``name``, or else ``GRAPHCACHE_TENSORRT``, or else the first that can be imported.

    The order is ``tensorrt``, ``tensorrt_rtx``, ``tensorrt_lean``. Each is imported once; every later call returns the
    same object, from any thread. A failed search is not remembered.

    Args:
        name: ``"tensorrt"``, ``"tensorrt_rtx"`` (or ``"rtx"``) or ``"tensorrt_lean"`` (or ``"lean"``).

    Raises:
        ConfigError: If the argument or the environment names something else.
        TensorRTNotFoundError: If the named one, or all three, cannot be imported.
    """
    wanted = _named(name)
    candidates = _FLAVOURS if wanted is None else (wanted,)
    said: list[str] = []
    with _lock:
        for flavour in candidates:
            if flavour in _found:
                return _found[flavour]
            try:
                found = _import(flavour)
                _found[flavour] = _found.setdefault(found.flavour, found)
            except Exception as error:  # a wheel whose shared libraries are missing raises OSError or RuntimeError
                said.append(f"{flavour}: {_one_line(str(error)) or type(error).__name__}")
            else:
                return _found[flavour]
    what = "no flavour of TensorRT can be imported" if wanted is None else f"{wanted} cannot be imported"
    remedy = " or ".join(_EXTRAS[flavour] for flavour in candidates)
    raise TensorRTNotFoundError(f"{what}. Tried {'; '.join(said)}. To install: {remedy}", name=candidates[0])


def _named(name: str | None) -> Flavour | None:
    source = "library" if name is not None else "GRAPHCACHE_TENSORRT"
    text = os.environ.get(source, "") if name is None else name
    if name is None and not text.strip():
        return None
    if not isinstance(text, str):
        raise ConfigError(f"{source}={shown(text)}: expected the name of a flavour of TensorRT, such as 'tensorrt_rtx'")
    known = text.strip().lower().replace("-", "_")
    for flavour in _FLAVOURS:
        if flavour in (known, _ALIASES.get(known)):
            return flavour
    raise ConfigError(
        f"{source}={shown(text)} is no flavour of TensorRT; expected one of 'tensorrt', 'tensorrt_rtx' (or 'rtx'), "
        "'tensorrt_lean' (or 'lean')"
    )


def _import(flavour: Flavour) -> Library:
    module = importlib.import_module(flavour)
    if not hasattr(module, "ILogger"):  # any folder called tensorrt on sys.path imports as an empty namespace package
        places = list(getattr(module, "__path__", ())) or [getattr(module, "__file__", None)]
        raise ImportError(f"{places[0]} was imported, but it is not TensorRT (it has no ILogger)")
    # Torch-TensorRT for RTX puts tensorrt_rtx in the place of tensorrt, and engines are the one's, not the other's.
    name = getattr(module, "__name__", flavour)
    true = next((each for each in _FLAVOURS if each == name), flavour)
    return Library(module, true, str(module.__version__), _logger(module))


class _Open(threading.local):
    def __init__(self) -> None:
        self.lists: list[list[str]] = []
        self.interrupt: BaseException | None = None


class MessageLog:
    """What TensorRT's loggers do here: pass messages on to ``logging.getLogger("graphcache.tensorrt")``.

    Errors go to ``ERROR``, or to ``DEBUG`` while somebody collects them in order to raise them. Warnings go to
    ``WARNING``, each distinct text once. Everything else goes to ``DEBUG``. Nothing is ever raised into TensorRT.

    Args:
        levels: The ``logging`` level of each of TensorRT's severities; an unknown severity counts as an error.
    """

    def __init__(self, levels: Mapping[Any, int]) -> None:
        self._levels = dict(levels)
        self._open = _Open()
        self._warned: set[str] = set()

    def log(self, severity: Any, msg: str) -> None:
        """Called by TensorRT, from any of its threads."""
        try:
            self._forward(self._levels.get(severity, logging.ERROR), msg)
        except BaseException as raised:
            if not isinstance(raised, Exception):
                self._open.interrupt = raised

    def _forward(self, level: int, msg: str) -> None:
        if level == logging.ERROR and self._open.lists:
            for errors in self._open.lists:
                errors.append(msg)
            level = logging.DEBUG
        elif level == logging.WARNING:
            if msg in self._warned:
                return
            if len(self._warned) >= _REMEMBERED_WARNINGS:  # texts with changing numbers must not grow it for ever
                self._warned.clear()
            self._warned.add(msg)
        if log.isEnabledFor(level):
            log.log(level, "%s", msg)

    def collect(self) -> AbstractContextManager[list[str]]:
        """The texts of the errors that TensorRT logs on this thread until the block is left, oldest first.

        Blocks may nest; each gets what arrives while it is open. A Ctrl-C that arrived inside TensorRT's call to the
        logger, from where it could not be raised, is raised when the block is left.

        Raises:
            KeyboardInterrupt: See above.
        """
        return _Collecting(self._open)


class _Collecting:
    """Every eager call goes through three of these, so that it is no generator's business."""

    __slots__ = ("_errors", "_open")

    def __init__(self, opened: _Open) -> None:
        self._open = opened
        self._errors: list[str] = []

    def __enter__(self) -> list[str]:
        if not self._open.lists:
            self._open.interrupt = None
        self._open.lists.append(self._errors)
        return self._errors

    def __exit__(self, *_: object) -> None:
        # by identity: two lists with the same texts are equal
        self._open.lists[:] = [other for other in self._open.lists if other is not self._errors]
        interrupt, self._open.interrupt = self._open.interrupt, None
        if interrupt is not None:
            raise interrupt


def _logger(trt: Any) -> Any:
    class Logger(MessageLog, trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            MessageLog.__init__(
                self,
                {
                    trt.ILogger.INTERNAL_ERROR: logging.ERROR,
                    trt.ILogger.ERROR: logging.ERROR,
                    trt.ILogger.WARNING: logging.WARNING,
                    trt.ILogger.INFO: logging.DEBUG,
                    trt.ILogger.VERBOSE: logging.DEBUG,
                },
            )

    return Logger()


def words(errors: Iterable[str]) -> str:
    """What TensorRT said, in one line, for the message of an exception.

    Repetitions are dropped. So is the echo in which TensorRT's bindings look for a CUDA error after any failure, unless
    nothing else was said.

    Example:
        >>> words(["No such layer.", "No such layer."])
        'No such layer'
        >>> words([])
        'nothing'
    """
    texts = list(dict.fromkeys(text for text in (_one_line(error).rstrip(".") for error in errors) if text))
    telling = [text for text in texts if "catchCudaError" not in text]
    return "; ".join(telling or texts) or "nothing"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def load_plugin_library(path: str | os.PathLike[str], name: str | None = None) -> None:
    """Loads a shared library of TensorRT plugins, so that engines and ONNX models that use them can be loaded.

    Both kinds work: libraries that register their plugins when loaded, and those that export ``getCreators`` (or the
    older ``getPluginCreators``) for TensorRT's plugin registry. TensorRT's own standard plugins are registered as well
    where the flavour has them. A library loaded here is left alone the next time; it stays until the process ends.

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
        file = Path(path).expanduser().resolve()
        there = file.is_file()
    except (TypeError, ValueError, RuntimeError, OSError, LookupError) as error:
        raise EngineError(f"{shown(path)} is no path of a plugin library: {_one_line(str(error))}") from error
    if not there:
        raise EngineError(f"there is no plugin library at {file}; pass the path of a shared library (.so or .dll)")
    with _lock:
        if (found.flavour, file) not in _plugins:
            _load_plugins(found, file)
            _plugins.add((found.flavour, file))


def loaded_plugins(flavour: str) -> list[str]:
    """The plugin libraries that were loaded for a flavour here, sorted."""
    with _lock:
        return sorted(str(path) for each, path in _plugins if each == flavour)


def _load_plugins(found: Library, file: Path) -> None:
    trt: Any = found.module
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(found.logger, "")
    registry = trt.get_plugin_registry()
    before = len(registry.all_creators)
    try:
        loaded = ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise EngineError(
            f"the plugin library {file} cannot be loaded: {_one_line(str(error))}. It must be a shared library for "
            f"this platform, built against {found.flavour} {found.version}, and what it links to must be found as well"
        ) from error
    if len(registry.all_creators) > before:
        return
    if any(hasattr(loaded, entry) for entry in ("getCreators", "getPluginCreators")):
        with found.logger.collect() as errors:
            handle = registry.load_library(str(file))
        if handle is None:
            raise EngineError(
                f"{found.flavour} {found.version} registered no plugin of {file}; it said: {words(errors)}. It refuses "
                "a library of which a plugin is registered already, or that was built against another version"
            )
    else:
        log.warning(
            "%s was loaded but registered no new plugin with %s %s: it was loaded before by other means, or built "
            "against another flavour of TensorRT",
            file,
            found.flavour,
            found.version,
        )


def require_gpu(what: str) -> None:
    """Does nothing if there is a CUDA device.

    Args:
        what: What needs one, as the subject of a sentence: ``"running a TensorRT engine"``.

    Raises:
        NoGpuError: If ``torch.cuda.is_available()`` is False; it tells a PyTorch built without CUDA from a machine
            whose driver or device is missing or hidden.
    """
    if torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        seen = f"PyTorch {torch.__version__} is a build without CUDA"
        remedy = "install a CUDA build of PyTorch on a machine with an NVIDIA GPU"
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f" and CUDA_VISIBLE_DEVICES={visible!r}"
        seen = f"PyTorch {torch.__version__} is built for CUDA {torch.version.cuda}, but found no device{hidden}"
        remedy = "check that nvidia-smi lists a GPU, and that CUDA_VISIBLE_DEVICES does not hide it"
    raise NoGpuError(
        f"{what} needs a CUDA device, and torch.cuda.is_available() is False: {seen}. To go on, {remedy}. "
        "Without a GPU, PyTorch modules still run on host graphs, and TensorRT-RTX still builds engines"
    )
