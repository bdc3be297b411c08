"""Calls that are padded to buckets: never another answer than the exact call's, whatever the module and the sizes."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphcache
from graphcache import Axis, Buckets, GraphConfig, Mask, Reason
from graphcache.dispatch import background
from graphcache.errors import CaptureError, ClosedError, ConfigError
from graphcache.features import features
from graphcache.graphs.verify import largest_gap
from graphcache.keys.call_spec import CallSpec
from tests.dispatch.test_admission_of_calls import Clock, clock, timed  # noqa: F401 - the fixture is used by its name
from tests.helpers import (
    Fn,
    calls,
    dispatcher_of,
    frozen,
    in_background,
    in_threads,
    mlp,
    outcomes,
    same,
    settled,
    strides,
)

ROWS = {0: [2, 4, 8]}


class Tagger(nn.Module):
    """Indices, norms, products, and a mean over what the mask says is there."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor, *, mask: Tensor | None = None, scale: float = 1.0) -> dict[str, Any]:
        hidden = self.embedding(ids) * scale
        weights = torch.ones(ids.shape) if mask is None else mask.to(hidden.dtype)
        mean = (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
        return {"tags": self.head(hidden), "mean": (mean, ids.dtype), "best": hidden.argmax(-1)}


TAGGER = frozen(Tagger())
LENGTH = Axis([4, 6, 9], name="length")
TAGGED: dict[str, Any] = {"ids": {0: Axis([1, 3], name="batch"), 1: LENGTH}, "mask": Mask(["batch", "length"])}
LINEAR = frozen(nn.Linear(5, 3))


def close(got: Any, wanted: Any) -> bool:
    """Equal structure, types, shapes, dtypes and strides; values up to the order of a sum."""
    if isinstance(wanted, Tensor):
        return strides(got) == strides(wanted) and largest_gap(got, wanted) < 1e-5
    if isinstance(wanted, dict):
        return list(got) == list(wanted) and all(close(got[name], wanted[name]) for name in wanted)
    if isinstance(wanted, (list, tuple)):
        return type(got) is type(wanted) and len(got) == len(wanted) and all(map(close, got, wanted))
    return bool(got == wanted)


def counted(fast: Any, number: int) -> bool:
    """Whether each of so many calls stands in the account once."""
    return calls(fast) == number


# ---- the same answers


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 11), min_size=1, max_size=12), st.integers(0, 99))
def test_elementwise_to_the_last_bit(sizes: list[int], seed: int) -> None:
    fast = graphcache.wrap(Fn(lambda _, x: (x.sin() + 1, x > 0)), buckets={0: ROWS})
    draw = torch.Generator().manual_seed(seed)
    for size in sizes:
        x = torch.randn(size, 3, generator=draw)
        before = x.clone()
        assert same(fast(x), fast.module(x))
        assert same(x, before)
    assert Reason.PADDING not in fast.cache_info().eager
    assert counted(fast, len(sizes))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 10), st.booleans()), min_size=1, max_size=12), st.integers(0, 99))
