"""What the suite asks of every system that it measures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor

    from bench import store


class Peer(ABC):
    """One way to run an engine, or the torch network it was made of.

    An object serves one measurement: :meth:`load`, calls, :meth:`close`. Nothing heavy is imported before that.
    """

    name: str
    """How the suite, its tables and ``--systems`` call it."""
    kind: ClassVar[Literal["engine", "torch"]] = "engine"
    """What it runs: the engine, or the torch network."""
    rival: str | None = None
    """The mode of graphcache that promises the caller as much, and must be ahead; ``None`` for graphcache itself."""
    also: tuple[str, ...] = ()
    """Further modes of graphcache that it is shown next to; being behind those counts for nothing."""
    exact: bool = False
    """Whether a wrong answer is a failure of the suite, rather than something to report of a peer."""
    burst: int = 20
    """How many calls may be under way at once; fewer where each enqueues its kernels one by one."""

    def available(self) -> str | None:
        """Why it cannot run here, as far as that is known without loading anything; ``None`` if nothing is known."""
        return None

    @abstractmethod
    def load(self, bundle: store.Bundle, device: torch.device, sizes: Sequence[int]) -> Callable[..., Tensor]:
        """Make it ready.

        Args:
            bundle: The engine.
            device: Where to run.
            sizes: What will be called, so that a cache can be given room for all of it.

        Returns:
            A function of a call's inputs that gives its answer, which the next call may overwrite.

        Raises:
            Exception: Whatever keeps it from running; the first line of it is reported.
        """

    def timed(self, inputs: Sequence[Tensor]) -> Callable[[], object] | None:
        """What is timed for a call; ``None`` for the call itself, with the inputs as they are.

        A system that owns its buffers gives a function that runs on what lies in them.

        Args:
            inputs: Of one call; inputs of these shapes were given to what :meth:`load` returned before.
        """
        return None

    def misses(self) -> int | None:
        """How many calls so far did more than replay what was kept; ``None`` if that cannot be told."""
        return None

    def close(self) -> None:  # noqa: B027 - most have something to give back, a few have not
        """Give everything back, also after a :meth:`load` that failed."""
