"""Captures beside the calls: calls go on, answers stay right, and what is closed or changed meanwhile is not used."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphcache
from graphcache import Reason
from graphcache.dispatch import background
from graphcache.dispatch.background import CALLS_BETWEEN, Worker
from graphcache.errors import Cause, ClosedError
from graphcache.modules.explain import explain
from tests.engine_modules import MODULES, load, prepare, rows
from tests.graphs.fake_driver import Torch, installed
from tests.helpers import Fn, dispatcher_of, graphs_of, in_background, in_threads, mlp, same, settled

X = torch.linspace(-1, 1, 8).reshape(2, 4)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    for worker in list(background._workers.values()):
        worker.stop()


class Gate:
    """Stops what the recorder of a PyTorch module does beside the calls until it is opened."""

    def __init__(self, fast: Any) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        record = dispatcher_of(fast).target.recorder.record

        def slow(*args: Any, **kwargs: Any) -> Any:
            self.reached.set()
            assert self.open.wait(60)
            return record(*args, **kwargs)

        dispatcher_of(fast).target.recorder.record = slow


# ---- the worker


def submit(
    worker: Worker, job: Callable[[], object], dropped: Any = lambda: None, answered: Callable[[], int] | None = None
) -> None:
    """Without ``answered``, enough calls are answered at each look."""
    many = itertools.count(step=CALLS_BETWEEN)
    worker.submit(lambda wanted: job() if wanted else dropped(), answered or (lambda: next(many)))


def test_jobs_in_order_and_one_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    worker, seen, done = Worker("test"), [], threading.Event()

    def fails() -> None:
        raise ValueError("mine")

    for job in (lambda: seen.append(1), fails, lambda: seen.append(2), done.set):
        submit(worker, job)
    assert done.wait(60)
    assert seen == [1, 2]
    assert "a job of test failed" in caplog.text
    worker.stop()
    worker.stop()


def test_only_so_many_wait() -> None:
    worker, begun, go, seen, dropped = Worker("test", most=2), threading.Event(), threading.Event(), [], []

    def first() -> None:
        begun.set()
        assert go.wait(60)

    submit(worker, first)
    assert begun.wait(60)
    for number in range(4):
        submit(worker, lambda number=number: seen.append(number), lambda number=number: dropped.append(number))
    assert dropped == [2, 3]
    go.set()
    done = threading.Event()
    while not done.wait(0.01):
        submit(worker, done.set)
    assert seen == [0, 1]
    worker.stop()


def test_stopping_drops_what_waits_and_waits_for_what_runs() -> None:
    worker, begun, go, seen = Worker("test"), threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        assert go.wait(60)
        seen.append("first")

    submit(worker, first)
    # What runs ends when what waits was dropped, not before.
    submit(worker, lambda: seen.append("never"), go.set)
    assert begun.wait(60)
    worker.stop()
    assert seen == ["first"]
    done = threading.Event()
    submit(worker, done.set)
    assert done.wait(60), "it starts again"
    worker.stop()


def test_the_next_job_waits_for_calls_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_MAX_REST_SECONDS", 60.0)
    monkeypatch.setattr(background, "_REST", 1e9)
    worker, calls, looked, seen = Worker("test"), [0], threading.Event(), []
    after: list[int] = []

    def answered() -> int:
        looked.set()
        return calls[0]

    first, second = threading.Event(), threading.Event()
    submit(worker, lambda: (seen.append("first"), first.set()), answered=answered)
    submit(worker, lambda: (seen.append("second"), after.append(calls[0]), second.set()))
    assert first.wait(60)
    assert looked.wait(60)
    calls[0] = CALLS_BETWEEN - 1
    looked.clear()
    assert looked.wait(60), "it goes on looking"
    assert seen == ["first"]
    calls[0] += CALLS_BETWEEN
    assert second.wait(60)
    assert after == [calls[0]]
    worker.stop()


def test_a_rest_ends_where_calls_are_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_MAX_REST_SECONDS", 0.01)
    worker, done = Worker("test"), threading.Event()
    submit(worker, lambda: None, answered=lambda: 0)
    submit(worker, done.set)
    assert done.wait(60)
    worker.stop()


def test_stopping_waits_for_no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_MAX_REST_SECONDS", 600.0)
    monkeypatch.setattr(background, "_REST", 1e9)
    worker, resting = Worker("test"), threading.Event()
    submit(worker, lambda: None, answered=lambda: resting.set() or 0)
    assert resting.wait(60)
    worker.stop()
    done = threading.Event()
    submit(worker, done.set)
    assert done.wait(60), "it starts again"
    worker.stop()


def test_a_job_keeps_nothing_alive_when_it_is_done() -> None:
    worker, done = Worker("test"), threading.Event()
    tensor = torch.ones(3)
    seen = weakref.ref(tensor)
    submit(worker, lambda tensor=tensor: done.set())
    assert done.wait(60)
    del tensor
    worker.stop()
    gc.collect()
    assert seen() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_worker_for_each_device_and_process() -> None:
    assert background.worker_of("cpu") is background.worker_of(torch.device("cpu"))
    assert background.worker_of("cpu") is not background.worker_of("cuda:0")


# ---- modules on the host


def beside(module: nn.Module, **options: Any) -> Any:
    return graphcache.wrap(module, capture_in="background", **options)


def test_calls_are_answered_while_a_graph_is_made() -> None:
    fast = beside(mlp())
    gate = Gate(fast)
    for _ in range(5):
        assert same(fast(X), fast.module(X))
    assert gate.reached.wait(60)
    assert fast.cache_info().eager == {Reason.PENDING: 5}
    for [call] in (explain(fast).calls, explain(fast, X).calls):
        assert (call.outcome, call.cause) == ("eager", Cause(Reason.PENDING))
    gate.open.set()
    settled(fast)
    assert same(fast(X), fast.module(X))
    assert explain(fast, X).calls[0].outcome == "hit"
    info = fast.cache_info()
    assert (info.captures, info.hits, info.eager) == (1, 1, {Reason.PENDING: 5})


def test_values_that_change_after_the_call_are_no_part_of_it() -> None:
    fast = beside(mlp())
    gate = Gate(fast)
    x = X.clone()
    fast(x)
    assert gate.reached.wait(60)
    x.fill_(float("nan"))
    gate.open.set()
    settled(fast)
    assert (fast.cache_info().captures, fast.cache_info().graphs) == (1, 1)
    assert same(fast(X), fast.module(X))


def test_a_capture_that_fails_is_a_reason_and_is_not_repeated() -> None:
    fast = beside(Fn(lambda _, x: x * float(x.sum())))
    for _ in range(4):
        assert same(settled(fast)(X), fast.module(X))
    info = fast.cache_info()
    assert info.captures == 0
    assert info.eager == {Reason.PENDING: 1, Reason.HOST_READ: 3}


def test_a_module_that_raises_raises_for_the_caller_alone() -> None:
    def refuses(_: nn.Module, x: Tensor) -> Tensor:
        if in_background():
            raise ValueError("not here")
        return x + 1

    fast = beside(Fn(refuses))
    assert same(fast(X), X + 1)
    settled(fast)
    assert same(fast(X), X + 1)
    assert set(fast.cache_info().eager) == {Reason.PENDING, Reason.CAPTURE_FAILED}


def test_effects_that_show_beside_the_calls_alone_are_not_repeated_by_every_call() -> None:
    def counts(self: Any, x: Tensor) -> Tensor:
        if in_background():
            self.count += 1
        return x + 1

    fast = beside(Fn(counts, count=0))
    for _ in range(10):
        assert same(fast(X), X + 1)
        settled(fast)
    assert fast.module.count == 4, "at the first two calls, after 2 further ones, after 4"
    assert fast.cache_info().eager == {Reason.PENDING: 4, Reason.MUTATES: 6}


def test_a_module_that_enters_inference_mode_does_so_in_its_graph_too() -> None:
    def enters(_: nn.Module, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return x + 1

    fast = beside(Fn(enters))
    for _ in range(3):
        answer = settled(fast)(X)
        assert answer.is_inference()
        assert same(answer, X + 1)
    assert fast.cache_info().hits == 2


@pytest.mark.parametrize("how", ["clear", "close", "replace a weight"])
def test_what_changes_meanwhile_is_not_used(how: str) -> None:
    module = mlp()
    fast = beside(module)
    gate = Gate(fast)
    fast(X)
    assert gate.reached.wait(60)
    opened = threading.Timer(0, gate.open.set)
    if how == "clear":
        opened.start()
        fast.clear()
    elif how == "close":
        opened.start()
        fast.close()
        with pytest.raises(ClosedError):
            fast(X)
    else:
        module[0].weight = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
        opened.start()
    settled(fast)
    assert fast.cache_info().graphs == 0
    if how != "close":
        for _ in range(3):
            assert same(settled(fast)(X), module(X))
        assert fast.cache_info().hits == 2
    opened.join()


def test_settings_that_change_meanwhile_are_not_those_of_the_graph() -> None:
    module = Fn(lambda _, x: x + torch.ones(4))
    fast = beside(module)
    gate, usual = Gate(fast), torch.get_default_dtype()
    fast(X)
    assert gate.reached.wait(60)
    try:
        torch.set_default_dtype(torch.float64)
        gate.open.set()
        settled(fast)
    finally:
        torch.set_default_dtype(usual)
    assert fast.cache_info().graphs == 0
    for _ in range(3):
        assert same(settled(fast)(X), module(X))
    assert fast.cache_info().hits >= 1


def test_a_subscriber_may_clear_from_within() -> None:
    fast = beside(mlp())
    heard: list[object] = []

    def hears(event: object) -> None:
        heard.append(event)
        if type(event).__name__ == "Captured":
            fast.clear()

    fast.subscribe(hears)
    fast(X)
    settled(fast)
    assert same(fast(X), fast.module(X))
    assert "Captured" in {type(event).__name__ for event in heard}


def test_a_subscriber_may_clear_a_module_whose_capture_waits() -> None:
    fast, other = beside(mlp()), beside(mlp())
    gate = Gate(fast)

    def hears(event: object) -> None:
        if type(event).__name__ == "Captured":
            other.clear()

    fast.subscribe(hears)
    fast(X)
    assert gate.reached.wait(60)
    other(X)
    gate.open.set()
    settled(fast)
    assert settled(other).cache_info().graphs == 0
    for _ in range(3):
        assert same(settled(other)(X), other.module(X))
    assert other.cache_info().hits == 2


@pytest.mark.parametrize("layout", ["expanded", "strided", "twice", "nested"])
def test_what_a_copy_does_not_show_is_captured_at_once_or_alike(layout: str) -> None:
    args: tuple[Any, ...]
    args = {
        "expanded": (torch.ones(1, 4).expand(3, 4), X[:1]),
        "strided": (torch.arange(16.0).reshape(4, 4)[:, ::2], torch.ones(4, 1)),
        "twice": (X, X),
        "nested": (X, {"bias": [X + 1]}),
    }[layout]
    module = Fn(lambda _, x, y: x * 2 + (y["bias"][0] if isinstance(y, dict) else y))
    fast = beside(module)
    for _ in range(4):
        assert same(settled(fast)(*args), module(*args))
    info = fast.cache_info()
    assert (info.captures, info.hits, info.eager) == (1, 3, {Reason.PENDING: 1})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_in_the_modes_of_the_call(mode: Callable[[], Any]) -> None:
    fast = beside(mlp())
    with mode():
        for _ in range(3):
            assert same(settled(fast)(X), fast.module(X))
        assert fast.cache_info().hits == 2
    for _ in range(3):
        assert same(settled(fast)(X), fast.module(X))
    assert (fast.cache_info().captures, fast.cache_info().hits) == (2, 4)


@pytest.mark.parametrize("graphs", [3, 5])
def test_threads(graphs: int) -> None:
    fast = beside(mlp(), max_graphs=graphs)

    def work(index: int) -> None:
        for step in range(40):
            x = torch.full((1 + (index + step) % 5, 4), float(step))
            assert same(fast(x), fast.module(x))

    in_threads(work)
    settled(fast)
    info = fast.cache_info()
    assert info.graphs <= graphs
    # A hit is not counted if another thread evicts its graph before it ends; with room for all of them, every call is.
    assert (info.evictions == 0) is (graphs == 5)
    assert 160 - info.evictions <= info.hits + sum(info.eager.values()) <= 160


def test_only_what_is_worth_it_is_captured_beside() -> None:
    fast = beside(mlp(), capture="worthwhile")
    for size in range(1, 30):
        fast(torch.ones(size, 4))
    assert not dispatcher_of(fast).queue._pending
    assert fast.cache_info().eager == {Reason.COLD: 29}


# ---- engines


@given(steps=st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["call", "call", "settle", "epoch", "clear"]))))
def test_engines(steps: list[tuple[int, str]]) -> None:
    """Whatever happens between a call and its capture; the stand-ins see every race and everything freed early."""
    with pytest.MonkeyPatch.context() as patch, installed(*MODULES, background, patch=patch) as fake, torch.no_grad():
        prepare(fake, patch)
        module = load("affine")
        fast = beside(module, max_graphs=2)
        with fake.on(fake.new_stream()):
            for size, what in steps:
                x = rows(fake, size)
                assert torch.equal(fast(x), x * 3 + 1)
                if what == "settle":
                    settled(fast)
                elif what == "epoch":
                    module.epoch += 1
                elif what == "clear":
                    fast.clear()
            settled(fast)
        background._stop_all()
        assert fast.cache_info().graphs <= 2
        fast.close()
        module.close()
        gc.collect()
        assert fake.driver.leaked() == {}


def test_graphs_have_scratch_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays of two of them need not wait for each other, nor for eager calls."""
    with installed(*MODULES, background, patch=monkeypatch) as fake, torch.no_grad():
        prepare(fake, monkeypatch)
        module = load("affine")
        fast = beside(module)
        with fake.on(fake.new_stream()):
            for size in (2, 3):
                for _ in range(2):
                    settled(fast)(rows(fake, size))
            settled(fast)
        orders = {id(entry.graph.graph.order) for entry in graphs_of(fast).entries.values()}
        assert len(orders) == 2
        assert id(module.order) not in orders
        own = next(iter(graphs_of(fast).entries.values())).nbytes
        foreground = graphcache.wrap(load("affine"))
        foreground(rows(fake, 2))
        assert own == next(iter(graphs_of(foreground).entries.values())).nbytes + module.engine.scratch_bytes
        refitted = load("refittable")
        other = beside(refitted)
        x = fake.driver.heap.tensor([[1.0, 2.0]])
        with fake.on(fake.new_stream()):
            for _ in range(3):
                settled(other)(x)
            refitted.refit({"shift": torch.tensor([10.0, 20.0])}, wait=False)
            assert other(x).tolist() == [[12.0, 26.0]]
            assert settled(other)(x).tolist() == [[12.0, 26.0]]
            assert other(x).tolist() == [[12.0, 26.0]]
        for each in (fast, other, foreground):
            each.close()
        assert isinstance(fake, Torch)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_ends_a_thread_ends_no_captures_of_others(error: type[BaseException]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if in_background():
            raise error
        return x + 1

    bad = graphcache.wrap(Fn(forward), capture_in="background")
    good = graphcache.wrap(Fn(lambda _, x: x + 1), capture_in="background")
    with torch.no_grad():
        for fast in (bad, good):
            fast(X)
            settled(fast)
    assert bad.cache_info().hits == 0
    assert good.cache_info().captures == 1
