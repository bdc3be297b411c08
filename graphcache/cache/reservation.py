"""Room in a budget, kept for a graph that is still to be captured."""

from __future__ import annotations

from collections.abc import Callable


class Reservation:
    """Bytes that nobody else may take until the graph is there, or until its capture was given up.

    A context manager, which releases at the end of its block.

    Args:
        nbytes: How many bytes are kept free.
        release: Gives them back; called with the reservation, once.

    Example:
        >>> with Reservation(8, lambda room: print(room.nbytes, "bytes are free again")) as room:
        ...     room.release()
        8 bytes are free again
    """

    def __init__(self, nbytes: int, release: Callable[[Reservation], None]) -> None:
        self.nbytes = nbytes
        self._release: Callable[[Reservation], None] | None = release

    def release(self) -> None:
        """Give the room back; a second time does nothing."""
        release, self._release = self._release, None
        if release is not None:
            release(self)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()
