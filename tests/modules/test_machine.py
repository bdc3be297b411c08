"""Thousands of steps against the module itself: whatever happens to it, the answer is the eager one."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

import graphcache
from graphcache import CachedModule, Reason
from graphcache.config import Modes, modes
from graphcache.errors import ClosedError
from graphcache.runtime import set_cudagraphs_mode
from tests.effort import share
from tests.helpers import frozen, graphs_of, same

GRAD_MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
INPUTS = [torch.randn(size, 3, generator=torch.Generator().manual_seed(size)) for size in (1, 2, 3, 4, 5)]


class Net(nn.Module):
    """Fails, reads values or draws random numbers on demand; the demand is part of the call."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.act: nn.Module = nn.ReLU()
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(3, 2)
        self.scale = nn.Buffer(torch.tensor(1.0))

    def forward(self, x: Tensor, how: str = "plain", *, extra: Any = None) -> Any:
        y = self.drop(self.act(self.first(x.to(self.scale.dtype)))) * self.scale
        if how == "fail":
            raise LookupError("on demand")
        if how == "read":
            y = y * y.sum().item()
        elif how == "mask":
            y = y[y.sum(1) >= 0]
        elif how == "view":
            return self.last(y), x, x[0], None
        elif how == "state":
            return self.last(y), self.scale
        if extra is not None:
            y = y + sum(extra["add"]) if "add" in extra else y * extra["times"]
        return {"y": self.last(y), "how": how}


