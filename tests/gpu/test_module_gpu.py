"""Any PyTorch module on CUDA behind a cache, with and without engines in it."""

import gc
import threading

import pytest
import torch
from torch import nn

import graphcache
from graphcache import Reason
from graphcache.errors import CaptureError
from tests.helpers import graphs_of, wrap_recorded

SIZE = 64


class Net(nn.Module):
    """A few layers with structure in and out."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(SIZE, SIZE), nn.GELU(), nn.LayerNorm(SIZE), nn.Linear(SIZE, SIZE))

    def forward(self, x, *, scale=1.0, extra=None):
        y = self.layers(x) * scale
        if extra is not None:
            y = y + extra["bias"]
        return {"y": y, "pair": (y.sum(-1), x)}


class Mixed(nn.Module):
    """An engine, torch, an engine."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.second(nn.functional.gelu(self.first(x)) + x)


class Detector(nn.Module):
    """An engine and a part whose shapes depend on the data."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        y = self.backbone(x)
        return y, (y > y.mean()).nonzero()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().cuda().requires_grad_(False).eval()


def test_structures_and_shapes_are_those_of_eager(net):
    fast = graphcache.wrap(net)
    for n, scale in ((1, 1.0), (4, 2.0), (1, 1.0), (4, 2.0), (4, 3.0), (1, 1.0)):
        x = torch.randn(n, SIZE, device="cuda")
        extra = {"bias": torch.randn(SIZE, device="cuda")}
        got, wanted = fast(x, scale=scale, extra=extra), net(x, scale=scale, extra=extra)
        assert torch.allclose(got["y"], wanted["y"], rtol=1e-5, atol=1e-5)
        assert torch.allclose(got["pair"][0], wanted["pair"][0], rtol=1e-4, atol=1e-4)
        assert got["pair"][1] is x
    assert (fast.cache_info().captures, fast.cache_info().hits) == (3, 3)


def test_two_engines_with_torch_between_are_one_graph(load):
    model = Mixed(load("mlp8"), load("mlp8"))
    fast = graphcache.wrap(model)
    inputs = [torch.randn(n, SIZE, device="cuda") for n in (1, 2, 5, 8, 13, 21)]
    for _ in range(3):
        for x in inputs:
            assert torch.allclose(fast(x), model(x), rtol=1e-3, atol=1e-5)
    info = fast.cache_info()
    assert (info.captures, info.hits, info.eager) == (6, 12, {})
    assert not fast.first._runner.recorded


def test_one_engine_called_twice_in_a_graph(load):
    engine = load("mlp8")
    model = Mixed(engine, engine)
    fast = graphcache.wrap(model)
    for n in (3, 6, 3, 6):
        x = torch.randn(n, SIZE, device="cuda")
        assert torch.allclose(fast(x), model(x), rtol=1e-3, atol=1e-5)
    assert fast.cache_info().hits == 2


def test_data_dependent_parts_cost_only_themselves(load):
    model = Detector(load("mlp8"))
    fast = graphcache.wrap(model)
    for n in (2, 7, 2, 7, 2, 7):
        x = torch.randn(n, SIZE, device="cuda")
        for got, wanted in zip(fast(x), model(x), strict=True):
            assert torch.equal(got, wanted)
    info = fast.cache_info()
    assert sum(info.eager.values()) == 6
    assert set(info.eager) <= {Reason.HOST_READ, Reason.DATA_DEPENDENT}, info
    # The first call of a shape tries the whole, the second captures the part, the third replays it.
    assert (info.captures, info.hits) == (2, 2), info


def test_an_uncapturable_engine_between_capturable_ones(load):
    conditional, first = load("conditional"), load("mlp8")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle = first, conditional

        def forward(self, x):
            return self.middle(self.first(x)[:, :4].contiguous())

    model = Model()
    fast = graphcache.wrap(model)
    for n in (2, 3, 2, 3, 2, 3):
        x = torch.randn(n, SIZE, device="cuda")
        assert torch.allclose(fast(x), model(x), rtol=1e-4, atol=1e-6)
    info = fast.cache_info()
    assert info.eager == {Reason.NOT_CAPTURABLE: 6}, "the whole; what was found in it is a part of that"
    assert info.hits == 2


def test_more_pools_than_there_are_small_numbers(net):
    """What torch 2.11's ``MemPool.snapshot`` does to a pool's id would show from the 257th pool on."""
    x = torch.randn(2, SIZE, device="cuda")
    wanted = net(x)["y"]
    fast = graphcache.wrap(net)
    for _ in range(300):
        assert torch.equal(fast(x)["y"], wanted)
        fast.clear()
        gc.collect(0)
    assert fast.cache_info().captures == 300


def test_a_module_that_asks_how_its_input_lies_runs_eagerly(net):
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            y = self.net(x)["y"]
            return y * 2 if x.storage_offset() else y

    model = Asks()
    fast = graphcache.wrap(model)
    whole = torch.randn(5, SIZE, device="cuda")
    for x in (whole[:4], whole[1:], whole[:4]):
        assert torch.equal(fast(x), model(x))
    assert fast.cache_info().eager == {Reason.HOST_READ: 3}


def test_an_input_whose_elements_overlap_where_an_output_shows_it():
    class Same(nn.Module):
        def forward(self, x):
            return torch.empty_strided(x.shape, x.stride(), device="cuda").fill_(1.0) + 0 * x

    model = Same()
    fast = graphcache.wrap(model)
    for _ in range(2):
        x = torch.randn(1, 4, device="cuda").expand(3, 4)
        got, wanted = fast(x), model(x)
        assert torch.equal(got, wanted)
        assert got.stride() == wanted.stride()


def test_outputs_that_share_elements_share_them_in_every_answer():
    class Views(nn.Module):
        def forward(self, x):
            y = x * 2
            return y[:1], y, y.view(-1), y.t(), *y.chunk(2, -1)

    module = Views()
    fast = graphcache.wrap(module)
    for value in range(4):
        x = torch.full((2, SIZE), float(value), device="cuda")
        answer, expected = fast(x), module(x)
        for each in (answer, expected):
            each[2].add_(1)
        assert all(map(torch.equal, answer[:4], expected[:4]))
    assert (fast.cache_info().hits, fast.cache_info().eager) == (3, {})


def test_outputs_keep_their_strides():
    class Strided(nn.Module):
        def forward(self, x):
            return (x * 2)[:, ::2], (x * 3)[:, 1], (x * 4).t(), (x * 5).sum(0).expand(3, SIZE)

    module = Strided()
    fast = graphcache.wrap(module)
    for value in range(4):
        x = torch.full((2, SIZE), float(value), device="cuda")
        answer, expected = fast(x), module(x)
        assert [each.stride() for each in answer] == [each.stride() for each in expected]
        answer[3][0] += 1
        expected[3][0] += 1
        assert all(map(torch.equal, answer, expected))
    assert (fast.cache_info().hits, fast.cache_info().eager) == (3, {})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("options", [{}, {"fullgraph": True}, {"dynamic": True}])
def test_what_inductor_compiled_is_captured(net, options):
    module = torch.compile(nn.Sequential(*net.layers), **options)
    fast = graphcache.wrap(module)
    with torch.no_grad():
        for value in range(6):
            x = torch.randn(4, SIZE, device="cuda")
            assert torch.equal(fast(x), module(x))
            if value == 4:
                net.layers[0].weight.mul_(2)
    info = fast.cache_info()
    assert info.hits >= 3
    # The first call compiles, and is observed once more.
    assert set(info.eager) <= {Reason.UNSETTLED}


def test_a_host_read_fails_the_capture_and_leaves_everything_sound(net):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            y = self.net(x)["y"]
            return y * 2 if y.sum().item() > 0 else y

    model = Reads()
    fast = graphcache.wrap(model)
    before = torch.cuda.current_stream()
    for _ in range(3):
        x = torch.randn(3, SIZE, device="cuda")
        assert torch.equal(fast(x), model(x))
        assert torch.cuda.current_stream() == before
    assert fast.cache_info().eager == {Reason.HOST_READ: 3}
    strict = graphcache.wrap(model, on_failure="raise")
    with pytest.raises(CaptureError, match="host_read"):
        strict(x)
    good = graphcache.wrap(net)
    assert torch.allclose(good(x)["y"], net(x)["y"], rtol=1e-5, atol=1e-5)
    assert good.cache_info().captures == 1


def test_random_modules_run_eagerly():
    model = nn.Dropout(0.5).cuda()
    fast = graphcache.wrap(model)
    torch.manual_seed(3)
    wanted = [model(torch.ones(100, device="cuda")) for _ in range(3)]
    torch.manual_seed(3)
    for each in wanted:
        assert torch.equal(fast(torch.ones(100, device="cuda")), each)
    assert fast.cache_info().eager == {Reason.RANDOM: 3}


def test_evicting_one_graph_leaves_the_others_their_memory(net):
    """The canary of pytorch/pytorch#193402: a survivor must not lose its cuBLAS workspace or its pool."""
    fast = graphcache.wrap(net, max_graphs=8)
    inputs = [torch.randn(n, SIZE, device="cuda") for n in (16, 32, 48, 64)]
    wanted = [net(x)["y"] for x in inputs]
    for x in inputs:
        fast(x)
    for victim in list(graphs_of(fast).entries)[:2]:
        graphs_of(fast).evict(victim)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    garbage = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(64)]
    for _ in range(3):
        for x, y in list(zip(inputs, wanted, strict=True))[2:]:
            assert torch.allclose(fast(x)["y"], y, rtol=1e-5, atol=1e-5)
    del garbage
    assert fast.cache_info().hits == 6


