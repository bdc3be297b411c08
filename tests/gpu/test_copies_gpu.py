"""Copies as nodes of a graph, on a device: every byte of tensors of all sizes and alignments."""

import random

import pytest
import torch
from torch import nn

import graphcache
from tests.gpu.test_engine_gpu import close
from tests.helpers import graphs_of, wrap_recorded

networks = pytest.importorskip("tests.gpu.networks")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


class Many(nn.Module):
    """Many inputs and outputs, small and large ones."""

    def forward(self, *tensors):
        return tuple(tensor * (index + 2) for index, tensor in enumerate(tensors))


def test_modules_with_many_tensors_of_all_sizes():
    module = Many()
    fast = graphcache.wrap(module)
    draw = random.Random(0)
    sizes = [1, 3, 5, 64, 1000, 1 << 16, (1 << 16) + 1, 7, 2, 48, 100_000]
    kept = []
    with torch.no_grad():
        for step in range(12):
            given_ = [torch.randn(size + 4, device="cuda")[draw.choice([0, 1, 3]) :][:size] for size in sizes]
            if step % 3 == 0:
                given_ = [tensor.clone() for tensor in given_]
            kept.append((fast(*given_), module(*given_)))
    torch.cuda.synchronize()
    assert all(torch.equal(left, right) for got, wanted in kept for left, right in zip(got, wanted, strict=True))
    info = fast.cache_info()
    assert (info.captures, info.hits, info.eager) == (1, 11, {})
    (entry,) = graphs_of(fast).entries.values()
    # A copy in, a kernel of torch's and a copy out for each.
    assert entry.graph.graph.nodes == 3 * len(sizes)


def test_an_engine_whose_tensors_are_copied(load):
    fast = wrap_recorded(load("mlp8"), io="copy")
    inputs = [torch.randn(n, networks.SIZE, device="cuda") for n in (1, 3, 8, 17, 64)]
    wanted = [networks.mlp8_reference(x) for x in inputs]
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        kept = [fast(x) for _ in range(50) for x in inputs]
        torch.cuda.synchronize()
    assert all(close(got, wanted[index % len(inputs)]) for index, got in enumerate(kept))
    assert fast.cache_info().hits == 49 * len(inputs)
