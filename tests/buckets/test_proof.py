from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache.buckets.bucketed import Bucketed
from graphcache.buckets.padder import Padder
from graphcache.buckets.spec import Buckets
from graphcache.errors import Cause, Reason
from graphcache.keys.call_key import describe
from tests.helpers import Fn, dispatcher_of, frozen, same

BUCKETS = Buckets({0: {0: [4, 8]}})


class Tried:
    """The proof of buckets, for calls with one tensor."""

    def __init__(self, module: nn.Module, buckets: Buckets = BUCKETS, **options: Any) -> None:
        self.fast = graphcache.wrap(module, **options)
        self.bucketed = Bucketed(buckets, dispatcher_of(self.fast))

    def bucket(self, x: Tensor) -> Any:
        """The bucket of a call."""
        return self.bucketed._plan(describe((x,), {})).bucket

    def refused(self, x: Tensor) -> bool:
        """Whether a call is not padded this time, which counts it."""
        return self.bucketed._is_refused(self.bucket(x))

    def __call__(self, x: Tensor) -> tuple[Any, Padder | Cause]:
        """The answer of a call, and what came of trying to pad it."""
        call = describe((x,), {})
        plan = self.bucketed._plan(call)
        assert plan.bucket is not None
        answer, effects = self.bucketed._observe(call)
        return answer, self.bucketed._prove(plan, plan.bucket, call, effects)


def test_what_is_found_is_remembered_until_denials_are_forgotten() -> None:
    tried, x = Tried(frozen(nn.Linear(2, 5))), torch.randn(3, 2)
    answer, found = tried(x)
    assert answer.shape == (3, 5)
    assert isinstance(found, Padder)
    assert found.buckets.outputs == {0: {0: "0[0]"}}
    assert tried.bucket(x).padder is found
    assert tried.bucket(x) is tried.bucket(x[:2])
    assert (tried.bucket(torch.randn(7, 2)).padder, tried.refused(x)) == (None, False)
    tried.fast.clear()
    assert tried.bucket(x).padder is None


def test_a_refusal_is_remembered_for_good() -> None:
    tried = Tried(Fn(lambda _, x: x.softmax(0)))
    answer, cause = tried(torch.ones(3))
    assert same(answer, torch.full((3,), 1 / 3))
    assert isinstance(cause, Cause)
    assert cause.reason is Reason.PADDING
    assert all(tried.refused(torch.ones(3)) for _ in range(40))
    assert tried.bucket(torch.ones(3)).denial.cause is cause
    assert tried.bucketed.target(describe((torch.ones(3),), {})) is None
    tried.fast.clear()
    assert not tried.refused(torch.ones(3))


def test_what_changes_itself_runs_once_and_is_tried_again() -> None:
    """At the next call, then after 2 calls, then after 4."""

    def run(self: Fn, x: Tensor) -> Tensor:
        self.count += 1
        return x + 1

    module, x = Fn(run, count=0), torch.ones(3)
    tried = Tried(module)
    for times, wait in enumerate([0, 2, 4, 8], 1):
        _, cause = tried(x)
        assert isinstance(cause, Cause)
        assert cause.reason is Reason.MUTATES
        assert module.count == times, "it ran once"
        assert [tried.refused(x) for _ in range(wait + 1)] == [*[True] * wait, False]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_smallest_sizes_are_tried_too(rows: int) -> None:
    sizes = set()

    def run(self: Any, x: Tensor) -> Tensor:
        sizes.add(len(x))
        return x * 2

    tried = Tried(Fn(run), ignore=["self.function.sizes"])
    _, found = tried(torch.ones(rows, 2))
    assert isinstance(found, Padder)
    assert sizes == {1, rows, 4}
    sizes.clear()
    tried(torch.ones(7, 2))
    assert sizes == {5, 7, 8}


