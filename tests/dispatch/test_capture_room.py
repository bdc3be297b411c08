"""What captures take beyond the graphs that come of them is made room for, and counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphcache
from graphcache import Reason
from graphcache.capture.torch_recorder import TorchRecorder
from tests.helpers import dispatcher_of, graphs_of


def wrapped(**options: int) -> graphcache.CachedModule:
    return graphcache.wrap(nn.ReLU(), **options)


def one_graph() -> int:
    fast = wrapped()
    fast(torch.zeros(1000))
    return fast.cache_info().nbytes


@pytest.mark.parametrize(("passing", "kept"), [(0, 4), (1, 3), (2, 2)])
def test_room_is_made_for_what_a_capture_takes_for_a_while(
    monkeypatch: pytest.MonkeyPatch, passing: int, kept: int
) -> None:
    """Before it begins, so that the peak stays in the budget too."""
    nbytes = one_graph()
    monkeypatch.setattr(TorchRecorder, "passing_nbytes", passing * nbytes)
    fast = wrapped(max_bytes=4 * nbytes)
    for turn in range(6):
        for width in range(1, 7):
            x = torch.full((width, 1000 // width), float(turn))
            assert torch.equal(fast(x), x)
    # Shapes of about the same size; one that is there when another is captured, and that one itself.
    assert fast.cache_info().graphs == kept


def test_what_graphs_share_counts_and_goes_with_the_last_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    nbytes = one_graph()
    monkeypatch.setattr(TorchRecorder, "shared_nbytes", 10 * nbytes)
    fast = wrapped(max_bytes=12 * nbytes)
    for turn in range(3):
        for start in range(3):
            fast(torch.zeros(1000).reshape(10 ** (start % 3), -1) + turn)
    info = fast.cache_info()
    assert (info.graphs, info.nbytes) == (2, 12 * nbytes)
    fast.clear()
    assert fast.cache_info().nbytes == 0


def test_what_is_shared_alone_may_be_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    nbytes = one_graph()
    monkeypatch.setattr(TorchRecorder, "shared_nbytes", 10 * nbytes)
    fast = wrapped(max_bytes=10 * nbytes)
    x = torch.ones(1000)
    assert torch.equal(fast(x), x)
    assert fast.cache_info().eager == {Reason.OVER_BUDGET: 1}


def test_the_stale_graph_of_a_key_goes_first_for_its_background_capture() -> None:
    fast = graphcache.wrap(nn.Linear(2, 2).requires_grad_(False), max_bytes=10 * one_graph())
    stale, other = torch.zeros(1, 2), torch.zeros(2, 2)
    fast(other)
    dispatcher = dispatcher_of(fast)
    key, current = (dispatcher.target.describe((x,), {}).key for x in (stale, other))
    fast(stale)
    entries = graphs_of(fast).entries
    entries[key].graph.version -= 1
    for x in (stale, other):
        call = dispatcher.target.describe((x,), {})
        with dispatcher.captures.room(call) as room:
            dispatcher.captures.reserve(room, call)
    assert list(entries) == [current]
