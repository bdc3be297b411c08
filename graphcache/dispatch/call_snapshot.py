"""A call that is captured after it was answered, in another thread, on copies of its tensors."""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from graphcache.graphs.buffers import static_copies
from graphcache.graphs.stream_order import own_stream
from graphcache.keys.ambient import has_modes
from graphcache.keys.call import KeyedCall
from graphcache.keys.call_key import describe, substitute


class CallSnapshot:
    """One call, as it was when it was made: values, context variables, torch's modes, and what its stream had done.

    Args:
        call: The call; its tensors are copied, on the current stream.
    """

    def __init__(self, call: KeyedCall) -> None:
        tensors = static_copies(call.tensors)
        args, kwargs = substitute(call.args, call.kwargs, tensors)
        own, _ = describe(args, kwargs)
        self.call = KeyedCall(call.key, tensors, args, kwargs)
        """The same call on the copies."""
        # Values of host shape tensors follow in the call's.
        self.is_alike = own == call.key[: len(own)] and not has_modes()
        """Whether the copies lie as the tensors do, and no default device is set for the caller's thread alone.

        Otherwise a graph of them would not be one of the call.
        """
        self.cancelled = False
        self._process = os.getpid()
        self.thread: threading.Thread | None = None
        """Which captures it, once one does."""
        self.done = threading.Event()
        self._context = contextvars.copy_context()
        self._modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), _autocast()
        self._index = next((value.device.index for value in tensors if value.is_cuda), None)
        self._copied: Any = None
        if self._index is not None:
            with torch.cuda.device(self._index):
                self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._copied.record(torch.cuda.current_stream())

    @property
    def is_lost(self) -> bool:
        """Whether this is a fork of the process that would have captured it: no thread of that one is here."""
        return self._process != os.getpid()

    def run(self, function: Callable[[], Any]) -> Any:
        """Call ``function`` in this thread as if it were the call's own, on a stream of the background's."""
        return self._context.run(self._run, function)

    def _run(self, function: Callable[[], Any]) -> Any:
        inference, grad, autocast = self._modes
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            for kind, enabled, dtype in autocast:
                stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype))
            if self._index is not None:
                stack.enter_context(_beside(self._index, self._copied))
            return function()


@contextmanager
def _beside(index: int, copied: Any) -> Iterator[None]:
    stream = own_stream(index, "background")
    with torch.cuda.device(index), torch.cuda.stream(stream):
        stream.wait_event(copied)
        yield
        # What was copied belongs to the caller's stream, which does not know of this one.
        stream.synchronize()


def _autocast() -> list[tuple[str, bool, torch.dtype]]:
    kinds = ["cpu", "cuda"] if torch.cuda.is_initialized() else ["cpu"]  # type: ignore[no-untyped-call]
    return [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
