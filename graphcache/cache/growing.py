"""Whether an axis keeps coming in sizes that have no graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

MANY = 8
"""Distinct sizes of one axis at which it is said; ``torch.compile`` warns of as many for its own graphs."""
_MOST_AXES = 256


class Growth(NamedTuple):
    """An axis that came in many sizes.

    Args:
        place: The argument, by position or by name.
        axis: Counted from 0.
        sizes: Those that came, ascending.
    """

    place: str | int
    axis: int
    sizes: tuple[int, ...]

    def advice(self, name: str, *, capture: str) -> str:
        """What was seen, and what would help here.

        Args:
            name: What the argument is called.
            capture: The policy by which graphs are captured.
        """
        option = f"buckets={{{name!r}: {{{self.axis}: [{self.sizes[0]}, …]}}}}"
        ways = [
            f"pad to a few sizes with {option} (advise_buckets tells which)",
            "capture the sizes that will come with prepare()",
        ]
        if capture == "first":
            ways.append("capture only what pays for itself with capture='worthwhile'")
        return (
            f"`{name}` dim {self.axis} came in {len(self.sizes)} sizes that had no graph "
            f"({', '.join(map(str, self.sizes))}), and each needs a graph of its own. To change that: "
            f"{', or '.join(ways)}. (Said once.)"
        )


class Growing:
    """Watches the sizes of new signatures, and says once that one axis keeps growing.

    Example:
        >>> growing = Growing()
        >>> [growing.new({0: (1, length)}) is not None for length in range(70, 79)]
        [False, False, False, False, False, False, False, True, False]
    """

    def __init__(self) -> None:
        self._sizes: dict[tuple[str | int, int], set[int]] = {}
        self._said = False

    def new(self, shapes: Mapping[str | int, tuple[int, ...]]) -> Growth | None:
        """Note the shapes of a signature that was never called before.

        Args:
            shapes: Of the tensors among the arguments, by position or name.

        Returns:
            The axis, the first time that one has come in 8 sizes.
        """
        if self._said:
            return None
        for place, shape in shapes.items():
            for axis, size in enumerate(shape):
                sizes = self._sizes.get((place, axis))
                if sizes is None:
                    if len(self._sizes) >= _MOST_AXES:
                        continue
                    sizes = self._sizes[(place, axis)] = set()
                sizes.add(size)
                if len(sizes) >= MANY:
                    self._said = True
                    self._sizes.clear()
                    return Growth(place, axis, tuple(sorted(sizes)))
        return None
