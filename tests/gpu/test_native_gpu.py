"""The compiled short way on a device: it agrees with Python, is used, and answers as the Python way does."""

import statistics
import time
from types import BuiltinFunctionType

import pytest
import torch
from torch import nn

from graphcache import native
from graphcache.config import graphs_off
from graphcache.dispatch import fast_path
from graphcache.graphs.cuda import IoSlot
from graphcache.native.probe import prepare
from tests.helpers import dispatcher_of, in_threads, wrap_recorded

SIZE = 64


@pytest.fixture
def wraps(compiled, monkeypatch):
    """Wraps an engine or a module twice: for the Python way, and for the compiled one.

    What is loaded from now on has the library's locks, which both ways can use.
    """
    monkeypatch.setattr(native, "loaded", lambda wait=False: compiled)

    def wrap(module, **options):
        made = {"python": wrap_recorded(module, **options), "compiled": wrap_recorded(module, **options)}
        # Whoever remembers the first graph asks for the library; each asks once.
        for way, library in (("python", None), ("compiled", compiled)):
            monkeypatch.setattr(native, "loaded", lambda wait=False, library=library: library)
            dispatcher_of(made[way]).fast_path.table()
        assert dispatcher_of(made["python"]).fast_path.table() is None
        assert dispatcher_of(made["compiled"]).fast_path.table() is not None
        return made

    return wrap


@pytest.fixture
def stream():
    """A stream of its own is current; the legacy default stream has no short way."""
    made = torch.cuda.Stream()
    with torch.cuda.stream(made):
        yield made
    made.synchronize()


def answers_natively(fast, *args):
    """Whether the compiled way itself answers, once everything is warm; its answer goes to waste."""
    return fast._graphcache_table is not None and fast._graphcache_table.call(args) is not None


def warm(fast, *args, times=4):
    for _ in range(times):
        fast(*args)


def test_it_agrees_with_python_about_the_device(compiled):
    torch.cuda.init()
    x = torch.empty(4, 8, device="cuda")
    views = [x, x[1:], x.T, x[:, ::2], x.expand(3, 4, 8), x.half(), x.to(torch.complex64), x.bool(), x[0, 0]]
    layouts = {compiled.layout((each,)) for each in views}
    assert len(layouts) == len(views)
    assert None not in layouts
    assert compiled.layout((x,)) != compiled.layout((x.cpu(),)), "the device counts"
    assert all(compiled.address(each) == each.data_ptr() for each in views)
    for odd in (x.to_sparse(), nn.Parameter(x), torch._neg_view(x), x.to(torch.complex64).conj()):
        assert compiled.layout((odd,)) is None
    in_threads(lambda _: prepare(compiled), 1)


def test_new_outputs_come_from_torchs_allocator():
    torch.cuda.init()
    side = torch.cuda.Stream()
    x = torch.empty(1 << 18, 2, device="cuda").T
    make, args = IoSlot(x, (), 1).maker
    for inference in (False, True):
        before = torch.cuda.memory_allocated()
        with torch.inference_mode(inference), torch.cuda.stream(side):
            y = make(*args)
        assert torch.cuda.memory_allocated() - before >= x.nbytes
        assert y.data_ptr() % 512 == 0
        assert (y.shape, y.stride(), y.dtype, y.device) == (x.shape, x.stride(), x.dtype, x.device)
        assert (type(y), y.requires_grad, y.is_inference()) == (torch.Tensor, False, inference)
        y.record_stream(side)
        del y


def test_torchs_function_for_its_current_stream_is_used(compiled, monkeypatch):
    """Its number is compared without a call of Python's, on every stream."""
    torch.cuda.init()
    monkeypatch.setattr(native, "loaded", lambda wait=False: compiled)
    address = fast_path._stream_function(compiled)
    assert address
    index = torch.cuda.current_device()
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream(priority=-1)):
        with torch.cuda.stream(stream):
            assert compiled.stream_id(address, index) == (1, index, stream.stream_id)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("io", ["bind", "copy"])
