"""Loops on the device: one launch for all steps, with the answers of launches from the host."""

import pytest
import torch

import graphcache
from tests.loops.test_loop import Walk, check, eagerly


@pytest.mark.parametrize("steps", [1, 2, 1000])
def test_an_engine_fed_with_its_answer(load, steps):
    fast, x = graphcache.wrap(load("mlp8")), torch.rand(4, 64, device="cuda")
    kept = torch.zeros(steps, 4, 64, device="cuda")
    with (
        fast.session(x) as session,
        graphcache.loop(fast, x, feed={"y": "x"}, steps=steps, collect={"y": kept}) as loop,
    ):
        assert loop.fallback == ""
        for _ in range(2):
            loop.inputs[0].copy_(x)
            session.inputs[0].copy_(x)
            kept.zero_()
            loop.run()
            wanted = torch.empty_like(kept)
            for row in wanted:
                session.run()
                row.copy_(session.outputs)
                session.inputs[0].copy_(session.outputs)
            assert torch.equal(kept, wanted)
            assert torch.equal(loop.outputs, wanted[-1])
            assert torch.equal(loop.inputs[0], wanted[-1])
            assert int(loop.taken) == steps


@pytest.mark.parametrize("rows", [1, 3, 70_000])
@pytest.mark.parametrize("limit", [0.5, 2.0, 1e9])
def test_a_module_that_says_when_it_is_done(rows, limit):
    torch.manual_seed(rows)
    module, x, h = Walk(limit).cuda(), torch.randn(rows, 3, device="cuda"), torch.randn(rows, 3, device="cuda")
    steps = 9
    tokens, states = (torch.full((steps, rows, *more), -1, device="cuda") for more in ((), (3,)))
    states = states.float()
    wanted, next_x, next_h = eagerly(module, x, h, steps)
    options = {"feed": {"x": "x", "h": 1}, "until": "done", "collect": {"token": tokens, "h": states}}
    with graphcache.loop(module, (x, h), steps=steps, **options) as loop:
        assert loop.fallback == ""
        for _ in range(3):
            loop.inputs[0].copy_(x)
            loop.inputs[1].copy_(h)
            loop.run()
            check(loop, wanted, next_x, next_h, tokens, states)


def test_loops_follow_the_stream_and_one_another(load):
    fast, x = graphcache.wrap(load("mlp8")), torch.rand(4, 64, device="cuda")
    side = torch.cuda.Stream()
    with (
        graphcache.loop(fast, x, feed={0: 0}, steps=50) as loop,
        graphcache.loop(fast, x, feed={0: 0}, steps=25) as half,
    ):
        loop.run()
        wanted = loop.outputs.clone()
        half.run()
        with torch.cuda.stream(side):
            side.wait_stream(torch.cuda.current_stream())
            half.run()
            found = half.outputs.clone()
            hit = fast(x)
        torch.cuda.synchronize()
        assert torch.equal(found, wanted)
        assert torch.equal(hit, fast(x))


def test_what_lies_in_another_order_is_launched_by_the_host():
    class Turned(torch.nn.Module):
        def forward(self, x):
            return (x + 1).t().contiguous().t()

    x = torch.rand(4, 4, device="cuda")
    with graphcache.loop(Turned(), x, feed={0: 0}, steps=5) as loop:
        assert "another order" in loop.fallback
        loop.run()
        assert torch.allclose(loop.inputs[0], x + 5)
        assert int(loop.taken) == 5


def test_closing_gives_its_memory_back(load):
    fast, x = graphcache.wrap(load("mlp8")), torch.rand(4, 64, device="cuda")
    fast(x)

    def once():
        graphcache.loop(fast, x, feed={0: 0}, steps=5).close()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    before = once()
    assert all(once() <= before for _ in range(5))
