"""Buckets with the least padding for the shapes that were seen: one axis at a time, exactly, until nothing gets better.

A call weighs what one step on an axis costs it: the product of its other sizes, padded.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from graphcache.buckets.padder import find_argument
from graphcache.dispatch.dispatcher import Dispatcher
from graphcache.dispatch.targets import arguments_of
from graphcache.errors import ConfigError, shown
from graphcache.keys.call_spec import CallSpec, TensorSpec

Shape = tuple[int, ...]

MAX_SHAPES = 100_000
MAX_STEPS = 200_000_000
"""Squared sizes times buckets of one axis: half a minute of Python."""
_MAX_ROUNDS = 16
"""Two axes may change each other for ever between results that are equally good."""


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


def advise_buckets(dispatcher: Dispatcher, trace: Any, most: Any, *, argument: Any) -> Advice:
    """Buckets for one argument of a wrapped module, from a trace or from the calls that it had."""
    return advise(_trace_of(dispatcher, argument) if trace is None else trace, most)


def _trace_of(dispatcher: Dispatcher, argument: Any) -> Counter[Shape]:
    """The shapes that an argument had; of several ranks, those of the rank that most calls had."""
    if type(argument) not in (str, int) or (isinstance(argument, int) and argument < 0):
        raise ConfigError(f"argument={shown(argument)}: expected a name, or a position from 0 on")
    ref = find_argument(argument, arguments_of(dispatcher.target.module), f"argument={argument!r}")
    counts: Counter[Shape] = Counter()
    ranks: Counter[int] = Counter()
    for key in dispatcher.captures.keys.known():
        values, count = CallSpec(key).values, dispatcher.captures.keys.calls(key)
        for path in (f"args[{ref.index}]", ref.name or ""):
            if count and isinstance(found := values.get(path), TensorSpec):
                counts[found.shape] += count
                ranks[len(found.shape)] += count
    if not counts:
        raise ConfigError(
            f"argument={argument!r}: {dispatcher.ledger.name} was not called with a tensor there; call it first, or "
            f"give a trace"
        )
    [(usual, _)] = ranks.most_common(1)
    return Counter({shape: count for shape, count in counts.items() if len(shape) == usual})


def advise(trace: Any, most: Any) -> Advice:
    """The buckets for the axes of an input that add the least padding to a trace.

    Example:
        >>> advise([((1, 8), 100), ((7, 8), 5), ((64, 8), 1)], 2).option()
        {0: [1, 64]}
    """
    if not isinstance(most, Mapping) and (type(most) is not int or most < 1):
        raise ConfigError(f"most={shown(most)}: expected a whole number, 1 or more, or axes with one for each")
    rank, counts = _counts(trace)
    if not isinstance(most, Mapping):
        axes = [axis for axis in range(rank or 0) if len({shape[axis] for shape in counts}) > 1]
        most = dict.fromkeys(axes or range(rank or 1), most)
    _check_axes(most, rank)
    sizes: dict[int, tuple[int, ...]] = {}
    for _ in range(_MAX_ROUNDS if len(most) > 1 else 1):
        before = dict(sizes)
        for axis in most:
            sizes[axis] = best_buckets(_weights(counts, axis, sizes), most[axis])
        if sizes == before:
            break
    targets = {shape: padded_shape(shape, sizes) for shape in counts}
    work = sum(count * prod(shape) for shape, count in counts.items())
    graphs = set(targets.values())
    return Advice(
        sizes=sizes,
        calls=sum(counts.values()),
        shapes=len(counts),
        graphs=len(graphs),
        work=work,
        padding=sum(count * prod(targets[shape]) for shape, count in counts.items()) - work,
        held=sum(map(prod, graphs)),
        held_without=sum(map(prod, counts)),
    )


def best_buckets(weights: Mapping[int, int], most: int) -> tuple[int, ...]:
    """The buckets of one axis that cost the least padding; among equals the fewest.

    A size is padded to the smallest bucket that holds it, so the sizes, in order, fall into runs, and the best bucket
    of a run is its largest size. The least padding of the first j sizes in k runs is the least, over all starts of the
    last run, of the padding before it and the padding in it.
    """
    sizes = sorted(weights)
    most = min(most, len(sizes))
    if len(sizes) ** 2 * most > MAX_STEPS:
        raise ConfigError(
            f"most={most}: {len(sizes)} distinct sizes squared times {most} buckets are more than {MAX_STEPS} steps; "
            f"expected fewer buckets, or sizes rounded up to a multiple first"
        )
    if not sizes:
        return ()
    # Sums over the first sizes: of the weights, and of weight times size.
    weight, work = [0], [0]
    for size in sizes:
        weight.append(weight[-1] + weights[size])
        work.append(work[-1] + weights[size] * size)

    def padding(start: int, end: int) -> int:
        """Of the sizes from ``start`` to ``end``, padded to the last of them."""
        return sizes[end - 1] * (weight[end] - weight[start]) - (work[end] - work[start])

    ends = range(1, len(sizes) + 1)
    costs = [0, *(padding(0, end) for end in ends)]
    starts = [[0] * len(costs)]
    """For each number of runs and each end: where the last run begins."""
    while len(starts) < most:
        start = [0, *(min(range(end), key=lambda at: costs[at] + padding(at, end)) for end in ends)]
        better = [0, *(costs[start[end]] + padding(start[end], end) for end in ends)]
        if better[-1] == costs[-1]:
            # A further run never saves more than the one before.
            break
        costs = better
        starts.append(start)
    chosen: list[int] = []
    end = len(sizes)
    for start in reversed(starts):
        chosen.insert(0, sizes[end - 1])
        end = start[end]
    return tuple(chosen)


def padded_shape(shape: Sequence[int], sizes: Mapping[int, Sequence[int]]) -> Shape:
    """A shape with the smallest bucket that holds it on each axis that has buckets, in ascending order."""
    target = list(shape)
    for axis, buckets in sizes.items():
        target[axis] = buckets[bisect_left(buckets, target[axis])]
    return tuple(target)


def _weights(counts: Mapping[Shape, int], axis: int, sizes: Mapping[int, Sequence[int]]) -> Counter[int]:
    """What a step on an axis costs the calls of each size."""
    others = {other: buckets for other, buckets in sizes.items() if other != axis}
    weights: Counter[int] = Counter()
    for shape, count in counts.items():
        target = padded_shape(shape, others)
        weights[shape[axis]] += count * prod(target[:axis] + target[axis + 1 :])
    return weights


def _counts(trace: object) -> tuple[int | None, dict[Shape, int]]:
    """The rank of the shapes; the trace, checked, with equal shapes added up and without shapes of no elements."""
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
        if len(counts) > MAX_SHAPES:
            raise ConfigError(f"trace: more than {MAX_SHAPES} distinct shapes; expected the most frequent of them")
    return rank, counts


def _check_axes(most: Mapping[Any, Any], rank: int | None) -> None:
    """Raise unless ``most`` maps axes that are there to numbers."""
    if not most:
        raise ConfigError("most={}: expected axes with how many buckets each may have, such as {0: 8}")
    for axis, number in most.items():
        if type(axis) is not int or axis < 0 or (rank is not None and axis >= rank):
            seen = "" if rank is None else f" (the trace has {rank} dimensions)"
            raise ConfigError(f"most: the axis {shown(axis)}; expected the number of an axis, from 0 on{seen}")
        if type(number) is not int or number < 1:
            raise ConfigError(f"most[{shown(axis)}]={shown(number)}: expected a whole number, 1 or more")
