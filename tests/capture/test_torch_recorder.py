from __future__ import annotations

import gc
import random
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import CachedModule, Reason
from graphcache.capture import torch_recorder
from graphcache.capture.recording import CaptureRequest, Recording
from tests.helpers import Fn, dispatcher_of, frozen, outcomes, reason, same

X = torch.linspace(-1, 1, 8).reshape(2, 4)


def wrapped(function: Any, **options: Any) -> CachedModule:
    return graphcache.wrap(Fn(function), **options)


MODULES = {
    "linear": (lambda: nn.Linear(4, 3), X),
    "convolution": (lambda: nn.Conv1d(2, 3, 2), X),
    "transposed convolution": (lambda: nn.ConvTranspose1d(2, 3, 2), X),
    "batch norm": (lambda: nn.BatchNorm1d(4), X),
    "layer norm": (lambda: nn.LayerNorm(4), X),
    "embedding": (lambda: nn.Embedding(9, 3), torch.tensor([[1, 8], [0, 3]])),
    "embedding bag": (lambda: nn.EmbeddingBag(9, 3), torch.tensor([[1, 8], [0, 3]])),
    "gru": (lambda: nn.GRU(4, 3), X[None]),
    "lstm": (lambda: nn.LSTM(4, 3, 2, bidirectional=True), X[None]),
    "rnn": (lambda: nn.RNN(4, 3, batch_first=True), X[None]),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), X[None]),
    "pooling": (lambda: nn.AdaptiveAvgPool1d(2), X),
    "upsampling": (lambda: nn.Upsample(scale_factor=2, mode="linear"), X[None]),
    "softmax": (lambda: nn.Softmax(-1), X),
    "pixel shuffle": (lambda: nn.PixelShuffle(2), torch.randn(1, 4, 3, 3)),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_the_modules_of_torch_are_captured_and_right(name, grad):
    make, x = MODULES[name]
    module = frozen(make())
    fast = graphcache.wrap(module)
    other = x.flip(0) if x.dtype is torch.int64 else x * -2 + 1
    with torch.set_grad_enabled(grad):
        assert same(fast(x), module(x))
    for given in (other, x):
        with torch.set_grad_enabled(grad):
            answer = fast(given)
        # A graph is recorded without gradients; torch runs an LSTM by other kernels with them, which round otherwise on
        # some processors.
        with torch.no_grad():
            assert same(answer, module(given))
    assert outcomes(fast) == (2, 1, {})


# ---- values that the host reads, past the dispatcher

READS = {
    "numpy": lambda x: float(x.numpy().max()),
    "tolist": lambda x: max(x.flatten().tolist()),
    "array": lambda x: float(__import__("numpy").asarray(x).max()),
    "dlpack": lambda x: float(__import__("numpy").from_dlpack(x).max()),
    "item": lambda x: x.max().item(),
}
VALUES = {
    "other": [X, X * 3, X + 1],
    "zero": [X * 0, X, X + 1],
    "constant": [torch.ones(2, 4), X * 3, X],
    "integers": [torch.full((2, 4), 3), torch.full((2, 4), 5), torch.arange(8).reshape(2, 4)],
    "one number": [torch.tensor(2.0), torch.tensor(5.0), torch.tensor(0.0)],
    "one integer": [torch.tensor(2), torch.tensor(5), torch.tensor(0)],
    "one bool": [torch.tensor(True), torch.tensor(False), torch.tensor(True)],
}


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("name", READS)
def test_a_value_that_the_host_reads_is_never_frozen(name, values):
    fast = wrapped(lambda _, x: x * 2 + READS[name](x))
    for x in VALUES[values]:
        assert same(fast(x), fast.module(x))


@pytest.mark.parametrize("name", READS)
def test_a_path_chosen_by_a_value_is_never_frozen(name):
    # The other values that a capture is verified with choose the path of the first call.
    fast = wrapped(lambda _, x: x * 2 if abs(READS[name](x)) > 2 else x * 3)
    for x in (X + 5, X, X + 5):
        assert same(fast(x), fast.module(x))


