from __future__ import annotations

import copy
import gc
import logging
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphcache
from graphcache import CachedModule, Reason
from graphcache.errors import CaptureError, ClosedError, ConfigError
from graphcache.events import Captured, Evicted, RanEagerly
from tests.effort import share
from tests.helpers import (
    Fn,
    calls,
    constants,
    frozen,
    graphs_of,
    in_threads,
    mlp,
    outcomes,
    reason,
    replays,
    same,
    structures,
    tensors,
)

X = torch.linspace(-1, 1, 8).reshape(2, 4)


def every_leaf(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The arguments' own structure, with something new in the place of every tensor."""
    return pytree.tree_map(
        lambda leaf: (leaf.double() * 2 + 1).cumsum(-1) if isinstance(leaf, Tensor) and leaf.dim() else leaf,
        (args, dict(kwargs)),
    )


def wrapped(function: Any = every_leaf, **options: Any) -> CachedModule:
    return graphcache.wrap(Fn(function), **options)


def test_the_first_call_captures_and_the_next_ones_replay():
    fast = graphcache.wrap(mlp())
    for _ in range(3):
        assert same(fast(X), fast.module(X))
    assert outcomes(fast) == (2, 1, {})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"include": ["0"]},
        {"include": ["0"], "strategy": "per_submodule"},
        {"capture": "worthwhile"},
        {"buckets": {0: {0: [4, 8]}}},
    ],
    ids=str,
)
def test_who_lets_go_of_a_wrapped_module_frees_it_at_once(options):
    """Graphs hold device memory: it must not wait for the collector."""
    fast = graphcache.wrap(mlp(), **options)
    for _ in range(2):
        fast(X)
    fast.prepare((X,), progress=False)
    graphs = [entry.graph.graph for each in (fast, *fast.parts.values()) for entry in graphs_of(each).entries.values()]
    gone = [weakref.ref(each) for each in (fast, *graphs)]
    assert len(gone) > 1
    # What torch leaves behind at the first call in a process is none of ours.
    gc.collect()
    gc.disable()
    try:
        del fast, graphs
        assert [each() for each in gone] == [None] * len(gone)
    finally:
        gc.enable()


def test_shapes_seen_before_are_not_captured_again():
    fast = graphcache.wrap(mlp())
    for size in (1, 2, 3, 1, 2, 3):
        x = torch.randn(size, 4)
        assert same(fast(x), fast.module(x))
    assert outcomes(fast) == (3, 3, {})


@given(
    st.lists(
        st.tuples(
            st.lists(structures(tensors() | constants), min_size=1, max_size=2),
            st.dictionaries(st.sampled_from(["a", "b"]), tensors(), max_size=2),
        ),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=share(150, 30))
def test_answers_equal_eager_stay_intact_and_are_counted(arguments):
    fast = wrapped(max_graphs=2)
    held: list[tuple[Any, Any]] = []
    for count, (args, kwargs) in enumerate([*arguments, *arguments, arguments[-1]], 1):
        answer = fast(*args, **kwargs)
        assert same(answer, fast.module(*args, **kwargs))
        held.append((answer, copy.deepcopy(answer)))
        assert fast.cache_info().graphs <= 2
        assert calls(fast) == count
    assert all(same(answer, before) for answer, before in held)


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=25), budget=st.integers(16, 600))
@settings(max_examples=40)
def test_the_budget_in_bytes_holds_after_every_call(sizes, budget):
    fast = graphcache.wrap(mlp(), max_bytes=budget)
    for count, size in enumerate(sizes, 1):
        x = torch.ones(size, 4) * count
        assert same(fast(x), fast.module(x))
        info = fast.cache_info()
        assert info.nbytes <= budget
        assert calls(fast) == count
    assert (info.eager.get(Reason.OVER_BUDGET, 0) > 0) == any(size * 16 > budget for size in sizes)
    assert info.captures - info.evictions == info.graphs


def test_the_least_recently_replayed_graph_goes_first():
    fast = graphcache.wrap(mlp(), max_graphs=2)
    one, two, three = (torch.randn(size, 4) for size in (1, 2, 3))
    for x in (one, two, one, three):
        fast(x)
    assert replays(fast, one)
    assert not replays(fast, two)
    assert fast.cache_info().evictions == 2


