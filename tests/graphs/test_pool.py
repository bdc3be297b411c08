"""A pool is held from its first use until it is gone, however it was used in between."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.graphs.stream_order import MemoryPool
from tests.graphs.fake_driver import Torch, installed


@pytest.fixture
def fake() -> Iterator[Torch]:
    with installed() as fake:
        yield fake


def test_what_is_allocated_inside_is_the_pools(fake: Torch) -> None:
    pool, other = MemoryPool(0), MemoryPool(0)
    assert pool.id != other.id
    assert pool.nbytes == 0
    with pool.allocating():
        fake.empty(256)
        inside = pool.nbytes
        with other.allocating():
            fake.empty(64)
    fake.empty(1024)
    assert inside >= 4 * 256
    assert (pool.nbytes, other.nbytes >= 4 * 64) == (inside, True)
    with pool.allocating():
        fake.empty(1)
    assert pool.nbytes > inside


def test_an_exception_inside_ends_the_allocating(fake: Torch) -> None:
    pool = MemoryPool(0)
    with pytest.raises(KeyError), pool.allocating():
        raise KeyError
    assert fake.driver.heap.pool is None
    fake.empty(16)
    assert pool.nbytes == 0


@given(st.lists(st.integers(0, 2), max_size=12))
def test_any_sequence_of_uses_leaves_one_holder_and_then_none(uses: list[int]) -> None:
    with installed() as fake:
        pools = [MemoryPool(0) for _ in range(3)]
        for index in uses:
            with pools[index].allocating():
                assert fake.pools.alive[pools[index].id].holders == 1 + (fake.pools.alive[pools[index].id].kept != [])
                fake.empty(4)
            assert fake.pools.alive[pools[index].id].holders == 1
        assert set(fake.pools.alive) == {pools[index].id for index in uses}
        pools.clear()
        gc.collect()
        assert not fake.pools.alive