def test_an_engine(wraps, load, stream, mode, io):
    engine = load("mlp8")
    both = wraps(engine, io=io)
    inputs = [torch.randn(n, SIZE, device="cuda") for n in (1, 2, 3, 8, 64)]
    with mode():
        kept = []
        for _ in range(4):
            kept += [(both["compiled"](x), both["python"](x)) for x in inputs]
        for x in inputs:
            other = torch.randn_like(x)
            both["compiled"](x)
            assert answers_natively(both["compiled"], other)
            kept.append((both["compiled"](other), both["python"](other)))
            assert kept[-1][0].is_inference() is torch.is_inference_mode_enabled()
        stream.synchronize()
        assert all(torch.equal(*each) for each in kept)
        assert len({left.data_ptr() for left, _ in kept}) == len(kept), "every answer is the caller's own"
    hits = [fast.cache_info().hits for fast in both.values()]
    assert hits[1] == hits[0] + 2 * len(inputs), "what was asked natively counts too"


def test_several_inputs_and_outputs(wraps, load, stream):
    both = wraps(load("two_outputs"))
    with torch.no_grad():
        for n in (1, 4, 1, 4, 1, 4, 1, 4):
            a, b = torch.randn(n, 8, device="cuda"), torch.randn(n, 8, device="cuda")
            for fast in both.values():
                got = fast(a, b)
                assert type(got) is tuple
                assert torch.equal(got[0], a + b)
                assert torch.equal(got[1], a * b)
        assert answers_natively(both["compiled"], a, b)


def test_into_the_callers_memory(wraps, load, stream):
    both = wraps(load("mlp8"))
    x, y = torch.randn(8, SIZE, device="cuda"), torch.empty(8, SIZE, device="cuda")
    with torch.no_grad():
        warm(both["compiled"], x)
        for _ in range(5):
            x.normal_()
            assert both["compiled"].forward_into(y, x) is y
            assert torch.equal(y, both["python"](x))
        assert both["compiled"]._graphcache_table.into(y, (x,)) is True
        assert both["compiled"]._graphcache_table.into(x, (x,)) is False
        assert both["compiled"]._graphcache_table.into(y[1:], (x,)) is False
        assert both["compiled"]._graphcache_table.into(y.half(), (x,)) is False
        fresh = both["compiled"](x)
        assert torch.equal(fresh, y)
        assert fresh.data_ptr() != y.data_ptr()


def test_a_module_of_torch_whose_weights_are_replaced(wraps, stream):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(SIZE, SIZE), nn.GELU(), nn.Linear(SIZE, SIZE)).cuda().requires_grad_(False).eval()
    both = wraps(net)
    x = torch.randn(4, SIZE, device="cuda")
    with torch.no_grad():
        for fast in both.values():
            warm(fast, x)
        assert answers_natively(both["compiled"], x)
        assert torch.equal(both["compiled"](x), both["python"](x))
        net[0].weight = nn.Parameter(torch.randn_like(net[0].weight), requires_grad=False)
        assert not answers_natively(both["compiled"], x)
        assert torch.allclose(both["compiled"](x), net(x), rtol=1e-4, atol=1e-5)
    assert both["compiled"].cache_info().captures == 2


def test_streams_modes_captures_and_layouts_in_turn(wraps, load, stream):
    engine = load("mlp8")
    both = wraps(engine)
    fast, x = both["compiled"], torch.randn(8, SIZE, device="cuda")
    other = torch.cuda.Stream()
    other.wait_stream(stream)
    with torch.no_grad():
        wanted = both["python"](x).clone()
        warm(fast, x)
        for step in range(12):
            with torch.cuda.stream((stream, other, torch.cuda.default_stream())[step % 3]):
                torch.cuda.current_stream().wait_stream(stream)
                assert torch.equal(fast(x), wanted)
        warm(fast, x)
        with torch.inference_mode():
            assert torch.equal(fast(x), wanted)
        with torch.enable_grad():
            assert torch.equal(fast(x), wanted)
        with torch.autocast("cuda"):
            assert torch.equal(fast(x), wanted)
        with graphs_off():
            assert torch.equal(fast(x), wanted)
        unaligned = torch.randn(8 * SIZE + 1, device="cuda")[1:].view(8, SIZE).copy_(x)
        assert torch.equal(fast(unaligned), wanted)
        warm(fast, x)
        assert answers_natively(fast, x)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            y = x + 1
            assert not answers_natively(fast, x), "nothing is launched into a capture"
        graph.replay()
        assert torch.equal(y, x + 1)
        warm(fast, x)
        assert answers_natively(fast, x)


