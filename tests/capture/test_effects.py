"""What a call does besides answering is noticed, happens once for each call, and is named."""

from __future__ import annotations

import contextvars
import ctypes
import gc
import itertools
import random
import re
import sys
import types
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import Reason
from graphcache.capture.effects import Effects, Watched, observe, snapshot_of
from graphcache.errors import CaptureError
from graphcache.keys.guards import ModuleGuard
from tests.helpers import Fn, frozen, graphs_of, mlp, outcomes, reason, replays, same

X = torch.linspace(-1, 1, 8).reshape(2, 4)
VARIABLE: contextvars.ContextVar[int] = contextvars.ContextVar("VARIABLE", default=0)
COUNTS = {"calls": 0}


def observed(module: nn.Module, *args: Any, **kwargs: Any) -> Effects:
    """One observed run."""
    inputs = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    watched = Watched(ModuleGuard(module).snapshot(), snapshot_of(args, kwargs), inputs, lambda: "")
    return observe(module, args, kwargs, watched)


def test_the_callers_tensor_is_changed_exactly_once():
    fast = graphcache.wrap(Fn(lambda _, x: x.add_(1) * 2))
    x = torch.zeros(3)
    for count in (1, 2, 3):
        assert fast(x).tolist() == [2.0 * count] * 3
        assert x.tolist() == [float(count)] * 3
    assert outcomes(fast) == (2, 1, {})


STATEFUL = {
    "parameter": lambda self: self.parameter.add_(1),
    "buffer": lambda self: self.buffer.add_(1),
    "data of a buffer": lambda self: self.buffer.data.add_(1),
    "detached buffer": lambda self: self.buffer.detach().add_(1),
    "numpy view of a buffer": lambda self: self.buffer.numpy().__iadd__(1),
    "replaced buffer": lambda self: setattr(self, "buffer", self.buffer + 1),
    "tensor in a list": lambda self: self.kept[0].add_(1),
    "replaced tensor": lambda self: setattr(self, "plain", self.plain + 1),
    "number": lambda self: setattr(self, "count", self.count + 1),
}


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("visible", [True, False])
def test_state_is_changed_exactly_once_per_call(name, visible):
    def forward(self: Any, x: Tensor) -> Tensor:
        STATEFUL[name](self)
        return x * 2 + self.total() if visible else x * 2

    def make() -> nn.Module:
        module = Fn(
            forward,
            parameter=nn.Parameter(torch.zeros(1)),
            buffer=nn.Buffer(torch.zeros(1)),
            kept=[torch.zeros(1)],
            count=0,
        )
        module.__dict__["plain"] = torch.zeros(1)
        module.total = lambda: (
            module.parameter.detach() + module.buffer + module.kept[0] + module.plain + float(module.count)
        )
        return module.requires_grad_(False)

    module, twin = make(), make()
    fast = graphcache.wrap(module)
    for _ in range(4):
        assert same(fast(X), twin(X))
        assert same(module.total(), twin.total())


class Kept:
    """A class that functions name, with state behind its methods."""

    @staticmethod
    def default(kept: list[float] = [0.0]) -> list[float]:  # noqa: B006 - what is meant
        return kept

    @classmethod
    def closed(cls) -> list[float]:
        return closed_over()


def _closing(kept: list[float]) -> Any:
    return lambda: kept


closed_over = _closing([0.0])


@pytest.mark.parametrize("name", ["default", "closed"])
def test_state_behind_the_methods_of_a_class_that_is_only_named(name: str) -> None:
    kept = getattr(Kept, name)()

    def counts(_: Any, x: Tensor) -> Tensor:
        found = Kept.default() if name == "default" else Kept.closed()
        found[0] += 1
        return x * found[0]

    fast = graphcache.wrap(Fn(counts))
    before = kept[0]
    for step in range(1, 6):
        assert torch.equal(fast(X), X * (before + step))
    assert kept[0] == before + 5


def test_random_numbers_are_drawn_as_eager_draws_them():
    fast = graphcache.wrap(nn.Dropout(0.5))
    torch.manual_seed(7)
    answers = [fast(X) for _ in range(3)]
    torch.manual_seed(7)
    assert same(answers, [fast.module(X) for _ in range(3)])
    assert fast.cache_info().eager == {Reason.RANDOM: 3}


def test_a_generator_of_the_modules_own_advances_as_in_eager():
    def make() -> nn.Module:
        return Fn(lambda self, x: x + torch.rand(4, generator=self.own), own=torch.Generator().manual_seed(1))

    fast, twin = graphcache.wrap(make()), make()
    for _ in range(3):
        assert same(fast(X), twin(X))
    assert fast.cache_info().eager == {Reason.RANDOM: 3}


