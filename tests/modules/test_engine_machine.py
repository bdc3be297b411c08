"""Thousands of steps over an engine of the stand-in: calls, refits, faults, sessions, and every answer right.

The stand-in freezes weights into what is captured, finds work that races for memory, and counts what is left behind.
"""

from __future__ import annotations

import contextvars
from collections import Counter
from contextlib import ExitStack
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

import graphcache
from graphcache import CachedModule, Reason, Session
from graphcache.errors import CaptureError, ClosedError, EngineError, ProfileRangeError
from tests.effort import share
from tests.engine_modules import MODULES, load, prepare
from tests.graphs.fake_driver import Torch, installed
from tests.helpers import graphs_of, wrap_recorded

MOST = 3
IN_A_CAPTURE = [
    "cuStreamBeginCapture",
    "cuGraphGetNodes",
    "cuGraphNodeGetType",
    "cuGraphKernelNodeGetParams",
    "cuGraphInstantiateWithParams",
]
"""Driver functions that only a capture calls. Without one of them a call has no graph, and an answer all the same."""


class Steps(RuleBasedStateMachine):
    """One refittable engine behind one cache."""

    total: ClassVar[Counter[str]] = Counter()

    @initialize(
        io=st.sampled_from(["bind", "copy"]),
        contexts=st.sampled_from(["auto", "shared", "private"]),
    )
    def start(self, io: str, contexts: str) -> None:
        self.undo = ExitStack()
        patch = self.undo.enter_context(pytest.MonkeyPatch.context())
        self.fake: Torch = self.undo.enter_context(installed(*MODULES, patch=patch))
        prepare(self.fake, patch)
        self.undo.enter_context(torch.no_grad())
        self.streams = [self.fake.new_stream() for _ in range(2)]
        self.engine = load("refittable")
        self.scale, self.shift = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 1.0])
        self.options: dict[str, Any] = {"io": io, "contexts": contexts, "max_graphs": MOST}
        self.fast: CachedModule = wrap_recorded(self.engine, **self.options)
        self.calls = 0
        self.held: list[tuple[Tensor, Tensor]] = []
        self.session: Session | None = None

    def teardown(self) -> None:
        if not hasattr(self, "undo"):
            return
        with self.undo:
            self.fake.driver.forgive()
            if self.session is not None:
                self.session.close()
            self.retire()
            self.fast.close()
            self.engine.close()
            for answer, wanted in self.held:
                assert torch.equal(answer, wanted), "an answer changed later"
            assert self.fake.driver.leaked() == {}

    # ---- calls

    @rule(
        count=st.integers(1, 8),
        layout=st.sampled_from(["plain", "plain", "unaligned", "turned"]),
        stream=st.integers(0, 1),
        into=st.sampled_from(["", "", "", "plain", "unaligned", "the input"]),
        repeat=st.integers(1, 3),
    )
    def call(self, count: int, layout: str, stream: int, into: str, repeat: int) -> None:
        Steps.total["steps"] += 1
        with self.fake.on(self.streams[stream]):
            for _ in range(repeat):
                x = self.tensor(count, layout)
                wanted = self.right(x)
                if into:
                    out = x if into == "the input" else self.tensor(count, into)
                    assert self.fast.forward_into(out, x) is out
                    assert torch.equal(out, wanted)
                else:
                    answer = self.fast(x)
                    assert torch.equal(answer, wanted)
                    self.held.append((answer, wanted))
                self.calls += 1

    @rule(
        counts=st.lists(st.integers(1, 8), min_size=MOST + 1, max_size=MOST + 2, unique=True), stream=st.integers(0, 1)
    )
    def take_turns(self, counts: list[int], stream: int) -> None:
        """More shapes than graphs, so that some take each other's places."""
        for count in (*counts, *counts):
            self.call(count, "plain", stream, "", 1)

    @rule(count=st.integers(1, 8))
    def feed_back(self, count: int) -> None:
        Steps.total["steps"] += 1
        with self.fake.on(self.streams[0]):
            state = self.tensor(count, "plain")
            for _ in range(3):
                wanted = self.right(state)
                state = self.fast(state)
                self.calls += 1
                assert torch.equal(state, wanted)

    @rule()
    def call_out_of_range(self) -> None:
        Steps.total["steps"] += 1
        with pytest.raises(ProfileRangeError):
            self.fast(self.tensor(9, "plain"))
        self.calls = self.counted()

    @rule(how=st.sampled_from(["off", "allocator"]), count=st.integers(1, 8))
    def call_without_graphs(self, how: str, count: int) -> None:
        Steps.total["steps"] += 1
        x = self.tensor(count, "plain")

        def body() -> None:
            if how == "off":
                graphcache.runtime.set_cudagraphs_mode(False)
                assert torch.equal(self.fast(x), self.right(x))
            else:
                with graphcache.runtime.enable_output_allocator(self.fast):
                    assert torch.equal(self.fast(x), self.right(x))

        reason = Reason.DISABLED if how == "off" else Reason.OUTPUT_ALLOCATOR
        before = self.fast.cache_info().eager.get(reason, 0)
        with self.fake.on(self.streams[0]):
            contextvars.copy_context().run(body)
        assert self.fast.cache_info().eager[reason] == before + 1
        self.calls += 1

    # ---- what happens in between

    @rule(values=st.tuples(*[st.integers(-9, 9)] * 4), scale=st.booleans())
    def refit(self, values: tuple[int, int, int, int], scale: bool) -> None:
        Steps.total["steps"] += 1
        self.end_session()
        given = {"shift": torch.tensor([float(values[0]), float(values[1])])}
        if scale:
            given |= {"scale.a": torch.tensor([float(values[2]), float(values[3])]), "scale.b": torch.zeros(2)}
        with self.fake.on(self.streams[0]):
            self.engine.refit(given)
        self.shift = given["shift"]
        self.scale = given.get("scale.a", self.scale)
        Steps.total["refits"] += 1
        assert self.fast.cache_info().graphs == 0

    @rule(bad=st.sampled_from(["nothing", "scale.a", "size"]))
    def refit_badly(self, bad: str) -> None:
        Steps.total["steps"] += 1
        self.end_session()
        weights = {"nothing": torch.zeros(2), "scale.a": torch.ones(2), "size": torch.zeros(3)}[bad]
        with pytest.raises(EngineError), self.fake.on(self.streams[0]):
            self.engine.refit({"shift" if bad == "size" else bad: weights})

    @rule(name=st.sampled_from(IN_A_CAPTURE), after=st.integers(0, 2))
    def let_a_capture_fail(self, name: str, after: int) -> None:
        Steps.total["steps"] += 1
        self.fake.driver.fail(name, after=after)

    @rule()
    def clear(self) -> None:
        Steps.total["steps"] += 1
        self.fast.clear()
        assert self.fast.cache_info().graphs == 0

    @rule(io=st.sampled_from(["bind", "copy"]))
    def wrap_again(self, io: str) -> None:
        Steps.total["steps"] += 1
        self.retire()
        self.fast.close()
        with pytest.raises(ClosedError):
            self.fast(self.tensor(1, "plain"))
        self.options["io"] = io
        self.fast = wrap_recorded(self.engine, **self.options)
        self.calls = 0

    @precondition(lambda self: self.session is None)
    @rule(count=st.integers(1, 8))
    def make_session(self, count: int) -> None:
        Steps.total["steps"] += 1
        x = self.tensor(count, "plain")
        with self.fake.on(self.streams[0]):
            try:
                self.session = self.fast.session(x)
            except CaptureError:
                # A planned fault; a session has no other way to answer.
                return
            self.session.run()
            assert torch.equal(self.session.outputs, self.right(x))

    @precondition(lambda self: self.session is not None)
    @rule(stream=st.integers(0, 1), start=st.integers(-9, 9))
    def run_session(self, stream: int, start: int) -> None:
        Steps.total["steps"] += 1
        assert self.session is not None
        with self.fake.on(self.streams[stream]):
            self.session.inputs[0].fill_(start)
            self.session.run()
            assert torch.equal(self.session.outputs, self.right(self.session.inputs[0]))

    @rule()
    def end_session(self) -> None:
        if self.session is not None:
            self.session.close()
            self.session = None

    # ---- what always holds

    @invariant()
    def the_budget_holds(self) -> None:
        if hasattr(self, "fast"):
            assert len(graphs_of(self.fast)) <= MOST
            assert len(self.engine.contexts) <= MOST + 2

    @invariant()
    def the_account_adds_up(self) -> None:
        if hasattr(self, "fast"):
            info = self.fast.cache_info()
            assert self.counted() == self.calls
            assert info.captures - info.evictions == info.graphs
            allowed = {Reason.DISABLED, Reason.OUTPUT_ALLOCATOR, Reason.CAPTURE_FAILED, Reason.NOT_CAPTURABLE}
            assert set(info.eager) <= allowed, info

    # ---- the parts

    def counted(self) -> int:
        info = self.fast.cache_info()
        return info.hits + info.captures + sum(info.eager.values())

    def retire(self) -> None:
        info = self.fast.cache_info()
        Steps.total.update(hits=info.hits, captures=info.captures)
        Steps.total["failed"] += info.eager.get(Reason.CAPTURE_FAILED, 0)

    def right(self, x: Tensor) -> Tensor:
        return (x * self.scale + self.shift).clone()

    def tensor(self, count: int, layout: str) -> Tensor:
        made = {
            "plain": lambda: self.fake.empty(count, 2),
            "unaligned": lambda: self.fake.empty(count, 2, offset=4),
            "turned": lambda: self.fake.empty(2, count).t(),
        }[layout]()
        return made.copy_(torch.arange(float(count * 2)).view(count, 2) - self.calls % 7)


def test_thousands_of_steps_over_an_engine_that_is_refitted() -> None:
    Steps.total.clear()
    run_state_machine_as_test(
        Steps,
        settings=settings(
            max_examples=share(160, 20),
            stateful_step_count=50,
            # A failure is a sequence of steps, long or short; making it shorter takes minutes.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        ),
    )
    assert Steps.total["steps"] >= share(4_000, 500), Steps.total
    rarest = min(Steps.total[name] for name in ("hits", "captures", "refits", "failed"))
    assert rarest >= share(50, 5), Steps.total
