"""Synthetic traffic: which signature each call comes with.

Every generator gives the same calls for the same arguments. ``favourites`` says whether some signatures are called much
more often than others, at least for a while: only then is there something that a cache with less room than signatures
could find out.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Calls in order.

    Args:
        name: What the generator calls it.
        calls: The signature of each call.
        favourites: Whether some signatures are much hotter than others.
    """

    name: str
    calls: list[int]
    favourites: bool


def zipf(exponent: float, calls: int, *, shapes: int = 200, one_offs: float = 0.0, seed: int = 0) -> Traffic:
    """Independent calls; the n-th hottest of ``shapes`` comes with a probability proportional to ``n ** -exponent``.

    Args:
        exponent: 0 is uniform; measured request streams lie between 0.6 and 1.1.
        calls: How many.
        shapes: How many signatures there are.
        one_offs: The share of calls that come with a signature of their own instead.
        seed: Of the draw.
    """
    draw = random.Random(seed)
    hottest_first = list(range(shapes))
    draw.shuffle(hottest_first)
    weights = [(rank + 1) ** -exponent for rank in range(shapes)]
    found = draw.choices(hottest_first, weights, k=calls)
    fresh = shapes
    for index in range(calls):
        if one_offs and draw.random() < one_offs:
            found[index] = fresh
            fresh += 1
    name = f"zipf {exponent:g} over {shapes}" + (f", {one_offs:.0%} one-offs" if one_offs else "")
    return Traffic(name, found, favourites=exponent > 0)


def uniform(calls: int, *, shapes: int = 200, seed: int = 0) -> Traffic:
    """Independent calls, each signature as likely as the others."""
    return Traffic(f"uniform over {shapes}", zipf(0.0, calls, shapes=shapes, seed=seed).calls, favourites=False)


def loop(calls: int, *, shapes: int) -> Traffic:
    """All signatures in turn, again and again: the worst there is for a cache that drops the least recently used."""
    return Traffic(f"loop over {shapes}", [index % shapes for index in range(calls)], favourites=False)


def phases(calls: int, *, count: int, shapes: int = 40, exponent: float = 1.0, seed: int = 0) -> Traffic:
    """Zipf over other signatures in every phase; what was hot in one is never seen again."""
    each, rest = divmod(calls, count)
    found: list[int] = []
    for phase in range(count):
        length = each + (phase < rest)
        drawn = zipf(exponent, length, shapes=shapes, seed=seed * 1000 + phase).calls
        found += [phase * shapes + signature for signature in drawn]
    return Traffic(f"{count} phases of {shapes}", found, favourites=True)


def tides(calls: int, *, count: int, shapes: int = 40, exponent: float = 1.0, seed: int = 0) -> Traffic:
    """Two sets of signatures that take turns, as day and night do."""
    halves = phases(calls, count=2, shapes=shapes, exponent=exponent, seed=seed).calls
    halves = [halves[: len(halves) // 2], halves[len(halves) // 2 :]]
    each = max(len(halves[1]) // ((count + 1) // 2), 1)
    found: list[int] = []
    for turn in range(count):
        found += halves[turn % 2][turn // 2 * each : (turn // 2 + 1) * each]
    return Traffic(f"{count} tides of {shapes}", found, favourites=True)


SYNTHETIC: dict[str, Callable[[int, int], Traffic]] = {
    "zipf 0.7": lambda calls, seed: zipf(0.7, calls, seed=seed),
    "zipf 1.0": lambda calls, seed: zipf(1.0, calls, seed=seed),
    "zipf 1.1": lambda calls, seed: zipf(1.1, calls, shapes=60, one_offs=0.3, seed=seed),
    "4 phases": lambda calls, seed: phases(calls, count=4, seed=seed),
    "10 phases": lambda calls, seed: phases(calls, count=10, seed=seed),
    "8 tides": lambda calls, seed: tides(calls, count=8, seed=seed),
    "loop of 24": lambda calls, seed: loop(calls, shapes=24),
    "loop of 48": lambda calls, seed: loop(calls, shapes=48),
    "uniform": lambda calls, seed: uniform(calls, seed=seed),
    "all different": lambda calls, seed: Traffic("all different", list(range(calls)), favourites=False),
}
"""What :mod:`bench.policy` runs, each from a number of calls and a seed."""
