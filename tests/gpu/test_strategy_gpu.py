"""Mixed models on CUDA: what is found around a culprit, what is excluded, and what everything costs in graphs."""

import pytest
import torch
from torch import nn

import graphcache
from graphcache import Reason
from graphcache.config import graphs_off
from graphcache.runtime import weight_streaming
from tests.helpers import graphs_of

SIZE = 64
SHAPES = (2, 7, 1, 16, 5, 3, 12, 9, 4, 20, 6, 31)
ROUNDS = 12
"""Effects are looked for again, of the whole and then of the part that is to blame, before its parts are found."""


class Selects(nn.Module):
    """As many rows as score above the average."""

    def forward(self, y):
        scores = y.max(-1).values
        return y[torch.nonzero(scores >= scores.mean()).squeeze(1)]


class Head(nn.Module):
    def __init__(self, culprit):
        super().__init__()
        self.score = nn.Sequential(nn.Linear(SIZE, SIZE), nn.GELU())
        self.nms = culprit
        self.box = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh())

    def forward(self, x):
        return self.box(self.nms(self.score(x)))


class Model(nn.Module):
    """An engine, torch, and a head in which something forbids a graph."""

    def __init__(self, engine, culprit):
        super().__init__()
        self.engine = engine
        self.more = nn.ModuleList([nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU()) for _ in range(2)])
        self.head = Head(culprit)

    def forward(self, x):
        y = self.engine(x)
        for each in self.more:
            y = each(y)
        return self.head(y)


class Reads(nn.Module):
    def forward(self, y):
        return y * (2.0 if y.sum().item() > 0 else 1.0)


class Draws(nn.Module):
    def forward(self, y):
        return nn.functional.dropout(y, 0.0) + torch.rand_like(y) * 0


CULPRITS = {
    "nonzero": (Selects, {Reason.DATA_DEPENDENT, Reason.HOST_READ, Reason.CAPTURE_FAILED}),
    "item": (Reads, {Reason.HOST_READ, Reason.CAPTURE_FAILED}),
    "random": (Draws, {Reason.RANDOM}),
}


def made(load, culprit):
    torch.manual_seed(0)
    return Model(load("mlp8"), culprit).cuda().requires_grad_(False).eval()


def xs():
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(n, SIZE, generator=draw).cuda() for n in SHAPES]


def close(left, right):
    return left.shape == right.shape and torch.allclose(left, right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CULPRITS)
def test_the_largest_parts_around_a_culprit_answer_twelve_shapes(load, name, caplog):
    culprit, reasons = CULPRITS[name]
    model = made(load, culprit())
    fast = graphcache.wrap(model)
    calls = xs()
    with torch.inference_mode():
        kept = [(fast(x), model(x)) for _ in range(ROUNDS) for x in calls]
    assert all(close(got, wanted) for got, wanted in kept)
    info = fast.cache_info()
    assert sum(info.eager.values()) == ROUNDS * len(SHAPES)
    assert set(info.eager) <= reasons, info
    holding = {part for part, each in fast.parts.items() if graphs_of(each).entries}
    assert {"engine", "more.0", "more.1", "head.score"} <= holding
    assert "head.nms" not in holding
    assert "head.nms" in caplog.text


def test_without_a_culprit_the_whole_is_one_graph(load):
    model = made(load, nn.Identity())
    fast = graphcache.wrap(model)
    with torch.inference_mode():
        for _ in range(3):
            assert all(close(fast(x), model(x)) for x in xs())
    assert fast.parts == {}
    assert (fast.cache_info().captures, fast.cache_info().eager) == (len(SHAPES), {})


def test_what_is_excluded_is_never_tried(load):
    model = made(load, Selects())
    fast = graphcache.wrap(model, exclude=["head.nms"])
    with torch.inference_mode():
        for _ in range(3):
            assert all(close(fast(x), model(x)) for x in xs())
    info = fast.cache_info()
    assert set(fast.parts) == {"engine", "more.0", "more.1", "head.score", "head.box"}
    assert info.eager == {}
    assert info.captures >= 4 * len(SHAPES)


