"""Running what Dynamo compiles as plain Python, where a call is looked at and not measured."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
from torch._higher_order_ops import utils

from graphcache.graphs.process_wide import process_wide


@contextmanager
def compiled_runs_eagerly() -> Iterator[None]:
    """Inside, functions that ``torch.compile`` made run as they were written, and higher-order operators as well.

    ``torch.cond`` and ``flex_attention`` compile themselves in eager mode. Dynamo would trace the function mode that is
    active, and raise. The stance of ``torch.compile`` that prevents it belongs to the process: meanwhile, other threads
    run eagerly too. Dynamo is imported only when the first higher-order operator is called.
    """
    with ExitStack() as stance:
        if "torch._dynamo" in sys.modules or sys.getprofile() is not None or _COMPILES_ITSELF is None:
            stance.enter_context(_eager_stance())
            yield
            return

        def event(frame: FrameType, kind: str, _: Any) -> None:
            if frame.f_code is _COMPILES_ITSELF:
                sys.setprofile(None)
                stance.enter_context(_eager_stance())

        sys.setprofile(event)
        try:
            yield
        finally:
            sys.setprofile(None)


@process_wide
def _eager_stance() -> AbstractContextManager[Any]:
    """The stance of ``torch.compile`` in which nothing is compiled."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _code_before_compiling() -> CodeType | None:
    """The code that every higher-order operator runs before it compiles itself."""
    function = getattr(utils, "setup_compilation_env", None)
    code = getattr(getattr(function, "__wrapped__", None), "__code__", None)
    return code if isinstance(code, CodeType) else None


_COMPILES_ITSELF = _code_before_compiling()