@pytest.mark.parametrize("share", [1e-2, 1e-5, 1e-7])
def test_a_small_value_that_the_host_reads_is_not_lost_in_a_tolerance(share):
    fast = wrapped(lambda _, x: (x + 1e3).double() + share * float(x.numpy().max()))
    for x in (X, X * 3, X + 1):
        assert same(fast(x), fast.module(x))


def test_calls_that_are_refused_leave_the_graphs_of_others_right():
    def reads_some(self: Any, x: Tensor) -> Tensor:
        return x * 2 if len(x) < 3 else x * x.sum().tolist()

    fast = wrapped(reads_some)
    for rows in (1, 3, 1, 4, 1, 5, 1):
        x = torch.ones(rows, 4)
        assert same(fast(x), fast.module(x))
    assert outcomes(fast) == (3, 1, {Reason.HOST_READ: 3})


def test_a_refusal_that_the_module_swallows_is_still_one():
    def careful(_: Any, x: Tensor) -> Tensor:
        try:
            positive = bool(x.sum() > 0)
        except Exception:
            positive = True
        return x * 2 if positive else x * 3

    fast = wrapped(careful)
    for x in (X + 5, X - 5):
        assert same(fast(x), fast.module(x))
    assert fast.cache_info().eager == {Reason.HOST_READ: 2}


# ---- what cannot be verified


def test_a_module_that_answers_differently_every_time_is_reported():
    fast = wrapped(lambda _, x: x + random.random())
    assert reason(fast, X) is Reason.RANDOM
    runs: list[int] = []
    fast = wrapped(lambda _, x: (runs.append(1), x + len(runs))[1], ignore=["self.function.runs"])
    assert reason(fast, X) is Reason.NONDETERMINISTIC
    assert fast.cache_info().captures == 0


def test_verification_finds_a_tensor_that_was_made_outside_and_written_inside():
    numpy = pytest.importorskip("numpy")

    def forward(_: Any, x: Tensor) -> Tensor:
        total = torch.from_numpy(numpy.zeros(4, numpy.float32))
        total += x.sum(0)
        return total * 1

    fast = wrapped(forward)
    for x in (X, X + 1, X * 3):
        assert same(fast(x), fast.module(x))


def test_without_verification_a_graph_is_trusted():
    fast = wrapped(lambda _, x: x * 2, verify=False)
    for x in (X, X + 1):
        assert same(fast(x), fast.module(x))
    assert outcomes(fast) == (1, 1, {})


def test_inputs_that_the_module_takes_only_as_they_are_do_not_spoil_the_capture():
    def picky(_: Any, x: Tensor, index: Tensor) -> Tensor:
        return x.index_select(0, index)

    fast = wrapped(picky)
    args = (X, torch.tensor([1, 0, 1]))
    for _ in range(2):
        assert same(fast(*args), picky(None, *args))
    assert outcomes(fast) == (1, 1, {})


# ---- exceptions in the runs that the caller did not ask for


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        AssertionError,
        ZeroDivisionError,
        StopIteration,
        type("Own", (Exception,), {}),
        OSError,
    ],
    ids=lambda error: error.__name__,
)
@pytest.mark.parametrize("run", [2, 3, 4])
def test_an_exception_in_a_run_of_the_capture_only_is_not_the_callers(error, run):
    runs: list[int] = []

    def forward(_: Any, x: Tensor) -> Tensor:
        runs.append(1)
        if len(runs) == run:
            raise error("not this time")
        return x * 2

    fast = wrapped(forward, ignore=["self.function.runs"])
    for _ in range(3):
        assert same(fast(X), X * 2)
    info = fast.cache_info()
    assert info.hits + info.captures + sum(info.eager.values()) == 3
    assert set(info.eager) <= {Reason.CAPTURE_FAILED}
    assert torch._C._len_torch_dispatch_stack() == 0


def test_an_interrupt_in_a_run_of_the_capture_passes_and_leaves_nothing_half_made():
    runs: list[int] = []

    def forward(_: Any, x: Tensor) -> Tensor:
        runs.append(1)
        if len(runs) == 3:
            raise KeyboardInterrupt
        return x * 2

    fast = wrapped(forward, ignore=["self.function.runs"])
    with pytest.raises(KeyboardInterrupt):
        fast(X)
    assert (fast.cache_info().graphs, torch._C._len_torch_dispatch_stack()) == (0, 0)
    assert same(fast(X), X * 2)
    assert outcomes(fast) == (0, 1, {})


