"""Whatever is given in the place of a module, a mode or a setting: an error that says so, and nothing changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphcache
from graphcache import runtime
from graphcache.config import Modes, modes
from graphcache.errors import GraphCacheError

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
    st.binary(max_size=6),
    st.lists(st.one_of(st.integers(), st.none()), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from([nn.ReLU, object(), torch.zeros(2), len]),
)
MANAGERS = {
    "enable_cudagraphs": lambda odd: runtime.enable_cudagraphs(odd),
    "strictly": lambda odd: runtime.enable_cudagraphs(odd, strict=True),
    "enable_output_allocator": lambda odd: runtime.enable_output_allocator(odd),
    "enable_pre_allocated_outputs": lambda odd: runtime.enable_pre_allocated_outputs(odd),
    "optimization_profile": lambda odd: runtime.optimization_profile(odd, 0),
    "weight_streaming": lambda odd: runtime.weight_streaming(odd),
    "runtime_config": lambda odd: runtime.runtime_config(odd, runtime_cache=None),
    "runtime_cache": lambda odd: runtime.runtime_cache(odd),
}


@pytest.mark.parametrize("name", MANAGERS)
@given(odd=ODD)
def test_in_the_place_of_a_module(name: str, odd: Any) -> None:
    with pytest.raises(GraphCacheError) as raised:
        MANAGERS[name](odd).__enter__()
    assert str(raised.value)
    assert modes.get() == Modes()


@given(ODD)
def test_in_the_place_of_a_switch(odd: Any) -> None:
    if not isinstance(odd, bool):
        for call in (
            lambda: runtime.set_cudagraphs_mode(odd),
            lambda: runtime.set_multi_device_safe_mode(odd),
            lambda: runtime.enable_cudagraphs(nn.ReLU(), strict=odd).__enter__(),
            lambda: runtime.enable_output_allocator(nn.ReLU(), strict=odd).__enter__(),
            lambda: runtime.runtime_cache(nn.ReLU(), "", odd).__enter__(),
        ):
            with pytest.raises(GraphCacheError, match="takes True or False, not "):
                call()
        assert modes.get() == Modes()


@given(st.sampled_from(["strategy", "include", "exclude", "runtime"]), ODD)
def test_in_the_place_of_an_option(name: str, odd: Any) -> None:
    if (name in ("include", "exclude") and odd == []) or (name == "runtime" and odd is None):
        return
    with pytest.raises(GraphCacheError):
        graphcache.wrap(nn.Sequential(nn.ReLU()), **{name: odd})


@given(st.text(max_size=8), ODD)
def test_in_the_place_of_a_setting(name: str, odd: Any) -> None:
    with pytest.raises(GraphCacheError):
        runtime.runtime_config(nn.ReLU(), **{f"{name}_": odd}).__enter__()
    with pytest.raises(GraphCacheError):
        runtime.set_dynamic_shapes_kernel_strategy(nn.ReLU(), odd)


@given(ODD)
def test_in_the_place_of_an_observer(odd: Any) -> None:
    with pytest.raises(GraphCacheError, match="is no observer"):
        graphcache.wrap(nn.ReLU()).observe(odd)
