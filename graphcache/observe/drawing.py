"""The graphs of a module as files for Graphviz."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils import _pytree as pytree

from graphcache.errors import ClosedError, ConfigError, CudaError
from graphcache.files import replacing
from graphcache.graphs import driver
from graphcache.graphs.cpu_tape import CpuTape
from graphcache.graphs.cuda import CudaGraph
from graphcache.keys.call_spec import short_name
from graphcache.modules.cached_module import CachedModule
from graphcache.modules.transparent import controls


def dump_dot(module: CachedModule, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Path:
    """Write the graph that answers a call as a file of Graphviz (``dot -Tsvg``).

    On CUDA the driver writes it, with every kernel, its parameters and addresses; on the CPU it shows the recorded
    operations. The call is not made.

    Args:
        module: A wrapped module.
        path: Of the file, which is replaced.
        args: Arguments of a call that has a graph. Without arguments, the graph that was used last is written.
        kwargs: Likewise.

    Returns:
        The path.

    Raises:
        ConfigError: If ``module`` is not wrapped, or has no graph for the call.
        CudaError: If the driver fails.
        OSError: If the file cannot be written.

    Example:
        >>> import tempfile, torch, graphcache
        >>> fast = graphcache.wrap(torch.nn.ReLU())
        >>> _ = fast(torch.zeros(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(dump_dot(fast, f"{folder}/relu.dot", torch.zeros(2)).read_text())
        digraph host_graph {
          node [shape=box, fontname=monospace];
          input0 [label="input 0: float32[2]", style=rounded];
          step0 [label="aten.relu.default"];
          input0 -> step0;
          output0 [label="output 0", style=rounded];
          step0 -> output0;
        }
        <BLANKLINE>
    """
    graph = controls(module).graph_for(*args, **kwargs)
    if graph is None:
        which = "for this call; explain() tells why" if args or kwargs else "yet; call it, or prepare() it"
        raise ConfigError(f"{controls(module).ledger.name} has no graph {which}")
    text = dot_of(graph)
    with replacing(path) as file:
        file.write(text.encode())
    return Path(path)


def dot_of(graph: Any) -> str:
    """The nodes and edges of a graph. On CUDA the driver writes them, with kernels, their parameters and addresses."""
    if isinstance(graph, CudaGraph):
        return _from_driver(graph)
    if isinstance(graph, CpuTape):
        return "\n".join(_tape_lines(graph)) + "\n"
    raise CudaError(f"a graph of type {type(graph).__name__} cannot be drawn; expected a CudaGraph or a CpuTape")


def _from_driver(graph: CudaGraph) -> str:
    """What ``cuGraphDebugDotPrint`` writes."""
    with graph.order.lock:
        if graph.executable is None:
            raise ClosedError("the graph was closed; call the module again to capture a new one")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph.dot"
            flags = driver.binding().CUgraphDebugDot_flags.CU_GRAPH_DEBUG_DOT_FLAGS_VERBOSE
            driver.call("cuGraphDebugDotPrint", graph.captured, os.fsencode(path), int(flags))
            return path.read_text(encoding="utf-8", errors="replace")


def _tape_lines(graph: CpuTape) -> Iterator[str]:
    """A tape's inputs, operations and outputs as nodes, and an edge from each value to its users."""
    inputs, steps, outputs = graph.recorded()
    yield "digraph host_graph {"
    yield "  node [shape=box, fontname=monospace];"
    positions = {id(tensor): index for index, tensor in enumerate(inputs)}
    for index, tensor in enumerate(inputs):
        label = _quoted(f"input {index}: {short_name(tensor.dtype)}{list(tensor.shape)}")
        yield f"  input{index} [label={label}, style=rounded];"
    made: dict[int, int] = {}
    for step, (func, args, kwargs, fills, results) in enumerate(steps):
        yield f"  step{step} [label={_quoted(str(func))}];"
        sources = {f"step{made[slot]}" for _, _, slot in fills}
        leaves = pytree.tree_leaves((args, kwargs))
        sources |= {f"input{positions[id(leaf)]}" for leaf in leaves if id(leaf) in positions}
        for source in sorted(sources):
            yield f"  {source} -> step{step};"
        for slot in results if isinstance(results, list) else [results]:
            if slot is not None:
                # An operation that writes in place answers with what it was given.
                made[slot] = step
    for index, slot in enumerate(outputs):
        yield f"  output{index} [label={_quoted(f'output {index}')}, style=rounded];"
        if slot in made:
            yield f"  step{made[slot]} -> output{index};"
    yield "}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