def test_sessions(wraps, load, stream):
    module = load("mlp8")
    both = wraps(module)
    fast = both["compiled"]
    inputs = [torch.randn(n, SIZE, device="cuda") for n in (1, 3, 8)]
    with torch.no_grad():
        for x in inputs:
            warm(fast, x)
            assert answers_natively(fast, x)
        sessions = [fast.session(x) for x in inputs]
        for step in range(60):
            x, session = inputs[step % 3], sessions[step % 3]
            x.normal_()
            session.inputs[0].copy_(x)
            session.run()
            assert type(session.run) is BuiltinFunctionType
            shown = fast(x)
            assert torch.equal(shown, session.outputs)
            wanted = module(x)
            assert torch.allclose(shown, wanted, rtol=1e-2, atol=1e-3)
            assert torch.equal(both["python"](x), session.outputs)
        for session in sessions:
            session.close()


def test_threads(wraps, load, stream):
    both = wraps(load("mlp8"))
    fast, x = both["compiled"], torch.randn(8, SIZE, device="cuda")
    with torch.no_grad():
        wanted = both["python"](x).clone()
        warm(fast, x)
    torch.cuda.synchronize()
    streams, wrong = [torch.cuda.Stream() for _ in range(2)], []

    def work(index):
        with torch.no_grad(), torch.cuda.stream(streams[index % 2]):
            out = torch.empty_like(wanted)
            for step in range(200):
                y = fast.forward_into(out, x) if step % 5 == 0 else fast(x)
                if step % 20 == 0:
                    torch.cuda.current_stream().synchronize()
                    if not torch.equal(y, wanted):
                        wrong.append((index, step))

    in_threads(work, 4)
    assert wrong == []


def test_eviction_refit_and_closing(wraps, load, stream):
    both = wraps(load("mlp8"), max_graphs=2)
    fast = both["compiled"]
    inputs = [torch.randn(n, SIZE, device="cuda") for n in (1, 2, 3)]
    with torch.no_grad():
        for step in range(30):
            x = inputs[step * 7 % 3]
            assert torch.equal(fast(x), both["python"](x))
        x = inputs[0]
        warm(fast, x)
        assert answers_natively(fast, x)
        fast.module.epoch += 1
        assert not answers_natively(fast, x), "as after a refit"
        warm(fast, x)
        assert answers_natively(fast, x)
        fast.clear()
        assert not answers_natively(fast, x)
        assert torch.equal(fast(x), both["python"](x))
        fast.close()
        assert not answers_natively(fast, x)


def test_it_costs_less_host_time(wraps, load, stream):
    """The time until a call returns, in runs so short that the launch queue never fills up."""
    both = wraps(load("mlp8"))
    x, out = torch.randn(8, SIZE, device="cuda"), torch.empty(8, SIZE, device="cuda")
    found = {}
    with torch.no_grad():
        for way, fast in both.items():
            for name, call in (
                ("fresh", lambda fast=fast: fast(x)),
                ("into", lambda fast=fast: fast.forward_into(out, x)),
            ):
                times = []
                for _ in range(60):
                    warm(fast, x)
                    call()
                    stream.synchronize()
                    start = time.perf_counter_ns()
                    for _ in range(50):
                        call()
                    times.append((time.perf_counter_ns() - start) / 50)
                found[way, name] = statistics.median(times)
    print({f"{way} {name}": f"{nanoseconds / 1000:.2f} us" for (way, name), nanoseconds in found.items()})
    for name in ("fresh", "into"):
        assert found["compiled", name] < found["python", name], found
