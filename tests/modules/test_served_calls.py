from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from graphcache.cache.served import ManifestEntry, heat, plan, together
from graphcache.cache.spec import spec_of
from graphcache.cache.tree import TreeError
from hypothesis import given
from hypothesis import strategies as st

from graphcache.errors import ConfigError

SPECS = [spec_of((torch.zeros(size),), {}) for size in range(1, 6)]
seconds = st.none() | st.floats(0, 100, allow_nan=False)
entries = st.builds(
    ManifestEntry,
    spec=st.sampled_from(SPECS),
    hits=st.integers(0, 50),
    part=st.sampled_from(["", "a"]),
    nbytes=st.integers(0, 200),
    eager_seconds=seconds,
    replay_seconds=seconds,
    capture_seconds=seconds,
)


@given(entries)
def test_an_entry_is_the_same_after_a_file(entry):
    assert ManifestEntry.of_tree(json.loads(json.dumps(entry.tree))) == entry


@given(entries, entries, entries)
def test_together_is_the_same_in_whatever_order(one, two, three):
    three_of_one = [replace(each, spec=SPECS[0], part="") for each in (one, two, three)]
    found = {together(together(a, b), c) for a, b, c in permutations(three_of_one)}
    assert len(found) == 1
    [all_three] = found
    assert all_three.hits == one.hits + two.hits + three.hits
    assert all_three.nbytes == max(one.nbytes, two.nbytes, three.nbytes)
    measured = [each.eager_seconds for each in (one, two, three) if each.eager_seconds is not None]
    assert all_three.eager_seconds == min(measured, default=None)


def test_hits_stop_where_a_file_could_not_hold_them():
    most = ManifestEntry(SPECS[0], 2**63 - 1)
    assert together(most, most) == most


def test_what_replays_saved():
    assert ManifestEntry(SPECS[0], 10, eager_seconds=0.5, replay_seconds=0.25).saved_seconds == 2.5
    assert ManifestEntry(SPECS[0], 10, eager_seconds=0.25, replay_seconds=0.5).saved_seconds == 0
    assert ManifestEntry(SPECS[0], 10, eager_seconds=0.25).saved_seconds == 0


def test_the_hottest_is_the_one_seen_most_then_the_one_that_saves_most():
    often, dear = ManifestEntry(SPECS[0], 9), ManifestEntry(SPECS[1], 5, eager_seconds=2, replay_seconds=1)
    cheap, again = ManifestEntry(SPECS[2], 5), ManifestEntry(SPECS[2], 5, part="a")
    for order in permutations([often, dear, cheap, again]):
        assert sorted(order, key=heat) == [often, dear, cheap, again]


@given(
    st.lists(entries, max_size=8),
    st.integers(0, 6),
    st.none() | st.integers(0, 400),
    st.none() | st.floats(0, 150, allow_nan=False),
)
def test_a_plan_stays_within_its_budgets_and_leaves_out_nothing_that_fits(listed, graphs, nbytes, limit):
    chosen = list(plan(listed, graphs, nbytes, limit))

    def size(entry: ManifestEntry) -> int:
        return max(entry.nbytes, entry.spec.nbytes)

    assert len(chosen) <= graphs
    assert nbytes is None or sum(map(size, chosen)) <= nbytes
    assert limit is None or sum(each.capture_seconds or 0 for each in chosen) <= limit + 1e-9
    assert [heat(each) for each in chosen] == sorted(heat(each) for each in chosen)
    taken, ordered = 0, sorted(listed, key=heat)
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


def test_a_plan_is_asked_for_one_by_one_as_long_as_there_is_time():
    chosen = plan([ManifestEntry(spec, hits) for hits, spec in enumerate(SPECS)], 3)
    assert [next(chosen).hits, next(chosen).hits] == [4, 3]


def test_inputs_count_where_nobody_knows_what_a_graph_owned():
    unknown = ManifestEntry(spec_of((torch.zeros(1, device="meta").expand(10), torch.zeros(100)), {}), 1)
    assert unknown.spec.nbytes == 404
    assert list(plan([unknown], 1, 403)) == []
    assert list(plan([unknown], 1, 404)) == [unknown]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"spec": "x"}, r"^spec='x': expected what spec_of gives"),
        ({"hits": -1}, r"^hits=-1: expected a whole number from 0 to"),
        ({"hits": True}, r"^hits=True:"),
        ({"hits": 2**63}, r"^hits=9223372036854775808:"),
        ({"hits": 1.0}, r"^hits=1.0:"),
        ({"nbytes": None}, r"^nbytes=None:"),
        ({"part": 5}, r"^part=5: expected text of at most 1000 characters"),
        ({"part": "a" * 1001}, r"^part='aaa"),
        ({"eager_seconds": -0.5}, r"^eager_seconds=-0.5: expected seconds from 0 to 1e9, or None"),
        ({"replay_seconds": float("nan")}, r"^replay_seconds=nan:"),
        ({"capture_seconds": float("inf")}, r"^capture_seconds=inf:"),
        ({"capture_seconds": "1"}, r"^capture_seconds='1':"),
        ({"capture_seconds": False}, r"^capture_seconds=False:"),
    ],
)
def test_numbers_that_are_none_are_refused_by_name(fields: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        ManifestEntry(**{"spec": SPECS[0], "hits": 1} | fields)


@pytest.mark.parametrize("tree", [None, [], {}, {"call": 1}])
def test_a_tree_that_is_no_entry_is_refused(tree):
    with pytest.raises(TreeError, match=r"^an entry is .*; expected the fields call, hits, part, nbytes"):
        ManifestEntry.of_tree(tree)


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ((-1,), r"^max_graphs=-1: expected a whole number, 0 or more"),
        ((None,), r"^max_graphs=None:"),
        ((True,), r"^max_graphs=True:"),
        ((1, -1), r"^max_bytes=-1:"),
        ((1, 1.5), r"^max_bytes=1.5:"),
        ((1, None, -1), r"^max_seconds=-1: expected seconds, 0 or more"),
        ((1, None, float("nan")), r"^max_seconds=nan:"),
        ((1, None, "1"), r"^max_seconds='1':"),
    ],
)
def test_budgets_that_are_none_are_refused_at_once(budgets: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        plan([], *budgets)
