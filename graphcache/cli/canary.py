"""The canary of ``graphcache doctor``: graphs that stay must answer as before when others are evicted.

What the evicted ones freed is taken again and filled with NaN. A graph that still reads it gives a wrong answer; one
that still writes it, such as the workspace of a matrix product, leaves a trace there.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import graphcache
from graphcache import CachedModule, CacheInfo, Reason
from graphcache.cli.output import Causes
from graphcache.cli.timing import difference

_LONG = 4096
_ROWS = (4, 16, 32)
_CHUNK = 1 << 26
_MOST = 1 << 30


@dataclass(frozen=True)
class Outcome:
    """What the graphs that stayed gave.

    Args:
        asked: How many answers were compared with eager execution.
        info: The account of all calls; ``hits`` is how many of these answers came from a graph.
        wrong: What was not as before, in words.
        reasons: Why calls ran eagerly, in words.
    """

    asked: int
    info: CacheInfo
    wrong: list[str]
    reasons: dict[Reason, str]


class Products(nn.Module):
    """Matrix products for which cuBLAS wants a workspace: long and thin, square, and in half precision."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter((torch.randn(size, generator=generator) / size[0] ** 0.5).to(dtype), requires_grad=False)
            for size, dtype in (((_LONG, 64), torch.float32), ((64, 512), torch.float32), ((512, 512), torch.float16))
        )

    def forward(self, x: Tensor) -> Tensor:
        """From ``[n, 4096]`` to ``[n, 512]``."""
        thin, square, half = self.weights
        y = torch.tanh(torch.relu(x @ thin) @ square)
        # An eighth, so that what two algorithms round differently in half precision stays within the tolerance.
        mixed: Tensor = y + (y.half() @ half).float() / 8
        return mixed


def overwrite(device: torch.device) -> list[Tensor]:
    """Give freed memory back, take it again, and fill it with NaN."""
    gc.collect()
    large = 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        large = min(_MOST, free // 4) // _CHUNK
    blocks = [_CHUNK // 4] * large
    # Small ones come from places of their own; 64 of each size that a call works with.
    blocks += [rows * width for rows in _ROWS for width in (64, 512, _LONG) for _ in range(64)]
    taken = [torch.full((count,), float("nan"), device=device) for count in blocks]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return taken


def canary(device: torch.device) -> Outcome:
    """Capture graphs of two modules, evict some, overwrite what that freed, and hold the others against eager answers.

    First the least recently used graph of one module goes, which has its memory pool in common with one that stays;
    then the whole module, which may have left a workspace in use by the other.
    """
    generator = torch.Generator().manual_seed(0)
    one, other = (Products(generator).to(device) for _ in range(2))
    oldest, kept, newest = (torch.randn(rows, _LONG, generator=generator).to(device) for rows in _ROWS)
    wrong: list[str] = []
    with (
        torch.no_grad(),
        graphcache.wrap(one, max_graphs=2, max_bytes=None) as first,
        graphcache.wrap(other, max_graphs=2, max_bytes=None) as second,
    ):
        causes = Causes(first, second)
        expected = {first: one(kept), second: other(kept)}
        first(oldest)
        first(kept)
        second(kept)

        first(newest)
        wrong += _compare("a graph was evicted", expected, kept, device)
        first.clear()
        wrong += _compare("a module was cleared", {second: expected[second]}, kept, device)
        info = first.cache_info() + second.cache_info()
    return Outcome(len(expected) + 1, info, wrong, {reason: causes.explain(reason.value) for reason in info.eager})


def _compare(event: str, expected: dict[CachedModule, Tensor], x: Tensor, device: torch.device) -> list[str]:
    taken = overwrite(device)
    differences = [difference(fast(x), answer) for fast, answer in expected.items()]
    wrong = [f"after {event}: {seen}" for seen in differences if seen is not None]
    if written := sum(not bool(block.isnan().all()) for block in taken):
        wrong.append(f"after {event}: replays wrote into {written} blocks of memory that are not theirs")
    return wrong