def test_an_engine_that_refuses_between_two_parts(load):
    conditional = load("conditional")

    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.before = nn.Sequential(nn.Linear(SIZE, 16), nn.ReLU(), nn.Linear(16, 4))
            self.engine = conditional
            self.after = nn.Sequential(nn.Linear(4, 8), nn.Tanh())

        def forward(self, x):
            return self.after(self.engine(self.before(x)))

    model = Between().cuda().requires_grad_(False).eval()
    fast = graphcache.wrap(model)
    calls = [x for x in xs() if x.shape[0] <= 16]
    with torch.inference_mode():
        for _ in range(4):
            assert all(close(fast(x), model(x)) for x in calls)
    assert fast.cache_info().eager == {Reason.NOT_CAPTURABLE: 4 * len(calls)}
    assert {name for name, part in fast.parts.items() if graphs_of(part).entries} == {"before", "after"}


def test_inside_a_capture_of_the_callers_and_replayed_there(load):
    model = made(load, nn.Identity())
    fast = graphcache.wrap(model, strategy="per_submodule", include=["engine", "head"])
    x = torch.randn(4, SIZE, device="cuda")
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):
            fast(x)
        # A part that was always replayed has no context that could be captured.
        with graphs_off():
            fast(x)
        graph = torch.cuda.CUDAGraph()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            y = fast(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert close(y, model(x))
    stream.synchronize()


def test_autocast_and_inference_mode_have_graphs_of_their_own(load):
    model = made(load, Selects())
    fast = graphcache.wrap(model)
    x = torch.randn(4, SIZE, device="cuda")
    for mode in (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cuda", torch.float16)):
        with mode(), torch.no_grad():
            for _ in range(5):
                got, wanted = fast(x), model(x)
                assert got.dtype is wanted.dtype
                assert torch.allclose(got.float(), wanted.float(), rtol=1e-2, atol=1e-2)


def test_preparing_prepares_the_parts_too(load):
    model = made(load, Selects())
    fast = graphcache.wrap(model)
    calls = xs()[:4]
    with torch.inference_mode():
        done = fast.prepare(*[(x,) for x in calls], progress=False)
        assert done.signatures >= 4 * len(calls)
        captures = fast.cache_info().captures
        assert all(close(fast(x), model(x)) for x in calls)
    assert fast.cache_info().captures == captures


def test_an_observer_hears_of_parts_within_the_whole(load):
    model = made(load, Selects())
    fast = graphcache.wrap(model)
    seen = []

    class Notes:
        def before(self, kind, module):
            pass

        def after(self, kind, module, seconds, done):
            seen.append((kind, module, done))

    x = torch.randn(4, SIZE, device="cuda")
    with torch.inference_mode():
        for _ in range(4):
            fast(x)
        end = fast.observe(Notes())
        fast(x)
        end()
        fast(x)
    assert ("replay", "engine", True) in seen
    assert seen[-1] == ("eager", "Model", True)
    assert len([each for each in seen if each[1] == "Model"]) == 1


def test_a_budget_for_weights_over_a_mixed_model(engine_bytes):
    engine = graphcache.load(engine_bytes("mlp8_streaming"), name="streaming")
    try:
        if not engine.get_streamable_device_memory_budget():
            pytest.skip("this TensorRT streams no weights of this engine")
        model = Model(engine, nn.Identity()).cuda().requires_grad_(False).eval()
        fast = graphcache.wrap(model)
        x = torch.randn(4, SIZE, device="cuda")
        with torch.inference_mode():
            for _ in range(2):
                fast(x)
            with weight_streaming(fast) as weights:
                weights.device_budget = 0
                for _ in range(4):
                    assert close(fast(x), model(x))
                assert fast.parts["head"].cache_info().hits > 0
            assert engine.get_device_memory_budget() == engine.get_streamable_device_memory_budget()
            for _ in range(2):
                assert close(fast(x), model(x))
        assert len(graphs_of(fast).entries) == 1
        fast.close()
    finally:
        engine.close()
