"""What a graph consists of, in the DOT language of Graphviz."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from graphcache.errors import ClosedError, CudaError
from graphcache.graphs import driver
from graphcache.graphs.cpu_tape import CpuTape
from graphcache.graphs.cuda import CudaGraph


def dot_of(graph: Any) -> str:
    """The nodes and edges of a graph. On CUDA the driver writes them, with kernels, their parameters and addresses."""
    if isinstance(graph, CudaGraph):
        return _from_driver(graph)
    if isinstance(graph, CpuTape):
        return "\n".join(_tape_lines(graph)) + "\n"
    raise CudaError(f"a graph of type {type(graph).__name__} cannot be drawn; expected a CudaGraph or a CpuTape")


def _from_driver(graph: CudaGraph) -> str:
    """What ``cuGraphDebugDotPrint`` writes."""
    with graph.lane.lock:
        if graph.executables is None:
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
        yield f"  input{index} [label={_quoted(f'input {index}: {_shape(tensor)}')}, style=rounded];"
    made: dict[int, int] = {}
    for step, (func, args, kwargs, fills, results) in enumerate(steps):
        yield f"  step{step} [label={_quoted(str(func))}];"
        sources = {f"step{made[slot]}" for _, _, slot in fills if slot in made}
        sources |= {f"input{positions[id(leaf)]}" for leaf in _leaves((args, kwargs)) if id(leaf) in positions}
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


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