def test_linear_on_rows_whatever_the_layout(sizes: list[tuple[int, bool]], seed: int) -> None:
    fast = graphcache.wrap(LINEAR, buckets={"input": ROWS})
    draw = torch.Generator().manual_seed(seed)
    for size, turned in sizes:
        x = torch.randn(5, size, generator=draw).t() if turned else torch.randn(size, 5, generator=draw)
        assert close(fast(x), LINEAR(x))
    assert fast.cache_info().eager == {}
    assert counted(fast, len(sizes))


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 10), st.booleans(), st.booleans(), st.sampled_from([1.0, 2.0])),
        min_size=1,
        max_size=8,
    ),
    st.integers(0, 99),
)
def test_an_embedding_and_a_masked_mean(given_calls: list[Any], seed: int) -> None:
    fast = graphcache.wrap(TAGGER, buckets=TAGGED)
    draw = torch.Generator().manual_seed(seed)
    for batch, length, masked, by_name, scale in given_calls:
        ids = torch.randint(10, (batch, length), generator=draw)
        kwargs: dict[str, Any] = {"scale": scale}
        if masked:
            kwargs["mask"] = torch.rand(batch, length, generator=draw) < 0.7
            kwargs["mask"][:, 0] = True
        args = () if by_name else (ids,)
        if by_name:
            kwargs["ids"] = ids
        kept = dict(kwargs)
        assert close(fast(*args, **kwargs), TAGGER(*args, **kwargs))
        assert list(kwargs) == list(kept)
        assert all(kwargs[name] is kept[name] for name in kept)
    assert fast.cache_info().eager == {}


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), min_size=1, max_size=14),
    st.sampled_from(["first", "worthwhile", "prepared"]),
    st.integers(1, 3),
)
def test_whatever_is_evicted_dropped_or_switched_meanwhile(steps: Any, capture: str, room: int) -> None:
    module = frozen(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    fast = graphcache.wrap(module, buckets={"input": ROWS}, capture=capture, max_graphs=room)
    for size, what in steps:
        if what == 0:
            fast.clear()
        elif what == 1:
            module[0].weight = nn.Parameter(torch.randn(3, 3), requires_grad=False)
        x = torch.randn(size, 3)
        if what == 2:
            with torch.inference_mode():
                assert close(fast(x), module(x))
        elif what == 3:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert fast(x).dtype is module(x).dtype
                assert largest_gap(fast(x), module(x)) < 0.05
        else:
            assert close(fast(x), module(x))


def test_answers_are_the_callers_own() -> None:
    fast = graphcache.wrap(LINEAR, buckets={"input": {0: [4]}})
    kept = []
    for step in range(6):
        x = torch.randn(1 + step % 3, 5)
        kept.append((x, fast(x)))
        if step == 4:
            kept[0][1].fill_(7)
    assert all(close(y, LINEAR(x)) for x, y in kept[1:])
    assert (outcomes(fast), fast.cache_info().padded) == ((5, 1, {}), 5)


def test_several_sizes_share_a_graph_and_the_account_says_so() -> None:
    fast = graphcache.wrap(mlp(), buckets={"input": ROWS})
    for size in (3, 4, 3, 4, 7, 5, 8, 2, 1):
        x = torch.ones(size, 4)
        assert close(fast(x), fast.module(x))
    info = fast.cache_info()
    assert (info.captures, info.graphs, info.hits, info.padded, info.eager) == (3, 3, 6, 3, {})
    both = info + info
    assert (both.captures, both.graphs, both.hits, both.padded, both.nbytes) == (6, 6, 12, 6, 2 * info.nbytes)


def test_what_is_larger_than_every_bucket_or_empty_goes_the_normal_way() -> None:
    fast = graphcache.wrap(mlp(), buckets={"input": ROWS})
    for size in (9, 9, 0, 0):
        x = torch.ones(size, 4)
        assert close(fast(x), fast.module(x))
    assert (outcomes(fast), fast.cache_info().padded) == ((2, 2, {}), 0)


def test_what_has_no_such_axis_runs_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    fast = graphcache.wrap(Fn(lambda _, x: x + 1), buckets={0: {1: [4]}})
    with caplog.at_level(logging.WARNING, "graphcache"):
        for _ in range(3):
            assert same(fast(torch.ones(3)), torch.ones(3) + 1)
    assert outcomes(fast) == (1, 1, {Reason.PADDING: 1})
    assert "buckets[0][1]: the argument has 1 dimensions; expected an axis that it has" in caplog.text


def test_a_fill_that_the_dtype_has_not_is_said() -> None:
    fast = graphcache.wrap(Fn(lambda _, x: x + 1), buckets={0: {0: {"sizes": [4], "fill": 0.5}}})
    x = torch.ones(3, dtype=torch.int64)
    for _ in range(3):
        assert same(fast(x), x + 1)
    assert outcomes(fast) == (1, 1, {Reason.PADDING: 1})


def test_other_arguments_than_plain_tensors_go_the_normal_way() -> None:
    fast = graphcache.wrap(Fn(lambda _, x, y=None: x if y is None else y + 1), buckets={0: {0: [4]}})
    for _ in range(2):
        assert fast(3) == 3
        assert same(fast([1], torch.ones(2)), torch.ones(2) + 1)
    assert fast.cache_info().padded == 0


# ---- refusals

CUMSUM = "running sum from the padded side"
DEPENDENT: dict[str, Any] = {
    "softmax": lambda x: x.softmax(0),
    "mean": lambda x: x - x.mean(0),
    CUMSUM: lambda x: x.flip(0).cumsum(0).flip(0),
    "attention": lambda x: (x @ x.t()).softmax(-1) @ x,
    "length": lambda x: x / len(x),
}


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(DEPENDENT)), st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 99))
def test_a_dependent_axis_is_refused_and_every_answer_right(name: str, sizes: list[int], seed: int) -> None:
    function = DEPENDENT[name]
    fast = graphcache.wrap(Fn(lambda _, x: function(x)), buckets={0: {0: [4, 8]}})
    draw = torch.Generator().manual_seed(seed)
    for size in sizes:
        x = torch.randn(size, 3, generator=draw)
        assert close(fast(x), function(x))
    info = fast.cache_info()
    assert info.padded == 0
    assert set(info.eager) <= {Reason.PADDING}
    between = {4 if size < 4 else 8 for size in sizes if size not in (4, 8) and size < 8}
    assert info.eager.get(Reason.PADDING, 0) == len(between), "once for each bucket"
    assert counted(fast, len(sizes))


