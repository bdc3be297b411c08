"""From the shapes that were seen to the buckets that would have served them best.

One axis at a time, exactly (:mod:`graphcache.cache.ladder`): a call counts by how many elements one step on that axis
costs it, which is the product of its other sizes, padded as they will be. The axes are gone through again until nothing
gets better. With one axis that is the best there is; with several each axis is the best for what the others are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from graphcache.cache.ladder import check_options, knee, ladder
from graphcache.errors import ConfigError, shown

Shape = tuple[int, ...]

MOST_SHAPES = 100_000
_MOST_ROUNDS = 16


@dataclass(frozen=True)
class Advice:
    """Buckets for the axes of one input, and what the trace would have cost with them.

    Elements are those of this input; times the size of one they are bytes.

    Args:
        sizes: Axis -> its buckets, ascending.
        calls: Calls in the trace, those of empty shapes left out.
        shapes: Distinct shapes in it: graphs without buckets.
        graphs: Distinct shapes after padding: graphs with them.
        work: Elements of all calls together.
        padding: Elements added to them.
        held: Elements of one static input for each graph.
        held_without: The same without buckets.

    Example:
        >>> advice = advise({(n, 16): 10 for n in range(1, 9)}, {0: 2})
        >>> print(advice)
        axis 0: 4, 8; 2 graphs in place of 8 hold 33 % of the memory, 33.3 % more work
    """

    sizes: Mapping[int, tuple[int, ...]]
    calls: int
    shapes: int
    graphs: int
    work: int
    padding: int
    held: int
    held_without: int

    @property
    def overhead(self) -> float:
        """Padding as a share of the work without it."""
        return self.padding / self.work if self.work else 0.0

    @property
    def saving(self) -> float:
        """The share of the memory for static inputs that buckets save; negative where they need more."""
        return 1 - self.held / self.held_without if self.held_without else 0.0

    def option(self) -> dict[int, list[int]]:
        """What the ``buckets`` option takes for this input."""
        return {axis: list(sizes) for axis, sizes in self.sizes.items() if sizes}

    def __str__(self) -> str:
        axes = "; ".join(f"axis {axis}: {', '.join(map(str, sizes))}" for axis, sizes in self.sizes.items())
        return (
            f"{axes}; {self.graphs} graphs in place of {self.shapes} hold {100 * (1 - self.saving):.0f} % of the "
            f"memory, {100 * self.overhead:.1f} % more work"
        )


def advise(
    trace: Mapping[Shape, int] | Iterable[tuple[Shape, int]],
    most: Mapping[int, int],
    *,
    threshold: float = 0.0,
    price: int = 0,
) -> Advice:
    """The buckets for some axes of an input that minimise padding over a trace, and memory as far as it has a price.

    Args:
        trace: Shapes of one input, with how often each was seen.
        most: Axis -> how many buckets it may have.
        threshold: A further bucket must save this share of the work; 0 takes whatever saves anything.
        price: How many elements of padding one element of memory is worth, over the whole trace.

    Raises:
        ConfigError: Naming the field, for a trace that is none, shapes of several ranks, or an axis that is not there.

    Example:
        >>> advise([((1, 8), 100), ((7, 8), 5), ((64, 8), 1)], {0: 2}).option()
        {0: [1, 64]}
    """
    check_options(1, price, threshold)
    counts = _counts(trace)
    rank = len(next(iter(counts))) if counts else 0
    _check_axes(most, rank if counts else None)
    sizes: dict[int, tuple[int, ...]] = {}
    for _ in range(_MOST_ROUNDS):
        before = dict(sizes)
        for axis in most:
            weights, rest = _weights(counts, axis, sizes)
            rungs = ladder(weights, most[axis], price=price * rest)
            sizes[axis] = knee(rungs, threshold).sizes if rungs else ()
        if sizes == before:
            break
    return _account(counts, sizes)


def padded_shape(shape: Sequence[int], sizes: Mapping[int, Sequence[int]]) -> Shape:
    """A shape with the smallest bucket that holds it on each axis that has buckets.

    Args:
        shape: No larger than the largest bucket.
        sizes: Axis -> its buckets, ascending.

    Example:
        >>> padded_shape((3, 5), {0: (2, 4)})
        (4, 5)
    """
    target = list(shape)
    for axis, buckets in sizes.items():
        target[axis] = buckets[bisect_left(buckets, target[axis])]
    return tuple(target)


def _weights(counts: Mapping[Shape, int], axis: int, sizes: Mapping[int, Sequence[int]]) -> tuple[Counter[int], int]:
    """What a step on an axis costs the calls of each size, and how many elements it adds to one graph of each rest."""
    others = {other: buckets for other, buckets in sizes.items() if other != axis}
    weights: Counter[int] = Counter()
    rests: dict[Shape, int] = {}
    for shape, count in counts.items():
        target = padded_shape(shape, others)
        rest = target[:axis] + target[axis + 1 :]
        weights[shape[axis]] += count * rests.setdefault(rest, prod(rest))
    return weights, sum(rests.values())


def _account(counts: Mapping[Shape, int], sizes: Mapping[int, tuple[int, ...]]) -> Advice:
    targets = {shape: padded_shape(shape, sizes) for shape in counts}
    work = sum(count * prod(shape) for shape, count in counts.items())
    done = sum(count * prod(targets[shape]) for shape, count in counts.items())
    graphs = set(targets.values())
    return Advice(
        sizes=dict(sizes),
        calls=sum(counts.values()),
        shapes=len(counts),
        graphs=len(graphs),
        work=work,
        padding=done - work,
        held=sum(map(prod, graphs)),
        held_without=sum(map(prod, counts)),
    )


def _counts(trace: object) -> dict[Shape, int]:
    """The trace, checked, with equal shapes added up; without shapes that have no elements."""
    pairs = trace.items() if isinstance(trace, Mapping) else trace
    if not isinstance(pairs, Iterable) or isinstance(pairs, (str, bytes)):
        raise ConfigError(f"trace={shown(trace)}: expected shapes with how often each was seen")
    counts: dict[Shape, int] = {}
    rank = None
    for index, pair in enumerate(pairs):
        where = f"trace[{index}]"
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ConfigError(f"{where}={shown(pair)}: expected a shape and how often it was seen")
        shape, count = pair
        if not isinstance(shape, (tuple, list)) or any(
            type(size) is not int or not 0 <= size < 2**63 for size in shape
        ):
            raise ConfigError(f"{where}: the shape {shown(shape)}; expected whole numbers from 0 to 2**63 - 1")
        if type(count) is not int or count < 1:
            raise ConfigError(f"{where}: the count {shown(count)}; expected a whole number, 1 or more")
        rank = len(shape) if rank is None else rank
        if len(shape) != rank:
            raise ConfigError(f"{where}: {len(shape)} dimensions after shapes of {rank}; expected one input's shapes")
        if all(shape):
            counts[tuple(shape)] = counts.get(tuple(shape), 0) + count
        if len(counts) > MOST_SHAPES:
            raise ConfigError(f"trace: more than {MOST_SHAPES} distinct shapes; expected the most frequent of them")
    return counts


def _check_axes(most: object, rank: int | None) -> None:
    if not isinstance(most, Mapping) or not most:
        raise ConfigError(f"most={shown(most)}: expected axes with how many buckets each may have, such as {{0: 8}}")
    for axis, number in most.items():
        if type(axis) is not int or axis < 0 or (rank is not None and axis >= rank):
            seen = "" if rank is None else f" (the trace has {rank} dimensions)"
            raise ConfigError(f"most: the axis {shown(axis)}; expected the number of an axis, from 0 on{seen}")
        if type(number) is not int or number < 1:
            raise ConfigError(f"most[{shown(axis)}]={shown(number)}: expected a whole number, 1 or more")