def test_nobody_keeps_the_callers_tensors():
    fast = graphcache.wrap(Fn(lambda _, x: (x[0], x * 2)))
    for _ in range(2):
        x = X.clone()
        answer = fast(x)
        gone = [weakref.ref(x), weakref.ref(answer[0]), weakref.ref(answer[1])]
        del x, answer
        gc.collect()
        assert [each() for each in gone] == [None] * 3


# ---- one observed run


class Has:
    """An object with slots."""

    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0


def counting(self: Any) -> None:
    COUNTS["calls"] += 1


@lru_cache
def memo(n: int) -> int:
    return n + 1


EFFECTS: dict[str, tuple[Callable[[Any, Any], object], Reason, str]] = {
    "an input": (lambda self, x: x.add_(1), Reason.MUTATES, "args[0]"),
    "a view of an input": (lambda self, x: x[0].t().zero_(), Reason.MUTATES, "args[0]"),
    "a parameter": (lambda self, x: self.weight.add_(1), Reason.MUTATES, "self.weight"),
    "a buffer past PyTorch": (lambda self, x: ctypes.memset(self.address, 64, 4), Reason.MUTATES, "self.buffer"),
    "an input by NumPy": (lambda self, x: x.numpy().fill(3.0), Reason.HOST_READ, "Tensor.numpy"),
    "a tensor in a list": (lambda self, x: self.kept["a"][0].add_(1), Reason.MUTATES, "self.kept['a'][0]"),
    "an attribute": (lambda self, x: setattr(self, "number", 5), Reason.MUTATES, "self.number"),
    "a new attribute": (lambda self, x: setattr(self, "seen", 5), Reason.MUTATES, "self.seen"),
    "an item": (lambda self, x: self.kept.update(b=1), Reason.MUTATES, "self.kept['b']"),
    "a slot": (lambda self, x: setattr(self.slots, "n", 1), Reason.MUTATES, "self.slots.n"),
    "a NumPy array": (lambda self, x: self.array.fill(1), Reason.MUTATES, "self.array"),
    "an iterator": (lambda self, x: next(self.count), Reason.MUTATES, "self.count"),
    "a training flag": (lambda self, x: self.train(not self.training), Reason.MUTATES, "self.training"),
    "a hook": (
        lambda self, x: self.register_forward_hook(lambda *_: None),
        Reason.MUTATES,
        "self._forward_hooks",
    ),
    "a global": (lambda self, x: counting(self), Reason.MUTATES, "COUNTS['calls']"),
    "a cache": (lambda self, x: memo(1), Reason.MUTATES, "memo"),
    "a context variable": (lambda self, x: VARIABLE.set(VARIABLE.get() + 1), Reason.MUTATES, "VARIABLE"),
    "the grad mode": (lambda self, x: torch.set_grad_enabled(not torch.is_grad_enabled()), Reason.MUTATES, "grad mode"),
    "random numbers": (lambda self, x: torch.rand(1), Reason.RANDOM, "aten.rand"),
    "random numbers in place": (lambda self, x: torch.ones(3).normal_(), Reason.RANDOM, "aten.normal_"),
    "a permutation": (lambda self, x: torch.randperm(4), Reason.RANDOM, "aten.randperm"),
    "a generator": (lambda self, x: torch.rand(1, generator=self.generator), Reason.RANDOM, "aten.rand"),
    "Python's generator": (lambda self, x: random.random(), Reason.RANDOM, "random"),
    "one of Python's": (lambda self, x: self.random.random(), Reason.RANDOM, "Random.random"),
    "NumPy's generator": (lambda self, x: np.random.rand(), Reason.RANDOM, "numpy"),
    "one of NumPy's": (lambda self, x: self.numpy.random(), Reason.RANDOM, "self.numpy"),
}


@pytest.fixture(autouse=True)
def empty() -> None:
    """Nothing in the memo."""
    memo.cache_clear()


def stateful(function: Callable[[Any, Any], object]) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        function(self, x)
        return x * 2

    module = Fn(
        forward,
        weight=nn.Parameter(torch.zeros(1), requires_grad=False),
        buffer=nn.Buffer(torch.zeros(1)),
        kept={"a": [torch.zeros(1)]},
        number=1,
        slots=Has(),
        array=np.zeros(2),
        count=itertools.count(),
        generator=torch.Generator(),
        random=random.Random(1),
        numpy=np.random.default_rng(1),
    )
    module.address = module.buffer.data_ptr()
    return module.eval()


def test_a_number_of_threads_that_a_call_sets_is_an_effect() -> None:
    before = torch.get_num_threads()
    try:
        assert reason(graphcache.wrap(stateful(lambda self, x: torch.set_num_threads(before + 1))), X) is Reason.MUTATES
    finally:
        torch.set_num_threads(before)