FAILING: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "other sizes raise": (lambda x: x.reshape(3, -1) + 0 if len(x) != 4 else x.reshape(3, -1), "a call of other sizes"),
    "a product of sizes": (lambda x: x.repeat(2), "outputs[0][0]: from 6 to 8 when 0[0] is padded from 3 to 4"),
    "as many outputs as rows": (lambda x: list(x), "outputs: 3 tensors, but 4 once 0[0] is padded"),
    "its length as a number": (lambda x: (x + 1, len(x)), "the answer contains 4 in place of 3"),
}


@pytest.mark.parametrize("name", FAILING)
def test_why_is_said(name: str) -> None:
    function, text = FAILING[name]
    answer, cause = Tried(Fn(lambda _, x: function(x)))(torch.randn(3))
    assert isinstance(cause, Cause)
    assert cause.reason is Reason.PADDING
    assert text in cause.detail
    assert answer is not None


@pytest.mark.parametrize("outputs", [None, {0: {0: "0[0]"}}])
def test_no_memory_is_no_verdict_on_the_axis(outputs: Any) -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        if len(x) == 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return x + 1

    tried = Tried(Fn(run), Buckets({0: {0: [4, 8]}}, outputs=outputs))
    answer, cause = tried(torch.ones(3))
    assert same(answer, torch.full((3,), 2.0))
    assert isinstance(cause, Cause)
    assert cause.reason is Reason.OUT_OF_MEMORY
    assert not [tried.refused(torch.ones(3)) for _ in range(17)][-1]


def test_what_calls_of_other_sizes_change_is_changed_once() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        self.count += len(x) == 4
        return x + 1

    module = Fn(run, count=0)
    answer, cause = Tried(module)(torch.ones(3))
    assert same(answer, torch.full((3,), 2.0))
    assert isinstance(cause, Cause)
    assert (cause.reason, module.count) == (Reason.MUTATES, 1)


def test_what_the_call_itself_raises_is_raised_and_nothing_remembered() -> None:
    tried = Tried(frozen(nn.Linear(2, 5)))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        tried(torch.ones(3, 7))
    bucket = tried.bucket(torch.ones(3, 7))
    assert (bucket.padder, bucket.denial) == (None, None)


def test_modes_are_as_they_were() -> None:
    seen = []
    run = Fn(lambda _, x: (seen.append((torch.is_grad_enabled(), graphcache.config.modes.get().off)), x + 1)[1])
    before = torch.is_grad_enabled(), graphcache.config.modes.get()
    Tried(run, ignore=["self.function.seen"])(torch.ones(3))
    assert (torch.is_grad_enabled(), graphcache.config.modes.get()) == before
    assert seen[0] == (before[0], True), "parts of the call are no calls of their own"
    assert set(seen[1:]) == {(False, True)}


@pytest.mark.parametrize("warm_up", [torch.zeros(3, 4), torch.ones(3, 4), torch.full((3, 4), float("nan"))], ids=str)
@pytest.mark.parametrize("name", ["size", "mean", "booleans"])
def test_values_of_a_warm_up_hide_no_dependence(warm_up: Tensor, name: str) -> None:
    modules = {
        "size": Fn(lambda _, x: x * x.shape[0]),
        "mean": Fn(lambda _, x: x - x.mean(0, keepdim=True)),
        "booleans": Fn(lambda _, x: x & (x.sum(0) % 2 == 0)),
    }
    x = warm_up == 1 if name == "booleans" else warm_up
    _, cause = Tried(modules[name])(x)
    assert isinstance(cause, Cause)
    assert cause.reason is Reason.PADDING


@pytest.mark.parametrize("warm_up", [torch.zeros(3, 4), torch.ones(3, 4)], ids=["zeros", "ones"])
def test_what_bears_padding_is_accepted_on_any_warm_up(warm_up: Tensor) -> None:
    for module in (frozen(nn.Linear(4, 2)), Fn(lambda _, x: (x + 1).log()), Fn(lambda _, x: x.relu().sqrt())):
        assert isinstance(Tried(module)(warm_up)[1], Padder)
    table = frozen(nn.Embedding(1, 4))
    assert isinstance(Tried(table)(torch.zeros(3, dtype=torch.int64))[1], Padder)
