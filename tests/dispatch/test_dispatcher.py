"""The slow way by itself: what is captured, what runs eagerly, and what is answered either way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache.cache.graph_cache import Entry
from graphcache.capture.recording import Recording
from graphcache.config import GraphConfig, graphs_off
from graphcache.dispatch.dispatcher import STALE
from graphcache.errors import CaptureError, Cause, ClosedError, Reason
from graphcache.keys.call_key import KeyedCall, describe
from graphcache.keys.guards import ModuleGuard
from graphcache.modules.cached_module import CachedModule
from graphcache.modules.session import capture_alone
from tests.helpers import dispatcher_of


class Slow:
    """The dispatcher of one module, which counts the replays it is asked for."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        self.module = module
        self.fast = CachedModule(module, GraphConfig(max_graphs=2, **options), name="net")
        self.dispatcher = dispatcher_of(self.fast)
        self.ledger = self.dispatcher.ledger
        self.cache = self.dispatcher.captures.graphs
        self.hits = 0
        self.dispatcher.replay = self.hit

    def hit(self, entry: Entry[Recording], call: KeyedCall, out: Any = None) -> Any:
        self.hits += 1
        return entry.graph.build(entry.graph.replay(call.tensors, out), call.tensors)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.dispatcher.miss(describe(args, kwargs))


class Branches(nn.Module):
    """Looks at a value."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum().item() > 0 else x - 1


class Odd:
    """An argument that no key describes."""

    __slots__ = ()


class Takes(nn.Module):
    """Takes one more argument, and leaves it alone."""

    def forward(self, x: Tensor, other: object = None) -> Tensor:
        return x + 1


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU()).requires_grad_(False)


X = torch.linspace(-1, 1, 8).reshape(2, 4)


def test_a_miss_is_answered_and_kept() -> None:
    slow = Slow(net())
    assert torch.equal(slow(X), slow.module(X))
    assert (len(slow.cache), slow.ledger.captures, slow.hits) == (1, 1, 0)


def test_who_comes_second_finds_the_graph_of_the_first() -> None:
    slow = Slow(net())
    for _ in range(2):
        assert torch.equal(slow(X), slow.module(X))
    assert (slow.ledger.captures, slow.hits) == (1, 1)


def test_a_graph_that_could_not_answer_is_captured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(net())
    slow(X)
    with monkeypatch.context() as patch:
        patch.setattr(slow.dispatcher, "replay", lambda *_: STALE)
        assert torch.equal(slow(X), slow.module(X))
    assert (slow.ledger.captures, len(slow.cache)) == (2, 1)
    assert torch.equal(slow(X), slow.module(X))
    assert slow.hits == 1


def test_what_cannot_be_captured_is_answered_once_and_remembered() -> None:
    module = Branches()
    slow = Slow(module)
    for x in (X + 3, X - 3, X + 3):
        assert torch.equal(slow(x), module(x))
    assert dict(slow.ledger.eager) == {Reason.HOST_READ: 3}
    slow.dispatcher.clear()
    assert torch.equal(slow(X - 3), module(X - 3))
    assert slow.ledger.eager[Reason.HOST_READ] == 4


def test_on_failure_raises_what_cannot_be_captured_and_nothing_else() -> None:
    slow = Slow(Branches(), on_failure="raise")
    for _ in range(2):
        with pytest.raises(CaptureError, match=r"^net: host_read"):
            slow(X)
    with graphs_off():
        assert torch.equal(slow(X + 3), slow.module(X + 3))


def test_a_graph_of_weights_that_were_replaced_is_captured_again() -> None:
    slow = Slow(net())
    slow(X)
    slow.module[0].weight.data = torch.randn(4, 4)
    assert torch.equal(slow(X), slow.module(X))
    assert (slow.ledger.captures, slow.hits, len(slow.cache)) == (2, 0, 1)


def test_a_graph_of_before_is_not_right_because_another_call_has_looked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, asked = CachedModule(net()), ModuleGuard.is_stale
    fast(X), fast(X[:1])
    fast.module[0].weight.data = torch.randn(4, 4)

    def after_another_call(guard: ModuleGuard, grad: bool) -> bool:
        monkeypatch.undo()
        assert torch.equal(fast(X[:1]), fast.module(X[:1]))
        return asked(guard, grad)

    monkeypatch.setattr(ModuleGuard, "is_stale", after_another_call)
    assert torch.equal(fast(X), fast.module(X))


def test_gradients_are_asked_of_inputs_and_parameters() -> None:
    slow = Slow(net())
    assert slow(X.clone().requires_grad_()).requires_grad
    slow.module[0].bias.requires_grad_()
    assert slow(X).requires_grad
    assert dict(slow.ledger.eager) == {Reason.GRAD: 2}
    with torch.no_grad():
        slow(X)
    assert slow.ledger.captures == 1


def test_arguments_that_no_signature_describes() -> None:
    slow = Slow(Takes())
    assert torch.equal(slow.fast(X, Odd()), slow.module(X))
    with graphs_off():
        slow.fast(X, Odd())
    assert dict(slow.ledger.eager) == {Reason.ARGUMENT: 1, Reason.DISABLED: 1}


def test_a_graph_of_ones_own_is_in_no_cache() -> None:
    slow = Slow(net())
    recorded = capture_alone(slow.dispatcher, describe((X,), {}))
    assert torch.equal(recorded.build(recorded.replay([X]), [X]), slow.module(X))
    assert (len(slow.cache), slow.ledger.captures) == (0, 0)
    recorded.close()
    with pytest.raises(CaptureError, match=r"^net: host_read"):
        capture_alone(Slow(Branches()).dispatcher, describe((X,), {}))
    with graphs_off(), pytest.raises(CaptureError, match=r"^net: disabled"):
        capture_alone(slow.dispatcher, describe((X,), {}))


def test_closed_is_closed() -> None:
    slow = Slow(Takes())
    slow(X)
    slow.fast.close()
    for call in (slow, lambda x: slow.fast(x, Odd())):
        with pytest.raises(ClosedError, match=r"^net was closed; wrap its \.module again$"):
            call(X)


def test_switched_off_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHCACHE_DISABLE", "1")
    slow = Slow(net())
    assert slow.dispatcher.forbidden() == Cause(Reason.DISABLED)
    assert torch.equal(slow(X), slow.module(X))
    assert dict(slow.ledger.eager) == {Reason.DISABLED: 1}
