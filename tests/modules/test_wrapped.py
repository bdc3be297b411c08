"""The account: what it shows, and that it adds up."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphcache
from graphcache import CacheInfo, Reason
from tests.helpers import dispatcher_of, frozen, graphs_of, mlp

counts = st.integers(0, 10**6)
seconds = st.integers(0, 1000).map(lambda n: n / 8)
infos = st.builds(
    CacheInfo,
    hits=counts,
    captures=counts,
    evictions=counts,
    eager=st.dictionaries(st.sampled_from(Reason), counts, max_size=3),
    graphs=counts,
    nbytes=counts,
    capture_seconds=seconds,
    eager_seconds=seconds,
    saved_seconds=seconds.map(lambda value: value - 60),
    budget=counts | st.none(),
    process_nbytes=counts,
)


@given(infos, infos, infos)
def test_accounts_add_up_in_any_order(one: CacheInfo, other: CacheInfo, third: CacheInfo) -> None:
    assert one + CacheInfo() == one
    assert one + other == other + one
    assert (one + other) + third == one + (other + third)
    assert (one + other).saved_seconds == one.saved_seconds + other.saved_seconds
    assert ((one + other).budget is None) == (one.budget is None or other.budget is None)


def test_what_was_measured_shows() -> None:
    fast = graphcache.wrap(mlp(), capture="worthwhile", max_bytes=1 << 20)
    for _ in range(5):
        fast(torch.ones(2, 4))
    info = fast.cache_info()
    assert info.eager_seconds > 0
    assert (info.saved_seconds, info.budget, info.process_nbytes) == (0, 1 << 20, 0)


def test_replays_that_save_show_too() -> None:
    fast = graphcache.wrap(mlp(), capture="worthwhile")
    x = torch.ones(2, 4)
    fast.prepare(x)
    [signature] = graphs_of(fast).entries
    dispatcher_of(fast).captures.admission.learn(signature, eager=2.0, replay=0.5, capture=1.0)
    for _ in range(4):
        fast(x)
    info = fast.cache_info()
    # A replay was measured here too, and took less than the 0.5 seconds that were learnt.
    assert abs(info.eager_seconds - 8.0) < 0.01
    assert 6.0 <= info.saved_seconds <= 8.0
    assert info.process_nbytes >= info.nbytes > 0


def test_parts_count_once_in_what_the_process_holds() -> None:
    fast = graphcache.wrap(frozen(nn.Sequential(mlp(), mlp())), strategy="per_submodule", include=["0", "1"])
    fast(torch.ones(2, 4))
    info = fast.cache_info()
    assert info.graphs == 2
    assert info.process_nbytes == dispatcher_of(fast.parts["1"]).captures.graphs.budget.nbytes
    assert info.budget is None