@pytest.mark.parametrize("sizes", [(3, 1, 2), (1, 3, 1), (2, 1)])
def test_what_is_done_for_one_row_alone_is_found_whatever_comes_first(sizes: tuple[int, ...]) -> None:
    function = lambda x: x * 2 if len(x) > 1 else x * 3  # noqa: E731
    fast = graphcache.wrap(Fn(lambda _, x: function(x)), buckets={0: {0: [4, 8]}})
    for size in (*sizes, 6, 6):
        x = torch.randn(size, 3)
        assert same(fast(x), function(x))
    assert fast.cache_info().eager == {Reason.PADDING: 1}
    assert fast.cache_info().padded == 1, "of 6 rows"


def test_what_differed_is_said(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[Any] = []
    fast = graphcache.wrap(Fn(lambda _, x: x.softmax(0)), buckets={0: {0: Axis([4], name="rows")}})
    fast.subscribe(heard.append)
    with caplog.at_level(logging.WARNING, "graphcache"):
        fast(torch.tensor([1.0, 2.0, 3.0]))
    assert heard[0].cause.reason is Reason.PADDING
    assert "padding rows from 3 to 4 changes the answer: output 0 differs by" in heard[0].cause.detail
    assert "an axis that was declared independent is not" in caplog.text


def test_a_refusal_raises_where_it_was_asked_for() -> None:
    fast = graphcache.wrap(Fn(lambda _, x: x.softmax(0)), buckets={0: {0: [4]}}, on_failure="raise")
    x = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(CaptureError, match=r"padding 0\[0\] from 3 to 4 changes the answer"):
        fast(x)
    assert same(fast(x), x.softmax(0))


def test_a_module_that_changes_itself_does_so_once_a_call_and_is_padded_when_it_stops() -> None:
    module = nn.BatchNorm1d(3).requires_grad_(False)
    fast, twin = graphcache.wrap(module, buckets={"input": ROWS}), nn.BatchNorm1d(3).requires_grad_(False)
    for size in (3, 3, 5, 3):
        x = torch.randn(size, 3)
        assert same(fast(x), twin(x))
        assert same(dict(module.state_dict()), dict(twin.state_dict()))
    # Each as it is: padding would be counted by the running statistics.
    assert fast.cache_info().padded == 0
    fast.eval()
    twin.eval()
    for size in (3, 3, 5):
        x = torch.randn(size, 3)
        assert close(fast(x), twin(x))
    assert fast.cache_info().padded == 1
    fast.train()
    x = torch.randn(3, 3)
    assert same(fast(x), twin.train()(x))
    assert same(dict(module.state_dict()), dict(twin.state_dict()))


@pytest.mark.parametrize("capture_in", ["foreground", "background"])
def test_what_was_found_of_padding_counts_for_the_state_that_it_was_found_in(capture_in: str) -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        return x - x.mean(0) if self.centred else x * 2

    module = Fn(run, centred=False)
    fast = graphcache.wrap(module, buckets={0: {0: [4]}}, capture_in=capture_in)
    draw = torch.Generator().manual_seed(3)

    def call() -> None:
        x = torch.randn(3, 2, generator=draw)
        assert close(fast(x), run(module, x))
        settled(fast)

    padded = []
    for centred in (False, True, False):
        module.centred = centred
        for _ in range(5):
            call()
        padded.append(fast.cache_info().padded)
    assert 0 < padded[0] == padded[1] < padded[2]
    assert fast.cache_info().eager[Reason.PADDING] == 1
    fast.close()


def test_a_module_that_draws_random_numbers_draws_as_many() -> None:
    fast = graphcache.wrap(nn.Dropout(), buckets={"input": ROWS})
    x = torch.ones(3, 50)
    torch.manual_seed(5)
    found = [fast(x) for _ in range(3)]
    torch.manual_seed(5)
    assert all(same(got, fast.module(x)) for got in found)
    assert fast.cache_info().eager == {Reason.RANDOM: 3}


def test_outputs_that_cannot_be_told_are_refused_and_can_be_declared() -> None:
    function = lambda x: torch.cat([x, x])  # noqa: E731
    fast = graphcache.wrap(Fn(lambda _, x: function(x)), buckets={0: {0: [4]}})
    x = torch.randn(3, 2)
    for _ in range(2):
        assert same(fast(x), function(x))
    assert outcomes(fast) == (0, 1, {Reason.PADDING: 1})
    declared = graphcache.wrap(mlp(), buckets=Buckets({"input": {0: [4]}}, outputs={0: {0: "input[0]"}}))
    wrong = graphcache.wrap(mlp(), buckets=Buckets({"input": {0: [3]}}, outputs={0: {1: "input[0]"}}))
    for _ in range(2):
        assert close(declared(torch.ones(3, 4)), declared.module(torch.ones(3, 4)))
        assert close(wrong(torch.ones(2, 4)), wrong.module(torch.ones(2, 4)))
    assert declared.cache_info().padded == 1
    assert outcomes(wrong) == (0, 1, {Reason.PADDING: 1})


def test_what_the_module_raises_is_raised() -> None:
    fast = graphcache.wrap(LINEAR, buckets={"input": ROWS})
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            fast(torch.ones(3, 7))
    assert close(fast(torch.ones(3, 5)), LINEAR(torch.ones(3, 5)))


def test_gradients_run_eagerly_as_they_are() -> None:
    fast = graphcache.wrap(nn.Linear(5, 3), buckets={"input": ROWS})
    x = torch.randn(3, 5)
    fast(x).sum().backward()
    assert fast.module.weight.grad is not None
    with torch.no_grad():
        fast(x)
        fast(x)
    fast(x).sum().backward()
    assert fast.cache_info().eager == {Reason.GRAD: 2}
    assert fast.cache_info().padded == 1


def test_switched_off_nothing_is_padded() -> None:
    fast = graphcache.wrap(mlp(), buckets={"input": ROWS})
    token = graphcache.config.modes.set(graphcache.config.Modes(graphs="off"))
    try:
        assert same(fast(torch.ones(3, 4)), fast.module(torch.ones(3, 4)))
    finally:
        graphcache.config.modes.reset(token)
    assert outcomes(fast) == (0, 0, {Reason.DISABLED: 1})


# ---- the other ways of a call


def test_into_the_callers_memory() -> None:
    fast, out = graphcache.wrap(mlp(), buckets={"input": ROWS}), torch.empty(3, 4)
    for _ in range(3):
        x = torch.randn(3, 4)
        assert fast.forward_into(out, x) is out
        assert close(out, fast.module(x))
    assert fast.cache_info().padded == 2


def test_a_session_is_of_the_sizes_that_it_is_given() -> None:
    fast = graphcache.wrap(mlp(), buckets={"input": ROWS})
    with fast.session(torch.ones(3, 4)) as session:
        assert session.inputs[0].shape == (3, 4)
        session.run()
        assert close(session.outputs, fast.module(torch.ones(3, 4)))


def test_a_strategy_that_excludes_buckets() -> None:
    with pytest.raises(ConfigError, match=r"^buckets with strategy='per_submodule': .*expected one of the two"):
        graphcache.wrap(mlp(), buckets={"input": ROWS}, strategy="per_submodule")


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        (5, r"^buckets=5: expected arguments with axes"),
        ({}, r"^buckets=\{\}: expected arguments with axes"),
        ({"y": ROWS}, r"^buckets\['y'\]: no argument has this name; expected one of \['input'\]"),
        ({1: ROWS}, r"^buckets\[1\]: there are 1 positional arguments"),
        ({"input": {0: [0]}}, r"^buckets\['input'\]\[0\]: the size 0; expected a whole number"),
        ({"input": ROWS, 0: ROWS}, r"^buckets\[0\] is the argument of buckets\['input'\]"),
    ],
)
def test_impossible_buckets_name_the_field(buckets: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        graphcache.wrap(LINEAR, buckets=buckets)


def test_configs_with_buckets_are_hashable_and_comparable() -> None:
    one, other = GraphConfig(buckets={"x": ROWS}), GraphConfig(buckets={"x": {0: [3]}})
    assert hash(one) == hash(GraphConfig(buckets={"x": ROWS}))
    assert one == GraphConfig(buckets={"x": ROWS}) != other


def test_parts_are_not_padded_and_the_whole_falls_back_to_them() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = mlp()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.part(x)
            return y[y[:, 0] > 0]

    fast = graphcache.wrap(Whole(), include=["part"], buckets={"x": ROWS})
    for _ in range(4):
        x = torch.randn(3, 4)
        assert close(fast(x), fast.module(x))
    assert fast.cache_info().padded == 0
    assert fast.cache_info().hits >= 1


def test_closed() -> None:
    fast = graphcache.wrap(mlp(), buckets={"input": ROWS})
    fast(torch.ones(3, 4))
    fast.close()
    with pytest.raises(ClosedError):
        fast(torch.ones(3, 4))


def test_nothing_keeps_it_alive() -> None:
    fast = graphcache.wrap(mlp(), buckets={"input": ROWS})
    fast(torch.ones(3, 4))
    fast(torch.ones(3, 4))
    gone = weakref.ref(fast)
    del fast
    gc.collect()
    assert gone() is None


def test_threads_get_their_own_answers() -> None:
    fast = graphcache.wrap(mlp(), buckets={"input": ROWS}, max_graphs=2)

    def work(index: int) -> None:
        draw = torch.Generator().manual_seed(index)
        for step in range(40):
            x = torch.randn(1 + (step * (index + 1)) % 9, 4, generator=draw)
            assert close(fast(x), fast.module(x))

    in_threads(work)


# ---- what it costs


def test_without_buckets_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = graphcache.wrap(mlp())
    assert dispatcher_of(fast).padding is None
    padded = graphcache.wrap(mlp(), buckets={"input": ROWS})
    x = torch.ones(4, 4)
    padded(x)
    monkeypatch.setattr(dispatcher_of(padded).padding, "answer", None)
    padded(x)
    assert outcomes(padded) == (1, 1, {}), "a call that fills its bucket hits as any other"


def test_the_core_wraps_modules_without_the_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(features, "padding")
    monkeypatch.delattr(features, "advise_buckets")
    fast, x = graphcache.wrap(mlp()), torch.ones(3, 4)
    for _ in range(2):
        assert close(fast(x), fast.module(x))


def test_a_bucket_is_captured_when_the_calls_that_go_there_have_lost_enough(clock: Clock) -> None:  # noqa: F811
    fast = timed(clock, capture="worthwhile", buckets={0: {0: [4]}})
    for step in range(400):
        x = torch.full((1 + step % 3, 3), float(step))
        assert torch.equal(fast(x), x * 2)
    info = fast.cache_info()
    assert (info.captures, info.graphs) == (1, 1), "one for the three sizes"
    assert info.padded == info.hits > 250
    assert set(info.eager) == {Reason.COLD}
    assert counted(fast, 400)


def test_only_prepared_buckets_are_used() -> None:
    fast = graphcache.wrap(mlp(), capture="prepared", buckets={"input": ROWS})
    x = torch.randn(3, 4)
    for _ in range(3):
        assert close(fast(x), fast.module(x))
    assert outcomes(fast) == (0, 0, {Reason.NOT_PREPARED: 3})


# ---- beside the calls


@pytest.fixture
def beside() -> Iterator[None]:
    yield
    for worker in list(background._workers.values()):
        worker.stop()


def test_beside_the_calls_buckets_are_captured_and_tried(beside: None) -> None:
    beside_calls = set()

    def run(_: Any, x: Tensor) -> Tensor:
        if len(x) != 3:
            beside_calls.add(in_background())
        return x * 2

    seen = ["self.function.beside_calls"]
    fast = graphcache.wrap(Fn(run), buckets={0: {0: [4]}}, capture_in="background", ignore=seen)
    for step in range(3):
        x = torch.full((3, 2), float(step))
        assert same(fast(x), x * 2)
        settled(fast)
    assert outcomes(fast) == (1, 1, {Reason.PENDING: 2}), "one until it was captured, one until it was tried"
    assert fast.cache_info().padded == 1
    assert beside_calls == {True}, "no call waited for others"
    fast.clear()
    assert not any(bucket.is_tried for bucket in dispatcher_of(fast).padding._buckets.values())
    x = torch.ones(3, 2)
    assert same(fast(x), x * 2)
    settled(fast)
    fast.close()


def test_beside_the_calls_nothing_runs_that_has_effects(beside: None) -> None:
    module, twin = (nn.BatchNorm1d(2).requires_grad_(False) for _ in range(2))
    fast = graphcache.wrap(module, buckets={0: {0: [4]}}, capture_in="background")
    for size in (3, 4, 3, 2, 4, 3):
        x = torch.randn(size, 2)
        assert same(fast(x), twin(x))
        settled(fast)
        assert same(dict(module.state_dict()), dict(twin.state_dict()))
    assert outcomes(fast) == (0, 0, {Reason.MUTATES: 6})
    fast.close()


@pytest.mark.parametrize("size", [3, 4])
def test_beside_the_calls_effects_of_padded_sizes_alone_are_found(beside: None, size: int) -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        if len(x) == 4:
            self.count += 1
        return x * 2

    fast = graphcache.wrap(Fn(run, count=0), buckets={0: {0: [4]}}, capture_in="background")
    for step in range(4):
        x = torch.full((size, 2), float(step))
        assert same(fast(x), x * 2)
        settled(fast)
    assert fast.cache_info().padded == 0
    assert fast.module.count == (1 if size == 3 else 4), "once beside the calls, never again"
    assert fast.cache_info().graphs == (1 if size == 3 else 0), "of 3 rows"
    fast.close()


def test_beside_the_calls_the_module_runs_alone(beside: None) -> None:
    inside: list[tuple[object, bool]] = []
    together: list[int] = []
    callers = threading.local()

    def run(_: Any, x: Tensor) -> Tensor:
        me = object(), in_background()
        inside.append(me)
        is_caller = getattr(callers, "here", False)
        for _ in range(20):
            others = [each for each in list(inside) if each is not me]
            if others and (not is_caller or any(is_background for _, is_background in others)):
                together.append(len(others))
        inside.remove(me)
        return x * 2

    seen = ["self.function.*"]
    fast = graphcache.wrap(Fn(run), buckets={0: {0: [4, 8, 12]}}, capture_in="background", ignore=seen)

    def work(index: int) -> None:
        callers.here = True
        for step in range(30):
            x = torch.full((1 + (index + step) % 11, 2), float(step))
            assert same(fast(x), x * 2)

    in_threads(work)
    settled(fast)
    assert not together
    assert fast.cache_info().captures
    fast.close()


def test_beside_the_calls_a_refusal_is_heard_of_once(beside: None) -> None:
    fast = graphcache.wrap(Fn(lambda _, x: x.softmax(0)), buckets={0: {0: [4]}}, capture_in="background")
    draw = torch.Generator().manual_seed(1)
    for _ in range(6):
        x = torch.randn(3, 2, generator=draw)
        assert close(fast(x), x.softmax(0))
        settled(fast)
    info = fast.cache_info()
    assert info.eager == {Reason.PENDING: 3, Reason.PADDING: 1}
    assert (info.padded, info.hits) == (0, 2)
    fast.close()


def test_a_trial_that_ends_when_the_module_is_another_one_counts_for_nothing(beside: None) -> None:
    trying, go = threading.Event(), threading.Event()

    def run(self: Any, x: Tensor) -> Tensor:
        if self.training and len(x) == 3 and in_background():
            trying.set()
            go.wait(60)
        return x * 2 if self.training else x - x.mean(0)

    module = Fn(run)
    events = ["self.function.trying", "self.function.go"]
    fast = graphcache.wrap(module, buckets={0: {0: [4]}}, capture_in="background", ignore=events)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(2))
    fast(x)
    settled(fast)
    fast(x)
    assert trying.wait(60)
    module.eval()
    # The next call waits for the one run of the trial that is under way.
    go.set()
    assert close(fast(x), x - x.mean(0))
    settled(fast)
    for _ in range(6):
        assert close(fast(x), x - x.mean(0))
        settled(fast)
    assert fast.cache_info().padded == 0
    assert fast.cache_info().eager[Reason.PADDING] == 1
    fast.close()


