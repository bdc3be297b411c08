"""What the Python code of a call does past the dispatcher: reads of tensors, clocks, files, random numbers, threads."""

from __future__ import annotations

import _queue
import _socket
import _thread
import asyncio
import concurrent.futures
import datetime
import functools
import io
import logging
import multiprocessing.pool
import os
import queue
import random
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from traceback import walk_stack
from typing import Any

import torch
from torch import Tensor

from graphcache.capture.blame import at
from graphcache.errors import Cause, Reason
from graphcache.graphs.operations import is_unwatched, skipped_by_dynamo
from graphcache.keys.user_code import is_library, is_tracer
from graphcache.keys.values import draws_randomness

_OF_INFERENCE = frozenset({"is_inference_mode_enabled", "is_inference"})
"""Functions that tell of inference mode, in which no graph is recorded."""
_READS = frozenset({"numpy", "tolist", "data_ptr"})
_CLOCKS = frozenset(
    {
        *(time.time, time.time_ns, time.perf_counter, time.perf_counter_ns, time.monotonic, time.monotonic_ns),
        *(time.process_time, time.process_time_ns, time.thread_time, time.thread_time_ns, time.clock_gettime),
        *(time.clock_gettime_ns, time.localtime, time.gmtime, time.ctime, time.asctime, time.strftime, os.times),
    }
)
_STREAMS = (io.TextIOWrapper, io.BufferedReader, io.BufferedWriter, io.BufferedRandom, io.FileIO, _socket.socket)
_STREAMING = ("read", "write", "seek", "truncate", "send", "recv")
_FILES = frozenset(
    {print, input, open, os.open, os.read, os.write, os.stat, os.lstat, os.listdir, os.scandir, os.remove, os.system}
    | {os.access, os.getcwd, os.readlink, os.unlink, os.rename, os.replace, os.mkdir, os.rmdir, os.link, os.symlink}
    | {os.utime, os.chdir, os.truncate}
)
_WRITERS = frozenset(each.__code__ for each in (logging.Logger.callHandlers, torch.save, torch.load, torch.jit.save))
"""Functions that use files past Python, or handlers that may do anything with a message."""
_HANDOFFS: frozenset[types.CodeType] = frozenset(
    vars(kind)[name].__code__
    for kind, names in {
        threading.Thread: ("start", "join", "is_alive"),
        threading.Condition: ("wait", "notify"),
        threading.Event: ("wait", "set"),
        threading.Barrier: ("wait",),
        queue.Queue: ("put", "get"),
        concurrent.futures.Future: ("result", "exception", "done", "running", "cancelled", "add_done_callback"),
        concurrent.futures.ThreadPoolExecutor: ("submit",),
        multiprocessing.pool.Pool: ("apply", "apply_async", "map", "map_async", "starmap", "imap"),
        multiprocessing.pool.AsyncResult: ("get", "wait", "ready", "successful"),
        asyncio.BaseEventLoop: ("call_soon", "call_later", "call_at", "create_task", "run_in_executor"),
    }.items()
    for name in names
)
"""Functions that give work to another thread or to an event loop, wait for it, or ask about it."""

_COMPILER = "torch._dynamo.convert_frame"
_OPAQUE = frozenset({"CompiledFxGraph.__call__", "CompiledAOTI.__call__", "EngineModule.forward"})
"""What runs a graph that Inductor compiled, or an engine, with memory that it allocates past the dispatcher."""

_MODULES = (types.ModuleType, type(torch._C.fork.__self__))  # type: ignore[attr-defined]
"""What functions belong to. Those of a module that pybind11 makes belong to a record of its own."""