def test_a_failure_that_may_pass_is_tried_again_after_some_calls():
    runs: list[int] = []

    def forward(_: Any, x: Tensor) -> Tensor:
        runs.append(1)
        if len(runs) == 2:
            raise RuntimeError("not this time")
        return x * 2

    fast = wrapped(forward, ignore=["self.function.runs"])
    for _ in range(30):
        assert same(fast(X), X * 2)
    assert outcomes(fast) == (12, 1, {Reason.CAPTURE_FAILED: 17})


def test_a_failed_capture_keeps_nothing_alive():
    def forward(_: Any, x: Tensor) -> Tensor:
        return x * x.sum().item()

    fast = wrapped(forward)
    x = X.clone()
    answer = fast(x)
    gone = [weakref.ref(x), weakref.ref(answer)]
    del x, answer
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_a_capture_runs_the_module_in_the_modes_of_graphs_off():
    seen: list[Any] = []

    def forward(_: Any, x: Tensor) -> Tensor:
        seen.append(graphcache.config.modes.get().graphs)
        return x * 2

    fast = wrapped(forward, ignore=["self.function.seen"])
    fast(X)
    assert set(seen) == {"off"}
    assert len(seen) >= 3


def test_a_part_of_an_earlier_answer_is_no_constant():
    memo: dict[str, Tensor] = {}

    def forward(_: Any, x: Tensor) -> Tensor:
        memo.setdefault("first", x.sum())
        return x + memo["first"]

    fast = wrapped(forward)
    for x in (X, X + 1, X * 3):
        assert same(fast(x), fast.module(x))


