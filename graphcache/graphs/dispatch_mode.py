"""Looking at what a call does: dispatch modes that change nothing, and compiled code that runs eagerly meanwhile."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial, wraps
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch._higher_order_ops import utils
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_eval_frame: Any = torch._C._dynamo.eval_frame
_CAN_SKIP = all(hasattr(_eval_frame, n) for n in ("set_code_exec_strategy", "_FrameExecStrategy", "_FrameAction"))

_FUNCTIONS = (FunctionType, MethodType, partial, nn.Module)


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A ``TorchDispatchMode`` that Dynamo does not compile, and that does not keep Dynamo from compiling.

    PyTorch wraps ``__torch_dispatch__`` of every mode in ``torch._dynamo.disable``, which imports ``torch._dynamo`` and
    sympy at the first operation: 1 to 4 s. This class marks the code object instead, which asks for no import. Dynamo
    then skips ``__torch_dispatch__`` and everything that it calls. A version of PyTorch without such marks wraps it.

    Under any other mode Dynamo skips every function that it is to compile. A function compiled with ``fullgraph=True``
    then raises, and so do ``torch.cond``, ``scan``, ``flex_attention`` and others that compile themselves in eager
    mode. Dynamo keeps that failure for the rest of the process. Under this mode they compile and run as they do without
    one. A higher-order operator is given to ``__torch_dispatch__``, which hands it to :meth:`higher_order`. Of a
    function that Inductor compiled, only calls of library kernels are seen.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether Dynamo compiles, and finds what it has compiled, as if this mode were not there."""
        return True

    def higher_order(self, func: HigherOrderOperator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a higher-order operator, such as ``torch.ops.higher_order.cond``, with its functions under this mode."""
        # Operators of this base class refuse anything but a graph module.
        if not any(each.__name__ == "BaseHOP" for each in type(func).__mro__):
            args, kwargs = pytree.tree_map_only(_FUNCTIONS, self._under, (args, kwargs))
        return func(*args, **kwargs)

    def _under(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that runs under this mode wherever it is called."""

        @wraps(function, updated=())
        def under(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return under

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return not _CAN_SKIP

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)  # type: ignore[no-untyped-call]
        method = vars(cls).get("__torch_dispatch__")
        if _CAN_SKIP and isinstance(method, FunctionType):
            skipped_by_dynamo(method)


_F = TypeVar("_F", bound=Callable[..., Any])


def skipped_by_dynamo(function: _F) -> _F:
    """Have Dynamo compile neither a function nor what it calls, where it runs within compiled code."""
    code = getattr(function, "__code__", None)
    if not _CAN_SKIP or not isinstance(code, CodeType):
        return cast("_F", torch._disable_dynamo(function, recursive=True))  # type: ignore[attr-defined]
    skip = _eval_frame._FrameAction.SKIP
    _eval_frame.set_code_exec_strategy(code, _eval_frame._FrameExecStrategy(skip, skip))
    return function


def process_wide(setting: Callable[[], AbstractContextManager[Any]]) -> Callable[[], AbstractContextManager[None]]:
    """Let any number of threads hold a setting: the first one to enter makes it, the last one to leave undoes it."""
    lock, made, users = threading.Lock(), ExitStack(), 0

    @wraps(setting)
    @contextmanager
    def shared() -> Iterator[None]:
        nonlocal users
        with lock:
            if not users:
                made.enter_context(setting())
            users += 1
        try:
            yield
        finally:
            with lock:
                users -= 1
                if not users:
                    made.close()

    return shared


@process_wide
def _eager_stance() -> AbstractContextManager[Any]:
    """The stance of ``torch.compile`` in which nothing is compiled."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


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


def _code_before_compiling() -> CodeType | None:
    """The code that every higher-order operator runs before it compiles itself."""
    function = getattr(utils, "setup_compilation_env", None)
    code = getattr(getattr(function, "__wrapped__", None), "__code__", None)
    return code if isinstance(code, CodeType) else None


_COMPILES_ITSELF = _code_before_compiling()