class HostActivity:
    """Inside, notices what the current thread does on the host, with the profile hook of the interpreter.

    A mode of PyTorch would see reads of tensors too, but makes some operations take another path.
    """

    def __init__(
        self,
        path_here: Callable[[], str],
        report: Callable[[Cause, str], object] | None = None,
        ignores: Callable[[str], bool] = lambda where: False,
    ) -> None:
        self.cause: Cause | None = None
        """The first thing noticed that no graph repeats, with the submodule that was at work then."""
        self.functions: dict[types.CodeType, dict[str, Any]] = {}
        """The functions of the user's that ran, with their globals."""
        self.reads = True
        """Whether reads of tensors' memory count, as on the CPU; of CUDA's, the capture decides by itself."""
        self.autocasts = False
        """Whether autocast was switched on inside the call."""
        self.compiled = False
        """Whether Dynamo compiled something, which sets context variables of its own."""
        self.entered: Callable[[Sequence[Any]], object] = _ignore
        """Told when code that works past the dispatcher begins, and what it is given."""
        self.left: Callable[[Any], object] = _ignore
        """Told when it ends, and what it returns."""
        self.paused = False
        """Set while code of this package runs within the call."""
        self._opaque: set[types.CodeType] = set()
        self._known: set[types.CodeType] = set()
        self._plain: set[type] = set()
        self._acquired: list[int] = []
        self._path_here = path_here
        self._report = report
        self._ignores = ignores

    def __enter__(self) -> HostActivity:
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        # They refer to the call's arguments, which must not wait for the collector of cycles.
        self.entered = self.left = _ignore

    @skipped_by_dynamo
    def _event(self, frame: types.FrameType, event: str, arg: Any) -> None:
        # What an engine does on the host, TensorRT's own reads of addresses among it, is nothing that the call does.
        if self.paused or is_unwatched.get():
            return
        if event == "call":
            code = frame.f_code
            if code not in self._known:
                self._known.add(code)
                module = frame.f_globals.get("__name__")
                self.compiled = self.compiled or module == _COMPILER
                # Dynamo's guards, which are made at run time, belong to no module.
                if module is not None and not is_library(module):
                    self.functions[code] = frame.f_globals
                    self._partials(frame)
                elif code.co_qualname in _OPAQUE:
                    self._opaque.add(code)
            if code is _AUTOCAST:
                self.autocasts = self.autocasts or frame.f_locals["self"]._enabled
            if code in self._opaque:
                self.entered(_given_to(frame))
            if code in _HANDOFFS and not _is_ours(frame):
                self._note(
                    Reason.HOST_READ,
                    code.co_qualname,
                    "work goes to another thread or to an event loop, or comes from one",
                )
            elif code in _WRITERS:
                self._file(frame, code.co_qualname)
            elif code is _EXPORTS and self.reads and not _is_ours(frame):
                self._note(Reason.HOST_READ, code.co_qualname)
            elif code in _ABOUT_THREADS and frame.f_back is not None:
                self._thread(frame.f_back, code.co_qualname)
        elif event == "c_call":
            self._c_call(frame, arg)
        elif event == "return" and frame.f_code in self._opaque:
            self.left(arg)

    def _partials(self, frame: types.FrameType) -> None:
        """No event tells that a partial calls a built-in function: naming a global that is one counts as the call."""
        for name in frame.f_code.co_names:
            value = frame.f_globals.get(name)
            if type(value) is functools.partial and type(value.func) is types.BuiltinFunctionType:
                self._function_of_module(frame, value.func, value.func.__name__)

    def _c_call(self, frame: types.FrameType, function: Any) -> None:
        owner: Any = getattr(function, "__self__", None)
        # Asked of the type: isinstance() may call the object's own __getattribute__.
        kind = type(owner)
        if kind in self._plain:
            return
        name = function.__name__
        if issubclass(kind, _MODULES):
            self._function_of_module(frame, function, name)
        elif issubclass(kind, Tensor):
            if name in _READS and (self.reads or not owner.is_cuda) and not _is_ours(frame):
                self._note(Reason.HOST_READ, f"Tensor.{name}")
            elif name in _OF_INFERENCE:
                self._inference(frame, name)
        elif issubclass(kind, type):
            if issubclass(owner, datetime.date) and name in ("now", "today", "utcnow"):
                self._clock(frame, f"{owner.__name__}.{name}")
        elif issubclass(kind, _STREAMS) or owner is sys.stdout or owner is sys.stderr:
            if name.startswith(_STREAMING):
                self._file(frame, f"{kind.__name__}.{name}")
        elif issubclass(kind, asyncio.Future):
            if name in ("done", "result", "exception", "cancelled"):
                self._note(Reason.HOST_READ, f"{kind.__name__}.{name}", "the call asks about work of others")
        elif issubclass(kind, _queue.SimpleQueue):
            self._note(Reason.HOST_READ, f"SimpleQueue.{name}", "work goes to another thread")
        elif issubclass(kind, (_thread.LockType, _thread.RLock)):
            if not _is_ours(frame):
                self._lock(frame, name, id(owner))
        elif draws_randomness(owner):
            if name not in _NOT_DRAWN or (name == "seed" and owner in _OF_THE_PROCESS):
                self._note(Reason.RANDOM, f"{kind.__name__}.{name}")
        else:
            self._plain.add(kind)

    def _function_of_module(self, frame: types.FrameType, function: Any, name: str) -> None:
        if name in _OF_INFERENCE:
            self._inference(frame, name)
        elif function is os.urandom:
            self._note(Reason.RANDOM, "os.urandom")
        elif function is _thread.start_new_thread or function in _TORCH_HANDOFFS:
            self._note(Reason.HOST_READ, function.__name__, "work goes to another thread")
        elif function in _CLOCKS:
            self._clock(frame, f"time.{function.__name__}")
        elif function in _FILES:
            self._file(frame, function.__name__)
        elif function in _SETTINGS:
            self._setting(frame, name, "it asks for a setting of the process that no key holds")
        elif function is id:
            self._setting(frame, name, "it asks for the identity of an object, and a repetition has other arguments")
        elif function in _OF_THREADS:
            self._thread(frame, function.__name__)

    def _inference(self, frame: types.FrameType, name: str) -> None:
        if torch.is_inference_mode_enabled() and _is_users(frame):
            self._note(Reason.UNOBSERVED, name, "a graph is recorded outside of inference mode")

    def _setting(self, frame: types.FrameType, name: str, detail: str) -> None:
        # With autocast around the call, the dtype of that is in the key.
        if _is_users(frame) and not self._ignores(name) and not torch._C._is_any_autocast_enabled():
            self._note(Reason.UNOBSERVED, name, detail)

    def _thread(self, frame: types.FrameType, name: str) -> None:
        """Which thread runs the user's code, or how many there are, may change."""
        if _is_users(frame):
            self._note(Reason.HOST_READ, name, "the call asks about threads")

    def _clock(self, frame: types.FrameType, name: str) -> None:
        # Handlers of the log read clocks for reasons of their own.
        if _is_users(frame) and not _is_inside("logging", frame) and not self._ignores(name):
            self._note(Reason.RANDOM, name, "a clock is read, which a graph would stop")

    def _file(self, frame: types.FrameType, name: str) -> None:
        """Note a file, a stream or a socket, by the function of the standard library that was called for it."""
        for each, _ in walk_stack(frame):
            module = str(each.f_globals.get("__name__"))
            package = module.partition(".")[0]
            # Modules are imported, and kernels compiled, once; lines of source are read for messages.
            if package in ("importlib", "linecache", "triton", "graphcache") or is_tracer(module):
                return
            if package not in sys.stdlib_module_names:
                break
            name = f"{module}.{each.f_code.co_qualname}"
        if self._ignores(name):
            return
        self._note(Reason.UNOBSERVED, name, "it uses a file or a stream, which no graph does")

    def _lock(self, frame: types.FrameType, name: str, identity: int) -> None:
        """A lock that is released without having been acquired lets another thread go on."""
        if name == "locked" and _is_users(frame):
            self._note(Reason.HOST_READ, "lock.locked", "another thread may hold the lock")
        if name in ("acquire", "acquire_lock"):
            self._acquired.append(identity)
        elif name in ("release", "release_lock"):
            if identity in self._acquired:
                self._acquired.remove(identity)
            else:
                self._note(Reason.HOST_READ, "lock.release", "another thread is let go on")

    def _note(self, reason: Reason, where: str, detail: str = "") -> None:
        # What Dynamo does while it compiles a function happens once.
        if (self.cause is not None and self._report is None) or _is_inside(_COMPILER, sys._getframe(1)):
            return
        cause = Cause(reason, where, detail)
        if self._report is not None:
            self._report(cause, where)
        if self.cause is None:
            self.cause = at(cause, self._path_here(), "")