def test_the_allocator_that_inductor_sets_at_every_launch_is_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = types.ModuleType("triton.runtime._allocation")
    source = "from contextvars import ContextVar\nheld = ContextVar('held')\ndef set_allocator(): held.set(object())"
    exec(source, vars(triton))
    set_allocator = triton.set_allocator
    with monkeypatch.context() as loaded:
        loaded.setitem(sys.modules, "triton.runtime._allocation", triton)
        fast = graphcache.wrap(stateful(lambda self, x: set_allocator()))
        fast(X), fast(X)
        assert outcomes(fast) == (1, 1, {})
    assert reason(graphcache.wrap(stateful(lambda self, x: set_allocator())), X) is Reason.MUTATES


@pytest.mark.parametrize("name", EFFECTS)
def test_an_effect_is_noticed_and_named(name: str) -> None:
    function, reason, where = EFFECTS[name]
    grad = torch.is_grad_enabled()
    try:
        effects = contextvars.copy_context().run(observed, stateful(function), X.clone())
    finally:
        torch.set_grad_enabled(grad)
    assert effects.cause is not None
    assert effects.cause.reason is reason
    assert where in effects.cause.where


UPDATES = ("a parameter", "a tensor in a list", "an input", "a view of an input")
"""State that a graph updates as well."""


@pytest.mark.parametrize(
    "name", [each for each in EFFECTS if each not in ("a context variable", "the grad mode", *UPDATES)]
)
def test_behind_wrap_it_is_the_reason(name: str) -> None:
    function, reason, where = EFFECTS[name]
    fast = graphcache.wrap(stateful(function), on_failure="raise")
    with pytest.raises(CaptureError, match=rf"{reason.value}.*{re.escape(where)}"):
        fast(X.clone())
    assert fast.cache_info().eager == {reason: 1}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int64], ids=str
)
def test_changes_of_inference_tensors_are_noticed(dtype: torch.dtype) -> None:
    def forward(_: Any, x: Tensor) -> int:
        x[1, 1] = 1
        return 0

    with torch.inference_mode():
        effects = observed(Fn(forward), torch.zeros(2, 3).to(dtype).t())
    assert effects.cause is not None
    assert effects.cause.reason is Reason.MUTATES


QUIET: dict[str, Callable[[Any, Any], object]] = {
    "writes into what it made": lambda self, x: (x + 1).relu_().t().sub_(1),
    "writes into a new constant": lambda self, x: torch.tensor([1.0, 2.0]).mul_(2),
    "writes into new memory": lambda self, x: torch.zeros(2).add_(1),
    "reads state": lambda self, x: (self.kept["a"][0] + self.number, VARIABLE.get(), COUNTS["calls"]),
    "sets what was there": lambda self, x: setattr(self, "number", 1),
    "draws nothing": lambda self, x: nn.functional.dropout(x, 0.5, training=False),
    "reads a memo": lambda self, x: memo.__wrapped__(1),
    "makes objects": lambda self, x: [Has() for _ in range(3)],
}


@pytest.mark.parametrize("name", QUIET)
def test_what_leaves_nothing_behind_is_no_effect(name: str) -> None:
    module = stateful(QUIET[name])
    assert observed(module, X.clone()).cause is None
    fast = graphcache.wrap(module)
    fast(X)
    assert replays(fast, X)


def test_an_observed_run_answers_as_any_and_tells_what_it_read() -> None:
    module = mlp()
    effects = observed(module, X)
    assert same(effects.value, module(X))
    assert {each.data_ptr() for each in effects.outside} == {each.data_ptr() for each in module.parameters()}


