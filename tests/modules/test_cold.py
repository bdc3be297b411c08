"""Cold calls without a look: as right, and as well accounted for, as those with one."""

import gc
import threading
import weakref
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphcache
from graphcache.cache.books import COLD
from graphcache.errors import CaptureError, Cause, ClosedError, Reason
from graphcache.modules.cold import MOST, RENEWALS, ColdCalls, Leave
from graphcache.modules.remembered import OFTEN
from graphcache.modules.shortcuts import Shortcuts


class Noted:
    """A policy that says the same thing each time, and counts what it is told."""

    def __init__(self, cause=None, count=0.0):
        self.said = cause, count
        self.calls = Counter()
        self.asked = 0

    def ran_again(self, key, count):
        self.calls[key] += count

    def renew(self, key, count):
        self.ran_again(key, count)
        self.asked += 1
        return self.said


class Double(nn.Module):
    def forward(self, x):
        return x * 2


def prepared(**options):
    return graphcache.wrap(Double(), **{"capture": "prepared", **options})


def looks(fast, monkeypatch):
    """Counts the calls that go the long way."""
    seen = []
    answer = fast._misses.answer
    monkeypatch.setattr(fast._misses, "answer", lambda *args, **kwargs: seen.append(1) or answer(*args, **kwargs))
    return seen


# ---- the accounts of leaves


@given(
    st.lists(st.sampled_from([*"abc", "settle", "clear", "forget"]), max_size=60),
    st.integers(0, 5),
    st.integers(0, 3),
)
def test_every_call_with_a_leave_is_told_once(steps, count, renewals):
    told, made = Counter(), Counter()
    shortcuts, policy = Shortcuts(None, bool), Noted(COLD, 2.5)
    cold = ColdCalls(shortcuts, lambda signature, cause, n: told.update({signature: n}), policy)
    for step in steps:
        if step in ("settle", "clear"):
            getattr(cold, step)()
        elif step == "forget":
            shortcuts.clear()
        else:
            leave = shortcuts[step][1] if step in shortcuts else None
            if leave is None or (next(leave.calls, None) is None and not cold.renew(leave)):
                assert leave is None or step not in shortcuts
                cold.grant(Leave(step, (step,), COLD, None, count, renewals))
            else:
                made[(step,)] += 1
    cold.settle()
    cold.settle()
    assert told == made == policy.calls


def calls_of(leave, cold):
    made = 0
    while next(leave.calls, None) is not None or cold.renew(leave):
        made += 1
    return made


def test_a_leave_is_renewed_so_often_and_each_time_for_what_the_policy_says():
    policy = Noted(COLD, 3.2)
    cold = ColdCalls(Shortcuts(None, bool), lambda *_: None, policy)
    cold.grant(leave := Leave("a", ("a",), COLD, None, 5, 2))
    assert calls_of(leave, cold) == 5 + 4 + 4
    assert policy.asked == 2
    policy.said = COLD, float("inf")
    cold.grant(leave := Leave("a", ("a",), COLD, None, 0, 1))
    assert calls_of(leave, cold) == MOST


@pytest.mark.parametrize("said", [(None, 0.0), (COLD, 0.5), (Cause(Reason.COLD, detail="another"), 9.0)])
def test_the_next_call_is_looked_at_where_the_policy_says_something_else(said):
    """Fails if another cause is counted under the one before it, or a call that is to be captured runs on eagerly."""
    policy, shortcuts = Noted(*said), Shortcuts(None, bool)
    cold = ColdCalls(shortcuts, lambda *_: None, policy)
    cold.grant(leave := Leave("a", ("a",), COLD, None, 2, 8))
    assert calls_of(leave, cold) == 2
    assert not shortcuts
    assert not cold
    assert policy.calls == {("a",): 2}


def test_a_leave_that_was_ended_is_not_renewed():
    policy = Noted(COLD, 9.0)
    cold = ColdCalls(Shortcuts(None, bool), lambda *_: None, policy)
    cold.grant(leave := Leave("a", ("a",), COLD, None, 0, 8))
    cold.clear()
    assert not cold.renew(leave)
    assert not policy.asked


def test_the_leaves_are_bounded_and_none_is_lost():
    told = Counter()
    shortcuts = Shortcuts(None, bool)
    cold = ColdCalls(shortcuts, lambda signature, cause, n: told.update([n]), Noted())
    for layout in range(5000):
        cold.grant(leave := Leave(layout, (layout,), COLD, None, 2))
        next(leave.calls)
    assert len(cold) == len(shortcuts) <= 1024
    cold.clear()
    assert told == {1: 5000}
    assert not shortcuts


