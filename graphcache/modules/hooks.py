"""Functions of upper layers that an engine's module calls. It imports none of them: importing graphcache sets them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

graph_backend: Callable[[Any], Any] | None = None
"""Puts a bare engine behind a cache of graphs, for ``set_cudagraphs_mode(True)``."""
observe_engine: Callable[[Any, Any], Callable[[], None]] | None = None
"""Tells an observer of an engine's eager runs and graphs; returns a function that ends it."""
describe_engine: Callable[[Any], str] | None = None
"""What a traced program says of an engine, for ``torch.ops.graphcache.execute_engine``."""
