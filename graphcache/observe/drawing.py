"""The graphs of a module as files for Graphviz."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from graphcache.errors import ConfigError
from graphcache.files import replacing
from graphcache.modules.cached_module import CachedModule
from graphcache.modules.controls import controls
from graphcache.observe.dot import dot_of


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
