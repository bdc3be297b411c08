"""Callbacks before and after eager runs, captures and replays."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache.errors import ConfigError
from tests.dispatch.test_hit_cost import calls_of
from tests.engine_modules import MODULES, load, prepare, rows
from tests.graphs.fake_driver import Torch, installed
from tests.helpers import Fn, dispatcher_of, frozen, in_threads, mlp, same

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Notes:
    """Notes what it hears."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def before(self, kind: str, module: str) -> None:
        self.seen.append((kind, module))

    def after(self, kind: str, module: str, seconds: float, done: bool) -> None:
        assert seconds >= 0
        self.seen.append((kind, module, done))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(*MODULES, patch=monkeypatch) as fake:
        yield prepare(fake, monkeypatch)


def pairs(*what: tuple[str, str, bool]) -> list[Any]:
    return [each for kind, name, done in what for each in ((kind, name), (kind, name, done))]


def test_captures_and_replays_before_and_after() -> None:
    fast, notes = graphcache.wrap(mlp()), Notes()
    fast.observe(notes)
    for _ in range(3):
        assert same(fast(X), fast.module(X))
    name = "Sequential"
    assert notes.seen == pairs(("capture", name, True), ("replay", name, True), ("replay", name, True))


def test_eager_runs_and_captures_in_vain() -> None:
    fast, notes = graphcache.wrap(frozen(Fn(lambda _, x: x * x.sum().item()))), Notes()
    fast.observe(notes)
    for _ in range(2):
        fast(X)
    with graphcache.config.graphs_off():
        fast(X)
    assert notes.seen == pairs(("capture", "Fn", False), ("eager", "Fn", True), ("eager", "Fn", True))


def test_parts_tell_within_the_whole_also_those_found_later() -> None:
    module = frozen(Fn(lambda self, x: self.inner(x) * x.sum().item(), inner=mlp()))
    fast, notes = graphcache.wrap(module), Notes()
    fast.observe(notes)
    fast(X)
    fast(X)
    notes.seen.clear()
    fast(X)
    assert notes.seen == [("eager", "Fn"), ("replay", "inner"), ("replay", "inner", True), ("eager", "Fn", True)]


def test_a_graph_that_is_stale_and_a_call_that_fails() -> None:
    fast, notes = graphcache.wrap(mlp()), Notes()
    fast(X)
    fast.observe(notes)
    fast.module[0].weight.data = torch.ones(4, 4)
    assert same(fast(X), fast.module(X))
    assert notes.seen == pairs(("replay", "Sequential", False), ("capture", "Sequential", True))
    notes.seen.clear()
    with pytest.raises(RuntimeError):
        fast(torch.ones(2, 3))
    assert notes.seen == pairs(("capture", "Sequential", False))


def test_sessions_are_captures_and_their_runs_are_not_observed() -> None:
    fast, notes = graphcache.wrap(mlp()), Notes()
    fast.observe(notes)
    with fast.session(X) as session:
        session.run()
    assert notes.seen == pairs(("capture", "Sequential", True))


@pytest.mark.parametrize("capture", ["prepared", "worthwhile"])
def test_calls_that_stay_cold_are_eager(capture: str) -> None:
    fast, notes = graphcache.wrap(mlp(), capture=capture), Notes()
    fast.observe(notes)
    fast(X)
    assert notes.seen == pairs(("eager", "Sequential", True))


def test_captures_beside_the_calls_are_told_by_their_thread() -> None:
    class Waits(Notes):
        """Says when a capture has been told in full, which is after it is there."""

        heard = threading.Event()

        def after(self, kind: str, module: str, seconds: float, done: bool) -> None:
            super().after(kind, module, seconds, done)
            if kind == "capture":
                self.heard.set()

    fast, notes = graphcache.wrap(mlp(), capture_in="background"), Waits()
    fast.observe(notes)
    fast(X)
    assert notes.heard.wait(60)
    fast(X)
    assert sorted(notes.seen, key=str) == sorted(
        pairs(("eager", "Sequential", True), ("capture", "Sequential", True), ("replay", "Sequential", True)), key=str
    )
    fast.close()