def test_replaced_weights_are_seen(net):
    fast = graphcache.wrap(net)
    x = torch.randn(4, SIZE, device="cuda")
    fast(x)
    layer = net.layers[0]
    changes = [
        lambda: layer.weight.mul_(0.5),
        lambda: setattr(layer.weight, "data", torch.randn_like(layer.weight)),
        lambda: setattr(layer, "weight", nn.Parameter(torch.randn_like(layer.weight), requires_grad=False)),
        lambda: net.load_state_dict({k: v * 0.7 for k, v in net.state_dict().items()}),
        lambda: net.load_state_dict({k: v * 0.7 for k, v in net.state_dict().items()}, assign=True),
        lambda: setattr(net, "layers", nn.Sequential(nn.Linear(SIZE, SIZE)).cuda()),
    ]
    with torch.no_grad():
        for change in changes:
            change()
            for _ in range(2):
                assert torch.allclose(fast(x)["y"], net(x)["y"], rtol=1e-5, atol=1e-5)
            torch.cuda.empty_cache()


def test_gradients_run_eagerly(net):
    fast = graphcache.wrap(net)
    x = torch.randn(2, SIZE, device="cuda", requires_grad=True)
    fast(x)["y"].sum().backward()
    assert x.grad is not None
    assert fast.cache_info().eager == {Reason.GRAD: 1}
    with torch.inference_mode():
        fast(x)
        assert fast(x)["y"].is_inference()
    assert fast.cache_info().hits == 1