def test_hits_of_evicted_graphs_are_not_forgotten():
    fast = graphcache.wrap(mlp(), max_graphs=1)
    for size in (1, 1, 2, 2, 2, 1):
        fast(torch.randn(size, 4))
    info = fast.cache_info()
    assert (info.hits, info.captures, info.evictions, info.graphs) == (3, 3, 2, 1)
    assert info.capture_seconds > 0


def test_dtypes_strides_and_constants_have_graphs_of_their_own():
    fast = wrapped(lambda _, x, n=1: x * n)
    for x in (X, X.double(), X.t(), X[:, ::2]):
        for n in (1, 1.0, True, 2):
            assert same(fast(x, n), x * n)
            assert same(fast(x, n=n), x * n)
    assert fast.cache_info().captures == 32


# ---- modes of the caller


def test_gradients_are_never_lost():
    module = nn.Linear(4, 2)
    fast = graphcache.wrap(module)
    assert reason(fast, X) is Reason.GRAD
    fast(X).sum().backward()
    assert module.weight.grad is not None
    with torch.no_grad():
        fast(X)
        assert replays(fast, X)
    assert fast(X).requires_grad
    assert not wrapped(lambda _, x: x * 2)(X).requires_grad


def test_an_input_that_requires_gradients_runs_eagerly():
    fast, x = wrapped(lambda _, x: x * 2), torch.ones(2, requires_grad=True)
    fast(torch.ones(2))
    fast(x).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]
    assert fast.cache_info().eager == {Reason.GRAD: 1}


def test_an_answer_that_requires_gradients_in_spite_of_no_grad_still_does():
    def insistent(self: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.inner(x)

    fast = graphcache.wrap(Fn(insistent, inner=nn.Linear(4, 2)))
    with torch.no_grad():
        assert [fast(X).requires_grad for _ in range(3)] == [True] * 3


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("then", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_answers_are_inference_tensors_when_eager_ones_are(first, then):
    fast = graphcache.wrap(mlp())
    for mode in (first, then, first, then):
        with mode():
            answer, eager = fast(X), fast.module(X)
            assert (answer.is_inference(), answer.requires_grad) == (eager.is_inference(), eager.requires_grad)
            assert same(answer, eager)
    assert fast.cache_info().eager == {}


def test_inputs_made_for_inference_are_taken_outside_of_it():
    with torch.inference_mode():
        x = X * 1
    fast = graphcache.wrap(mlp())
    with torch.no_grad():
        for _ in range(2):
            assert same(fast(x), fast.module(x))
    assert outcomes(fast) == (1, 1, {})


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.tensor([1 + 2j, 3 - 1j]).conj(),
        lambda: torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
        lambda: torch.randn(1, 2)[:, 0],
        lambda: torch.zeros(0, 3),
        lambda: torch.tensor(True),
    ],
    ids=["conjugate", "negative", "one element of two", "empty", "bool"],
)
def test_odd_inference_tensors_are_answered(make):
    fast = wrapped(lambda _, x: x * 2)
    with torch.inference_mode():
        x = make()
        for _ in range(3):
            assert same(fast(x), x * 2)
    assert outcomes(fast) == (2, 1, {})


