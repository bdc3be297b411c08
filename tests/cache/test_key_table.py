from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.cache import key_table
from graphcache.cache.graph_cache import GraphCache
from graphcache.cache.key_table import KeyTable
from graphcache.errors import Cause, Reason

TRANSIENT = (
    Reason.CAPTURE_FAILED,
    Reason.OUT_OF_MEMORY,
    Reason.OVER_BUDGET,
    Reason.MISMATCH,
    Reason.ALIASES_STATE,
)
EFFECTS = (Reason.MUTATES, Reason.RANDOM, Reason.UNOBSERVED, Reason.UNSETTLED)
LASTING = tuple(reason for reason in Reason if reason not in TRANSIENT + EFFECTS)


def waits(keys: KeyTable, key: str, version: int = 0) -> int:
    """How many calls run eagerly before capturing may be tried again."""
    return next(count for count in range(10_000) if keys.denial(key, version) is None)


def test_an_unknown_key_is_not_blocked():
    assert KeyTable({}).denial("a") is None


@pytest.mark.parametrize("reason", LASTING)
def test_what_lies_in_the_module_is_blocked_for_good(reason):
    keys = KeyTable({})
    keys.deny("a", Cause(reason))
    assert all(keys.denial("a") == Cause(reason) for _ in range(1000))


@pytest.mark.parametrize("reason", TRANSIENT)
def test_what_may_pass_is_tried_again_after_16_calls_then_32_then_64(reason):
    keys = KeyTable({})
    seen = []
    for _ in range(4):
        keys.deny("a", Cause(reason))
        seen.append(waits(keys, "a"))
    assert seen == [16, 32, 64, 128]


@pytest.mark.parametrize("reason", EFFECTS)
@pytest.mark.parametrize("version", [0, 1])
def test_an_effect_is_looked_for_at_the_next_call_then_after_2_4_and_8(reason, version):
    keys = KeyTable({})
    seen = []
    for _ in range(6):
        keys.deny("a", Cause(reason))
        seen.append(waits(keys, "a", version))
    assert seen == [0, 2, 4, 8, 16, 32]


@pytest.mark.parametrize("reason", [*LASTING, *TRANSIENT])
def test_once_the_module_has_changed_every_denial_is_looked_at_again_as_soon(reason):
    keys = KeyTable({})
    seen = []
    for version in range(4):
        keys.deny("a", Cause(reason), version)
        assert keys.denial("a", version) == Cause(reason)
        seen.append(waits(keys, "a", version + 1))
    # One call of each wait was counted under the version of the denial.
    assert seen == [0, 1, 3, 7]


def test_a_state_that_is_back_under_another_version_denies_nothing_for_good():
    keys = KeyTable({})
    keys.deny("a", Cause(Reason.HOST_READ), version=3)
    assert keys.denial("a", 4) is None
    denial = keys.states["a"].denial
    assert denial is not None
    assert (denial.wait(4), denial.wait(3)) == (0, None)


def test_a_key_that_was_captured_begins_anew():
    cache = GraphCache(max_graphs=1)
    keys = KeyTable(cache.entries)
    for _ in range(4):
        keys.deny("a", Cause(Reason.MUTATES))
    keys.captured("a", 0.1, 1)
    assert keys.states["a"].denial is None
    keys.deny("a", Cause(Reason.MUTATES))
    assert waits(keys, "a") == 0


def test_once_due_a_key_stays_due_until_it_fails_again():
    keys = KeyTable({})
    keys.deny("a", Cause(Reason.MISMATCH))
    waits(keys, "a")
    assert [keys.denial("a") for _ in range(3)] == [None] * 3


def test_keys_wait_for_themselves():
    keys = KeyTable({})
    keys.deny("a", Cause(Reason.MISMATCH))
    for _ in range(10):
        keys.denial("a")
    keys.deny("b", Cause(Reason.MISMATCH))
    assert (waits(keys, "a"), waits(keys, "b")) == (6, 16)


def test_the_latest_cause_counts():
    keys = KeyTable({})
    keys.deny("a", Cause(Reason.MISMATCH))
    keys.deny("a", Cause(Reason.HOST_READ, "aten.item"))
    assert keys.denial("a") == Cause(Reason.HOST_READ, "aten.item")


def test_beyond_the_size_the_longest_unused_is_forgotten(monkeypatch):
    monkeypatch.setattr(key_table, "MAX_KEYS", 2)
    keys = KeyTable({})
    for key in "ab":
        keys.deny(key, Cause(Reason.HOST_READ))
    keys.denial("a")
    keys.deny("c", Cause(Reason.HOST_READ))
    assert [keys.denial(key) is not None for key in "abc"] == [True, False, True]


def test_clear_forgets_everything_the_wait_too():
    keys = KeyTable({})
    for _ in range(3):
        keys.deny("a", Cause(Reason.MISMATCH))
    keys.allow_all()
    assert (keys.denial("a"), keys.states["a"].denial) == (None, None)
    keys.deny("a", Cause(Reason.MISMATCH))
    assert waits(keys, "a") == 16


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([Reason.HOST_READ, Reason.MISMATCH])), max_size=60))
def test_memory_is_bounded_and_the_last_key_is_always_known(blocked):
    keys = KeyTable({})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_table, "MAX_KEYS", 3)
        for key, reason in blocked:
            keys.deny(key, Cause(reason))
            assert len(keys.known()) <= 3
            assert keys.denial(key) == Cause(reason)


def test_looking_counts_no_call():
    keys = KeyTable({})
    keys.deny("key", Cause(Reason.CAPTURE_FAILED))
    denial = keys.states["key"].denial
    assert denial is not None
    assert {denial.wait(0) for _ in range(40)} == {16}
    keys.denial("key")
    assert (denial.cause, denial.wait(0)) == (Cause(Reason.CAPTURE_FAILED), 15)