def test_capture_while_other_threads_allocate_and_copy(net):
    fast = graphcache.wrap(net, max_graphs=64)
    stop, failures = threading.Event(), []

    def disturb():
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                while not stop.is_set():
                    big = torch.randn(1 << 18, device="cuda")
                    assert big.cpu().isfinite().all()
                    torch.cuda.empty_cache()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=disturb) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for n in range(1, 25):
            x = torch.randn(n, SIZE, device="cuda")
            for _ in range(2):
                assert torch.allclose(fast(x)["y"], net(x)["y"], rtol=1e-4, atol=1e-4)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures, failures
    assert fast.cache_info().captures == 24, fast.cache_info()


def test_cpu_tensors_among_cuda_ones_run_eagerly(net):
    class Adds(nn.Module):
        def forward(self, x, y):
            return x + y.to(x.device)

    fast = graphcache.wrap(Adds())
    x, y = torch.randn(3, device="cuda"), torch.randn(3)
    assert torch.equal(fast(x, y), x + y.cuda())
    assert fast.cache_info().eager == {Reason.ARGUMENT: 1}


def test_expanded_and_strided_inputs_are_copied_right(net):
    fast = graphcache.wrap(net)
    for _ in range(3):
        for x in (
            torch.randn(1, SIZE, device="cuda").expand(4, SIZE),
            torch.randn(SIZE, 4, device="cuda").t(),
            torch.randn(4, 2 * SIZE, device="cuda")[:, ::2],
        ):
            assert torch.allclose(fast(x)["y"], net(x)["y"], rtol=1e-5, atol=1e-5)
    assert (fast.cache_info().captures, fast.cache_info().hits) == (3, 6)


