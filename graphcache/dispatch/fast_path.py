"""Hits in native code: the graphs of one module by the layout of a call's tensors, in a table of the compiled library.

The library is optional. Without it nothing here costs anything, and every hit takes the way in ``dispatcher.py``.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as _hooks

from graphcache import native
from graphcache.cache.graph_cache import Entry, ticks
from graphcache.capture.recording import Recording
from graphcache.config import Modes, modes
from graphcache.dispatch.targets import EngineTarget, Target
from graphcache.errors import CudaError
from graphcache.events import log
from graphcache.graphs import driver
from graphcache.graphs.cuda import CudaGraph
from graphcache.graphs.graph import Graph
from graphcache.graphs.stream_order import StreamOrder, raw_stream
from graphcache.keys.call_key import USUAL, KeyedCall, ambient_state, guard_ambient
from graphcache.keys.guards import ModuleGuard
from graphcache.keys.state_snapshot import StateSnapshot

_FUNCTIONS = (
    *("cuGraphLaunch", "cuGraphExecKernelNodeSetParams", "cuGraphExecMemcpyNodeSetParams", "cuStreamIsCapturing"),
    *("cuCtxGetCurrent", "cuGraphInstantiateWithParams", "cuGraphExecDestroy"),
)


is_compiling = torch.compiler.is_compiling
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", int)
# Torch fills and empties these two dictionaries and never replaces them.
global_hooks, global_pre_hooks = _hooks._global_forward_hooks, _hooks._global_forward_pre_hooks


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run around a call of a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or global_hooks or global_pre_hooks)


@cache
def several_devices() -> bool:
    """Whether there is more than one CUDA device, so that the current one may be another than a graph's."""
    return torch.cuda.device_count() > 1


class FastPath:
    """The native table of one module, filled by hits in Python.

    ``publish`` is called with the table when it may answer calls, and with ``None`` when it may not.
    """

    def __init__(self, target: Target, publish: Callable[[Any], object]) -> None:
        self._target = target
        self._publish = publish
        self._table: Any = None
        self._asked = self._observed = self._paused = False
        self._lock = threading.Lock()
        self._known: dict[Hashable, tuple[Entry[Recording], int]] = {}
        self._ambient: tuple[Any, Any] = None, None
        """The ambient state of the graphs in the table, and what compares it in native code."""

    def remember(self, call: KeyedCall, entry: Entry[Recording]) -> None:
        """Let native code answer calls of this layout, if there is such code and it can."""
        if self._asked and self._table is None:
            return
        if not isinstance(entry.graph.graph, CudaGraph) or entry.graph.enters_inference:
            return
        if entry.graph.held is not None:
            # Native code compares what the module's guard holds, and no more.
            return
        if not call.is_flat or (table := self.table()) is None:
            return
        state, (known, ambient) = ambient_state(), self._ambient
        if state != (call.key.settings or USUAL):
            # Another thread has set something since the call was described.
            return
        if state != known:
            self.clear()
            self._ambient = state, ambient = state, new_ambient_guard(state)
        target, conditions = self._target, dict[str, Any]()
        if isinstance(target, EngineTarget):
            # The epoch of the graphs, not of this moment: another thread may have raised it since the replay.
            conditions.update(engine=target.engine, epoch=target.guard.epoch)
        else:
            conditions.update(guard=target.guard, epoch=entry.graph.version, ambient=ambient)
        if self._known.get(call.key) != (entry, conditions["epoch"]):
            self._known[call.key] = entry, conditions["epoch"]
            put(table, call.args, entry, **conditions)
        if not (self._observed or self._paused):
            self._publish(table)

    def table(self) -> Any:
        """The native table, made when a graph is first remembered; ``None`` where there is no library, or not yet."""
        if not self._asked:
            with self._lock:
                if not self._asked:
                    pending = native.is_pending()
                    self._table = new_table()
                    self._asked = self._table is not None or not pending
        return self._table

    def clear(self) -> None:
        """Forget all graphs."""
        self._known.clear()
        if self._table is not None:
            self._table.clear()

    def observed(self, active: bool) -> None:
        """While somebody observes, every hit takes the way in Python."""
        self._observed = active
        self._decide()

    def paused(self, active: bool) -> None:
        """While state is put back and forth, every hit takes the way in Python, where it waits."""
        self._paused = active
        self._decide()

    def _decide(self) -> None:
        in_python = self._observed or self._paused
        if in_python or self._table is not None:
            self._publish(None if in_python else self._table)


