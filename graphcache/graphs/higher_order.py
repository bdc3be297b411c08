"""Running what Dynamo compiles as plain Python, where a call is looked at and not measured."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
from torch._higher_order_ops import utils


@contextmanager
def compiled_runs_eagerly() -> Iterator[None]:
    """Inside, functions that ``torch.compile`` made run as they were written, and higher-order operators as well.

    ``torch.cond`` and ``flex_attention`` compile themselves in eager mode. Dynamo would trace the function mode that is
    active, and raise. The stance of ``torch.compile`` that prevents it belongs to the process: meanwhile, other threads
    run eagerly too. Dynamo is imported only when the first higher-order operator is called.
    """
    with ExitStack() as stance:

        def begin() -> None:
            stance.enter_context(_eager_stance())

        if "torch._dynamo" in sys.modules or sys.getprofile() is not None or _ENTERED is None:
            begin()
            yield
            return

        def event(frame: FrameType, kind: str, _: Any) -> None:
            if frame.f_code is _ENTERED:
                sys.setprofile(None)
                begin()

        sys.setprofile(event)
        try:
            yield
        finally:
            sys.setprofile(None)


@contextmanager
def _eager_stance() -> Iterator[None]:
    """Set the stance while any thread is inside: the last one to leave sets back what the first one found."""
    with _lock:
        _stances.append(torch.compiler.set_stance("force_eager") if not _stances else _stances[-1])
    try:
        yield
    finally:
        with _lock:
            stance = _stances.pop()
            if not _stances:
                stance.__exit__(None, None, None)


_lock = threading.Lock()
_stances: list[Any] = []
"""The stance that is set, once for each user."""


def _entered() -> CodeType | None:
    """The code that every higher-order operator runs before it compiles itself."""
    function = getattr(utils, "setup_compilation_env", None)
    code = getattr(getattr(function, "__wrapped__", None), "__code__", None)
    return code if isinstance(code, CodeType) else None


_ENTERED = _entered()