def test_pending_conjugation_and_negation(net):
    class Sum(nn.Module):
        def forward(self, x):
            return x * 2

    fast = graphcache.wrap(Sum())
    for _ in range(3):
        z = torch.randn(5, dtype=torch.complex64, device="cuda")
        for x in (z, z.conj(), z.conj().imag, z.imag):
            assert torch.equal(fast(x), x * 2)
    assert fast.cache_info().hits == 8


def test_graphs_of_one_module_share_a_pool(net):
    fast = graphcache.wrap(net, max_graphs=64)
    fast(torch.randn(64, SIZE, device="cuda"))
    first = fast.cache_info().nbytes
    for n in range(1, 33):
        fast(torch.randn(n, SIZE, device="cuda"))
    per_graph = (fast.cache_info().nbytes - first) / 32
    assert per_graph < 1024**2, f"{per_graph:.0f} bytes a graph: the cuBLAS workspace alone is 32 MiB"


def test_an_engine_inside_that_changes_makes_the_whole_graph_stale(load):
    model = Mixed(load("mlp8"), load("mlp8"))
    fast = graphcache.wrap(model)
    x = torch.randn(4, SIZE, device="cuda")
    for _ in range(2):
        fast(x)
    with graphcache.runtime.enable_output_allocator(fast):
        assert torch.allclose(fast(x), model(x), rtol=1e-3, atol=1e-5)
        assert fast.cache_info().eager == {Reason.OUTPUT_ALLOCATOR: 1}
    for _ in range(3):
        assert torch.allclose(fast(x), model(x), rtol=1e-3, atol=1e-5)
    info = fast.cache_info()
    assert (info.captures, info.hits) == (2, 3), info


def test_answers_into_the_callers_tensors(net, load):
    """Of a torch graph, whose pool other graphs write into, and of an engine, bound and copied."""
    engine = load("mlp8")
    torch_side = torch.nn.Sequential(torch.nn.Linear(SIZE, SIZE), torch.nn.GELU()).cuda().requires_grad_(False).eval()
    for module, options in ((torch_side, {}), (engine, {}), (engine, {"io": "copy"})):
        into = wrap_recorded(module, **options)
        inputs = [torch.randn(n, SIZE, device="cuda") for n in (2, 5, 9)]
        for x in inputs:
            into(x)
        state = wanted = torch.randn(5, SIZE, device="cuda")
        for _ in range(6):
            state, wanted = into(state), module(wanted)
            assert torch.allclose(state, wanted, rtol=1e-3, atol=1e-5)
        outs = [torch.empty(n, SIZE, device="cuda") for n in (2, 5, 9)]
        odd = torch.empty(SIZE, 2, device="cuda").t()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        for turn in range(4):
            with torch.cuda.stream(side if turn % 2 else torch.cuda.current_stream()):
                for x, out in zip(inputs, outs, strict=True):
                    x.normal_()
                    into.forward_into(out, x)
                    assert torch.allclose(out, module(x), rtol=1e-4, atol=1e-6)
                into.forward_into(odd, inputs[0])
                assert torch.allclose(odd, module(inputs[0]), rtol=1e-4, atol=1e-6)
                torch.cuda.current_stream().synchronize()
        assert into.cache_info().captures == 3
        assert into.cache_info().eager == {}
        into.close()
