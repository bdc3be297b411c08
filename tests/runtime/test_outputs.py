from __future__ import annotations

import pytest
import torch
from torch import nn

import graphcache
from graphcache import Reason
from graphcache.errors import ConfigError
from graphcache.runtime import enable_output_allocator, enable_pre_allocated_outputs
from tests.engine_modules import load, rows
from tests.helpers import reason, replays

BOTH = {
    enable_output_allocator: lambda engine: engine.uses_output_allocator,
    enable_pre_allocated_outputs: lambda engine: engine.use_pre_allocated_outputs,
}
SETTERS = {
    enable_output_allocator: "set_use_output_allocator",
    enable_pre_allocated_outputs: "set_pre_allocated_outputs",
}


@pytest.fixture(params=BOTH, ids=lambda each: each.__name__)
def enable(request):
    return request.param


def test_engines_at_any_depth_are_switched_and_switched_back(nested, enable):
    module, engines = nested("affine", "scaled")
    is_on = BOTH[enable]
    with enable(module) as inside:
        assert inside is module
        assert all(map(is_on, engines))
    assert not any(map(is_on, engines))


def test_what_was_on_before_stays_on(nested, enable):
    module, (first, second) = nested("affine", "scaled")
    is_on = BOTH[enable]
    getattr(second, SETTERS[enable])(True)
    with enable(module), enable(module):
        assert is_on(first)
    assert (is_on(first), is_on(second)) == (False, True)


def test_after_an_exception_too(nested, enable):
    module, engines = nested("affine", "scaled")
    with pytest.raises(KeyError), enable(module):
        raise KeyError
    assert not any(map(BOTH[enable], engines))


def test_behind_a_cache_and_inside_of_one(nested, enable):
    module, engines = nested("affine")
    for each in (graphcache.wrap(engines[0]), graphcache.wrap(module), nn.Sequential(graphcache.wrap(engines[0]))):
        with enable(each) as inside:
            assert inside is each
            assert BOTH[enable](engines[0])
        assert not BOTH[enable](engines[0])


def test_a_module_without_engines_is_left_alone(enable):
    module = nn.ReLU()
    with enable(module) as inside:
        assert inside is module


@pytest.mark.parametrize("odd", [None, 3, [nn.ReLU()], "engine"])
def test_what_is_no_module(enable, odd):
    with pytest.raises(ConfigError, match=r"^expected an nn\.Module, got "), enable(odd):
        pass


def test_one_engine_that_cannot_be_switched_leaves_none_switched(nested, enable, monkeypatch):
    module, (first, second) = nested("affine", "scaled")

    def fails(_: bool) -> bool:
        raise RuntimeError("no")

    monkeypatch.setattr(second, SETTERS[enable], fails)
    with pytest.raises(RuntimeError, match="no"), enable(module):
        pass
    assert not BOTH[enable](first)


def test_while_tensorrt_allocates_calls_run_eagerly(fake):
    engine = load("affine")
    fast, x = graphcache.wrap(engine), rows(fake, 2)
    fast(x)
    with enable_output_allocator(engine):
        assert reason(fast, x) is Reason.OUTPUT_ALLOCATOR
    fast(x)
    assert replays(fast, x)


def test_outputs_made_ahead_change_no_answer(fake, nested):
    module, (engine,) = nested("affine")
    with enable_pre_allocated_outputs(module):
        seen = [engine(rows(fake, 2, step)) for step in range(3)]
    for step, answer in enumerate(seen):
        assert torch.equal(answer, rows(fake, 2, step) * 3 + 1)


def test_outputs_made_ahead_in_inference_mode_are_for_inference_mode(fake, nested):
    module, (engine,) = nested("affine")
    with enable_pre_allocated_outputs(module):
        with torch.inference_mode():
            engine(rows(fake, 2))
        answer = engine(rows(fake, 2))
    assert not answer.is_inference()
