"""Calls that update tensors of their module in place are captured, and advance them once, whatever becomes of that."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphcache
from graphcache import Reason
from graphcache.capture import persistent_state, torch_recorder
from graphcache.capture.trial_call import TrialCall
from graphcache.errors import CaptureError
from graphcache.graphs.cpu_tape import CpuTape
from tests.effort import share
from tests.helpers import Fn
from tests.stateful import MODELS, SIZE, Recurrent, same, state_of


def pair(name: str, **options: Any) -> tuple[Any, nn.Module, nn.Module, Callable[[int], tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    module = make()
    return graphcache.wrap(module, **options), module, copy.deepcopy(module), inputs


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", MODELS)
def test_one_capture_then_hits_and_each_call_advances_the_state_once(name: str) -> None:
    fast, module, twin, inputs = pair(name)
    for step in range(30):
        given = inputs(step)
        assert torch.equal(fast(*given), twin(*given))
        assert same(module, twin), step
    info = fast.cache_info()
    assert (info.captures, info.hits, info.eager) == (1, 29, {})


@pytest.mark.parametrize("name", MODELS)
def test_in_inference_mode(name: str) -> None:
    fast, module, twin, inputs = pair(name)
    with torch.inference_mode():
        for step in range(6):
            given = inputs(step)
            assert torch.equal(fast(*given), twin(*given))
            assert same(module, twin)
    assert fast.cache_info().hits == 5


def test_state_that_was_made_in_inference_mode() -> None:
    with torch.inference_mode():
        fast, module, twin, inputs = pair("recurrent", strategy="whole_graph")
        module.hidden, twin.hidden = torch.zeros(1, SIZE), torch.zeros(1, SIZE)
        for step in range(4):
            given = inputs(step)
            answer = fast(*given)
            assert torch.equal(answer, twin(*given))
            assert answer.is_inference()
            assert same(module, twin)
    assert fast.cache_info().hits == 3


@pytest.mark.parametrize("copies", [0, 1, 2])
def test_no_memory_for_copies_of_the_state(copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [copies]
    clone = Tensor.clone

    def exhausted(self: Tensor, **options: Any) -> Tensor:
        if self.dtype is torch.uint8:
            left[0] -= 1
            if left[0] < 0:
                raise torch.OutOfMemoryError("made up")
        return clone(self, **options)

    fast, module, twin, inputs = pair("recurrent", strategy="whole_graph")
    monkeypatch.setattr(Tensor, "clone", exhausted)
    for step in range(3):
        given = inputs(step)
        assert torch.equal(fast(*given), twin(*given))
        assert same(module, twin)
    assert set(fast.cache_info().eager) <= {Reason.MUTATES, Reason.OUT_OF_MEMORY}
    assert not fast.cache_info().captures


@pytest.mark.parametrize("name", MODELS)
def test_the_user_may_write_the_state_and_evict_graphs_at_any_time(name: str) -> None:
    fast, module, twin, inputs = pair(name)
    for step in range(12):
        if step == 4:
            for each in (*state_of(module), *state_of(twin)):
                each.zero_()
        if step == 8:
            fast.clear()
        given = inputs(step)
        assert torch.equal(fast(*given), twin(*given))
        assert same(module, twin)
    assert fast.cache_info().captures == 2


def test_new_memory_for_the_state_is_noticed_before_the_graph_writes() -> None:
    fast, module, twin, inputs = pair("recurrent")
    fast(*(given := inputs(0))), twin(*given)
    for _ in range(3):
        old = module.hidden
        before = old.clone()
        module.hidden, twin.hidden = torch.ones(1, SIZE), torch.ones(1, SIZE)
        for step in range(2):
            given = inputs(step)
            assert torch.equal(fast(*given), twin(*given))
            assert same(module, twin)
        assert torch.equal(old, before)


def test_every_repetition_begins_with_the_state_of_before() -> None:
    """Another one may lead the module to do what was not observed."""

    def forward(self: Any, x: Tensor) -> Tensor:
        self.count += 1
        if float(self.count) > len(self.log) + 1:
            self.log.append(1)
        return x + self.count

    module = Fn(forward, count=torch.zeros(()), log=[])
    twin, fast = copy.deepcopy(module), graphcache.wrap(module)
    for _ in range(4):
        assert torch.equal(fast(torch.ones(2)), twin(torch.ones(2)))
        assert (module.log, module.count) == (twin.log, twin.count)
        module.count.zero_(), twin.count.zero_()


def test_the_last_place_of_a_cache_is_captured() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.rows.index_copy_(0, self.position, x)
        self.position.add_(1)
        return self.rows * 2

    module = Fn(forward, rows=torch.zeros(1, 3), position=torch.zeros(1, dtype=torch.long))
    fast = graphcache.wrap(module)
    for step in range(3):
        x = torch.full((1, 3), float(step))
        assert torch.equal(fast(x), x * 2)
        assert int(module.position) == 1
        module.position.zero_()
    assert fast.cache_info().captures == 1


def test_two_shapes_of_calls_have_two_graphs_and_one_state() -> None:
    fast, module, twin, _ = pair("running statistics")
    for step in range(12):
        x = torch.randn(3 + step % 2, SIZE)
        assert torch.equal(fast(x), twin(x))
        assert same(module, twin)
    assert fast.cache_info().captures == 2


FAULTS: dict[str, tuple[Any, str]] = {
    "the first trial": (TrialCall, "run"),
    "the comparison": (TrialCall, "compare"),
    "the recording": (CpuTape, "record"),
    "the verification": (torch_recorder, "verify"),
}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("name", FAULTS)
def test_a_recording_that_fails_leaves_the_state_as_after_one_call(
    name: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error("made up")

    fast, module, twin, inputs = pair("recurrent")
    with monkeypatch.context() as patched:
        patched.setattr(*FAULTS[name], fails)
        given = inputs(0)
        twin(*given)
        if error is KeyboardInterrupt:
            with pytest.raises(KeyboardInterrupt):
                fast(*given)
        else:
            fast(*given)
        assert same(module, twin)
    for step in range(40):
        given = inputs(step)
        assert torch.equal(fast(*given), twin(*given))
        assert same(module, twin)


def test_a_graph_that_updates_the_state_in_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    replay = CpuTape.replay

    def wrong(self: CpuTape, inputs: Any, out: Any = None) -> Any:
        answer = replay(self, inputs, out)
        module.steps.add_(1)
        return answer

    fast, module, twin, inputs = pair("recurrent", strategy="whole_graph")
    monkeypatch.setattr(CpuTape, "replay", wrong)
    for step in range(3):
        given = inputs(step)
        assert torch.equal(fast(*given), twin(*given))
        assert same(module, twin)
    assert fast.cache_info().eager == {Reason.MISMATCH: 3}


def returns_its_state(self: Any, x: Tensor) -> Tensor:
    return self.total.add_(x)


def counts_in_python(self: Any, x: Tensor) -> Tensor:
    self.total.add_(x)
    self.calls += 1
    return x * 2


def grows(self: Any, x: Tensor) -> Tensor:
    self.total = torch.cat([self.total, x])
    return self.total.sum()


EAGER: dict[str, tuple[Callable[..., Tensor], Reason]] = {
    "it returns its state": (returns_its_state, Reason.ALIASES_STATE),
    "it changes Python state too": (counts_in_python, Reason.MUTATES),
    "its state grows": (grows, Reason.MUTATES),
}


@pytest.mark.parametrize("name", EAGER)
def test_what_no_graph_can_keep_runs_eagerly(name: str) -> None:
    function, reason = EAGER[name]
    module = Fn(function, total=torch.zeros(2), calls=0)
    fast, twin = graphcache.wrap(module), copy.deepcopy(module)
    for step in range(4):
        x = torch.full((2,), float(step))
        assert torch.equal(fast(x), twin(x))
        assert torch.equal(module.total, twin.total)
        assert module.calls == twin.calls
    assert fast.cache_info().eager == {reason: 4}


@pytest.mark.parametrize("size", [0, 4, 4096])
def test_state_whose_memory_is_resized_runs_eagerly(size: int) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.total.add_(1)
        self.total.untyped_storage().resize_(size)
        return x * 2

    module = Fn(forward, total=torch.zeros(256))
    fast = graphcache.wrap(module)
    x = torch.ones(3)
    assert torch.equal(fast(x), x * 2)
    assert fast.cache_info().eager == {Reason.MUTATES: 1}


def test_state_that_is_given_as_an_argument_is_used_where_it_is() -> None:
    fast, module, twin, _ = pair("recurrent")
    for _ in range(5):
        assert torch.equal(fast(module.hidden), twin(twin.hidden))
        assert same(module, twin)
    assert fast.cache_info().hits == 4


def test_too_much_state_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persistent_state, "MAX_BYTES", 64)
    fast, module, twin, inputs = pair("attention")
    for step in range(3):
        given = inputs(step)
        assert torch.equal(fast(*given), twin(*given))
        assert same(module, twin)
    assert fast.cache_info().eager == {Reason.MUTATES: 3}
    assert "self.cache.keys" in str(fast.explain())


@pytest.mark.parametrize("options", [{"capture_in": "background"}, {"capture": "worthwhile"}])
def test_captures_that_would_run_the_module_at_other_times_leave_state_alone(options: dict[str, Any]) -> None:
    fast, module, twin, inputs = pair("recurrent", strategy="whole_graph", **options)
    for step in range(40):
        given = inputs(step)
        assert torch.equal(fast(*given), twin(*given))
        assert same(module, twin)
    assert fast.cache_info().captures == 0


def test_a_session_has_no_state() -> None:
    fast, _, _, inputs = pair("recurrent")
    with pytest.raises(CaptureError, match="mutates"):
        fast.session(*inputs(0))


def test_answers_into_memory_of_the_caller() -> None:
    fast, module, twin, inputs = pair("attention")
    out = torch.empty(1, SIZE)
    for step in range(6):
        given = inputs(step)
        assert torch.equal(fast.forward_into(out, *given), twin(*given))
        assert same(module, twin)
    assert fast.cache_info().hits == 5


def test_state_of_a_part_of_a_module_that_runs_eagerly() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Recurrent()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x if float(x.sum()) > 0 else -x)

    module = Outer()
    fast, twin = graphcache.wrap(module), copy.deepcopy(module)
    for _ in range(6):
        x = torch.randn(1, SIZE)
        assert torch.equal(fast(x), twin(x))
        assert same(module.inner, twin.inner)
    assert fast.cache_info().hits >= 4


OPERATIONS = (
    "self.t0.add_(y.sum(0))",
    "self.t0[1:].mul_(0.5)",
    "self.t1.copy_(self.t0)",
    "self.t1.index_fill_(0, torch.tensor([0]), 2.0)",
    "self.parts[0].addmm_(y.t(), y)",
    "self.parts[0].t()[0].sub_(1)",
    "torch._foreach_add_([self.t0, self.t1], 1.0)",
    "y = y + self.t0 * self.t1",
    "y = torch.tanh(y @ self.parts[0])",
    "y.mul_(2)",
    "self.t1.clamp_(-2, 2)",
)


@settings(max_examples=share(150, 25), deadline=None)
@given(
    st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=6),
    st.lists(st.sampled_from(("call", "call", "other", "zero", "new", "clear", "twice")), min_size=3, max_size=12),
)
def test_any_updates_in_any_order_with_any_resets(operations: list[str], steps: list[str]) -> None:
    body = "\n    ".join(["y = x * 1", *operations, "return y * 1"])
    space: dict[str, Any] = {"torch": torch}
    exec(f"def forward(self, x):\n    {body}", space)
    module = Fn(space["forward"], t0=torch.ones(SIZE), t1=torch.zeros(SIZE), parts=[torch.eye(SIZE)])
    fast, twin = graphcache.wrap(module), copy.deepcopy(module)
    generator = torch.Generator().manual_seed(1)
    for step in steps:
        if step == "zero":
            module.t0.zero_(), twin.t0.zero_()
        elif step == "new":
            module.t1, twin.t1 = torch.ones(SIZE), torch.ones(SIZE)
        elif step == "clear":
            fast.clear()
        for _ in range(2 if step == "twice" else 1):
            x = torch.randn(3 if step == "other" else 2, SIZE, generator=generator)
            assert torch.equal(fast(x), twin(x))
        for name in ("t0", "t1"):
            assert torch.equal(getattr(module, name), getattr(twin, name))
        assert torch.equal(module.parts[0], twin.parts[0])
    assert Reason.MUTATES not in fast.cache_info().eager
