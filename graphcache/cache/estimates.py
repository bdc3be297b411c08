"""What calls of a signature take, from few and noisy measurements."""

from __future__ import annotations

import math

from graphcache.errors import ConfigError, shown

_MEMORY = 16
LARGEST = 4.0
"""How many times the typical time a single measurement counts for at most."""
_LONGEST = 1e9


class Estimate:
    """A running estimate of a time, in seconds.

    The lesser of the first two measurements, then a mean over about 16. A signature's first calls load kernels and
    allocate memory, and take up to a thousand times what the later ones do. So a measurement of less than half the
    estimate replaces it (a time has a floor: the estimate was too high), and one above four times the estimate counts
    for four times (a stall is not a slow call, but a change that lasts is followed).

    Example:
        >>> estimate = Estimate()
        >>> for seconds in (1.3, 0.006, 0.0005, 0.0006):
        ...     estimate.add(seconds)
        >>> round(estimate.value, 6), estimate.count
        (0.000525, 4)
    """

    __slots__ = ("count", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self.count = 0

    def add(self, seconds: float) -> None:
        """Take a measurement into account."""
        if self.count < 2:
            self.value = min(self.value, seconds) if self.count else seconds
        elif 2.0 * seconds < self.value:
            self.value = seconds
        else:
            # The last term lets an estimate leave zero, which a coarse clock may have given.
            most = LARGEST * self.value + 1e-9
            self.value += (min(seconds, most) - self.value) / min(self.count + 1, _MEMORY)
        self.count += 1


class Mean:
    """The exponential mean of figures that differ by nature, such as what several signatures take.

    Args:
        prior: What is assumed before the first; it counts for nothing afterwards.

    Example:
        >>> share = Mean(0.3)
        >>> share.add(0.5)
        >>> share.value
        0.5
    """

    __slots__ = ("count", "value")

    def __init__(self, prior: float) -> None:
        self.value = prior
        self.count = 0

    def add(self, figure: float) -> None:
        """Take a figure into account."""
        self.count += 1
        self.value += (figure - self.value) / min(self.count, _MEMORY)


def checked_seconds(seconds: object, what: str) -> float:
    """A time as it can be.

    Raises:
        ConfigError: For what is no number, is negative, or is longer than thirty years.

    Example:
        >>> checked_seconds(1, "seconds")
        1.0
    """
    if isinstance(seconds, (int, float)) and not isinstance(seconds, bool):
        try:
            value = float(seconds)
        except OverflowError:
            value = math.inf
        if 0.0 <= value <= _LONGEST:
            return value
    raise ConfigError(f"{what}={shown(seconds)}: expected a time in seconds, from 0 to {_LONGEST:.0e}")
