"""The canary: it is quiet when graphs answer as before, and loud when one reads or writes what is not its own."""

from __future__ import annotations

import pytest
import torch

from graphcache import Reason
from graphcache.cli import canary as cage
from graphcache.cli.canary import Products, canary, overwrite
from graphcache.dispatch.dispatcher import Dispatcher

CPU = torch.device("cpu")
HITS = 3


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    """What a host graph frees is small; the largest block need not be 64 MiB."""
    monkeypatch.setattr(cage, "_CHUNK", 1 << 20)


@pytest.fixture
def after_overwriting(monkeypatch):
    """Sets what happens right after memory was overwritten, given what was taken and how often that was before."""

    def change(action):
        taken_before = []

        def then(device):
            taken = overwrite(device)
            action(taken, len(taken_before))
            taken_before.append(len(taken))
            return taken

        monkeypatch.setattr(cage, "overwrite", then)

    return change


def test_every_answer_is_a_replay_and_right():
    found = canary(CPU)
    assert (found.asked, found.info.hits, found.wrong, found.reasons) == (HITS, HITS, [], {})
    # Three shapes of one module and one of the other; room for two, and then the first module is cleared.
    assert (found.info.captures, found.info.evictions) == (4, 3 + 1 - 1)


def test_it_overwrites_while_the_others_are_kept_and_before_they_answer(monkeypatch, after_overwriting):
    seen = []
    hit = Dispatcher.replay
    monkeypatch.setattr(Dispatcher, "replay", lambda *args, **names: (seen.append("hit"), hit(*args, **names))[1])
    after_overwriting(lambda taken, turn: seen.append("overwritten"))
    canary(CPU)
    assert seen == ["overwritten", "hit", "hit", "overwritten", "hit"]


def test_what_is_taken_is_nan_and_of_every_size_in_use():
    taken = overwrite(CPU)
    assert all(block.isnan().all() for block in taken)
    assert {4 * 4096, 16 * 512, 32 * 64} <= {block.numel() for block in taken}


@pytest.mark.parametrize(("turn", "wrong"), [(0, 3), (1, 1)])
def test_a_graph_whose_memory_was_overwritten_is_found(monkeypatch, after_overwriting, turn, wrong):
    """The weights are what a host graph reads in place; what eager execution gave is known by then."""
    made = []
    make = Products.__init__
    monkeypatch.setattr(Products, "__init__", lambda self, generator: (make(self, generator), made.append(self))[0])

    def damage(taken, now):
        if now == turn:
            for module in made:
                module.weights[1].fill_(float("nan"))

    after_overwriting(damage)
    found = canary(CPU)
    assert found.info.hits == HITS
    assert len(found.wrong) == wrong
    event = ("a graph was evicted", "a module was cleared")[turn]
    assert found.wrong[0].startswith(f"after {event}: output 0: Tensor-likes are not equal!")


def test_the_least_error_is_found(monkeypatch):
    right = Dispatcher.replay

    def nudged(*args, **names):
        answer = right(*args, **names)
        answer[-1, -1] = answer[-1, -1].nextafter(torch.tensor(9.0))
        return answer

    monkeypatch.setattr(Dispatcher, "replay", nudged)
    found = canary(CPU)
    assert len(found.wrong) == HITS
    assert all("Mismatched elements: 1 / 8192" in each for each in found.wrong)


def test_a_replay_that_writes_into_memory_of_others_is_found(after_overwriting):
    after_overwriting(lambda taken, turn: [taken[block][-1:].zero_() for block in range(turn + 1)])
    assert canary(CPU).wrong == [
        "after a graph was evicted: replays wrote into 1 blocks of memory that are not theirs",
        "after a module was cleared: replays wrote into 2 blocks of memory that are not theirs",
    ]


def test_graphs_that_are_never_made_are_told_with_their_reason(monkeypatch):
    monkeypatch.setenv("GRAPHCACHE_DISABLE", "1")
    found = canary(CPU)
    assert (found.info.hits, found.wrong, list(found.reasons)) == (0, [], [Reason.DISABLED])
    assert found.reasons[Reason.DISABLED].startswith("disabled: CUDA graphs are switched off here")


def test_options_of_the_environment_do_not_bind_it(monkeypatch):
    monkeypatch.setenv("GRAPHCACHE_MAX_GRAPHS", "1")
    monkeypatch.setenv("GRAPHCACHE_MAX_BYTES", "1")
    assert canary(CPU).info.hits == HITS


def test_the_same_weights_each_time_and_the_callers_random_numbers_stay():
    before = torch.get_rng_state()
    first, again = (Products(torch.Generator().manual_seed(0)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first.weights, again.weights, strict=True))
    assert torch.equal(before, torch.get_rng_state())
