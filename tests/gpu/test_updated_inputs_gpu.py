"""Engines that update an input in place, such as a KV cache, with real engines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graphcache
from graphcache.engines.library import library
from graphcache.errors import InputError

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
pytest.importorskip("tests.gpu.networks")

SHAPE = (1, 2, 16, 8)
"""Batch, heads, length, size."""


@pytest.fixture(scope="module")
def serialized() -> bytes:
    """An engine with TensorRT's ``KVCacheUpdate``, and an output of its own."""
    trt = library().module
    if not hasattr(trt.INetworkDefinition, "add_kv_cache_update"):
        pytest.skip("this TensorRT has no KVCacheUpdate")
    builder = trt.Builder(library().logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    cache = network.add_input("cache", trt.float32, SHAPE)
    update = network.add_input("update", trt.float32, (1, 2, 1, 8))
    at = network.add_input("at", trt.int32, (1,))
    kept = network.add_kv_cache_update(cache, update, at, trt.KVCacheMode.LINEAR).get_output(0)
    twice = network.add_elementwise(update, update, trt.ElementWiseOperation.SUM).get_output(0)
    for name, output in (("kept", kept), ("twice", twice)):
        output.name = name
        network.mark_output(output)
    return bytes(builder.build_serialized_network(network, builder.create_builder_config()))


def step(caches: list[Tensor], number: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """What a cache is after a call, and the arguments of the call."""
    cache = caches[number % len(caches)]
    update = torch.randn(1, 2, 1, 8, device="cuda")
    wanted = cache.clone()
    wanted[:, :, number % SHAPE[2]] = update[:, :, 0]
    return wanted, (cache, update, torch.tensor([number % SHAPE[2]], dtype=torch.int32, device="cuda"))


@pytest.mark.parametrize("wrapped", [False, True])
def test_each_call_updates_its_cache_once(serialized: bytes, wrapped: bool) -> None:
    module = graphcache.EngineModule(serialized)
    run: Any = graphcache.wrap(module) if wrapped else module
    caches = [torch.zeros(SHAPE, device="cuda") for _ in range(3)]
    for number in range(40):
        wanted, given = step(caches, number)
        others = [each.clone() for each in caches if each is not given[0]]
        kept, twice = run(*given)
        assert kept is given[0]
        assert torch.equal(kept, wanted)
        assert torch.equal(twice, given[1] * 2)
        assert all(map(torch.equal, others, [each for each in caches if each is not given[0]]))
    if wrapped:
        info = run.cache_info()
        assert (info.captures, info.hits, info.eager) == (1, 39, {})


def test_a_session_keeps_its_cache_where_it_is(serialized: bytes) -> None:
    fast = graphcache.wrap(graphcache.EngineModule(serialized))
    _, given = step([torch.zeros(SHAPE, device="cuda")], 0)
    with fast.session(*given) as session:
        cache, update, at = session.inputs
        wanted = cache.zero_().clone()
        for number in range(8):
            at.fill_(number)
            update.normal_()
            wanted[:, :, number] = update[:, :, 0]
            session.run()
            assert torch.equal(cache, wanted)


def test_a_cache_that_cannot_be_updated_where_it_is(serialized: bytes) -> None:
    run = graphcache.EngineModule(serialized)
    _, (_, update, at) = step([torch.zeros(SHAPE, device="cuda")], 0)
    with pytest.raises(InputError, match="updates input 'cache' in place"):
        run(torch.zeros(1, 2, 8, 16, device="cuda").transpose(2, 3), update, at)