@pytest.mark.parametrize("name", ["attention", "identity", "keywords"])
def test_one_tensor_given_several_times_is_one_tensor_of_the_graph(name: str) -> None:
    def forward(_: Any, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return a.t() * 2 + b if a is c else a - b.flip(0)

    attention = frozen(nn.MultiheadAttention(4, 2, batch_first=True))
    module = attention if name == "attention" else Fn(forward)
    fast = graphcache.wrap(module)
    for scale in (1.0, -2.0, 3.0):
        x = torch.linspace(-1, 2, 16).reshape(4, 4) * scale
        args, kwargs = ((x,), {"b": x, "c": x}) if name == "keywords" else ((x, x, x), {})
        with torch.no_grad():
            assert same(fast(*args, **kwargs), module(*args, **kwargs))
    assert outcomes(fast) == (2, 1, {})
    # The same values in tensors of their own are another call.
    with torch.no_grad():
        assert same(fast(x, x.clone(), x.clone()), module(x, x.clone(), x.clone()))
    assert outcomes(fast) == (2, 2, {})


def test_an_output_that_is_a_tensor_given_several_times_is_the_callers() -> None:
    fast = wrapped(lambda _, a, b, c: (b, c[0], a + c))
    for value in (1.0, 2.0):
        x, y = torch.full((2, 2), value), torch.full((2, 2), value + 1)
        same_one, row, _ = fast(x, x, y)
        assert same_one is x
        assert row.data_ptr() == y.data_ptr()
    into = [torch.empty(2, 2)]
    into_fast = wrapped(lambda _, a, b: [a + b])
    for _ in range(3):
        assert torch.equal(into_fast.forward_into(into, x, x)[0], x + x)
    assert into_fast.cache_info().hits == 2


@pytest.mark.parametrize("name", ["row", "column", "windows", "indices", "conjugate", "with another"])
def test_expanded_inputs_are_captured_as_they_lie(name: str) -> None:
    def given(seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        row, column = torch.randn(1, 4).expand(3, 4), torch.randn(3, 1).expand(3, 4)
        return {
            "row": (row,),
            "column": (column,),
            "windows": (torch.randn(6).unfold(0, 4, 1),),
            "indices": (torch.randint(0, 9, (1, 4)).expand(3, 4),),
            "conjugate": (torch.randn(1, 4, dtype=torch.complex64).conj().expand(3, 4),),
            "with another": (row, torch.randn(3, 4)),
        }[name]

    module = Fn(lambda _, x, y=None: (torch.cat([x, x * 2], -1), x + 1, x.stride()[0], x if y is None else x * y))
    fast = graphcache.wrap(module)
    for seed in range(4):
        args = given(seed)
        assert same(fast(*args), module(*args))
    assert outcomes(fast) == (3, 1, {})


def test_a_module_that_writes_into_an_expanded_input() -> None:
    fast = wrapped(lambda _, x: x[:1].add_(1) * 2)
    for value in (1.0, 2.0):
        x = torch.full((1, 4), value)
        assert torch.equal(fast(x.expand(3, 4)), torch.full((1, 4), 2 * value + 2))
        assert torch.equal(x, torch.full((1, 4), value + 1))
    assert fast.cache_info().captures == 1


def test_attributes_of_a_tensor_are_part_of_the_key() -> None:
    fast = wrapped(lambda _, x: x * getattr(x, "scale", 1.0))
    for _ in range(2):
        for scale in (None, 5.0, 3.0):
            x = torch.ones(2)
            if scale is not None:
                x.scale = scale  # type: ignore[attr-defined]
            assert torch.equal(fast(x), x * (scale or 1.0))
    assert outcomes(fast) == (3, 3, {})
    assert str(fast.explain(x))
    x.scale = object()  # type: ignore[attr-defined]
    assert reason(wrapped(lambda _, x: x * 2), x) is Reason.ARGUMENT


@pytest.mark.parametrize("name", ["is_inference", "grad_fn", "requires_grad"])
def test_what_no_key_shows_of_a_tensor_is_not_asked_in_a_graph(name: str) -> None:
    def asks(_: Any, x: Tensor) -> Tensor:
        found = x.is_inference() if name == "is_inference" else getattr(x, name)
        return x * 2 if found else x * 3

    module = Fn(asks)
    fast = graphcache.wrap(module)
    with torch.inference_mode():
        inference = torch.ones(2)
    leaf = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        for x in (torch.ones(2), torch.ones(2), inference, leaf):
            assert same(fast(x), module(x))
        with torch.enable_grad():
            made = leaf * 1
        assert same(fast(made), module(made))
    assert fast.cache_info().captures == 0


class _Decorated(nn.Module):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 + 1


def test_a_forward_in_inference_mode_of_its_own_answers_inference_tensors_always() -> None:
    module = _Decorated()
    fast = graphcache.wrap(module)
    for x in (X, X + 1, X * 2):
        with torch.no_grad():
            answer = fast(x)
        assert answer.is_inference()
        assert same(answer, module(x))
    assert outcomes(fast) == (2, 1, {})
    plain = graphcache.wrap(Fn(lambda _, x: x * 2))
    with torch.no_grad():
        assert [plain(x).is_inference() for x in (X, X)] == [False, False]


def test_no_graph_is_of_a_state_that_another_thread_gave_up_during_the_observed_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = Fn(lambda self, x: x * self.scale)
    module.scale = 2.0
    target = dispatcher_of(graphcache.wrap(module)).target
    guard, observe = target.guard, torch_recorder.observe

    def observe_beside_another_thread(*args: Any) -> Any:
        effects = observe(*args)
        guard.forget()
        return effects

    monkeypatch.setattr(torch_recorder, "observe", observe_beside_another_thread)
    with torch.no_grad():
        request = CaptureRequest(target.describe((X,), {}))
        effects = target.recorder.observe(request.call)
        assert effects.cause is None
        outcome = target.recorder.record(request, effects)
    module.scale = 3.0
    guard.snapshot()
    assert not (isinstance(outcome, Recording) and outcome.version == guard.version and not guard.is_stale(False))


def test_two_observed_runs_of_a_module_are_made_one_after_the_other() -> None:
    """What one does while the other begins would be missed: both compare with the state of the module before them."""
    module = graphcache.wrap(Fn(lambda _, x: x + 1), capture_in="background")
    recorder = dispatcher_of(module).target.recorder
    with torch.no_grad(), recorder.observing:
        # Another thread observes.
        assert torch.equal(module(X), X + 1)
    assert module.cache_info().eager == {Reason.PENDING: 1}
    assert not dispatcher_of(module).queue.is_pending(dispatcher_of(module).captures.keys.known()[0])
    module.close()
