"""Answers that lie in the graph's memory: right until the next replay, refused from then on."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphcache
from graphcache import CachedModule
from graphcache.errors import StaleOutputError
from graphcache.modules.views import OutputView, is_plain, plain
from tests.helpers import Fn, in_threads, mlp

X = torch.linspace(-1, 1, 8).reshape(2, 4)

USES: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda y: y + 1,
    "an operation": lambda y: torch.cat([y, y]),
    "as the second argument": lambda y: torch.add(torch.zeros(y_shape), y),
    "in a list": lambda y: torch.stack([torch.zeros(y_shape), y]),
    "a low-level operator": lambda y: torch.ops.aten.mul(y, 2),
    "a view": lambda y: y[0],
    "values": lambda y: y.tolist(),
    "numpy": lambda y: y.numpy(),
    "dlpack": torch.from_dlpack,
    "its address": lambda y: y.data_ptr(),
    "its shape": lambda y: y.shape,
    "printing": repr,
    "a truth value": lambda y: bool(y.sum() > 0),
    "iteration": list,
    "a copy": lambda y: y.clone(),
    "pickling": lambda y: pickle.loads(pickle.dumps(y)),
    "a deep copy": copy.deepcopy,
    "writing": lambda y: y.add_(1),
    "as an index": lambda y: torch.arange(9)[y.long()],
}
y_shape = (2, 4)


def viewing(module: nn.Module, **options: Any) -> CachedModule:
    return graphcache.wrap(module, outputs="view", **options)


def warm(fast: CachedModule, *args: Any) -> None:
    """The first call captures, and answers with a tensor of its own."""
    assert type(fast(*args)) is Tensor


def test_a_replay_shows_the_graphs_own_memory_every_time() -> None:
    module = mlp()
    fast = viewing(module)
    warm(fast, X)
    places = set()
    for scale in (1, 2, 3):
        y = fast(X * scale)
        assert isinstance(y, OutputView)
        assert torch.equal(y, module(X * scale))
        places.add(y.data_ptr())
    assert len(places) == 1


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_any_use_after_a_later_replay_is_refused(use: Callable[[Tensor], Any]) -> None:
    fast = viewing(Fn(lambda _, x: x * 2 + 1))
    warm(fast, X)
    y = fast(X)
    use(y)
    fast(X)
    fast(X)
    with pytest.raises(StaleOutputError, match=r"^an output of Fn was used after 2 later replays of its graph"):
        use(y)


def test_views_of_a_view_are_refused_too_and_what_is_computed_stays() -> None:
    fast = viewing(Fn(lambda _, x: x * 2))
    warm(fast, X)
    y = fast(X)
    views = [y[0], y.t(), y.view(-1), *y.unbind(), *y.split(1), y.detach()]
    computed = [y + 0, y.clone(), y.sum(), torch.stack([y, y])]
    kept = [each.clone() for each in computed]
    fast(X * 7)
    for view in views:
        with pytest.raises(StaleOutputError):
            view.tolist()
    assert all(torch.equal(left, right) for left, right in zip(computed, kept, strict=True))
    assert all(type(each) is Tensor for each in computed)


def test_a_replay_of_another_graph_overwrites_nothing() -> None:
    fast = viewing(mlp())
    small, large = torch.randn(1, 4), torch.randn(5, 4)
    warm(fast, small)
    warm(fast, large)
    y = fast(small)
    fast(large)
    assert torch.equal(y, fast.module(small))


def test_an_answer_is_fed_back() -> None:
    module = Fn(lambda _, x: x.flip(0) * 2 + 1)
    fast = viewing(module)
    state, wanted = X, X
    for _ in range(5):
        state, wanted = fast(state), module(wanted)
        assert torch.equal(state, wanted)
    assert fast.cache_info().hits == 4


def test_structures_and_inputs_handed_through() -> None:
    fast = viewing(Fn(lambda _, x: {"y": [x + 1, x], "n": 3}))
    fast(X)
    answer = fast(X)
    assert isinstance(answer["y"][0], OutputView)
    assert answer["y"][1] is X
    assert answer["n"] == 3
    fast(X)
    with pytest.raises(StaleOutputError):
        answer["y"][0].sum()
    assert answer["y"][1].sum() == X.sum()


def test_one_wrapped_module_takes_what_another_shows() -> None:
    first, second = viewing(mlp()), viewing(mlp())
    for scale in (1.0, 2.0, 3.0):
        y = second(first(X * scale))
        assert torch.equal(y, second.module(first.module(X * scale)))
    # The capture of the first answered with a plain tensor; from then on the second was shown views.
    assert (second.cache_info().captures, second.cache_info().hits, second.cache_info().eager) == (1, 2, {})
    stale = first(X)
    first(X)
    with pytest.raises(StaleOutputError):
        second(stale)
    with second.session(first(X)) as session:
        session.run()
        assert torch.equal(session.outputs, second.module(first.module(X)))


def test_inference_mode_and_back() -> None:
    fast = viewing(mlp())
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            fast(X)
            y = fast(X * 3)
            assert torch.equal(y, fast.module(X * 3))


def test_an_evicted_graph_leaves_its_last_answer() -> None:
    fast = viewing(mlp(), max_graphs=1)
    warm(fast, X)
    y, wanted = fast(X), fast.module(X)
    fast.clear()
    gc.collect()
    assert torch.equal(y, wanted)
    gone = weakref.ref(y._source)
    del y
    assert gone() is None


def test_parts_own_their_outputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = mlp()

        def forward(self, x: Tensor) -> Tensor:
            y = self.part(x)
            return y + self.part(x * 2)[:, :1] if y.sum().item() else y

    fast = viewing(Twice(), include=["part"])
    for _ in range(4):
        assert torch.equal(fast(X), fast.module(X))
    assert fast.cache_info().hits > 0


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=12))
def test_any_sequence_of_calls_and_looks(steps: list[tuple[int, bool]]) -> None:
    fast = viewing(Fn(lambda _, x: x * 3 + 1))
    inputs = [torch.full((size, 2), float(size)) for size in (1, 2, 3)]
    for x in inputs:
        warm(fast, x)
    held: list[tuple[int, int, Tensor, Tensor]] = []
    calls = [0, 0, 0]
    for turn, (index, look) in enumerate(steps):
        x = inputs[index] + turn
        calls[index] += 1
        held.append((index, calls[index], fast(x), x * 3 + 1))
        for which, number, y, wanted in held if look else ():
            if calls[which] == number:
                assert torch.equal(y, wanted)
            else:
                with pytest.raises(StaleOutputError):
                    y.sum()


def test_threads_see_their_own_answer_or_an_error() -> None:
    """Calls and looks take turns, in whatever order: what a look accepts is the answer to its own call."""
    fast = viewing(Fn(lambda _, x: x * 2))
    warm(fast, X)
    turn = threading.Lock()

    def work(number: int) -> None:
        for step in range(50):
            x = X + 100 * number + step
            with turn:
                mine = fast(x)
            with turn:
                try:
                    assert torch.equal(mine, x * 2)
                except StaleOutputError:
                    continue

    in_threads(work, 4)
    assert fast.cache_info().hits == 200


def test_what_is_plain() -> None:
    fast = viewing(mlp())
    warm(fast, X)
    y = fast(X)
    nested: list[Any] = [1, {"a": (y,)}]
    loop: list[Any] = []
    loop.append(loop)
    assert is_plain(X, [X], {"a": X}, None, loop)
    assert not is_plain(nested)
    assert type(plain(nested)[1]["a"][0]) is Tensor
    assert plain(nested)[1]["a"][0].data_ptr() == y.data_ptr()