class Calls(RuleBasedStateMachine):
    """One module, its wrapper, and the account that the wrapper should have."""

    steps: ClassVar[int] = 0
    hits: ClassVar[int] = 0

    @initialize(
        graphs=st.integers(1, 4),
        nbytes=st.none() | st.integers(20, 200),
        strategy=st.sampled_from(["whole_graph", "auto", "per_submodule"]),
    )
    def start(self, graphs: int, nbytes: int | None, strategy: str) -> None:
        torch.manual_seed(0)
        self.net = frozen(Net())
        self.token = modes.set(Modes())
        self.wrap(graphs, nbytes, strategy)

    def wrap(self, graphs: int, nbytes: int | None, strategy: str) -> None:
        include = [] if strategy == "whole_graph" else ["first", "last"]
        self.fast: CachedModule = graphcache.wrap(
            self.net, max_graphs=graphs, max_bytes=nbytes, strategy=strategy, include=include
        )
        self.calls = 0
        self.closed = False
        self.held: list[tuple[Any, Any]] = []

    def teardown(self) -> None:
        if hasattr(self, "token"):
            Calls.hits += self.fast.cache_info().hits
            modes.reset(self.token)

    @rule(
        x=st.sampled_from(INPUTS),
        how=st.sampled_from(["plain"] * 4 + ["fail", "read", "mask", "view", "state"]),
        mode=st.sampled_from(list(GRAD_MODES)),
        extra=st.sampled_from([None, None, {"times": 2}, {"times": 2.0}, {"add": [1, (2)]}]),
        repeat=st.integers(3, 8),
    )
    def call(self, x: Tensor, how: str, mode: str, extra: Any, repeat: int) -> None:
        Calls.steps += 1
        with GRAD_MODES[mode]():
            for _ in range(repeat):
                self.one(x, how, extra)

    @rule(
        sizes=st.lists(st.sampled_from(INPUTS), min_size=2, max_size=6), mode=st.sampled_from(["no_grad", "inference"])
    )
    def call_in_a_loop(self, sizes: list[Tensor], mode: str) -> None:
        Calls.steps += 1
        with GRAD_MODES[mode]():
            for x in sizes:
                self.one(x, "plain", None)

    def one(self, x: Tensor, how: str, extra: Any) -> None:
        if self.closed:
            with pytest.raises(ClosedError):
                self.fast(x, how, extra=extra)
            return
        if how == "fail":
            with pytest.raises(LookupError, match="on demand"):
                self.fast(x, how, extra=extra)
            # A call that was refused before is counted before it fails.
            self.calls = self.counted()
            return
        torch.manual_seed(5)
        answer = self.fast(x, how, extra=extra)
        self.calls += 1
        torch.manual_seed(5)
        eager = self.net(x, how, extra=extra)
        assert same(answer, eager)
        assert requires_grad(answer) == requires_grad(eager)
        if how == "view":
            assert answer[1] is x
        self.held = [*self.held[-3:], (answer, copy_of(answer))] if how != "state" else self.held

    # ---- the weights

    @rule()
    def train_a_step(self) -> None:
        Calls.steps += 1
        with torch.no_grad():
            self.net.first.weight.add_(0.1)
            self.net.scale.mul_(1.5).clamp_(max=4)

    @rule(what=st.sampled_from(["data", "parameter", "buffer", "submodule", "copy", "assign", "bias"]))
    def replace(self, what: str) -> None:
        Calls.steps += 1
        dtype = self.net.scale.dtype
        other = Net().to(dtype).requires_grad_(False)
        if what == "data":
            self.net.last.weight.data = other.last.weight.data
        elif what == "parameter":
            self.net.first.weight = other.first.weight
        elif what == "buffer":
            self.net.scale = torch.tensor(0.5, dtype=dtype)
        elif what == "submodule":
            self.net.act = nn.Tanh() if isinstance(self.net.act, nn.ReLU) else nn.ReLU()
        elif what == "bias":
            self.net.first.bias = None if self.net.first.bias is not None else other.first.bias
        elif self.net.first.bias is not None:
            self.net.load_state_dict(other.state_dict(), assign=what == "assign")

    @rule(dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    def convert(self, dtype: torch.dtype) -> None:
        Calls.steps += 1
        self.net.to(dtype)

    @rule(on=st.booleans())
    def train(self, on: bool) -> None:
        Calls.steps += 1
        self.net.train(on)

    @rule(on=st.booleans())
    def require_grad(self, on: bool) -> None:
        Calls.steps += 1
        self.net.first.requires_grad_(on)

    # ---- the cache

    @rule(mode=st.sampled_from([True, False, None]))
    def switch(self, mode: bool | None) -> None:
        Calls.steps += 1
        modes.set(Modes()) if mode is None else set_cudagraphs_mode(mode)

    @rule()
    def clear(self) -> None:
        Calls.steps += 1
        self.fast.clear()
        assert self.fast.cache_info().graphs == 0

    @precondition(lambda self: not self.closed)
    @rule(sure=st.integers(0, 3))
    def close(self, sure: int) -> None:
        Calls.steps += 1
        if sure:
            return
        self.fast.close()
        self.closed = True

    @precondition(lambda self: self.closed)
    @rule(graphs=st.integers(1, 4), nbytes=st.none() | st.integers(20, 200))
    def wrap_again(self, graphs: int, nbytes: int | None) -> None:
        Calls.steps += 1
        Calls.hits += self.fast.cache_info().hits
        self.wrap(graphs, nbytes, self.fast.config.strategy)

    @invariant()
    def the_budget_holds(self) -> None:
        if hasattr(self, "fast"):
            for each in (self.fast, *self.fast.parts.values()):
                entries = graphs_of(each).entries.values()
                assert len(entries) <= each.config.max_graphs
                assert sum(entry.nbytes for entry in entries) <= (each.config.max_bytes or float("inf"))
            if self.closed:
                assert self.fast.cache_info().graphs == 0

    @invariant()
    def the_account_adds_up(self) -> None:
        if hasattr(self, "fast") and self.fast.config.strategy != "per_submodule":
            assert self.counted() == self.calls
            ledger = self.fast.ledger
            assert ledger.captures - ledger.evictions == len(graphs_of(self.fast))
            assert Reason.MISMATCH not in ledger.eager
            assert Reason.CAPTURE_FAILED not in ledger.eager

    @invariant()
    def answers_stay_what_they_were(self) -> None:
        for answer, before in getattr(self, "held", []):
            assert same(answer, before)

    @invariant()
    def the_module_is_left_alone(self) -> None:
        if hasattr(self, "net"):
            assert all("forward" not in module.__dict__ for module in self.net.modules())

    def counted(self) -> int:
        """Calls that the wrapper itself, not its parts, knows of."""
        ledger = self.fast.ledger
        hits = ledger.retired_hits + sum(entry.hits for entry in graphs_of(self.fast).entries.values())
        return int(hits + ledger.captures + sum(ledger.eager.values()))


def requires_grad(answer: Any) -> list[bool]:
    leaves = answer.values() if isinstance(answer, dict) else answer
    return [leaf.requires_grad for leaf in leaves if isinstance(leaf, Tensor)]


def copy_of(answer: Any) -> Any:
    if isinstance(answer, Tensor):
        return answer.detach().clone()
    if isinstance(answer, dict):
        return {name: copy_of(leaf) for name, leaf in answer.items()}
    return tuple(map(copy_of, answer)) if isinstance(answer, tuple) else answer


def test_ten_thousand_steps_and_no_answer_but_the_eager_one():
    Calls.steps = Calls.hits = 0
    run_state_machine_as_test(
        Calls,
        settings=settings(
            max_examples=share(270, 48),
            stateful_step_count=50,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        ),
    )
    assert Calls.steps >= share(10_000, 1_200)
    assert Calls.hits >= share(1_000, 120)
