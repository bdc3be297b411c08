"""Finding TensorRT at its first use, in one of three flavours with almost one API, and its messages."""

from __future__ import annotations

import importlib
import logging
import os
import threading
import weakref
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, get_args

import torch

from graphcache.errors import ConfigError, NoGpuError, TensorRTNotFoundError, shown

log = logging.getLogger("graphcache.tensorrt")

Flavour = Literal["tensorrt", "tensorrt_rtx", "tensorrt_lean"]

_FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
_EXTRAS: dict[Flavour, str] = {
    "tensorrt": 'pip install "graphcache[tensorrt]" (the full TensorRT)',
    "tensorrt_rtx": 'pip install "graphcache[rtx]" (TensorRT-RTX, which also builds engines without a GPU)',
    "tensorrt_lean": 'pip install "graphcache[lean]" (runs engines, builds none)',
}
_MAX_WARNINGS = 1024
"""Texts of warnings that are remembered."""

_lock = threading.RLock()
_found: dict[Flavour, Library] = {}


@dataclass(frozen=True, slots=True)
class Library:
    """One flavour of TensorRT, imported. All its objects have the one ``logger``, a :class:`MessageLog`."""

    module: ModuleType
    flavour: Flavour
    version: str
    logger: Any


def library(name: str | None = None) -> Library:
    """The TensorRT to use: ``name``, or else ``GRAPHCACHE_TENSORRT``, or else the first that can be imported.

    The order is ``tensorrt``, ``tensorrt_rtx``, ``tensorrt_lean``. Each is imported once; a failed search is not
    remembered.
    """
    wanted = _named(name)
    candidates = _FLAVOURS if wanted is None else (wanted,)
    said: list[str] = []
    with _lock:
        for flavour in candidates:
            try:
                if flavour not in _found:
                    found = _import(flavour)
                    _found[flavour] = _found.setdefault(found.flavour, found)
                return _found[flavour]
            except Exception as error:  # a wheel whose shared libraries are missing raises OSError or RuntimeError
                said.append(f"{flavour}: {one_line(str(error)) or type(error).__name__}")
    what = "no flavour of TensorRT can be imported" if wanted is None else f"{wanted} cannot be imported"
    remedy = " or ".join(_EXTRAS[flavour] for flavour in candidates)
    raise TensorRTNotFoundError(f"{what}. Tried {'; '.join(said)}. To install: {remedy}", name=candidates[0])


def _named(name: str | None) -> Flavour | None:
    """The flavour that the argument or the environment names, if one does."""
    source = "library" if name is not None else "GRAPHCACHE_TENSORRT"
    text = os.environ.get(source, "") if name is None else name
    known = text.strip().lower().replace("-", "_") if isinstance(text, str) else ""
    if name is None and not known:
        return None
    for flavour in _FLAVOURS:
        if flavour in (known, f"tensorrt_{known}"):
            return flavour
    raise ConfigError(
        f"{source}={shown(text)} is no flavour of TensorRT; expected one of 'tensorrt', 'tensorrt_rtx' (or 'rtx'), "
        "'tensorrt_lean' (or 'lean')"
    )


def _import(flavour: Flavour) -> Library:
    """Import one flavour."""
    module = importlib.import_module(flavour)
    if not hasattr(module, "ILogger"):  # any folder called tensorrt on sys.path imports as an empty namespace package
        places = list(getattr(module, "__path__", ())) or [getattr(module, "__file__", None)]
        raise ImportError(f"{places[0]} was imported, but it is not TensorRT (it has no ILogger)")
    # Torch-TensorRT for RTX puts tensorrt_rtx in the place of tensorrt, and engines are the one's, not the other's.
    name = getattr(module, "__name__", flavour)
    return Library(module, name if name in _FLAVOURS else flavour, str(module.__version__), _logger(module))


class _Thread(threading.local):
    """What one thread collects."""

    def __init__(self) -> None:
        self.blocks: list[weakref.ref[_Collecting]] = []
        self.interrupt: BaseException | None = None


