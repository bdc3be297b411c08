"""``forward_into`` answers into tensors of the caller's, or not at all."""

import pytest
import torch

import graphcache
from graphcache.errors import OutputMismatchError
from tests.helpers import Fn, mlp, outcomes

X = torch.linspace(-1, 1, 8).reshape(2, 4)


def test_captures_hits_and_eager_calls_write_into_the_callers_tensor():
    fast, out = graphcache.wrap(mlp()), torch.empty(2, 4)
    for factor in (1, 2, 3):
        assert fast.forward_into(out, X * factor) is out
        assert torch.equal(out, fast.module(X * factor))
    assert outcomes(fast) == (2, 1, {})
    eager = graphcache.wrap(Fn(lambda _, x: x * x.sum().item()))
    assert torch.equal(eager.forward_into(out, X), X * X.sum().item())


def test_structures_and_keywords():
    fast = graphcache.wrap(Fn(lambda _, x, scale=1.0: {"y": x * scale, "sum": x.sum(-1)}))
    out = {"y": torch.empty(2, 4), "sum": torch.empty(2)}
    for scale in (2.0, 2.0):
        fast.forward_into(out, X, scale=scale)
        assert torch.equal(out["y"], X * scale)
        assert torch.equal(out["sum"], X.sum(-1))


def test_a_hit_of_an_engine_launches_straight_into_them(fake, load, rows):
    fast, x = graphcache.wrap(load("affine")), rows(2)
    out = fake.driver.heap.tensor((x * 0).tolist())
    for _ in range(3):
        fast.forward_into(out, x)
    fake.driver.calls.clear()
    fast.forward_into(out, x)
    assert fake.driver.calls.count("cuGraphLaunch") == 1
    assert not [name for name in fake.driver.calls if "Memcpy" in name or "Malloc" in name], "nothing is copied"
    assert torch.equal(out, x * 3 + 1)


@pytest.mark.parametrize("out", [torch.empty(2, 3), torch.empty(2, 4).double(), [torch.empty(2, 4)], None])
def test_what_does_not_fit_is_refused(out):
    fast = graphcache.wrap(mlp())
    for _ in range(3):
        with pytest.raises(OutputMismatchError):
            fast.forward_into(out, X)