# ---- advice


def test_advice_from_what_was_seen_counts_every_call() -> None:
    fast = graphcache.wrap(mlp(), max_graphs=2)
    for size, times in ((1, 5), (2, 4), (3, 1), (8, 3)):
        for _ in range(times):
            fast(torch.ones(size, 4))
    advice = fast.advise_buckets(most=2, argument="input")
    assert (advice.calls, advice.shapes, advice.work) == (13, 4, 4 * (5 + 8 + 3 + 24))
    assert str(fast.advise_buckets(most={0: 2})) == str(advice)
    assert list(advice.option()) == [0]
    tuned = graphcache.wrap(fast.module, buckets={"input": advice.option()})
    for size in (1, 2, 3, 8):
        x = torch.randn(size, 4)
        assert close(tuned(x), tuned.module(x))
    assert tuned.cache_info().graphs == 2


@pytest.mark.parametrize("capture_in", ["foreground", "background"])
def test_padded_calls_count_by_their_own_sizes(capture_in: str, beside: None) -> None:
    fast = graphcache.wrap(mlp(), buckets={"input": {0: [4]}}, capture_in=capture_in)
    for size in (3, 3, 3, 4, 4, 2):
        fast(torch.ones(size, 4))
        settled(fast)
    wanted = {(3, 4): 3, (4, 4): 2, (2, 4): 1}

    def seen() -> dict[tuple[int, ...], int]:
        keys = dispatcher_of(fast).captures.keys
        return {CallSpec(key).tensors[0].shape: keys.calls(key) for key in keys.known()}

    assert seen() == wanted
    fast.clear()
    assert seen() == wanted
    assert fast.advise_buckets(most=3).calls == 6


