"""Short ways to the graphs of one module, by the layout of a call's tensors: in Python, and compiled where it is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch

from graphcache.cache.lru import Entry, ticks
from graphcache.config import Modes, modes
from graphcache.errors import CudaError
from graphcache.events import log
from graphcache.graphs import driver, native
from graphcache.graphs.cuda import CudaGraph
from graphcache.graphs.graph import Graph
from graphcache.graphs.lane import Lane
from graphcache.graphs.single import Fire, Into, allocator
from graphcache.keys.ambient import ambient_state
from graphcache.keys.guards import ModuleGuard
from graphcache.modules.conditions import (
    current_device,
    global_hooks,
    global_pre_hooks,
    raw_stream,
    several_devices,
)
from graphcache.modules.module_guards import EngineGuard
from graphcache.modules.record import Recorded

Shortcut = tuple[Entry[Recorded], Fire | None, Into | None, int, int | None]
"""An entry, shorter ways to replay it (a :class:`~graphcache.graphs.single.Fire`, or none), its device's index, and the
epoch of the engine that it was captured of."""

_FUNCTIONS = (
    "cuGraphLaunch",
    "cuGraphExecKernelNodeSetParams",
    "cuGraphExecMemcpyNodeSetParams",
    "cuStreamIsCapturing",
)


class Shortcuts(dict[Hashable, Shortcut]):
    """A dictionary of shortcuts, and the same graphs in a table of the compiled library, if there is one.

    Args:
        engine: The engine whose ``epoch`` says whether its graphs still hold; ``None`` for any other module.
        guard: What says it of any other module.
    """

    def __init__(self, engine: Any, guard: EngineGuard | ModuleGuard) -> None:
        super().__init__()
        self._engine = engine
        self._guard = guard
        self._table: Any = None
        self._asked = False
        self._making = threading.Lock()
        self.ambient = ambient_state()
        """The ambient state of PyTorch that all of them were captured under."""

    def table(self) -> Any:
        """The compiled table; ``None`` where there is no library. Asked for once, when a graph is first remembered."""
        if not self._asked:
            with self._making:
                if not self._asked:
                    self._table = new_table()
                    self._asked = True
        return self._table

    def remember(self, layout: Hashable, args: tuple[Any, ...], shortcut: Shortcut) -> None:
        """Answer calls of a layout in a shorter way from now on.

        Args:
            layout: Of the arguments.
            args: The arguments of such a call, all of them plain tensors.
            shortcut: The way.
        """
        if (ambient := ambient_state()) != self.ambient:
            self.clear()
            self.ambient = ambient
        if self.get(layout) == shortcut:
            return
        self[layout] = shortcut
        if (table := self.table()) is not None:
            self._put(table, args, shortcut)

    def clear(self) -> None:
        """Forget all of them."""
        super().clear()
        if self._table is not None:
            self._table.clear()

    def _put(self, table: Any, args: tuple[Any, ...], shortcut: Shortcut) -> None:
        entry, _, _, index, epoch = shortcut
        recorded, graph = entry.graph, entry.graph.graph
        assert isinstance(graph, CudaGraph)
        # One look at what another thread may take away by closing the graph.
        executables, outputs, slots = graph.executables, graph.outputs, (*graph.inputs, *graph.outputs)
        pointed = all(slot.pointers for slot in slots)
        if executables is None or not outputs or not pointed:
            return
        table.put(
            args,
            entry,
            graph,
            graph.lane,
            graph.lane.lock,
            executables,
            executables.table,
            index,
            self._engine,
            epoch,
            self._guard.stale_since(recorded.version) if isinstance(self._guard, ModuleGuard) else None,
            None if recorded.bare else recorded.build,
            slots,
            tuple([slot.raw for slot in slots]),
            tuple([slot.buffer for slot in outputs]),
            # A device's memory comes from where the buffer's came from.
            tuple([None if slot.buffer.is_cuda else allocator(slot.buffer) for slot in outputs]),
        )


def open_to(call: Any, into: Any) -> None:
    """Let calls of two methods of modules come to the compiled library before they come to Python.

    It answers those whose module has a table in ``_table``, unless hooks are to be run or something is being compiled;
    what it leaves alone runs the methods as they are written. What reads their code, such as ``torch.compile``, notices
    nothing.

    Args:
        call: The function behind ``__call__``.
        into: That behind ``forward_into``.
    """
    if (library := native.loaded()) is not None:
        library.open(call, into, global_hooks, global_pre_hooks, vars(torch.compiler))


def launcher(graph: Graph) -> Callable[[], None]:
    """What launches a pinned graph on the current stream: :meth:`~graphcache.graphs.graph.Graph.launch`, or compiled.

    Args:
        graph: A graph that is pinned.
    """
    executables = graph.executables if isinstance(graph, CudaGraph) else None
    if executables is None or (table := new_table()) is None:
        return graph.launch
    assert isinstance(graph, CudaGraph)
    run: Callable[[], None] = table.run(
        graph, graph.lane, graph.lane.lock, executables, graph.index, int(graph.pinned), graph.launch
    )
    return run


def new_table() -> Any:
    """An empty table of the compiled library; ``None`` if there is no library, or no driver for it."""
    library = native.loaded()
    if library is None:
        return None
    try:
        functions = driver.addresses(*_FUNCTIONS)
    except CudaError as error:
        log.debug("hits are answered in Python: %s", error)
        return None
    return library.Table(
        (CudaGraph, Lane, Entry, Modes),
        modes,
        ticks,
        raw_stream,
        # Torch knows its streams by numbers that can be compared without a call of Python's.
        raw_stream is getattr(torch._C, "_cuda_getCurrentRawStream", None),
        current_device if several_devices() else None,
        driver.failure_of,
        (torch.cuda.OutOfMemoryError, CudaError),
        functions,
    )
