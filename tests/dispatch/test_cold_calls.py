"""Calls that wait for admission run eagerly: right, counted, and heard of like any other."""

from collections import Counter

import pytest
import torch
from torch import nn

import graphcache
from graphcache.errors import CaptureError, Reason
from tests.helpers import dispatcher_of


class Double(nn.Module):
    def forward(self, x):
        return x * 2


def prepared(**options):
    return graphcache.wrap(Double(), **{"capture": "prepared", **options})


def test_all_of_them_are_counted():
    fast = prepared()
    x = torch.randn(3)
    with torch.no_grad():
        for call in range(1, 40):
            assert torch.equal(fast(x), x * 2)
            assert fast.cache_info().eager == {Reason.NOT_PREPARED: call}
    [call] = fast.explain().calls
    assert call.calls == 39
    [key] = dispatcher_of(fast).captures.keys.known()
    assert dispatcher_of(fast).captures.keys.states[key].ran == 39


def test_a_shape_that_is_prepared_has_its_graph_at_once():
    fast = prepared()
    x = torch.randn(5)
    with torch.no_grad():
        for _ in range(20):
            fast(x)
        fast.prepare((x,))
        for _ in range(3):
            assert torch.equal(fast(x), x * 2)
    assert fast.cache_info().hits == 3


CHANGES = {
    "gradients": (torch.enable_grad, {}),
    "autocast": (lambda: torch.autocast("cpu", dtype=torch.bfloat16), {}),
    "switched off": (graphcache.config.graphs_off, {Reason.DISABLED: 1}),
    "inference": (torch.inference_mode, {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_under_other_modes_is_counted_for_its_own_reason(change):
    scope, reasons = CHANGES[change]
    fast = prepared()
    x = torch.randn(5)
    with torch.no_grad():
        for _ in range(20):
            fast(x)
        before = fast.cache_info().eager
        with scope():
            assert torch.equal(fast(x), x * 2)
    assert fast.cache_info().eager == Counter(before) + Counter(reasons or {Reason.NOT_PREPARED: 1})


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

        class Spans:
            def before(self, kind, module):
                spans.append(1)

            def after(self, kind, module, seconds, done):
                pass

        fast.ledger.observers.add(Spans(), replays=False)
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


def test_what_cannot_be_captured_is_still_an_error_where_that_was_asked_for():
    class Reads(nn.Module):
        def forward(self, x):
            return x * float(x.sum())

    fast = graphcache.wrap(Reads(), capture="worthwhile", on_failure="raise")
    x = torch.ones(4)
    admission = dispatcher_of(fast).captures.admission
    with torch.no_grad():
        fast(x)
        [signature] = dispatcher_of(fast).captures.keys.known()
        admission.learn(signature, eager=1e-3, replay=1e-9, capture=3e-2)
        ran = admission.ran
        admission.ran = lambda key, seconds: ran(key, 1e-3)
        with pytest.raises(CaptureError):
            for _ in range(5000):
                fast(x)


def test_cold_calls_of_an_engine_are_right_for_every_shape(fake_engine):
    fast, rows = fake_engine
    with torch.no_grad():
        for _ in range(20):
            for x in rows:
                assert torch.equal(fast(x), fast.module(x))
    assert fast.cache_info().eager == {Reason.NOT_PREPARED: 20 * len(rows)}


@pytest.fixture
def fake_engine(monkeypatch):
    from tests.engine_modules import load
    from tests.standins import engines

    with engines(monkeypatch, streams=False):
        yield (
            graphcache.wrap(load("affine"), capture="prepared"),
            [torch.randn(count, 4) for count in (1, 2, 3)],
        )
