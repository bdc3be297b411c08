"""Which calls a benchmark makes: sizes, inputs and the answers they should get, in turn."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor

    from bench import store


@dataclass(frozen=True)
class Call:
    """One call on the device.

    Args:
        size: Batch size, or number of tokens.
        inputs: In the order that was asked for.
        answer: What torch returns, on the CPU.
    """

    size: int
    inputs: tuple[Tensor, ...]
    answer: Tensor


def spread(bundle: store.Bundle, count: int) -> list[int]:
    """Sizes to alternate over, from the smallest to the largest; a single one is what the engine was tuned for.

    Args:
        bundle: What is called.
        count: How many; all there are if there are fewer.
    """
    sizes = bundle.sizes()
    count = min(count, len(sizes))
    if count == 1:
        return [bundle.usual()]
    return [sizes[round(index * (len(sizes) - 1) / (count - 1))] for index in range(count)]


def pool(
    bundle: store.Bundle,
    sizes: Sequence[int],
    count: int,
    device: torch.device,
    names: Sequence[str] | None = None,
) -> list[Call]:
    """Calls in which sizes take turns, so that a sequence of several shapes changes shape at every call.

    Args:
        bundle: Where they come from.
        sizes: In the order of the turns.
        count: Calls of each size, each with input tensors of its own.
        device: Where the inputs are put.
        names: The order of the inputs; that of the bundle if ``None``.

    Raises:
        ValueError: If a name is none of the bundle's inputs.
    """
    if unknown := set(names or ()) - set(bundle.inputs):
        raise ValueError(f"{bundle.name} has the inputs {', '.join(bundle.inputs)}, not {', '.join(sorted(unknown))}")
    order = [bundle.inputs.index(name) for name in names or bundle.inputs]
    cases = {size: bundle.cases(size, count) for size in sizes}
    return [
        Call(size, tuple(cases[size][turn].inputs[index].to(device) for index in order), cases[size][turn].answer)
        for turn in range(count)
        for size in sizes
    ]


def in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A function that makes one of some calls each time, over and over."""
    turns = cycle(calls).__next__

    def call() -> object:
        return turns()()

    return call
