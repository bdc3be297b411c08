"""What becomes of served calls: a manifest of them, and which of a manifest are captured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import graphcache
from graphcache.keys.call_spec import CallSpec
from graphcache.persist.manifest import ManifestEntry
from graphcache.persist.saved_call import nbytes as bytes_of
from graphcache.persist.served_calls import plan, with_host_values
from tests.engine_modules import fake, load  # noqa: F401 - the fixture is used by its name
from tests.graphs.fake_driver import Torch
from tests.helpers import mlp
from tests.persist.test_manifest import entries


@given(
    st.lists(entries, max_size=8),
    st.integers(0, 6),
    st.none() | st.integers(0, 400),
    st.none() | st.floats(0, 150, allow_nan=False),
)
def test_a_plan_stays_within_its_budgets_and_leaves_out_nothing_that_fits(listed, graphs, nbytes, limit):
    chosen = plan(listed, graphs, nbytes, limit)

    def size(entry: ManifestEntry) -> int:
        return max(entry.nbytes, bytes_of(entry.spec))

    assert len(chosen) <= graphs
    assert nbytes is None or sum(map(size, chosen)) <= nbytes
    assert limit is None or sum(each.capture_seconds or 0 for each in chosen) <= limit + 1e-9
    assert [each.heat for each in chosen] == sorted(each.heat for each in chosen)
    taken, ordered = 0, sorted(listed, key=lambda entry: entry.heat)
    for entry in ordered:
        if taken < len(chosen) and entry == chosen[taken]:
            taken += 1
            continue
        before = chosen[:taken]
        full = len(before) == graphs
        too_large = nbytes is not None and size(entry) > nbytes - sum(map(size, before))
        spent = sum(each.capture_seconds or 0 for each in before)
        too_slow = limit is not None and (entry.capture_seconds or 0) > limit - spent - 1e-9
        assert full or too_large or too_slow


def test_inputs_count_where_nobody_knows_what_a_graph_owned():
    unknown = ManifestEntry(CallSpec.of((torch.zeros(1, device="meta").expand(10), torch.zeros(100)), {}), 1)
    assert bytes_of(unknown.spec) == 404
    assert plan([unknown], 1, 403) == []
    assert plan([unknown], 1, 404) == [unknown]


def test_what_is_served_has_what_is_known(tmp_path: Path) -> None:
    fast = graphcache.wrap(mlp())
    for _ in range(8):
        fast(torch.ones(2, 4))
    [entry] = fast.save_manifest(tmp_path / "m.json").entries
    assert (entry.hits, entry.part, entry.nbytes) == (7, "", fast.cache_info().nbytes)
    assert (entry.eager_seconds, entry.replay_seconds) == (None, None)
    assert entry.capture_seconds is not None
    assert entry.capture_seconds > 0


def test_what_was_evicted_is_served_too(tmp_path: Path) -> None:
    fast = graphcache.wrap(mlp(), max_graphs=1)
    for size in (1, 2, 2):
        fast(torch.ones(size, 4))
    assert [(each.hits, each.nbytes > 0) for each in fast.save_manifest(tmp_path / "m.json").entries] == [
        (1, True),
        (0, False),
    ]


@pytest.mark.parametrize("given_", [(), (None,), ((1, 2),), (("a",),), ((2**70,),), ((1,), (2,)), (((1,), 2),)])
def test_values_that_are_not_those_of_a_host_shape_tensor(fake: Torch, given_: Any) -> None:  # noqa: F811
    engine = load("head")
    x = fake.driver.heap.tensor([[1.0] * 4] * 16)
    made = with_host_values(engine, (x, torch.zeros(1)), ((5,),))
    assert made[0] is x
    assert made[1].tolist() == [5]
    with pytest.raises(ValueError, match=r"host shape tensors|args\[1\] holds no values of"):
        with_host_values(engine, (x, torch.zeros(1)), given_)
