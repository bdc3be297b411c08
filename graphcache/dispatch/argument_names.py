"""What the arguments of a module are called."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from graphcache.capture.engine_like import EngineLike


def arguments_of(module: Any) -> inspect.Signature | Sequence[str]:
    """What a module's arguments are called, as far as it can be told."""
    if isinstance(module, EngineLike):
        return module.input_binding_names
    try:
        return inspect.signature(module.forward)
    except (TypeError, ValueError):
        # Compiled code, which does not say.
        return inspect.signature(lambda *args, **kwargs: None)