class MessageLog:
    """Passes TensorRT's messages on to ``logging.getLogger("graphcache.tensorrt")``. It raises nothing into TensorRT.

    Errors go to ``ERROR``, or to ``DEBUG`` while :meth:`collect` gathers them. Warnings go to ``WARNING``, each
    distinct text once. Everything else goes to ``DEBUG``. ``levels`` has the ``logging`` level of each of TensorRT's
    severities; an unknown severity counts as an error.
    """

    def __init__(self, levels: Mapping[Any, int]) -> None:
        self._levels = dict(levels)
        self._thread = _Thread()
        self._warned: set[str] = set()

    def log(self, severity: Any, msg: str) -> None:
        """Called by TensorRT, from any of its threads."""
        try:
            self._forward(self._levels.get(severity, logging.ERROR), msg)
        except BaseException as raised:
            if not isinstance(raised, Exception):
                self._thread.interrupt = raised

    def collect(self) -> AbstractContextManager[list[str]]:
        """The texts of the errors that TensorRT logs on this thread until the block is left, oldest first.

        Blocks may nest; each gets what arrives while it is open.
        """
        return _Collecting(self._thread)

    def said(self) -> str:
        """What the innermost open block of this thread has gathered, for the text of an exception."""
        blocks = [block for each in self._thread.blocks if (block := each()) is not None]
        return join_messages(blocks[-1].errors if blocks else ())

    def _forward(self, level: int, msg: str) -> None:
        if level == logging.ERROR:
            for each in self._thread.blocks:
                if (block := each()) is not None:
                    block.errors.append(msg)
                    level = logging.DEBUG
        elif level == logging.WARNING:
            if msg in self._warned:
                return
            # Texts with numbers that change must not fill the memory.
            if len(self._warned) >= _MAX_WARNINGS:
                self._warned.clear()
            self._warned.add(msg)
        if log.isEnabledFor(level):
            log.log(level, "%s", msg)


class _Collecting:
    """An open block of :meth:`MessageLog.collect`. Every eager call enters one, so that it is no generator.

    The thread refers to it weakly: a block that Ctrl-C kept from being closed is gone with its ``with`` statement.
    """

    __slots__ = ("__weakref__", "_thread", "errors")

    def __init__(self, thread: _Thread) -> None:
        self._thread = thread
        self.errors: list[str] = []

    def __enter__(self) -> list[str]:
        blocks = self._thread.blocks
        if not blocks:
            self._thread.interrupt = None
        blocks.append(weakref.ref(self))
        return self.errors

    def __exit__(self, *_: object) -> None:
        thread = self._thread
        thread.blocks = [each for each in thread.blocks if each() not in (None, self)]
        if thread.interrupt is not None:
            interrupt, thread.interrupt = thread.interrupt, None
            raise interrupt


def _logger(trt: Any) -> Any:
    """A logger of TensorRT's type."""
    levels = {
        trt.ILogger.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.ERROR: logging.ERROR,
        trt.ILogger.WARNING: logging.WARNING,
        trt.ILogger.INFO: logging.DEBUG,
        trt.ILogger.VERBOSE: logging.DEBUG,
    }

    class Logger(MessageLog, trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            MessageLog.__init__(self, levels)

    return Logger()


def join_messages(errors: Iterable[str]) -> str:
    """TensorRT's messages in one line, for the text of an exception.

    Repeated messages are dropped. So are those of ``catchCudaError``, with which TensorRT's bindings look for a CUDA
    error after any failure, unless there are no others.
    """
    texts = list(dict.fromkeys(text for text in (one_line(error).rstrip(".") for error in errors) if text))
    telling = [text for text in texts if "catchCudaError" not in text]
    return "; ".join(telling or texts) or "nothing"


def one_line(text: str) -> str:
    """A text with each run of white space made one space."""
    return " ".join(text.split())


def require_gpu(what: str) -> None:
    """Raise if there is no CUDA device."""
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
