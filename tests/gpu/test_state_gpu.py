"""State that graphs update in place, on a device: it is what eager execution leaves, call by call."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._pytree import tree_map

import graphcache
from graphcache import Reason
from graphcache.capture import torch_recorder
from tests.capture import test_rebound_state as rebound
from tests.helpers import Fn
from tests.stateful import MODELS, SIZE, same, state_of

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


def moved(each):
    """Everything of a module on the device; what is no buffer too."""
    each = each.cuda()
    for name, value in vars(each).items():
        if isinstance(value, torch.Tensor):
            setattr(each, name, value.cuda())
    if (cache := getattr(each, "cache", None)) is not None:
        cache.keys, cache.layers = cache.keys.cuda(), [layer.cuda() for layer in cache.layers]
    return each


def pair(name, **options):
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    module = moved(make())
    twin = copy.deepcopy(module)
    return graphcache.wrap(module, **options), module, twin, lambda step: [each.cuda() for each in inputs(step)]


def near(module, twin):
    pairs = zip(state_of(module), state_of(twin), strict=True)
    return all(torch.allclose(one, other, rtol=1e-5, atol=1e-6) for one, other in pairs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", MODELS)
def test_one_capture_then_hits_and_each_call_advances_the_state_once(name, mode):
    with mode():
        fast, module, twin, inputs = pair(name)
        for step in range(200):
            given = inputs(step)
            assert torch.allclose(fast(*given), twin(*given), rtol=1e-5, atol=1e-6), step
            assert near(module, twin), step
            if step == 100:
                for each in (*state_of(module), *state_of(twin)):
                    each.zero_()
            if step == 150:
                fast.clear()
    info = fast.cache_info()
    assert (info.captures, info.hits, info.eager) == (2, 198, {})


def test_calls_on_several_streams_follow_one_another():
    with torch.no_grad():
        fast, module, twin, inputs = pair("recurrent")
        streams = [torch.cuda.Stream() for _ in range(3)]
        for step in range(60):
            stream = streams[step % 3]
            stream.wait_stream(torch.cuda.current_stream())
            given = inputs(step)
            with torch.cuda.stream(stream):
                answer = fast(*given)
            torch.cuda.current_stream().wait_stream(stream)
            assert torch.allclose(answer, twin(*given), rtol=1e-5, atol=1e-6)
            assert near(module, twin)


def test_new_memory_for_the_state_is_noticed_before_the_graph_writes():
    with torch.no_grad():
        fast, module, twin, inputs = pair("recurrent")
        for turn in range(6):
            old = module.hidden
            before = old.clone()
            module.hidden, twin.hidden = (torch.full((1, SIZE), float(turn), device="cuda") for _ in range(2))
            for step in range(3):
                given = inputs(step)
                assert torch.allclose(fast(*given), twin(*given), rtol=1e-5, atol=1e-6)
            assert near(module, twin)
            assert torch.equal(old, before)


def test_a_verification_that_fails_leaves_the_state_as_after_one_call(monkeypatch):
    def fails(graph, *_, **__):
        graph.close()
        raise ValueError("made up")

    with torch.no_grad():
        fast, module, twin, inputs = pair("recurrent", strategy="whole_graph")
        with monkeypatch.context() as patched:
            patched.setattr(torch_recorder, "verify", fails)
            given = inputs(0)
            fast(*given), twin(*given)
        assert same(module, twin)
    assert fast.cache_info().eager == {Reason.CAPTURE_FAILED: 1}


def test_a_counter_on_the_host_beside_the_device_runs_eagerly():
    with torch.no_grad():
        fast, module, twin, inputs = pair("recurrent", strategy="whole_graph")
        module.steps, twin.steps = torch.zeros((), dtype=torch.long), torch.zeros((), dtype=torch.long)
        for step in range(4):
            given = inputs(step)
            fast(*given), twin(*given)
            assert int(module.steps) == int(twin.steps) == step + 1
            assert near(module, twin)
    assert fast.cache_info().captures == 0


READS = {
    "an operand": lambda m, x: x * m.scale,
    "item": lambda m, x: x * m.scale.item(),
    "tolist": lambda m, x: x * m.table.tolist()[0],
    "a branch": lambda m, x: x * 2 if m.scale > 1 else x * 3,
}


@pytest.mark.parametrize("name", READS)
def test_values_of_tensors_on_the_host_are_never_frozen(name):
    module = Fn(READS[name], scale=torch.tensor(2.0), table=torch.tensor([2.0, 1.0]))
    fast = graphcache.wrap(module)
    x = torch.ones(3, device="cuda")
    for step in range(6):
        module.scale.fill_(step // 2)
        module.table.fill_(step // 2)
        assert torch.equal(fast(x), READS[name](module, x)), step


def test_cache_objects_and_tensors_that_are_given():
    class Cache:
        def __init__(self):
            self.keys = torch.zeros(16, SIZE, device="cuda")
            self.length = torch.zeros((), dtype=torch.long, device="cuda")

    def forward(self, x, cache, kept):
        cache.keys.index_copy_(0, (cache.length % 16)[None], self.layer(x))
        cache.length.add_(1)
        kept.mul_(0.5).add_(x)
        return torch.softmax(x @ cache.keys.t(), -1) @ cache.keys + kept, cache

    torch.manual_seed(0)
    module = Fn(forward, layer=torch.nn.Linear(SIZE, SIZE).cuda().requires_grad_(False))
    with torch.no_grad(), graphcache.wrap(module) as fast:
        states = [[(Cache(), torch.zeros(1, SIZE, device="cuda")) for _ in range(2)] for _ in range(2)]
        for step in range(200):
            (cache, kept), (twin, other) = states[step % 2]
            x = torch.randn(1, SIZE, device="cuda")
            answer, given_back = fast(x, cache, kept)
            assert given_back is cache
            assert torch.allclose(answer, module(x, twin, other)[0], rtol=1e-5, atol=1e-6), step
            pairs = (cache.keys, twin.keys), (cache.length, twin.length), (kept, other)
            assert all(torch.allclose(*pair, rtol=1e-5, atol=1e-6) for pair in pairs), step
            if step == 100:
                for each in (cache.keys, cache.length, twin.keys, twin.length):
                    each.zero_()
        # One input in memory that is updated, which no graph may copy first.
        for _ in range(4):
            answer, wanted = fast(kept, cache, kept)[0], module(other, twin, other)[0]
            assert torch.allclose(answer, wanted, rtol=1e-5, atol=1e-6)
        assert fast.cache_info().hits > 190


class Stream:
    """The state of one stream of frames."""

    def __init__(self, device):
        self.hidden = torch.zeros(1, SIZE, device=device)
        self.frames = torch.zeros(1, SIZE, 4, device=device)

    def reset(self):
        self.hidden.zero_()
        self.frames.zero_()


def recurrent(module, x, stream):
    stream.hidden.copy_(module.cell(x, stream.hidden))
    return stream.hidden * 2


def causal(module, x, stream):
    stream.frames.copy_(torch.cat([stream.frames[:, :, 1:], x[:, :, None]], -1))
    return module.conv(stream.frames)[:, :, 0]


def frames_differ(forward, device, count):
    """The largest difference of answers and state over many frames of two streams, and the cache's figures."""
    torch.manual_seed(0)
    layers = {"cell": torch.nn.GRUCell(SIZE, SIZE), "conv": torch.nn.Conv1d(SIZE, SIZE, 4)}
    module = Fn(forward, **{name: each.to(device).requires_grad_(False) for name, each in layers.items()})
    streams, twins = ([Stream(device) for _ in range(3)] for _ in range(2))
    worst = torch.zeros((), device=device)
    with torch.no_grad(), graphcache.wrap(module, max_graphs=2) as fast:
        for frame in range(count):
            # Now and then a third one, for which the graph of another one is evicted.
            at = 2 if frame % 1000 in (500, 501, 502, 503) else frame % 2
            if frame % 997 == 0:
                streams[at].reset(), twins[at].reset()
            x = torch.randn(1, SIZE, device=device)
            answers = fast(x, streams[at]), module(x, twins[at])
            pairs = answers, *((getattr(each[at], name) for each in (streams, twins)) for name in ("hidden", "frames"))
            for one, other in pairs:
                worst = torch.maximum(worst, (one - other).abs().max())
        return float(worst), fast.cache_info()