def test_a_module_that_asks_for_inference_mode_gets_the_mode_of_the_call():
    fast = wrapped(lambda _, x: x * (2 if torch.is_inference_mode_enabled() else 3))
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            assert same(fast(X), fast.module(X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_has_graphs_of_its_own(dtype):
    fast = graphcache.wrap(mlp())
    fast(X)
    for _ in range(2):
        with torch.autocast("cpu", dtype):
            answer = fast(X)
            assert answer.dtype is dtype
            assert same(answer, fast.module(X))
    assert outcomes(fast) == (1, 2, {})


def test_autocast_inside_the_module_is_part_of_the_graph():
    def half(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x)

    fast = graphcache.wrap(frozen(Fn(half, inner=nn.Linear(4, 2))))
    for _ in range(2):
        assert same(fast(X), fast.module(X))
    assert outcomes(fast) == (1, 1, {})


def test_a_part_that_switches_autocast_off_stays_off():
    def full(_: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return x @ x.t()

    fast = wrapped(full)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            assert same(fast(X), fast.module(X))
    assert outcomes(fast) == (1, 1, {})


# ---- tracers


def test_make_fx_sees_the_operations_of_the_module():
    from torch.fx.experimental.proxy_tensor import make_fx

    fast = wrapped(lambda _, x: x * 2 + 1, on_failure="raise")
    fast(X)
    for mode in ("real", "fake", "symbolic"):
        traced = make_fx(fast, tracing_mode=mode)(X)
        assert same(traced(X + 1), (X + 1) * 2 + 1)
    assert fast.cache_info().eager == {Reason.TRACING: 3}


def test_compile_runs_the_module_plainly():
    fast = graphcache.wrap(mlp())
    fast(X)
    compiled = torch.compile(fast, backend="eager")
    for x in (X, X + 1):
        assert same(compiled(x), fast.module(x))
    assert fast.cache_info().captures == 1
    # Dynamo has set an attribute of the module, so that it is captured once more.
    fast(X)
    assert replays(fast, X)
    assert fast.cache_info().captures == 2


def test_export_runs_the_module_plainly():
    fast = graphcache.wrap(mlp(), on_failure="raise")
    fast(X)
    program = torch.export.export(fast, (X,))
    assert same(program.module()(X + 1), fast.module(X + 1))


def test_vmap_and_grad_go_through():
    fast = wrapped(lambda _, x: x.sin() * 2)
    fast(X[0])
    assert same(torch.vmap(fast)(X), X.sin() * 2)
    gradient = torch.func.grad(lambda x: fast(x).sum())(X[0])
    assert torch.allclose(gradient, X[0].cos() * 2)
    assert fast.cache_info().eager == {Reason.TRACING: 2}


def test_another_dispatch_mode_sees_every_call():
    from torch.utils.flop_counter import FlopCounterMode

    fast = graphcache.wrap(mlp())
    fast(X)
    with FlopCounterMode(display=False) as counter:
        fast(X)
    assert counter.get_total_flops() == 2 * 2 * 2 * 4 * 4


# ---- refused, and still answered


def test_a_host_read_is_named_logged_once_and_counted(caplog):
    fast = wrapped(lambda _, x: x * x.sum().item())
    for _ in range(5):
        assert same(fast(X), fast.module(X))
    assert outcomes(fast) == (0, 0, {Reason.HOST_READ: 5})
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert (
        "Fn ran eagerly: host_read: the host reads a value that the device computes (at aten._local_scalar_dense"
        in (caplog.text)
    )


@pytest.mark.parametrize("value", [{1}, object(), lambda: None, iter(()), X.to_sparse(), nn.ReLU(), bytearray(b"x")])
def test_arguments_that_cannot_be_told_apart_run_eagerly(value):
    fast = wrapped(lambda _, x, other: (x * 2, other)[0])
    for _ in range(2):
        assert same(fast(X, value), X * 2)
    assert outcomes(fast) == (0, 0, {Reason.ARGUMENT: 2})


def test_a_structure_that_contains_itself_runs_eagerly():
    fast = wrapped(lambda _, x, other: x * 2)
    loop: list[Any] = []
    loop.append(loop)
    assert reason(fast, X, loop) is Reason.ARGUMENT


def test_tensors_on_two_devices_run_eagerly():
    fast = wrapped(lambda _, x, y: x * y.shape[0])
    assert reason(fast, X, torch.zeros(3, device="meta")) is Reason.ARGUMENT


@pytest.mark.parametrize("call", [{1}, "item", "mask", "random"])
def test_on_request_a_refusal_is_an_error_that_names_module_and_reason(call):
    def forward(_: Any, x: Tensor, how: Any) -> Any:
        if how == "item":
            return x * x.sum().item()
        return x[x > 0] if how == "mask" else x + torch.rand(4)

    fast = wrapped(forward, on_failure="raise")
    for _ in range(2):
        with pytest.raises(CaptureError, match=r"^Fn: (host_read|data_dependent|random|argument): .* To change that: "):
            fast(X, call)


def test_on_request_switched_off_is_still_no_error(monkeypatch):
    monkeypatch.setenv("GRAPHCACHE_DISABLE", "1")
    fast = wrapped(on_failure="raise")
    assert reason(fast, X) is Reason.DISABLED


def test_the_environment_is_read_when_a_module_is_wrapped(monkeypatch):
    before = graphcache.wrap(mlp())
    monkeypatch.setenv("GRAPHCACHE_DISABLE", "true")
    after = graphcache.wrap(mlp())
    assert (reason(before, X), reason(after, X)) == (None, Reason.DISABLED)
    monkeypatch.delenv("GRAPHCACHE_DISABLE")
    assert reason(after, X) is Reason.DISABLED


@pytest.mark.parametrize("warm", [False, True])
def test_exceptions_of_the_module_propagate_and_leave_nothing_half_made(warm):
    fast = wrapped(lambda _, x, index: x.select(0, index) * 2)
    if warm:
        fast(X, 0)
    before = outcomes(fast)
    for _ in range(2):
        with pytest.raises(IndexError):
            fast(X, 5)
    assert outcomes(fast) == before
    assert same(fast(X, 1), X[1] * 2)


def test_the_wrong_arguments_raise_what_the_module_raises():
    fast = graphcache.wrap(mlp())
    fast(X)
    for args, kwargs in (((), {}), ((X, X), {}), ((), {"y": X}), ((torch.ones(2, 3),), {}), (("text",), {})):
        with pytest.raises((TypeError, RuntimeError)) as eager:
            fast.module(*args, **kwargs)
        with pytest.raises(eager.type):
            fast(*args, **kwargs)
    assert replays(fast, X)


def test_nothing_is_captured_while_the_user_interrupts():
    def forward(_: Any, x: Tensor, how: str) -> Tensor:
        if how == "interrupt":
            raise KeyboardInterrupt
        return x * 2

    fast = wrapped(forward)
    with pytest.raises(KeyboardInterrupt):
        fast(X, "interrupt")
    assert fast.cache_info().graphs == 0
    assert same(fast(X, ""), X * 2)


# ---- clear, close, subscribe


def test_clear_drops_graphs_and_forgets_what_was_blocked():
    fast = wrapped(lambda self, x: x * (x.sum().item() if self.reads else 2), ignore=["self.reads"])
    fast.module.reads = True
    fast(X)
    fast.module.reads = False
    assert reason(fast, X) is Reason.HOST_READ
    fast.clear()
    assert reason(fast, X) is None
    assert replays(fast, X)
    fast.clear()
    assert (fast.cache_info().graphs, fast.cache_info().nbytes, fast.cache_info().evictions) == (0, 0, 1)
    assert not replays(fast, X)


def test_a_closed_module_refuses_every_call_and_the_original_still_works():
    fast = graphcache.wrap(mlp())
    fast(X)
    fast.close()
    fast.close()
    for args in ((X,), (torch.zeros(1, 4),), ({1},)):
        with pytest.raises(ClosedError, match=r"^Sequential was closed; wrap its \.module again$"):
            fast(*args)
    assert fast.cache_info().graphs == 0
    assert same(graphcache.wrap(fast.module)(X), fast.module(X))


def test_closed_at_the_end_of_a_block():
    with graphcache.wrap(mlp()) as fast:
        fast(X)
    with pytest.raises(ClosedError):
        fast(X)


def test_subscribers_hear_of_captures_evictions_and_eager_calls_until_they_leave():
    fast = wrapped(lambda _, x, how: x * (x.sum().item() if how else 2), max_graphs=1)
    seen: list[Any] = []
    leave = fast.subscribe(seen.append)
    fast(X, False)
    fast(X, False)
    fast(X[:1], False)
    fast(X, True)
    leave()
    leave()
    fast(X, True)
    assert [type(event) for event in seen] == [Captured, Evicted, Captured, RanEagerly]
    assert (seen[0].nodes, seen[0].nbytes, seen[1].hits, seen[1].key) == (1, 32, 1, seen[0].key)
    assert seen[3].cause.reason is Reason.HOST_READ


def test_a_subscriber_may_call_the_module(caplog):
    fast = graphcache.wrap(mlp(), max_graphs=1)
    answers: list[Any] = []
    fast.subscribe(lambda event: answers.append(fast(X)) if len(answers) < 3 else None)
    fast(torch.zeros(1, 4))
    assert all(same(answer, fast.module(X)) for answer in answers)
    assert answers
    assert not caplog.records


# ---- what wrapping leaves alone


def test_wrapping_leaves_the_module_exactly_as_it_was():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    module[0].register_forward_hook(lambda *_: None)
    frozen(module)
    before = {name: dict(each.__dict__) for name, each in module.named_modules()}
    fast = graphcache.wrap(module)
    auto = graphcache.wrap(module, strategy="per_submodule", include=["0", "1"])
    for each in (fast, auto, fast, auto):
        each(X)
    fast.close()
    auto.close()
    assert {name: dict(each.__dict__) for name, each in module.named_modules()} == before
    assert [type(each) for each in module.modules()] == [nn.Sequential, nn.Linear, nn.BatchNorm1d, nn.ReLU]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_wrapped_module_is_copied_and_pickled_as_if_it_were_not(duplicate):
    module = mlp()
    fast = graphcache.wrap(module, include=["0"])
    fast(X)
    again = duplicate(module)
    fast(X)
    again[0].weight.zero_()
    assert not same(again(X), fast(X))
    assert same(fast(X), module(X))


def test_the_wrapper_has_the_names_and_the_state_of_the_module():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    fast = graphcache.wrap(module)
    for ask in ("named_parameters", "named_buffers", "named_children"):
        assert [(name, id(each)) for name, each in getattr(fast, ask)()] == [
            (name, id(each)) for name, each in getattr(module, ask)()
        ]
    assert list(fast.state_dict()) == list(module.state_dict())
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in module.named_modules()]
    assert fast.training
    assert fast.eval() is fast
    assert not any(each.training for each in module.modules())


def test_attributes_of_the_module_are_found_and_missing_ones_are_missing():
    fast = graphcache.wrap(Fn(every_leaf, scale=3))
    assert fast.scale == 3
    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        _ = fast.missing


@pytest.mark.parametrize("name", ["_cache", "config", "parts", "ledger", "_run", "_blocks", "name"])
@pytest.mark.parametrize("value", [nn.ReLU(), nn.Buffer(torch.ones(4))], ids=["child", "buffer"])
def test_a_module_may_name_its_parts_as_it_likes(name, value):
    fast = graphcache.wrap(Fn(lambda self, x: x * 2, **{name: value}))
    for _ in range(2):
        assert same(fast(X), X * 2)
    assert outcomes(fast) == (1, 1, {})
    assert getattr(fast.module, name) is value


def test_conversions_of_the_wrapper_convert_the_module():
    fast = graphcache.wrap(mlp())
    fast(X)
    assert fast.double() is fast
    assert fast.module[0].weight.dtype is torch.float64
    assert same(fast(X.double()), fast.module(X.double()))


def test_the_representation_names_module_and_strategy():
    fast = graphcache.wrap(mlp())
    fast(X)
    assert "CachedModule(\n  Sequential, 1 graphs, strategy='auto'" in repr(fast)


def test_wrapping_twice_is_refused_and_two_wrappers_are_not():
    module = mlp()
    one, two = graphcache.wrap(module), graphcache.wrap(module)
    with pytest.raises(ConfigError, match=r"Sequential is wrapped already; use it as it is, or wrap its \.module"):
        graphcache.wrap(one)
    assert same(one(X), two(X))
    one.close()
    assert same(two(X), module(X))


@pytest.mark.parametrize("value", [None, "m.engine", torch.relu, nn.ReLU])
def test_what_is_no_module_is_refused(value):
    with pytest.raises(ConfigError, match=r"expected an nn\.Module, got"):
        graphcache.wrap(value)


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(3), lambda: nn.Sequential(nn.LazyLinear(3), nn.ReLU())])
def test_parameters_that_do_not_exist_yet_are_waited_for(make):
    fast = graphcache.wrap(make())
    with torch.no_grad():
        for _ in range(3):
            assert same(fast(X), fast.module(X))
    assert fast.cache_info().hits > 0