def put(
    table: Any,
    args: tuple[Any, ...],
    entry: Entry[Recording],
    *,
    engine: Any = None,
    epoch: int | None = None,
    guard: ModuleGuard | None = None,
    ambient: Any = None,
) -> None:
    """Let a native table answer calls that lie as plain tensors do, if the graph's kernels are pointed at tensors.

    An ``engine`` must have this ``epoch``. Of any other module the ``guard`` must have it as its version. Native code
    compares what the guard has armed and the ``ambient`` state. Python is asked if something differs, and always
    without an ``ambient`` guard.
    """
    recorded, graph = entry.graph, entry.graph.graph
    assert isinstance(graph, CudaGraph)
    if (half := graph.in_native_code(native.loaded())) is not None:
        build = None if recorded.bare else recorded.build
        order, context = graph.order, int(driver.primary_context(graph.index))
        updates = struct.pack(f"={len(recorded.updates)}Q", *recorded.updates)
        where = entry, graph, order, lock_of(order), half, graph.index, context, updates
        if guard is None or epoch is None:
            table.put(args, *where, build, engine, epoch, None, None, None)
        else:
            table.put(args, *where, build, None, epoch, guard, ambient, guard.stale_since(epoch))


def open_to(call: Any, into: Any) -> None:
    """Let calls of two methods of modules come to native code before they come to Python.

    It answers those whose module has a ``_graphcache_table``, unless hooks are to be run or something is compiled. What
    reads the code of the methods, such as ``torch.compile``, notices nothing.
    """
    if (library := native.loaded()) is not None:
        library.open(call, into, global_hooks, global_pre_hooks, vars(torch.compiler))


def launcher(graph: Graph) -> Callable[[], None]:
    """What launches a pinned graph on the current stream: its ``launch``, or native code that does the same."""
    # A session launches in the same way from its beginning to its end.
    if not isinstance(graph, CudaGraph) or (library := _connected(native.loaded(wait=True))) is None:
        return graph.launch
    context, executable = int(driver.primary_context(graph.index)), int(graph.executable)
    run: Callable[[], None] = library.launcher(
        graph, graph.order, lock_of(graph.order), graph.index, context, executable, graph.launch
    )
    return run


def lock_of(order: StreamOrder) -> Any:
    """The lock of an order, as native code takes it; one that was made before the library was loaded is Python's."""
    kind = native.loaded().Lock
    return order.lock if type(order.lock) is kind else _locks.setdefault(order, kind(order.lock))


_locks: WeakKeyDictionary[StreamOrder, Any] = WeakKeyDictionary()


def new_ambient_guard(state: Any) -> Any:
    """What compares the ambient state in native code; ``None`` if it cannot compare this state."""
    guard = native.loaded().Guard()
    return guard if guard_ambient(guard, state) else None


def new_table() -> Any:
    """An empty table of the library; ``None`` if there is no library, or no driver for it."""
    return None if (library := _connected(native.loaded())) is None else library.Table()


def _connected(library: Any) -> Any:
    """The library, which knows the functions of the driver from now on; ``None`` without one of the two."""
    if library is None:
        return None
    try:
        functions = driver.addresses(*_FUNCTIONS)
    except CudaError as error:
        log.debug("hits are answered in Python: %s", error)
        return None
    library.connect(
        (CudaGraph, StreamOrder, Entry, Modes, ModuleGuard, StateSnapshot),
        modes,
        ticks,
        raw_stream,
        current_device if several_devices() else None,
        vars(torch._C.TensorBase)["requires_grad"],
        driver.failure,
        (torch.cuda.OutOfMemoryError, CudaError),
        functions,
        _stream_function(library),
    )
    return library


def _stream_function(library: Any) -> int:
    """Where torch's function for its current stream is, whose number is compared without a call of Python's; or 0."""
    if raw_stream is not getattr(torch._C, "_cuda_getCurrentRawStream", None):
        return 0
    try:
        function = ctypes.CDLL(torch._C.__file__)["_ZN3c104cuda20getCurrentCUDAStreamEa"]
    except AttributeError:
        return 0
    address = ctypes.cast(function, ctypes.c_void_p).value or 0
    index = current_device()
    number, device_index, device_type = torch._C._cuda_getCurrentStream(index)
    return address if library.stream_id(address, index) == (device_type, device_index, number) else 0