def _ignore(*_: object) -> None:
    pass


def _given_to(frame: types.FrameType) -> Sequence[Any]:
    """The arguments of a function that works past the dispatcher; of Inductor's, the inputs of its graph."""
    given = frame.f_locals
    return given["inputs"] if "inputs" in given else (*given["args"], *given["kwargs"].values())


def is_available() -> bool:
    """Whether nobody else has the profile hook, such as ``cProfile``: what it is told would be lost."""
    return sys.getprofile() is None


def _is_users(frame: types.FrameType) -> bool:
    return not is_library(frame.f_globals.get("__name__"))


def _is_ours(frame: types.FrameType) -> bool:
    """Whether this package runs, by itself or in the standard library: an engine or another wrapped module inside."""
    names = (each.f_globals.get("__name__") for each, _ in walk_stack(frame))
    outer = next((name for name in names if name not in ("threading", "queue", "contextlib")), None)
    return str(outer).startswith("graphcache.")


def _is_inside(module_name: str, frame: types.FrameType) -> bool:
    return any(each.f_globals.get("__name__") == module_name for each, _ in walk_stack(frame))


_NOT_DRAWN = frozenset({"getstate", "get_state", "seed"})
"""Methods of generators that draw nothing; a generator of the module's that is seeded anew shows that by its state."""
_OF_THE_PROCESS = (random._inst, torch.default_generator)
_SETTINGS = frozenset({torch.is_anomaly_enabled, torch.get_autocast_dtype, sys.getrecursionlimit})
"""Functions that tell a setting of the process, which a graph keeps as it was."""
_OF_THREADS = (_thread.get_ident, _thread.get_native_id, torch.get_num_threads, torch.get_num_interop_threads)
_ABOUT_THREADS = {each.__code__ for each in (threading.current_thread, threading.enumerate, threading.active_count)}
_AUTOCAST = torch.autocast.__enter__.__code__
_EXPORTS = Tensor.__dlpack__.__code__
_TORCH_HANDOFFS = frozenset({torch._C.fork, torch._C.wait})
