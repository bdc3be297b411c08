"""One execution context for several graphs, which are checked whenever another graph is captured with it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakSet

from torch import Tensor

from graphcache.capture.engine_like import EngineLike
from graphcache.config import GraphConfig
from graphcache.engines.context import Context
from graphcache.events import log
from graphcache.graphs.buffers import nbytes_of, poison
from graphcache.graphs.cuda import CudaGraph
from graphcache.graphs.graph import Graph
from graphcache.graphs.verify import disagreement

MAX_GRAPHS_PER_CONTEXT = 129
"""A graph that shares a context takes 0.07 MB, another context 74 MB and 30 to 130 ms (evictions-h200.json)."""
MAX_CHECK_SECONDS = 0.01
"""Each capture replays all graphs of its context twice. One that took longer than this gets no further graphs: 7 graphs
of ViT (1.46 ms each) reach it, and 129 of mlp8 (40 us each) do not (H200)."""
_MEASURED = ("1.5.", "1.6.")
"""Versions of TensorRT-RTX under which graphs of one context, in turn, were seen to answer rightly (H100, H200). Under
1.4.0.76 with ``EAGER`` they did not."""


@dataclass(eq=False, slots=True)
class SharedContext:
    """A context, the optimisation profile that it is used with, and its graphs."""

    context: Context
    profile: int
    most: int
    """How many graphs it may have."""
    graphs: WeakSet[CudaGraph] = field(default_factory=WeakSet)

    def live(self) -> list[CudaGraph]:
        """The graphs that are open."""
        return [graph for graph in self.graphs if graph.executable is not None]


class SharedContexts:
    """The execution contexts that the graphs of one wrapped engine share, and the check that they may.

    A new context takes 30 to 130 ms, the rest of a capture 4 to 20 (H100, mlp8 to MiniLM). NVIDIA documents one context
    for each graph as safe, and its own servers keep many graphs of one. The risk: a graph may read memory of the
    context whose contents depend on the shapes it was last used with. So the graphs of a context are replayed before
    and after each further capture, on the same inputs. Unless all answer as before, they are closed, and nothing is
    shared any more. The engine's stream order is held throughout.
    """

    def __init__(self, module: EngineLike, config: GraphConfig) -> None:
        self._module = module
        self._open: list[SharedContext] = []
        contexts, library = config.recording.contexts, module.engine.library
        # What an engine updates in place would be another one at each replay.
        is_measured = library.flavour == "tensorrt_rtx" and library.version.startswith(_MEASURED)
        self.shares = not module.engine.aliases and (
            contexts == "shared" or (contexts == "auto" and config.capture_in == "foreground" and is_measured)
        )
        """Whether graphs share contexts."""
        # One is captured before another has to go.
        self._most = min(config.max_graphs + 1, MAX_GRAPHS_PER_CONTEXT)
        self.broken: list[Graph] = []
        """Graphs that were closed, and have to be removed from their cache."""
        self.passing_nbytes = 0
        """Peak memory of the answers of other graphs during a capture, in bytes."""

    @contextmanager
    def one(self, scratch: Tensor, profile: int, shares: bool) -> Iterator[SharedContext]:
        """A context to capture a graph with, which is added to it; one of the graph's own unless it ``shares``."""
        if not shares:
            yield SharedContext(self._module.contexts.take(scratch), profile, most=1)
            return
        fitting = (each for each in self._open if each.profile == profile and len(each.live()) < each.most)
        if (shared := next(fitting, None)) is None:
            shared = SharedContext(self._module.contexts.take(scratch), profile, self._most)
            self._open.append(shared)
        shared.context.use_scratch(scratch)
        graphs = shared.live()
        before = _answers(graphs)
        self.passing_nbytes = max(self.passing_nbytes, 2 * nbytes_of(before))
        try:
            yield shared
        except BaseException:
            # Its state is unknown; its graphs keep it.
            self._open.remove(shared)
            raise
        finally:
            self._check(shared, graphs, before)

    def release(self, *, wait: bool) -> None:
        """Give back the contexts that no graph needs any more, once the last replay is over, and forget the others."""
        unused = [shared.context for shared in self._open if not shared.live()]
        self._open.clear()
        self._module.order.release(partial(self._module.contexts.give_back, *unused), wait=wait)

    def _check(self, shared: SharedContext, graphs: Sequence[CudaGraph], before: Sequence[Tensor]) -> None:
        """Compare the answers of graphs with those from before their context was used."""
        start = time.perf_counter()
        try:
            # Answers that differ from replay to replay may differ from those of before by as much.
            is_same = disagreement(before, _answers(graphs), lambda: _answers(graphs)) is None
        except BaseException:
            # They may be wrong. The new graph was not handed out.
            self._drop(shared.live())
            raise
        # Comparing has waited for the device.
        if time.perf_counter() - start > MAX_CHECK_SECONDS:
            shared.most = len(shared.live())
        if not is_same:
            log.warning(
                "%s: %d graph(s) answered differently once their execution context was used for another shape; they "
                "were dropped, and each graph has a context of its own from now on",
                self._module.name,
                len(graphs),
            )
            self.shares = False
            self._drop(graphs)

    def _drop(self, graphs: Sequence[CudaGraph]) -> None:
        """Close graphs, and share no context that is there."""
        self._open.clear()
        for graph in graphs:
            graph.close(wait=False)
        self.broken += graphs


def _answers(graphs: Sequence[CudaGraph]) -> list[Tensor]:
    """The answers of graphs on their static inputs, with the outputs poisoned before."""
    found: list[Tensor] = []
    for graph in graphs:
        static, out = [slot.buffer for slot in graph.outputs], [slot.fresh() for slot in graph.outputs]
        poison([*static, *out])
        found += graph.replay([slot.buffer for slot in graph.inputs], out)
    return found