def test_the_end_of_a_leave_leaves_what_came_after_it_alone():
    shortcuts = Shortcuts(None, bool)
    cold = ColdCalls(shortcuts, lambda *_: None, Noted())
    cold.grant(old := Leave("a", ("a",), COLD, None, 2))
    cold.grant(new := Leave("a", ("a",), COLD, None, 2))
    assert not cold.renew(old)
    assert shortcuts["a"][1] is new
    shortcuts["a"] = graph = (object(), None, None, 0, None)
    assert calls_of(new, cold) == 2
    assert shortcuts["a"] is graph


def test_an_eviction_in_the_middle_of_the_end_of_a_leave():
    """Fails if what another thread drops in between is taken to be there."""

    class Evicted(Shortcuts):
        def get(self, key, default=None):
            found = super().get(key, default)
            self.clear()
            return found

    told = []
    cold = ColdCalls(Evicted(None, bool), lambda signature, cause, n: told.append(n), Noted())
    cold.grant(leave := Leave("a", ("a",), COLD, None, 1))
    assert calls_of(leave, cold) == 1
    assert (told, len(cold)) == ([1], 0)


def test_threads_take_each_call_of_a_leave_once():
    told, policy = [], Noted(COLD, 20.0)
    cold = ColdCalls(Shortcuts(None, bool), lambda signature, cause, n: told.append(n), policy)
    cold.grant(leave := Leave("a", ("a",), COLD, None, 0, 2000))
    taken = [0] * 4

    def take(index):
        while next(leave.calls, None) is not None or cold.renew(leave):
            taken[index] += 1
            if taken[index] % 1000 == 0:
                cold.settle()

    threads = [threading.Thread(target=take, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not cold
    assert sum(told) == sum(taken) == policy.calls[("a",)] == 40_000


# ---- through a module


def test_most_cold_calls_are_made_without_a_look_and_all_are_counted(monkeypatch):
    fast = prepared()
    seen = looks(fast, monkeypatch)
    x = torch.randn(3)
    with torch.no_grad():
        for call in range(1, 400):
            assert torch.equal(fast(x), x * 2)
            if call % 7 == 0:
                assert fast.cache_info().eager == {Reason.NOT_PREPARED: call}
    # The first two, the one at which it is remembered, and one after all renewals.
    assert len(seen) <= 4 + 399 // (MOST * RENEWALS)
    [call] = fast.explain().calls
    assert call.calls == 399
    [known] = fast._misses.admission.known().values()
    assert known.calls == 399


@pytest.mark.parametrize("capture", ["worthwhile", "prepared"])
def test_two_calls_are_measured_before_any_is_not(capture, monkeypatch):
    """Fails if what eager calls take is judged by the first alone, which loads kernels and takes longer."""
    fast = graphcache.wrap(Double(), capture=capture)
    seen, x = looks(fast, monkeypatch), torch.randn(3)
    with torch.no_grad():
        fast(x)
        fast(x)
    assert len(seen) == 2
    [record] = fast._misses.admission._books.seen.values()
    assert record.eager.count == 2


def test_a_capture_comes_no_later_than_with_a_look_at_each_call():
    """The same times are fed to both, so that both have to decide alike."""
    at = {}
    for looked_at in (True, False):
        fast = graphcache.wrap(Double(), capture="worthwhile")
        if looked_at:
            fast._misses.cold = None
        x = torch.randn(4)
        admission = fast._misses.admission
        ran = admission.ran
        admission.ran = lambda key, seconds, ran=ran: ran(key, 1e-3)
        with torch.no_grad():
            fast(x)
            [signature] = fast._seen.keys()
            admission.learn(signature, eager=1e-3, replay=2e-4, capture=0.08)
            for _ in range(2000):
                fast(x)
                if fast.cache_info().captures:
                    break
        at[looked_at] = sum(fast.cache_info().eager.values())
    assert 2000 > at[True] == at[False] > OFTEN


def test_preparing_a_shape_ends_its_leave():
    fast = prepared()
    x = torch.randn(5)
    with torch.no_grad():
        for _ in range(20):
            fast(x)
        fast.prepare((x,))
        for _ in range(3):
            assert torch.equal(fast(x), x * 2)
    assert fast.cache_info().hits == 3


@pytest.mark.parametrize("way", ["prepare", "clear", "close"])
def test_no_leave_outlives_what_it_was_granted_for(way):
    fast = prepared()
    x = torch.randn(5)
    with torch.no_grad():
        for _ in range(20):
            fast(x)
        assert len(fast._cold) == len(fast._shortcuts) == 1
        if way == "prepare":
            fast.prepare((torch.randn(6),))
        else:
            getattr(fast, way)()
        assert not fast._cold
        if way == "close":
            with pytest.raises(ClosedError):
                fast(x)
    assert fast.cache_info().eager[Reason.NOT_PREPARED] == 20


CHANGES = {
    "gradients": (torch.enable_grad, {}),
    "autocast": (lambda: torch.autocast("cpu", dtype=torch.bfloat16), {}),
    "switched off": (graphcache.config.graphs_off, {Reason.DISABLED: 1}),
    "inference": (torch.inference_mode, {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_under_other_modes_is_looked_at(change, monkeypatch):
    """Fails if a leave is used whatever the modes: its call would be counted for another reason."""
    scope, reasons = CHANGES[change]
    fast = prepared()
    x = torch.randn(5)
    with torch.no_grad():
        for _ in range(20):
            fast(x)
        before = fast.cache_info().eager
        seen = looks(fast, monkeypatch)
        with scope():
            assert torch.equal(fast(x), x * 2)
    assert len(seen) == 1
    wanted = Counter(before) + Counter(reasons or {Reason.NOT_PREPARED: 1})
    assert fast.cache_info().eager == wanted


def test_whoever_listens_hears_of_every_call():
    fast = prepared()
    x = torch.randn(5)
    heard = []
    with torch.no_grad():
        for _ in range(20):
            fast(x)
        end = fast.subscribe(heard.append)
        for _ in range(20):
            fast(x)
        end()
        assert len(heard) == 20
        spans = []

        class Span:
            def __enter__(self):
                spans.append(1)

            def __exit__(self, *_):
                pass

        fast.ledger.tracers.append(lambda label: Span())
        for _ in range(20):
            fast(x)
    assert len(spans) == 20
    assert fast.cache_info().eager == {Reason.NOT_PREPARED: 60}


def test_cold_answers_go_into_the_callers_tensors_too():
    fast = prepared()
    x, out = torch.randn(5), torch.empty(5)
    with torch.no_grad():
        for call in range(1, 41):
            out.zero_()
            assert fast.forward_into(out, x) is out
            assert torch.equal(out, x * 2)
            assert fast.cache_info().eager == {Reason.NOT_PREPARED: call}


def test_a_hook_runs_at_every_call():
    fast = prepared()
    x, seen = torch.randn(5), []
    with torch.no_grad():
        for _ in range(20):
            fast(x)
        fast.register_forward_hook(lambda *_: seen.append(1))
        for _ in range(9):
            fast(x)
    assert len(seen) == 9


def test_an_error_of_the_module_reaches_the_caller_and_modes_are_as_before():
    class Fails(nn.Module):
        broken = False

        def forward(self, x):
            if self.broken:
                raise ValueError("broken")
            return x + 1

    fast = graphcache.wrap(Fails(), capture="prepared")
    x = torch.randn(5)
    with torch.no_grad():
        for _ in range(20):
            fast(x)
        fast.module.broken = True
        modes = graphcache.config.modes.get()
        for _ in range(20):
            with pytest.raises(ValueError, match="broken"):
                fast(x)
        assert graphcache.config.modes.get() is modes
        fast.module.broken = False
        assert torch.equal(fast(x), x + 1)


def test_where_every_call_has_to_be_looked_at_there_are_no_leaves():
    assert graphcache.wrap(Double())._cold is None
    assert prepared(buckets={"x": {0: [8]}})._cold is None


def test_what_cannot_be_captured_is_still_an_error_where_that_was_asked_for():
    class Reads(nn.Module):
        def forward(self, x):
            return x * float(x.sum())

    fast = graphcache.wrap(Reads(), capture="worthwhile", on_failure="raise")
    x = torch.ones(4)
    admission = fast._misses.admission
    with torch.no_grad():
        fast(x)
        [signature] = fast._seen.keys()
        admission.learn(signature, eager=1e-3, replay=1e-9, capture=3e-2)
        ran = admission.ran
        admission.ran = lambda key, seconds: ran(key, 1e-3)
        with pytest.raises(CaptureError):
            for _ in range(5000):
                fast(x)


def test_a_closed_module_is_held_by_no_leave():
    fast = prepared()
    x = torch.randn(5)
    with torch.no_grad():
        for _ in range(20):
            fast(x)
    seen = weakref.ref(fast)
    fast.close()
    del fast
    gc.collect()
    assert seen() is None


def test_cold_calls_of_an_engine_are_right_for_every_shape(fake_engine):
    fast, rows = fake_engine
    with torch.no_grad():
        for _ in range(20):
            for x in rows:
                assert torch.equal(fast(x), fast.module(x))
    assert fast.cache_info().eager == {Reason.NOT_PREPARED: 20 * len(rows)}


@pytest.fixture
def fake_engine(monkeypatch):
    from tests.modules.test_engine_module import load
    from tests.standins import engines

    with engines(monkeypatch, streams=False):
        yield (
            graphcache.wrap(load("affine"), capture="prepared"),
            [torch.randn(count, 4) for count in (1, 2, 3)],
        )
