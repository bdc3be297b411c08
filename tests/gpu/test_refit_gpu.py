"""New weights reach eager calls and graphs; where this TensorRT builds no engine to take them, it says so."""

from __future__ import annotations

import pytest
import torch

import graphcache
from graphcache.engines.library import library
from graphcache.errors import EngineBuildError, EngineError

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
networks = pytest.importorskip("tests.gpu.networks")


def close(got, weights, x):
    wanted = x.double().cpu()
    for weight in weights:
        wanted = (wanted @ weight.double()).relu().softmax(-1)
    return bool((got.double().cpu() - wanted).norm() <= 5e-3 * wanted.norm())


def outside_support():
    """TensorRT-RTX after 1.4 cannot compile what takes new weights for Hopper (Myelin: CUDA error 222)."""
    used = library()
    hopper = torch.cuda.get_device_capability() == (9, 0)
    return used.flavour == "tensorrt_rtx" and hopper and not used.version.startswith("1.4.")


@pytest.mark.parametrize("which", ["all", "one"])
def test_new_weights_in_eager_calls_and_in_graphs(which):
    model, shapes = networks.mlp8()
    refittable = True if which == "all" else ["w0"]
    if outside_support():
        with pytest.raises(EngineBuildError, match="could not build"):
            graphcache.build(model, shapes=shapes, refittable=True)
        return
    engine = graphcache.load(graphcache.build(model, shapes=shapes, refittable=refittable), name="mlp8")
    weights = list(networks._weights(8))
    with graphcache.wrap(engine) as fast:
        inputs = [torch.randn(n, networks.SIZE, device="cuda") for n in (3, 17)]
        for x in inputs * 2:
            assert close(fast(x), weights, x)
        for turn in range(4):
            weights[0] = networks._weights(8)[0] * (0.3 + turn)
            # From the host and from the device; waiting, and in the order of the caller's stream.
            engine.refit({"w0": weights[0].cuda() if turn % 2 else weights[0]}, wait=turn < 2)
            for x in inputs:
                assert close(engine(x), weights, x)
                assert close(fast(x), weights, x)
                assert close(fast(x), weights, x)
        assert (fast.cache_info().captures, fast.cache_info().hits, fast.cache_info().eager) == (10, 10, {})
        for bad in ({"w0": weights[0][:1]}, {"w0": weights[0].half()}, {"nothing": weights[0]}):
            with pytest.raises(EngineError, match=r"^mlp8"):
                engine.refit(bad)
            assert close(fast(inputs[0]), weights, inputs[0])
    engine.close()


def test_an_engine_that_takes_no_new_weights(load):
    engine = load("mlp8")
    x = torch.randn(2, networks.SIZE, device="cuda")
    with pytest.raises(EngineError, match=r"^mlp8 takes no new weights; build it with refittable=True"):
        engine.refit({"w0": torch.zeros(64, 64)})
    assert close(engine(x), networks._weights(8), x)
