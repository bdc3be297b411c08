"""One execution context for several graphs, each of which has to answer as before whenever it was used again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from weakref import WeakSet

from torch import Tensor

from graphcache.capture.engine_like import EngineLike
from graphcache.config import GraphConfig
from graphcache.engines.context import Context
from graphcache.events import log
from graphcache.graphs.buffers import nbytes_of, poison
from graphcache.graphs.cuda import CudaGraph
from graphcache.graphs.verify import all_same_bits, disagreement

MOST = 129
"""Graphs of one context, where a cache may have more. Each capture there replays all of them twice, some 40 µs each for
a small network (evictions-h200.json), where another context takes 74 MB and 30 to 130 ms."""
_MEASURED = ("1.5.", "1.6.")
"""Versions of TensorRT-RTX under which graphs of one context, in turn, were seen to answer rightly (H100, H200). Under
1.4.0.76 with ``EAGER`` they did not."""


@dataclass(eq=False, slots=True)
class Shared:
    """A context that several graphs were captured with.

    Args:
        context: The context.
        profile: The optimisation profile that it is used with.
        graphs: Those that are there; whoever uses the context looks at all of them.
    """

    context: Context
    profile: int
    graphs: WeakSet[CudaGraph] = field(default_factory=WeakSet)

    def live(self) -> list[CudaGraph]:
        """The graphs that are open."""
        return [graph for graph in self.graphs if graph.executables is not None]


class SharedContexts:
    """The execution contexts that the graphs of one wrapped engine share, and the proof that they may.

    A new context takes 30 to 130 ms, the rest of a capture 4 to 20 (H100, mlp8 to MiniLM). NVIDIA documents one context
    for each graph as safe, and its own servers keep many graphs of one. What may go wrong: memory that a context keeps
    to itself depends on the shapes it was last used with, and a graph that was captured before reads it. So whoever
    uses a context again replays its graphs before and after, on the same inputs. No other replay comes between, as the
    lane is held. Unless all answer as before, they are closed, and nothing is shared any more.

    Not for several threads at once: the engine's lane is held.

    Args:
        module: The engine.
        config: Options of the wrapped module.
    """

    def __init__(self, module: EngineLike, config: GraphConfig) -> None:
        self._module = module
        self._open: list[Shared] = []
        contexts = config.recording.contexts
        self.shares = contexts == "shared" or (
            contexts == "auto" and config.capture_in == "foreground" and _is_measured(module)
        )
        """Whether graphs share contexts."""
        # One is captured before another has to go.
        self._most = min(config.max_graphs + 1, MOST)
        self.broken: list[CudaGraph] = []
        """Graphs that were closed, and are to be taken out of their cache."""
        self.passing_nbytes = 0
        """What the answers of other graphs took while one was captured, in bytes: the most so far."""

    @contextmanager
    def one(self, scratch: Tensor, profile: int) -> Iterator[tuple[Context, Callable[[CudaGraph], object]]]:
        """A context to capture with, and what to call with the graph that came of it.

        Args:
            scratch: As :class:`~graphcache.engines.context.Context` takes it.
            profile: The optimisation profile that it will be used with: switching it is no change of shapes.
        """
        shared = self._with_room(scratch, profile)
        graphs = shared.live()
        before = self._answers(graphs)
        self.passing_nbytes = max(self.passing_nbytes, 2 * nbytes_of(before))
        with ExitStack() as undo:
            undo.callback(self._check, shared, graphs, before)
            # After a failure nobody knows what state it is in; its graphs keep it.
            undo.callback(self._open.remove, shared)
            yield shared.context, shared.graphs.add
            undo.pop_all()
        self._check(shared, graphs, before)

    def release(self, *, wait: bool) -> None:
        """Give back the contexts that no graph needs any more, once the last replay is over; let go of the others.

        Args:
            wait: Wait for that replay.
        """
        unused = [shared.context for shared in self._open if not shared.live()]
        self._open.clear()

        def give_back() -> None:
            for context in unused:
                self._module.contexts.give_back(context)

        self._module.lane.release(give_back, wait=wait)

    def _with_room(self, scratch: Tensor, profile: int) -> Shared:
        for shared in self._open:
            if shared.profile == profile and len(shared.live()) < self._most:
                shared.context.use_scratch(scratch)
                return shared
        found = Shared(self._module.contexts.take(scratch), profile)
        self._open.append(found)
        return found

    def _answers(self, graphs: Sequence[CudaGraph]) -> list[Tensor]:
        """What the graphs answer on what lies in their static inputs; nothing of earlier answers can be left in it."""
        found: list[Tensor] = []
        for graph in graphs:
            static, out = [slot.buffer for slot in graph.outputs], [slot.fresh() for slot in graph.outputs]
            poison([*static, *out])
            found += graph.replay([slot.buffer for slot in graph.inputs], out)
        return found

    def _check(self, shared: Shared, graphs: Sequence[CudaGraph], before: Sequence[Tensor]) -> None:
        try:
            after = self._answers(graphs)
            # What they answer now, if that changes from replay to replay, says what they may have answered before.
            same = all_same_bits(after, before) or disagreement(before, after, lambda: self._answers(graphs)) is None
        except BaseException:
            # Nobody knows whether they are still right. The new one is nobody's.
            self._drop(shared.live())
            raise
        if same:
            return
        log.warning(
            "%s: %d graph(s) answered differently once their execution context was used for another shape; they were "
            "dropped, and each graph has a context of its own from now on",
            self._module.name,
            len(graphs),
        )
        self.shares = False
        self._drop(graphs)

    def _drop(self, graphs: Sequence[CudaGraph]) -> None:
        self._open.clear()
        for graph in graphs:
            graph.close(wait=False)
        self.broken += graphs


def _is_measured(module: EngineLike) -> bool:
    library = module.engine.library
    # What an engine updates in place would be another one at each replay.
    return library.flavour == "tensorrt_rtx" and library.version.startswith(_MEASURED) and not module.engine.aliases
