"""Which submodule was at work when something happened, read from Python's own stack, where a capture is refused."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from traceback import walk_stack, walk_tb
from types import FrameType

from torch import nn

from graphcache.errors import Cause


def path_here(module: nn.Module) -> str:
    """The name of the innermost submodule whose method is running now; empty for the module itself, or for none."""
    return _innermost(module, [frame for frame, _ in walk_stack(sys._getframe(1))])


def located(cause: Cause, error: BaseException, module: nn.Module, name: str) -> Cause:
    """The same cause with the submodule in which an exception was raised."""
    path, seen = "", set()
    raised: BaseException | None = error
    while not path and raised is not None and id(raised) not in seen:
        seen.add(id(raised))
        path = _innermost(module, [frame for frame, _ in walk_tb(raised.__traceback__)][::-1])
        raised = raised.__cause__ or raised.__context__
    return at(cause, path, name)


def at(cause: Cause, path: str, name: str) -> Cause:
    """The same cause with a submodule before what it says of the place."""
    if not path or cause.where == path:
        return cause
    return replace(cause, where=path if cause.where in ("", name) else f"{path}: {cause.where}")


def _innermost(module: nn.Module, frames: Sequence[FrameType]) -> str:
    """The name of the first submodule, from the innermost frame on, among what methods were called on."""
    names: dict[int, str] = {id(each): name for name, each in module.named_modules()}
    for frame in frames:
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(owner, nn.Module) and id(owner) in names:
            return names[id(owner)]
    return ""
