"""What modes do to engines deep inside of modules that nobody has wrapped."""

from __future__ import annotations

import contextvars
import threading

import pytest
import torch
from torch import nn

import graphcache
from graphcache import Reason
from graphcache.config import Modes, modes
from graphcache.runtime import (
    enable_cudagraphs,
    get_cudagraphs_mode,
    get_whole_cudagraphs_mode,
    set_cudagraphs_mode,
    set_multi_device_safe_mode,
)
from tests.engine_modules import load, rows
from tests.helpers import outcomes, reason


class Deep(nn.Module):
    """An engine two levels down."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.ModuleDict({"engine": load("affine")}))

    @property
    def engine(self):
        return self.inner[0]["engine"]

    def forward(self, x):
        return self.engine(x)


@pytest.fixture(autouse=True)
def own_context():
    token = modes.set(Modes())
    yield
    modes.reset(token)


def test_switched_on_engines_use_graphs_at_any_depth(fake):
    module, x = Deep(), rows(fake, 2)
    module(x)
    assert outcomes(module.engine.with_graphs()) == (0, 0, {})
    set_cudagraphs_mode(True)
    for _ in range(3):
        assert torch.equal(module(x), x * 3 + 1)
    info = module.engine.with_graphs().cache_info()
    assert (info.captures, info.hits) == (1, 2)
    set_cudagraphs_mode(False)
    assert torch.equal(module(x), x * 3 + 1)
    assert module.engine.with_graphs().cache_info().hits == 2


def test_the_graphs_of_a_bare_engine_wait_while_they_are_switched_off(fake):
    module, x = Deep(), rows(fake, 2)
    for mode in (True, False, True, False, True):
        set_cudagraphs_mode(mode)
        assert torch.equal(module(x), x * 3 + 1)
    assert module.engine.with_graphs().cache_info().captures == 1
    assert module.engine.with_graphs().cache_info().hits == 2


def test_inside_a_block_for_one_module_others_are_as_they_were(fake):
    fast_one, other, x = Deep(), Deep(), rows(fake, 2)
    with enable_cudagraphs(fast_one, strategy="per_submodule") as fast:
        assert get_cudagraphs_mode()
        fast(x)
        other(x)
        assert outcomes(other.engine.with_graphs()) == (0, 1, {}), "engines use graphs where the mode says so"
    assert not get_cudagraphs_mode()
    other(x)
    assert other.engine.with_graphs().cache_info().hits == 0


def test_a_whole_graph_leaves_bare_engines_of_others_eager(fake):
    mine, other, x = Deep(), Deep(), rows(fake, 2)
    with enable_cudagraphs(mine):
        assert get_whole_cudagraphs_mode()
        other(x)
    assert outcomes(other.engine.with_graphs()) == (0, 0, {})


def test_switched_off_a_wrapped_module_is_off_with_its_parts(fake):
    fast, x = graphcache.wrap(Deep(), strategy="per_submodule"), rows(fake, 2)
    fast(x)
    set_cudagraphs_mode(False)
    assert reason(fast, x) is Reason.DISABLED
    assert fast.cache_info().hits == 0


def test_modes_are_back_after_exceptions_however_they_nest(fake):
    with (
        pytest.raises(KeyError),
        enable_cudagraphs(Deep()),
        set_multi_device_safe_mode(True) as safe,
        enable_cudagraphs(Deep(), strategy="per_submodule"),
    ):
        assert (get_cudagraphs_mode(), get_whole_cudagraphs_mode()) == (True, False)
        assert safe.old_mode is False
        raise KeyError
    assert modes.get() == Modes()


def test_safe_mode_moves_what_lies_elsewhere_at_any_depth(fake, monkeypatch):
    module, x = Deep(), rows(fake, 2)
    moved = []
    monkeypatch.setattr(module.engine, "moved", lambda inputs: (moved.append(len(inputs)), list(inputs))[1])
    with set_multi_device_safe_mode(True):
        assert torch.equal(module(x), x * 3 + 1)
    assert moved == [1]
    module(x)
    assert moved == [1]


def test_modes_of_a_thread_are_its_own(fake):
    module, x, seen = Deep(), rows(fake, 2), []
    set_cudagraphs_mode(True)

    def work() -> None:
        module(x)
        seen.append((get_cudagraphs_mode(), outcomes(module.engine.with_graphs())))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, (0, 0, {}))]
    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,))
    thread.start()
    thread.join()
    assert seen[1] == (True, (0, 1, {}))
