"""Several GPUs: an engine and its graphs stay on theirs, whichever is current."""

import pytest
import torch

import graphcache
from graphcache import runtime
from tests.helpers import mlp

needs_two = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices; the stand-in of the driver has one"
)


def test_graphs_of_a_device_are_counted_for_that_device():
    fast = graphcache.wrap(mlp())
    fast(torch.ones(1, 4))
    assert fast.cache_info().process_nbytes >= fast.cache_info().nbytes
    runtime.set_process_budget(10**12, device="cpu")
    runtime.set_process_budget(None, device="cpu")


@needs_two
@pytest.mark.gpu
@pytest.mark.parametrize("current", [0, 1])
def test_a_module_answers_on_its_own_device_whichever_is_current(current):
    for index in range(2):
        device = torch.device("cuda", index)
        fast, x = graphcache.wrap(mlp().to(device)), torch.ones(1, 4, device=device)
        with torch.cuda.device(current):
            for _ in range(3):
                y = fast(x)
                assert (y.device, torch.cuda.current_device()) == (device, current)
        assert fast.cache_info().hits == 2