def test_advice_from_a_trace() -> None:
    fast = graphcache.wrap(mlp())
    trace = {(1, 4): 9, (7, 4): 2, (8, 4): 2}
    assert fast.advise_buckets(trace, 2).option() == {0: [1, 8]}
    assert fast.advise_buckets(list(trace.items()), {0: 1, 1: 1}).option() == {0: [8], 1: [4]}


@pytest.mark.parametrize(
    ("given_options", "message"),
    [
        ({}, r"^argument=0: Sequential was not called with a tensor there; call it first"),
        ({"argument": "y"}, r"^argument='y': no argument has this name"),
        ({"argument": -1}, r"^argument=-1: expected a name, or a position"),
        ({"argument": None}, r"^argument=None: expected a name"),
        ({"trace": 5}, r"^trace=5: expected shapes"),
        ({"trace": "ab"}, r"^trace='ab': expected shapes"),
        ({"trace": [5]}, r"^trace\[0\]=5: expected a shape and how often"),
        ({"trace": {(1,): 1}, "most": 0}, r"^most=0: expected a whole number"),
        ({"trace": {(1,): 1}, "most": True}, r"^most=True: expected a whole number"),
        ({"trace": {(1,): 1}, "most": {3: 1}}, r"^most: the axis 3; expected"),
        ({"trace": {(): 1}}, r"^most: the axis 0; expected"),
    ],
)
def test_advice_that_cannot_be_given(given_options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        graphcache.wrap(mlp()).advise_buckets(**given_options)