def test_nobody_hears_after_the_end_and_nothing_is_left() -> None:
    fast, notes, others = graphcache.wrap(mlp()), Notes(), Notes()
    before = set(fast.__dict__), set(dispatcher_of(fast).__dict__)
    ends = [fast.observe(notes), fast.observe(others), fast.observe(notes)]
    fast(X)
    assert len(notes.seen) == 2 * len(others.seen) == 4
    ends[0]()
    ends[0]()
    fast(X)
    assert len(notes.seen) == len(others.seen) + 2 == 6
    for end in ends:
        end()
    fast(X)
    assert len(notes.seen) == 6
    assert (set(fast.__dict__), set(dispatcher_of(fast).__dict__)) == before
    assert not fast._forward_pre_hooks
    gone = weakref.ref(notes)
    del notes, ends, end
    assert gone() is None


def test_a_hit_without_observers_costs_what_it_did() -> None:
    fast = graphcache.wrap(Fn(lambda _, x: x + 1))
    with torch.no_grad():
        for _ in range(3):
            fast(X)
        before = calls_of(lambda: fast(X))
        end = fast.observe(Notes())
        fast(X)
        assert calls_of(lambda: fast(X)) > before
        end()
        fast(X)
        assert calls_of(lambda: fast(X)) == before


class Fails:
    def before(self, kind: str, module: str) -> None:
        raise ValueError("before")

    def after(self, kind: str, module: str, seconds: float, done: bool) -> None:
        raise ValueError("after")


def test_what_an_observer_raises_is_logged_and_the_call_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    fast, notes = graphcache.wrap(mlp()), Notes()
    fast.observe(Fails())
    fast.observe(notes)
    assert same(fast(X), fast.module(X))
    assert len(notes.seen) == 2
    assert caplog.text.count(" failed on 'capture'; the call goes on") == 2


@pytest.mark.parametrize("odd", [None, 3, print, Notes, type("Half", (), {"before": lambda *_: None})()])
def test_what_is_no_observer(odd: Any) -> None:
    fast = graphcache.wrap(mlp())
    if odd is Notes:
        # A class has both, and would be called without an object; what it raises is logged.
        fast.observe(odd)
        assert same(fast(X), fast.module(X))
    else:
        with pytest.raises(ConfigError, match=r"is no observer; expected an object with the methods before and after$"):
            fast.observe(odd)


def test_observers_come_and_go_while_threads_call() -> None:
    module = frozen(Fn(lambda self, x: self.inner(x) * x.sum().item(), inner=mlp()))
    fast = graphcache.wrap(module)

    def work(index: int) -> None:
        for step in range(20):
            if index == 0:
                fast.observe(Notes())()
            else:
                x = X[: 1 + step % 3]
                assert same(fast(x), module(x))

    in_threads(work, 4)
    assert "_hit" not in fast.__dict__


# ---- engines


def test_a_bare_engine_tells_of_eager_runs_and_of_its_own_graphs(fake: Torch) -> None:
    engine, notes = load("affine"), Notes()
    end = engine.observe(notes)
    x = rows(fake, 2)
    engine(x)
    assert notes.seen == pairs(("eager", "affine", True))
    notes.seen.clear()
    graphcache.runtime.set_cudagraphs_mode(True)
    for _ in range(2):
        assert torch.equal(engine(x), x * 3 + 1)
    assert notes.seen == pairs(("capture", "affine", True), ("replay", "affine", True))
    end()
    notes.seen.clear()
    engine(x)
    graphcache.runtime.set_cudagraphs_mode(False)
    engine(x)
    graphcache.config.modes.set(graphcache.config.Modes())
    assert notes.seen == []
    assert "_run" not in engine.__dict__


def test_an_engine_that_cannot_be_captured_tells_of_each_run_once(fake: Torch) -> None:
    engine, notes = load("conditional"), Notes()
    engine.observe(notes)
    graphcache.runtime.set_cudagraphs_mode(True)
    x = fake.driver.heap.tensor([1.0, -2.0])
    for _ in range(3):
        engine(x)
    graphcache.config.modes.set(graphcache.config.Modes())
    assert notes.seen.count(("eager", "conditional", True)) in (2, 3)
    assert ("capture", "conditional", False) in notes.seen


def test_engines_deep_inside_tell_their_own_observers(fake: Torch) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep = nn.ModuleList([load("affine")])

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.deep[0](x)
            return answer

    module, notes = Both(), Notes()
    module.deep[0].observe(notes)
    module(rows(fake, 2))
    assert notes.seen == pairs(("eager", "affine", True))
