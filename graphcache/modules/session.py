"""The level below a call: static inputs, one launch, static outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from graphcache.capture.recording import Recording
from graphcache.dispatch.fast_path import launcher


class Session:
    """One signature of a module, for loops that keep their buffers: :meth:`run` is the launch and nothing else.

    Write into ``inputs``, call :meth:`run`, read ``outputs``, all on one stream. Nothing is checked, copied or
    allocated: a weight that was replaced, or an engine that was refitted, since the session was made, is not seen.

    Args:
        recorded: A verified graph of the session's own.

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
        self._recorded = recorded
        static, outputs = recorded.graph.pin()
        self.inputs: Sequence[Tensor] = tuple(recorded.spread(static))
        """The static inputs: the tensors of the call, depth first; host shape tensors, whose values are frozen, not.

        An axis that the call's tensor had expanded has size 1. A tensor given several times is one buffer.
        """
        self.outputs: Any = recorded.build(outputs, self.inputs)
        """What the module returns, over static outputs that every run overwrites."""
        self.run: Callable[[], None] = launcher(recorded.graph)
        """Launch on the current stream; does not wait."""

    def close(self) -> None:
        """Release the graph and its buffers; twice does nothing."""
        self._recorded.close()
        self.inputs, self.outputs = (), None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