@pytest.mark.parametrize("forward", [recurrent, causal])
def test_ten_thousand_frames_of_two_streams(forward):
    worst, info = frames_differ(forward, "cuda", 10_000)
    assert worst < 1e-6
    assert info.hits > 9_800
    assert info.evictions > 10


@pytest.mark.parametrize("name", rebound.MODELS)
def test_attributes_that_calls_give_other_tensors(name):
    torch.manual_seed(0)
    module = rebound.MODELS[name]().requires_grad_(False).cuda()
    module.h = tree_map(torch.Tensor.cuda, module.h)
    twin = copy.deepcopy(module)
    worst = torch.zeros((), device="cuda")
    with torch.inference_mode(), graphcache.wrap(module) as fast:
        for frame in range(3_000):
            if frame % 997 == 500:
                for each in (module, twin):
                    each.h = tree_map(torch.zeros_like, each.h)
            x = torch.randn(1, rebound.SIZE, device="cuda")
            pairs = [(fast(x), twin(x)), *zip(rebound.leaves(module.h), rebound.leaves(twin.h), strict=True)]
            for one, other in pairs:
                worst = torch.maximum(worst, (one - other).abs().max())
        info = fast.cache_info()
    assert float(worst) < 1e-5
    assert info.captures == 1
    assert info.hits == 2_998


def test_the_last_place_of_a_cache_is_captured():
    def forward(self, x):
        self.rows.index_copy_(0, self.position, x)
        self.position.add_(1)
        return self.rows * 2

    position = torch.zeros(1, dtype=torch.long, device="cuda")
    module = Fn(forward, rows=torch.zeros(1, 3, device="cuda"), position=position)
    with torch.no_grad(), graphcache.wrap(module) as fast:
        for step in range(3):
            x = torch.full((1, 3), float(step), device="cuda")
            assert torch.equal(fast(x), x * 2)
            assert int(module.position) == 1
            module.position.zero_()
        assert fast.cache_info().captures == 1


def test_text_generation():
    transformers = pytest.importorskip("transformers")
    from graphcache.integrations.transformers import enable_generation_graphs

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    model = transformers.LlamaForCausalLM(config).eval().cuda().requires_grad_(False)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    twin = copy.deepcopy(model)
    options = {"max_new_tokens": 100, "do_sample": False, "disable_compile": True}
    with enable_generation_graphs(model) as graphs:
        for length in (5, 9, 5):
            given = torch.randint(1, 64, (1, length), device="cuda")
            wanted = twin.generate(given, cache_implementation="static", **options)
            assert torch.equal(model.generate(given, **options), wanted)
        assert graphs.fast.cache_info().captures == 1
