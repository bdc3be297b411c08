"""Which optimisation profile engines use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

from torch import nn

from graphcache.errors import ConfigError, shown
from graphcache.runtime.engines import engines_of


@contextmanager
def optimization_profile(module: nn.Module, profile: int | Literal["auto"] | None) -> Iterator[nn.Module]:
    """Let every engine of a module use one optimisation profile, for the length of a ``with`` block.

    A change drops the graphs of the engine. Outside of blocks, engines use whichever profile fits, the current one
    first; graphs of different profiles are kept side by side then.

    Args:
        module: An engine or a module with engines at any depth.
        profile: Its index, or ``"auto"`` or ``None`` for whichever fits.

    Yields:
        The module.

    Raises:
        ConfigError: If an engine has no such profile, or for anything else; no engine is changed then.
    """
    if profile != "auto" and profile is not None and (isinstance(profile, bool) or not isinstance(profile, int)):
        raise ConfigError(f"profile={shown(profile)}: expected the index of a profile, 'auto' or None")
    index = None if profile == "auto" else profile
    with ExitStack() as undo:
        for _, engine in engines_of(module):
            before = engine.profile_choice
            engine.set_optimization_profile(index)
            undo.callback(engine.set_optimization_profile, before)
        yield module
