"""Calls that are padded to buckets, on a device: engines and modules, against the exact calls."""

import random

import pytest
import torch
from torch import nn

import graphcache
from graphcache import Axis, Mask, Reason
from graphcache.errors import ConfigError, ProfileRangeError
from tests.helpers import wrap_recorded

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
networks = pytest.importorskip("tests.gpu.networks")

BUCKETS = {"x": {0: [4, 16, 64]}}


def close(got, wanted, bound=5e-3):
    got, wanted = got.double().cpu(), wanted.double().cpu()
    return got.shape == wanted.shape and bool((got - wanted).norm() <= bound * wanted.norm())


class Tagger(nn.Module):
    """Indices, norms and products, and a mean over what the mask says is there."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        self.layer = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.LayerNorm(64))
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, ids, *, mask=None):
        hidden = self.layer(self.embedding(ids))
        absent = None if mask is None else ~mask
        hidden = hidden + self.attention(hidden, hidden, hidden, key_padding_mask=absent, need_weights=False)[0]
        weights = torch.ones_like(hidden[..., :1]) if mask is None else mask[..., None].to(hidden.dtype)
        return {"tags": hidden, "mean": (hidden * weights).sum(1) / weights.sum(1)}


@pytest.fixture
def tagger():
    torch.manual_seed(0)
    return Tagger().cuda().requires_grad_(False).eval()


@pytest.mark.parametrize("io", ["bind", "copy"])
def test_an_engine_answers_every_size_from_few_graphs(load, io):
    fast = wrap_recorded(load("mlp8"), io=io, buckets=BUCKETS)
    draw = random.Random(0)
    kept = []
    for _ in range(150):
        x = torch.randn(draw.randint(1, 64), networks.SIZE, device="cuda")
        before = x.clone()
        kept.append((x, fast(x)))
        assert torch.equal(x, before)
    for x, y in kept:
        assert close(y, networks.mlp8_reference(x))
    info = fast.cache_info()
    assert (info.captures, info.eager) == (3, {})
    assert info.hits == 147
    assert info.padded >= 100


def test_an_engine_on_a_side_stream_by_name_and_into_memory(load):
    fast = graphcache.wrap(load("mlp8"), buckets=BUCKETS)
    stream = torch.cuda.Stream()
    for _ in range(3):
        for count in (3, 9, 40):
            x = torch.randn(count, networks.SIZE, device="cuda")
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                there = fast(x=x * 2)
            torch.cuda.current_stream().wait_stream(stream)
            assert close(there, networks.mlp8_reference(x * 2))
            out = torch.empty(count, networks.SIZE, device="cuda")
            assert fast.forward_into(out, x) is out
            assert close(out, networks.mlp8_reference(x))
    assert fast.cache_info().captures == 3
    assert fast.cache_info().padded == 15


def test_inputs_may_be_freed_and_their_memory_used_while_a_replay_is_under_way(load):
    fast = graphcache.wrap(load("mlp8"), buckets=BUCKETS)
    fast(torch.randn(50, networks.SIZE, device="cuda"))
    given = [torch.randn(50, networks.SIZE) for _ in range(40)]
    answers = []
    for x in given:
        answers.append(fast(x.cuda()))
        torch.full((64, networks.SIZE), 1e9, device="cuda")
    assert all(close(y, networks.mlp8_reference(x)) for x, y in zip(given, answers, strict=True))


def test_buckets_outside_the_profiles_and_what_the_engine_refuses(load):
    with pytest.raises(
        ConfigError, match=r"^buckets\['x'\]\[0\]: the size 65; expected one that a profile takes: 1\.\.64"
    ):
        graphcache.wrap(load("mlp8"), buckets={"x": {0: [8, 65]}})
    fast = graphcache.wrap(load("mlp8"), buckets={"x": {0: "powers_of_two"}})
    for count in (33, 33, 64):
        x = torch.randn(count, networks.SIZE, device="cuda")
        assert close(fast(x), networks.mlp8_reference(x))
    with pytest.raises(ProfileRangeError):
        fast(torch.randn(65, networks.SIZE, device="cuda"))
    assert fast.cache_info().captures == 1


def test_two_inputs_of_two_axes(load):
    axes = {0: {"sizes": [4, 16, 32], "name": "n"}, 1: {"sizes": [8, 32], "name": "m"}}
    fast = graphcache.wrap(load("two_outputs"), buckets={"a": axes, "b": axes})
    draw = random.Random(1)
    for _ in range(60):
        shape = draw.randint(0, 32), draw.randint(1, 32)
        a, b = torch.randn(shape, device="cuda"), torch.randn(shape, device="cuda")
        for got, wanted in zip(fast(a, b), (a + b, a * b), strict=True):
            assert torch.equal(got, wanted)
            assert got.is_contiguous()
    # Calls of no rows have no work for a graph.
    assert set(fast.cache_info().eager) <= {Reason.EMPTY_GRAPH}
    assert fast.cache_info().padded > 20


def test_a_module_with_a_mask_answers_every_size_from_few_graphs(tagger):
    batch, length = Axis([1, 4], name="batch"), Axis([16, 48], name="length")
    buckets = {"ids": {0: batch, 1: length}, "mask": Mask(["batch", "length"])}
    fast = graphcache.wrap(tagger, buckets=buckets)
    draw = random.Random(2)
    for _ in range(60):
        ids = torch.randint(100, (draw.randint(1, 4), draw.randint(1, 47)), device="cuda")
        with torch.inference_mode(draw.random() < 0.5):
            got, wanted = fast(ids), tagger(ids)
        assert close(got["tags"], wanted["tags"], 1e-4)
        assert close(got["mean"], wanted["mean"], 1e-4)
    info = fast.cache_info()
    # Twice, once in inference mode: four buckets, with the mask, and a few sizes that filled theirs, without.
    assert info.padded > 20, info
    assert info.eager == {}


def test_without_the_mask_it_is_refused_and_right(tagger):
    fast = graphcache.wrap(tagger, buckets={"ids": {1: [16, 48]}})
    for count in (10, 10, 30, 30):
        ids = torch.randint(100, (2, count), device="cuda")
        got, wanted = fast(ids), tagger(ids)
        assert close(got["tags"], wanted["tags"], 1e-4)
    info = fast.cache_info()
    assert (info.eager, info.padded) == ({Reason.PADDING: 2}, 0)


def test_half_precision_under_autocast():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).cuda().requires_grad_(False)
    fast = graphcache.wrap(module, buckets={"input": {0: [8, 64]}})
    for count in (3, 5, 20, 3, 63):
        x = torch.randn(count, 64, device="cuda")
        with torch.autocast("cuda", dtype=torch.float16):
            got, wanted = fast(x), module(x)
        assert got.dtype is wanted.dtype is torch.float16
        assert close(got, wanted, 1e-2)
    assert (fast.cache_info().captures, fast.cache_info().padded) == (2, 3)


def test_worthwhile_is_right_whatever_it_decides(load):
    fast = graphcache.wrap(load("mlp8"), buckets=BUCKETS, capture="worthwhile")
    draw = random.Random(3)
    torch.manual_seed(3)
    for _ in range(1500):
        x = torch.randn(draw.randint(1, 64), networks.SIZE, device="cuda")
        y = fast(x)
    assert close(y, networks.mlp8_reference(x))
    info = fast.cache_info()
    assert set(info.eager) <= {Reason.COLD, Reason.NOT_WORTH_IT}, fast.explain()
    assert info.hits + info.captures + sum(info.eager.values()) == 1500


def test_advice(load):
    fast = graphcache.wrap(load("mlp8"))
    for count in (1, 1, 1, 7, 8, 8, 60):
        fast(torch.randn(count, networks.SIZE, device="cuda"))
    advice = fast.advise_buckets(most=3, argument="x")
    assert advice.option() == {0: [1, 8, 60]}
    assert advice.calls == 7
