"""How much graphs may own where nobody says: a share of their device's memory, and no bound on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import graphcache
from tests.engine_modules import load, rows
from tests.graphs.fake_driver import Driver, Torch
from tests.helpers import mlp
from tests.standins import engines

MEMORY = 2**36
"""What the stand-in's device has."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with engines(monkeypatch) as fake:
        yield fake


def test_graphs_may_own_a_quarter_of_their_device(fake: Torch) -> None:
    fast = graphcache.wrap(load("affine"))
    assert fast.config.max_bytes == "auto"
    assert fast.cache_info().budget is None, "no call has said yet which device it is"
    fast(rows(fake, 2))
    assert fast.cache_info().budget == MEMORY // 4


@pytest.mark.parametrize(("option", "budget"), [(None, None), (2**30, 2**30)])
def test_what_is_given_wins(fake: Torch, option: Any, budget: int | None) -> None:
    fast = graphcache.wrap(load("affine"), max_bytes=option)
    fast(rows(fake, 2))
    assert fast.cache_info().budget == budget


def test_the_environment_wins_too(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHCACHE_MAX_BYTES", str(2**30))
    fast = graphcache.wrap(load("affine"))
    fast(rows(fake, 2))
    assert fast.cache_info().budget == 2**30


def test_on_the_cpu_there_is_no_bound() -> None:
    fast = graphcache.wrap(mlp())
    for _ in range(2):
        fast(torch.ones(2, 4))
    assert fast.cache_info().budget is None
    assert fast.cache_info().hits == 1


def test_graphs_go_when_the_share_is_used_up(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    one = graphcache.wrap(load("affine"))
    one(rows(fake, 1))
    room = 3 * one.cache_info().nbytes + one.cache_info().nbytes // 2
    one.close()
    monkeypatch.setattr(Driver, "cuDeviceTotalMem", lambda self, dev: (0, 4 * room))
    fast = graphcache.wrap(load("affine"))
    for count in (1, 2, 3, 4, 8):
        x = rows(fake, count)
        assert torch.equal(fast(x), x * 3 + 1)
    info = fast.cache_info()
    assert (info.graphs, info.evictions, info.eager) == (3, 2, {})
    assert info.nbytes <= info.budget == room


def test_a_hundred_shapes_are_kept() -> None:
    fast = graphcache.wrap(mlp())
    for _ in range(2):
        for count in range(1, 101):
            fast(torch.ones(count, 4))
    assert (fast.cache_info().captures, fast.cache_info().hits) == (100, 100)