def test_sparse_state_runs_eagerly_or_replays_but_never_fails():
    module = Fn(lambda self, x: self.matrix @ x)
    module.register_buffer("matrix", torch.eye(2).to_sparse())
    fast = graphcache.wrap(module)
    for _ in range(2):
        assert same(fast(X), X)


def test_the_cached_module_inside_another_one_stands_back():
    inner = graphcache.wrap(mlp())
    outer = graphcache.wrap(nn.Sequential(inner, nn.ReLU()))
    for _ in range(3):
        assert same(outer(X), inner.module(X).relu())
    assert outcomes(outer) == (2, 1, {})
    assert set(inner.cache_info().eager) == {Reason.DISABLED}
    assert same(inner(X), inner.module(X))
    assert inner.cache_info().captures == 1


def test_the_cached_module_inside_an_eager_one_replays():
    inner = graphcache.wrap(mlp())
    outer = graphcache.wrap(Fn(lambda self, x: self.inner(x) * x.sum().item(), inner=inner))
    for _ in range(3):
        assert same(outer(X), inner.module(X) * X.sum().item())
    assert inner.cache_info().hits == 1


# ---- threads


def test_threads_share_one_module():
    fast = graphcache.wrap(mlp(), max_graphs=3)

    def work(index: int) -> None:
        generator = torch.Generator().manual_seed(index)
        for step in range(60):
            x = torch.randn(1 + (index + step) % 5, 4, generator=generator)
            assert same(fast(x), fast.module(x))

    in_threads(work)
    assert fast.cache_info().graphs <= 3
    assert set(fast.cache_info().eager) <= {Reason.CAPTURE_FAILED, Reason.PENDING}


