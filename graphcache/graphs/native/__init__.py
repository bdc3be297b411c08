"""The native hit in C++: optional, compiled on request, used only if it agrees with Python.

``graphcache compile`` (or ``python -m graphcache.graphs.native``) compiles ``hit.cpp`` and what it includes against the
torch that is installed. Nothing is compiled at an import or a call. Where there is no library, or it is for another
torch, Python or source, or was changed, or disagrees with Python about some tensors, hits are answered in Python, which
is complete and the reference; one debug message says why.
"""

from __future__ import annotations

import logging
import threading
from functools import cache
from pathlib import Path
from typing import Any

from graphcache.graphs.native.build import find
from graphcache.graphs.native.probe import disagreement
from graphcache.keys.native.compiled_library import NotUsable, wanted
from graphcache.keys.native.compiled_library import load as load_library

log = logging.getLogger("graphcache")

MODULE = "_graphcache_hit"


def loaded() -> Any:
    """The compiled library, loaded at the first use; ``None`` where there is none, or ``GRAPHCACHE_NATIVE=0``."""
    return _loaded() if wanted() else None


def new_lock() -> Any:
    """A lock that its owner may take again: the library's, which costs nothing while it is free, or Python's."""
    library = loaded()
    return threading.RLock() if library is None else library.Lock()


def load(path: Path) -> Any:
    """The module in a library file, which must have been checked: any other file may do anything."""
    return load_library(path, MODULE)


@cache
def _loaded() -> Any:
    """The library, if one is found that agrees with Python."""
    try:
        path = find()
        library = load(path)
        difference = disagreement(library)
    except NotUsable as why:
        log.debug("hits are answered in Python: %s", why)
    except Exception as error:
        log.debug("hits are answered in Python: the compiled library raised %s: %s", type(error).__name__, error)
    else:
        if difference is None:
            return library
        log.debug("hits are answered in Python: %s disagrees with it about %s", path, difference)
    return None
