"""Base class of the dispatch modes of this package: entering one does not import ``torch._dynamo``."""

from __future__ import annotations

from types import CodeType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_eval_frame: Any = torch._C._dynamo.eval_frame
_CAN_SKIP = all(hasattr(_eval_frame, n) for n in ("set_code_exec_strategy", "_FrameExecStrategy", "_FrameAction"))


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A ``TorchDispatchMode`` that Dynamo never compiles.

    PyTorch wraps ``__torch_dispatch__`` of every mode in ``torch._dynamo.disable``, which imports ``torch._dynamo`` and
    sympy at the first operation: 1 to 4 s. This class marks the code object instead, which asks for no import. Dynamo
    then skips ``__torch_dispatch__`` and everything that it calls. A version of PyTorch without such marks wraps it.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return not _CAN_SKIP

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)  # type: ignore[no-untyped-call]
        method = vars(cls).get("__torch_dispatch__")
        if _CAN_SKIP and isinstance(code := getattr(method, "__code__", None), CodeType):
            skip = _eval_frame._FrameAction.SKIP
            _eval_frame.set_code_exec_strategy(code, _eval_frame._FrameExecStrategy(skip, skip))