def test_threads_that_ask_for_the_same_graph_capture_it_once():
    fast = graphcache.wrap(mlp())
    in_threads(lambda index: [fast(X) for _ in range(10)])
    hits, captures, eager = outcomes(fast)
    assert (hits + captures + sum(eager.values()), captures) == (40, 1)
    assert set(eager) <= {Reason.PENDING}, "nobody waits for a capture of another thread"


def test_a_call_waits_for_no_capture_of_another_thread():
    captures, may_go_on = threading.Event(), threading.Event()
    x, thread = torch.ones(2), threading.current_thread()

    class Slow(nn.Module):
        def forward(self, x):
            return x + 1

    class Waits:
        def before(self, kind, module):
            if threading.current_thread() is not thread:
                captures.set()
                assert may_go_on.wait(60)

        def after(self, kind, module, seconds, done):
            pass

    fast = graphcache.wrap(Slow())
    fast.observe(Waits())
    other = threading.Thread(target=fast, args=(torch.ones(3),))
    other.start()
    assert captures.wait(60)
    assert same(fast(x), x + 1)
    assert outcomes(fast) == (0, 0, {Reason.PENDING: 1})
    may_go_on.set()
    other.join()
    assert same(fast(x), x + 1)
    assert outcomes(fast) == (0, 2, {Reason.PENDING: 1})


def test_threads_on_modules_of_their_own_and_on_shared_weights():
    shared = mlp()
    fast = [graphcache.wrap(shared if index % 2 else mlp()) for index in range(4)]

    def work(index: int) -> None:
        for step in range(30):
            x = torch.full((1 + step % 3, 4), float(index))
            assert same(fast[index](x), fast[index].module(x))

    in_threads(work)
    assert [each.cache_info().captures for each in fast] == [3] * 4


def test_a_thread_that_clears_does_not_disturb_those_that_call():
    fast = graphcache.wrap(mlp())

    def work(index: int) -> None:
        for step in range(40):
            if index == 0:
                fast.clear()
            x = torch.full((1 + step % 3, 4), float(index))
            assert same(fast(x), fast.module(x))

    in_threads(work)


def test_grad_and_dispatch_modes_of_one_thread_are_not_those_of_another():
    fast = graphcache.wrap(nn.Linear(4, 4))

    def work(index: int) -> None:
        for _ in range(30):
            with torch.set_grad_enabled(index % 2 == 0):
                assert fast(X).requires_grad == (index % 2 == 0)

    in_threads(work)