def test_what_a_call_raises_is_raised_and_nothing_stays_switched_on() -> None:
    def forward(_: Any, x: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        observed(Fn(forward), X)
    assert sys.getprofile() is None
    assert gc.isenabled()


# ---- what cannot be observed


def by_name(x: Tensor) -> Tensor:
    return x * SCALES[0]


SCALES = [2.0]


def test_functions_that_the_walk_did_not_find_are_observed_once_more() -> None:
    module = Fn(lambda _, x: globals()["".join(["by", "_", "name"])](x))
    # It is no failure: the next call is captured.
    fast = graphcache.wrap(module, on_failure="raise")
    for _ in range(4):
        assert same(fast(X), X * 2)
    info = fast.cache_info()
    assert (info.eager, info.captures, info.hits) == ({Reason.UNSETTLED: 1}, 1, 2)
    SCALES[0] = 3.0
    try:
        for _ in range(2):
            assert same(fast(X), X * 3)
    finally:
        SCALES[0] = 2.0
    assert fast.cache_info().captures == 2


def test_what_an_iterator_holds_since_it_was_begun() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if len(x) == 1:
            raise ValueError("one row")
        return x + next(self.numbers)

    module, twin = (Fn(forward, numbers=itertools.chain(range(50), range(50))) for _ in range(2))
    fast = graphcache.wrap(module)
    for each in (fast, twin):
        with pytest.raises(ValueError, match="one row"):
            each(torch.ones(1, 3))
    assert next(module.numbers) == next(twin.numbers)
    for _ in range(6):
        assert torch.equal(fast(torch.ones(2, 3)), twin(torch.ones(2, 3)))
    assert fast.cache_info().captures == 0


def test_an_iterator_of_an_extension_cannot_be_observed_but_ignored() -> None:
    module = Fn(lambda self, x: x * 2, names=np.nditer(np.arange(3)))
    fast = graphcache.wrap(module)
    for _ in range(2):
        assert same(fast(X), X * 2)
    assert fast.cache_info().eager == {Reason.UNOBSERVED: 2}
    fast = graphcache.wrap(module, ignore=["self.names"])
    fast(X)
    assert replays(fast, X)


def test_while_somebody_profiles_nothing_is_captured() -> None:
    fast = graphcache.wrap(mlp())
    sys.setprofile(lambda *_: None)
    try:
        fast(X)
    finally:
        sys.setprofile(None)
    assert fast.cache_info().eager == {Reason.UNOBSERVED: 1}
    fast(X)
    assert replays(fast, X)


# ---- ignore


class Counts(nn.Module):
    """Counts its calls in several places."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = frozen(nn.Linear(4, 4))
        self.calls = 0
        self.history: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.history.append(self.calls)
        return self.linear(x)


def test_ignored_state_is_no_reason_and_stays_as_the_last_capture_left_it() -> None:
    module = Counts()
    fast = graphcache.wrap(module, ignore=["self.calls", "self.history"])
    fast(X)
    calls = module.calls
    for _ in range(3):
        assert replays(fast, X)
    assert (module.calls, len(module.history)) == (calls, calls)
    module.calls = 100
    assert replays(fast, X)
    fast = graphcache.wrap(module, ignore=["self.calls"], on_failure="raise")
    with pytest.raises(CaptureError, match=r"mutates.*self\.history"):
        fast(X)


class Reads(nn.Module):
    """Two parts that count; between them a read that forbids a graph of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Counts(), Counts()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        return self.blocks[1](x * (1 if x.sum().item() > 0 else 2))


@pytest.mark.parametrize(
    ("ignore", "captured"),
    [
        (["self.blocks[*].calls", "self.blocks[*].history"], {"blocks.0", "blocks.1"}),
        (["self.blocks[0].calls", "self.blocks[0].history"], {"blocks.0"}),
        (["self.blocks[1]"], {"blocks.1"}),
        (["self.blocks"], {"blocks.0", "blocks.1"}),
        (["*.calls", "*.history"], {"blocks.0", "blocks.1"}),
        (["self.*"], {"blocks.0", "blocks.1"}),
        (["self.calls", "self.history"], set()),
        (["self.block"], set()),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
@pytest.mark.parametrize("strategy", ["auto", "per_submodule"])
def test_paths_that_are_ignored_reach_into_parts(ignore: list[str], captured: set[str], strategy: str) -> None:
    include = ("blocks.0", "blocks.1") if strategy == "per_submodule" else ()
    module = Reads()
    fast = graphcache.wrap(module, ignore=ignore, strategy=strategy, include=include)
    for _ in range(6):
        assert same(fast(X), module(X))
    found = {name for name, part in fast.parts.items() if graphs_of(part).entries}
    # The linear layers inside count nothing, and are captured where the parts are not.
    assert {name for name in found if not name.endswith("linear")} == captured


def test_a_context_variable_that_is_set_to_its_default_is_no_effect() -> None:
    variable: contextvars.ContextVar[bool] = contextvars.ContextVar("variable", default=False)

    def forward(_: Any, x: Tensor, value: bool) -> Tensor:
        before = variable.get()
        variable.set(True)
        variable.set(value)
        return x + 1 + before

    def run(value: bool) -> Reason | None:
        return contextvars.Context().run(reason, graphcache.wrap(Fn(forward), ignore=["*variable*"]), X, value)

    assert (run(False), run(True)) == (None, Reason.MUTATES)


@pytest.mark.parametrize("size", [None, 1, 8])
def test_a_cache_that_was_cleared_and_filled_anew_is_noticed(size: int | None) -> None:
    """Its counters are what they were; what it returns is not."""

    @lru_cache(size)
    def table(n: int) -> Tensor:
        return torch.rand(n)

    x = torch.zeros(4)
    with torch.no_grad(), graphcache.wrap(Fn(lambda m, x: x + table(4))) as fast:
        for _ in range(6):
            assert torch.equal(fast(x), table(4))
        assert fast.cache_info().hits
        for _ in range(2):
            table.cache_clear()
            table(4)
            for _ in range(3):
                assert torch.equal(fast(x), table(4))
