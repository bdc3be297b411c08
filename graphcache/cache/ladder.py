"""The sizes on one axis that cost the least padding, for every number of sizes at once, exactly.

A call of size s is padded to the smallest bucket b >= s. The sizes that were seen, in order, fall into runs, one run
for each bucket, and a bucket is the largest size of its run: a smaller one would not hold it, a larger one pads more.
So the best buckets are the cheapest way to cut the sizes into k runs. With W and S the sums of the weights and of
weight times size up to a place,

    cost(i, j] = s_j (W_j - W_i) - (S_j - S_i) + price * s_j
    best_k[j] = s_j W_j - S_j + price * s_j + min over i < j of (best_{k-1}[i] + S_i - W_i * s_j)

The minimum is over straight lines in s_j, whose slopes -W_i fall as i grows and which are asked at growing s_j: the
lower envelope is a queue, and k buckets of n sizes cost O(k n) in place of O(k n^2) (the "convex hull trick"). All of
it is whole numbers of Python, which neither round nor overflow.

For i <= i' <= j <= j' the costs fulfil the quadrangle inequality,

    cost(i, j'] + cost(i', j] - cost(i, j] - cost(i', j'] = (s_j' - s_j) (W_i' - W_i) >= 0,

for which the best cost is convex in the number of runs: each further bucket saves at most what the one before has
saved. So :func:`knee` may stop at the first that saves too little.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from graphcache.errors import ConfigError, shown

MOST_STEPS = 10_000_000
"""Distinct sizes times buckets that one table is made for: about ten seconds of Python."""


@dataclass(frozen=True, slots=True)
class Rung:
    """The best buckets of one number.

    Args:
        sizes: The buckets, ascending; the last is the largest size that was seen.
        cost: What was minimised: the padding, plus the price of what is held.
        padding: Units of padding that the weighted sizes cost with them.
        held: The sum of the buckets: units of memory for one static input of each.
        work: Units that the weighted sizes have by themselves, without padding.
    """

    sizes: tuple[int, ...]
    cost: int
    padding: int
    held: int
    work: int

    @property
    def share(self) -> float:
        """The part of what is computed that is padding, from 0 to 1."""
        total = self.padding + self.work
        return self.padding / total if total else 0.0


def ladder(weights: Mapping[int, int], most: int, *, price: int = 0) -> list[Rung]:
    """The best buckets for at most 1, 2, ... ``most`` of them.

    Best is what costs the least padding, plus ``price`` for every unit of every bucket; among equals the fewest
    buckets. More buckets than help are not used, so that rungs repeat once another bucket saves nothing.

    Args:
        weights: How much each size counts, such as the number of calls; 0 or more.
        most: How many buckets there may be, 1 or more.
        price: Units of padding that one unit of a bucket's memory is worth; 0 minimises padding alone.

    Returns:
        As many rungs as ``most``, or as there are distinct sizes if those are fewer; none without sizes.

    Raises:
        ConfigError: For sizes, weights or numbers that are none, or too many of them (:data:`MOST_STEPS`).

    Example:
        >>> [rung.sizes for rung in ladder({1: 100, 7: 5, 8: 5, 64: 1}, 3)]
        [(64,), (1, 64), (1, 8, 64)]
        >>> [rung.padding for rung in ladder({1: 100, 7: 5, 8: 5, 64: 1}, 3)]
        [6865, 565, 5]
    """
    check_options(most, price, 0)
    _check_weights(weights)
    sizes = sorted(weights)
    if not sizes:
        return []
    most = min(most, len(sizes))
    if most * len(sizes) > MOST_STEPS:
        raise ConfigError(
            f"most={most}: {len(sizes)} distinct sizes times {most} buckets are more than {MOST_STEPS} steps; expected "
            f"fewer buckets, or sizes rounded up to a multiple first"
        )
    sums = _Sums(sizes, weights)
    costs, cut = _first(sums, price)
    cuts = [cut]
    rungs = [_rung(sums, cuts, costs[-1])]
    while len(rungs) < most:
        costs, cut = _next(sums, price, costs)
        cuts.append(cut)
        saves = costs[-1] < rungs[-1].cost
        rungs.append(_rung(sums, cuts, costs[-1]) if saves else rungs[-1])
    return rungs


def knee(rungs: Sequence[Rung], threshold: float = 0.01) -> Rung:
    """The rung after which one more bucket saves too little.

    Args:
        rungs: What :func:`ladder` gave, at least one.
        threshold: What one more bucket must save, as a share of the work without padding.

    Raises:
        ConfigError: Without rungs, or for a threshold that is no number from 0 on.

    Example:
        >>> knee(ladder({1: 100, 7: 5, 8: 5, 64: 1}, 4), threshold=0.1).sizes
        (1, 8, 64)
    """
    check_options(1, 0, threshold)
    if not rungs:
        raise ConfigError("rungs: there are none; expected what ladder gave for at least one size")
    # Whole numbers of any size, so that no saving is lost in a rounding.
    enough = Fraction(threshold) * rungs[0].work
    chosen = rungs[0]
    for rung in rungs[1:]:
        if len(rung.sizes) == len(chosen.sizes) or chosen.cost - rung.cost < enough:
            break
        chosen = rung
    return chosen


class _Sums:
    """Sizes in order, with the sums of weights and of weight times size before each of them."""

    def __init__(self, sizes: list[int], weights: Mapping[int, int]) -> None:
        self.sizes = sizes
        self.weight, self.work = [0], [0]
        for size in sizes:
            self.weight.append(self.weight[-1] + weights[size])
            self.work.append(self.work[-1] + weights[size] * size)


def _first(sums: _Sums, price: int) -> tuple[list[int], array[int]]:
    """What one run up to each size costs; index 0 stands for no sizes at all."""
    costs = [0]
    for index, size in enumerate(sums.sizes, 1):
        costs.append(size * sums.weight[index] - sums.work[index] + price * size)
    return costs, array("i", [0]) * len(costs)


def _next(sums: _Sums, price: int, before: list[int]) -> tuple[list[int], array[int]]:
    """The cheapest ways to end at each size with one run more than ``before``, and where the last run begins."""
    costs, cut = [0], array("i", [0])
    weight, work = sums.weight, sums.work
    # Lines (height, weight, place); the first is one run from the first size on, so that fewer runs are allowed too.
    lines: deque[tuple[int, int, int]] = deque([(0, 0, 0)])
    for index, size in enumerate(sums.sizes, 1):
        while len(lines) > 1 and lines[1][0] - lines[1][1] * size < lines[0][0] - lines[0][1] * size:
            lines.popleft()
        height, slope, place = lines[0]
        costs.append(size * weight[index] - work[index] + price * size + height - slope * size)
        cut.append(place)
        line = (before[index] + work[index], weight[index], index)
        while len(lines) > 1 and _is_above(lines[-2], lines[-1], line):
            lines.pop()
        lines.append(line)
    return costs, cut


def _is_above(left: tuple[int, int, int], middle: tuple[int, int, int], right: tuple[int, int, int]) -> bool:
    """Whether ``middle`` is nowhere below both others, in whole numbers: the crossings are compared by products."""
    return (right[0] - left[0]) * (middle[1] - left[1]) <= (middle[0] - left[0]) * (right[1] - left[1])


def _rung(sums: _Sums, cuts: Sequence[array[int]], cost: int) -> Rung:
    chosen: list[int] = []
    padding, end = 0, len(sums.sizes)
    for cut in reversed(cuts):
        bucket, start = sums.sizes[end - 1], cut[end]
        chosen.insert(0, bucket)
        padding += bucket * (sums.weight[end] - sums.weight[start]) - (sums.work[end] - sums.work[start])
        end = start
    return Rung(tuple(chosen), cost, padding, sum(chosen), sums.work[-1])


def check_options(most: object, price: object, threshold: object) -> None:
    """Refuse numbers that are none.

    Raises:
        ConfigError: Naming the first of them.
    """
    if type(most) is not int or most < 1:
        raise ConfigError(f"most={shown(most)}: expected a whole number, 1 or more")
    if type(price) is not int or price < 0:
        raise ConfigError(f"price={shown(price)}: expected a whole number, 0 or more")
    if type(threshold) not in (int, float) or not 0 <= threshold < float("inf"):  # type: ignore[operator]
        raise ConfigError(f"threshold={shown(threshold)}: expected a share, 0 or more")


def _check_weights(weights: object) -> None:
    if not isinstance(weights, Mapping):
        raise ConfigError(f"weights={shown(weights)}: expected a mapping of sizes to how much they count")
    for size, weight in weights.items():
        if type(size) is not int or size < 1:
            raise ConfigError(f"weights: the size {shown(size)}; expected a whole number, 1 or more")
        if type(weight) is not int or weight < 0:
            raise ConfigError(f"weights[{shown(size)}]={shown(weight)}: expected a whole number, 0 or more")
