"""Functions of upper layers that lower ones call without importing them; ``import graphcache`` fills them in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

NO_ANSWER: Any = object()
"""Returned where a feature leaves a call to the core."""


class Features:
    """Functions of layers above the core, by name."""

    save: Callable[..., None]
    """Writes a module as a package file: :func:`graphcache.persist.saving.save`."""
    adopt: Callable[..., Any]
    """Puts engines of graphcache in the place of modules of Torch-TensorRT, until its ``end()``."""
    graph_backend: Callable[..., Any]
    """Puts a module behind a cache of graphs: :class:`graphcache.CachedModule`."""
    describe_engine: Callable[[Any], str]
    """What a traced program says of an engine, for ``torch.ops.graphcache.execute_engine``."""
    padding: Callable[..., Any]
    """Makes what pads the calls of one module: :class:`graphcache.buckets.bucketed.Bucketed`."""
    advise_buckets: Callable[..., Any]
    """Says which buckets would have served the calls of a module best."""
    manifest_of: Callable[..., Any]
    """Lists the calls that a module has served in a manifest, and counts those that no file can hold."""
    manifest_type: type
    calls_of_manifest: Callable[..., Any]
    """Chooses the calls of a manifest that are worth a capture here."""


features = Features()
