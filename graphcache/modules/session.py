"""The level below a call: static inputs, one launch, static outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphcache.capture.recording import CaptureRequest, Recording, Sharing
from graphcache.dispatch.dispatcher import Dispatcher
from graphcache.dispatch.fast_path import launcher
from graphcache.errors import CaptureError, Cause, Refusal
from graphcache.graphs.buffers import put
from graphcache.keys.call_key import KeyedCall


class Session:
    """One call key of a module, for loops that keep their buffers: :meth:`run` is the launch and nothing else.

    Write into ``inputs``, call :meth:`run`, read ``outputs``, all on one stream. Nothing is checked, copied or
    allocated: a weight that was replaced, or an engine that was refitted, since the session was made, is not seen.

    Example:
        >>> import torch, graphcache
        >>> fast = graphcache.wrap(torch.nn.ReLU())
        >>> with fast.session(torch.zeros(2)) as session:
        ...     _ = session.inputs[0].copy_(torch.tensor([-1.0, 3.0]))
        ...     session.run()
        ...     session.outputs
        tensor([0., 3.])
    """

    def __init__(self, recorded: Recording) -> None:
        self.recorded = recorded
        """The graph, and how its outputs become the answer."""
        static, outputs = recorded.graph.pin()
        self.inputs: Sequence[Tensor] = tuple(static)
        """The static inputs: the tensors of the call, depth first; host shape tensors, whose values are frozen, not.

        An axis that the call's tensor had expanded has size 1. A tensor given several times is one buffer.
        """
        self.outputs: Any = recorded.build(outputs, self.inputs)
        """What the module returns, over static outputs that every run overwrites."""
        self.run: Callable[[], None] = launcher(recorded.graph)
        """Launch on the current stream; does not wait."""

    def close(self) -> None:
        """Release the graph and its buffers; twice does nothing."""
        self.recorded.close()
        self.inputs, self.outputs = (), None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_session(dispatcher: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Session:
    """What :meth:`CachedModule.session` does."""
    dispatcher.check_open()
    try:
        call = dispatcher.target.describe(args, kwargs)
    except Refusal as refusal:
        raise CaptureError(f"{dispatcher.ledger.name}: {refusal.cause}") from refusal
    session = Session(capture_alone(dispatcher, call))
    with torch.no_grad():
        for static, tensor in zip(session.inputs, dispatcher.target.graph_inputs(call.tensors), strict=True):
            put(static, tensor)
    return session


def capture_alone(dispatcher: Dispatcher, call: KeyedCall) -> Recording:
    """A graph of a call that shares no outputs and is in no cache; a ``CaptureError`` says why there is none."""
    captures, ledger, excluded = dispatcher.captures, dispatcher.ledger, dispatcher.submodules.excluded
    outcome: Recording | Cause | str | None = dispatcher.forbidden() or captures.needs_grad(call.tensors)
    if outcome is None and call.state:
        outcome = "calls put other tensors into attributes, which a graph alone does not"
    if outcome is None and excluded:
        outcome = f"{', '.join(excluded)} is excluded, so that there is no graph of the whole"
    if outcome is None:
        with dispatcher.on_device(call), captures.lock, captures.running(), ledger.span("capture") as span:
            outcome = dispatcher.target.recorder.attempt(CaptureRequest(call, Sharing.SCRATCH))[1]
            span.done = isinstance(outcome, Recording)
    if not isinstance(outcome, Recording):
        raise CaptureError(f"{ledger.name}: {outcome}")
    return outcome
