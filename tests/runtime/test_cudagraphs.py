from __future__ import annotations

import contextvars
import threading

import pytest
import torch
from torch import nn

import graphcache
from graphcache import Reason
from graphcache.config import Modes, modes
from graphcache.errors import ClosedError, ConfigError
from graphcache.runtime import (
    enable_cudagraphs,
    enable_output_allocator,
    get_cudagraphs_mode,
    get_whole_cudagraphs_mode,
    set_cudagraphs_mode,
    set_multi_device_safe_mode,
)
from tests.helpers import mlp, outcomes, reason, replays, same


@pytest.fixture(autouse=True)
def own_context():
    """``set_cudagraphs_mode`` has no end of its own, so that each test undoes it."""
    token = modes.set(Modes())
    yield
    modes.reset(token)


def test_nothing_is_switched_on_by_default():
    assert (get_cudagraphs_mode(), get_whole_cudagraphs_mode(), modes.get()) == (False, False, Modes())


def test_the_switch_is_read_back():
    set_cudagraphs_mode(True)
    assert get_cudagraphs_mode()
    set_cudagraphs_mode(False)
    assert not get_cudagraphs_mode()


@pytest.mark.parametrize("switch", [set_cudagraphs_mode, set_multi_device_safe_mode])
@pytest.mark.parametrize("value", [1, None, "on"])
def test_a_switch_takes_a_bool_and_says_so(switch, value):
    with pytest.raises(ConfigError, match=rf"{switch.__name__} takes True or False, not {value!r}"):
        switch(value)
    assert modes.get() == Modes()


def test_switched_off_a_wrapped_module_runs_eagerly_and_its_graphs_wait():
    fast, x = graphcache.wrap(mlp()), torch.randn(2, 4)
    fast(x)
    set_cudagraphs_mode(False)
    assert reason(fast, x) is Reason.DISABLED
    set_cudagraphs_mode(True)
    assert replays(fast, x)


def test_a_mode_stays_in_its_thread():
    set_cudagraphs_mode(True)
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(get_cudagraphs_mode()))
    thread.start()
    thread.join()
    assert seen == [False]


def test_a_mode_goes_along_into_a_copied_context_and_does_not_come_back():
    set_cudagraphs_mode(True)
    context = contextvars.copy_context()
    context.run(set_cudagraphs_mode, False)
    assert get_cudagraphs_mode()
    assert context.run(get_cudagraphs_mode) is False


def test_the_block_gives_a_fast_module_and_closes_its_graphs():
    module, x = mlp(), torch.randn(2, 4)
    with enable_cudagraphs(module, max_graphs=3) as fast:
        assert get_whole_cudagraphs_mode()
        assert not get_cudagraphs_mode()
        assert same(fast(x), module(x))
        assert replays(fast, x)
        assert fast.config.max_graphs == 3
    assert modes.get() == Modes()
    assert fast.cache_info().graphs == 0
    with pytest.raises(ClosedError, match=r"Sequential was closed; wrap its \.module again"):
        fast(x)


def test_the_block_ends_well_after_an_exception():
    with pytest.raises(KeyError), enable_cudagraphs(mlp()) as fast:
        fast(torch.randn(2, 4))
        raise KeyError
    assert modes.get() == Modes()
    assert fast.cache_info().graphs == 0


def test_per_submodule_is_no_whole_graph():
    with enable_cudagraphs(mlp(), strategy="per_submodule", include=["0"]):
        assert get_cudagraphs_mode()
        assert not get_whole_cudagraphs_mode()


def test_a_wrapped_module_keeps_its_own_graphs_after_the_block():
    fast, x = graphcache.wrap(mlp()), torch.randn(2, 4)
    with enable_cudagraphs(fast) as inside:
        assert inside is fast
        fast(x)
    assert replays(fast, x)


def test_options_for_a_wrapped_module_are_refused():
    refused = pytest.raises(ConfigError, match=r"Sequential is wrapped already, so options have no effect")
    with refused, enable_cudagraphs(graphcache.wrap(mlp()), max_graphs=2):
        pass


def test_blocks_nest_and_inside_one_that_switched_off_graphs_are_on_again():
    set_cudagraphs_mode(False)
    with enable_cudagraphs(mlp()) as outer:
        with enable_cudagraphs(mlp(3), strategy="per_submodule", include=["0"]) as inner:
            inner(torch.randn(1, 3))
            assert get_cudagraphs_mode()
        assert get_whole_cudagraphs_mode()
        outer(torch.randn(1, 4))
        assert outcomes(outer) == (0, 1, {})
    assert modes.get() == Modes(graphs="off")


def test_the_output_allocator_leaves_modules_without_engines_alone():
    fast, x = graphcache.wrap(mlp()), torch.randn(2, 4)
    fast(x)
    with enable_output_allocator(fast) as inside:
        assert inside is fast
        assert replays(fast, x)


@pytest.mark.parametrize("before", [True, False])
def test_strictly_the_output_allocator_is_refused_while_graphs_are_on(before):
    set_cudagraphs_mode(before)
    if before:
        refused = pytest.raises(graphcache.errors.ModeConflictError, match="graphs are switched on here")
        with refused, enable_output_allocator(nn.ReLU(), strict=True):
            pass
    else:
        with enable_output_allocator(nn.ReLU(), strict=True) as inside:
            assert isinstance(inside, nn.ReLU)


def test_multi_device_safety_is_set_at_once_and_undone_by_the_block():
    with set_multi_device_safe_mode(True):
        assert modes.get().multi_device_safe
        with set_multi_device_safe_mode(False):
            assert not modes.get().multi_device_safe
        assert modes.get().multi_device_safe
    assert not modes.get().multi_device_safe
    set_multi_device_safe_mode(True)
    assert modes.get().multi_device_safe
