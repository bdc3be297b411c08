"""EngineModule, eager and behind a cache, against torch, with real engines."""

import contextvars
import gc
import random
import weakref

import pytest
import torch

import graphcache
from graphcache import Reason
from graphcache.capture import engine_recorder
from graphcache.errors import (
    ClosedError,
    EngineFormatError,
    EngineVersionError,
    InputCountError,
    InputDeviceError,
    InputDtypeError,
    InputRankError,
    InputTypeError,
    ProfileRangeError,
)
from tests.helpers import dispatcher_of, graphs_of, wrap_recorded

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
networks = pytest.importorskip("tests.gpu.networks")


def close(got, wanted, bound=5e-3):
    got, wanted = got.double().cpu(), wanted.double().cpu()
    return (got - wanted).norm() <= bound * wanted.norm()


def test_eager_answers_are_right(load):
    engine = load("mlp8")
    for n in (1, 8, 3, 64):
        x = torch.randn(n, networks.SIZE, device="cuda")
        assert close(engine(x), networks.mlp8_reference(x))


def test_eager_on_a_side_stream_and_on_the_default_stream(load):
    engine = load("mlp8")
    x = torch.randn(4, networks.SIZE, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        there = engine(x * 2)
    torch.cuda.current_stream().wait_stream(stream)
    assert close(there, engine(x * 2), 1e-5)


def test_there_and_back_again_replays_the_first_graph(load):
    fast = graphcache.wrap(load("mlp8"))
    a, b = (torch.randn(n, networks.SIZE, device="cuda") for n in (2, 5))
    for x in (a, b, a, b, a):
        assert close(fast(x), networks.mlp8_reference(x))
    info = fast.cache_info()
    assert (info.captures, info.hits, info.eager) == (2, 3, {})


@pytest.mark.parametrize(("contexts", "shapes", "count"), [("private", 30, 30), ("shared", 60, 1)])
def test_many_interleaved_shapes(load, contexts, shapes, count, monkeypatch):
    # How long a check takes depends on the host.
    monkeypatch.setattr(engine_recorder, "MAX_CHECK_SECONDS", float("inf"))
    engine = load("mlp8")
    fast = wrap_recorded(engine, max_graphs=shapes, contexts=contexts)
    inputs = [torch.randn(n, networks.SIZE, device="cuda") for n in range(1, shapes + 1)]
    for _ in range(3):
        for x in inputs:
            assert close(fast(x), networks.mlp8_reference(x))
    assert fast.cache_info().hits == 2 * shapes
    graphs = [entry.graph.graph for entry in graphs_of(fast).entries.values()]
    assert all(slot.pointers for graph in graphs for slot in (*graph.inputs, *graph.outputs)), "bound, not copied"
    scratch = {entry.graph.graph._held[2][0].scratch.data_ptr() for entry in graphs_of(fast).entries.values()}
    assert len(scratch) == 1, "all on one scratch memory"
    assert len({id(entry.graph.graph._held[2][0]) for entry in graphs_of(fast).entries.values()}) == count


def test_eviction_keeps_the_budget_and_the_answers(load):
    fast = graphcache.wrap(load("mlp8"), max_graphs=2)
    for n in (1, 2, 3, 1, 2, 3, 3):
        x = torch.randn(n, networks.SIZE, device="cuda")
        assert close(fast(x), networks.mlp8_reference(x))
        assert fast.cache_info().graphs <= 2
    assert fast.cache_info().evictions == 4


def test_answers_stay_intact_after_later_calls(load):
    fast = graphcache.wrap(load("mlp8"))
    kept = []
    for _ in range(4):
        x = torch.randn(3, networks.SIZE, device="cuda")
        kept.append((x, fast(x)))
    for x, y in kept:
        assert close(y, networks.mlp8_reference(x))


@pytest.mark.parametrize("io", ["bind", "copy"])
def test_graphs_that_share_contexts_stay_right_whatever_is_captured_later(load, io):
    engine = load("mlp8")
    fast = wrap_recorded(engine, contexts="shared", io=io, max_graphs=24)
    draw = random.Random(0)
    sizes = [draw.randint(1, 40) for _ in range(200)]
    for n in sizes:
        x = torch.randn(n, networks.SIZE, device="cuda")
        assert close(fast(x), networks.mlp8_reference(x))
    info = fast.cache_info()
    assert info.captures > 24
    assert info.hits == len(sizes) - info.captures
    assert dispatcher_of(fast).target.recorder._contexts.shares
    assert len(engine.engine.contexts) <= 2, "one more for eager calls"
    graphs = [entry.graph.graph for entry in graphs_of(fast).entries.values()]
    # A look at NaN would be empty: a graph that has become wrong makes NaN of it as well.
    assert all(slot.buffer.isfinite().all() for graph in graphs for slot in graph.inputs)


def test_copying_gives_the_same(load):
    fast = wrap_recorded(load("mlp8"), io="copy")
    for n in (1, 4, 2, 1, 4, 2):
        x = torch.randn(n, networks.SIZE, device="cuda")
        assert close(fast(x), networks.mlp8_reference(x))
    assert fast.cache_info().hits == 3


def test_many_fresh_tensors_bound_one_after_another(load):
    fast = graphcache.wrap(load("mlp8"))
    kept = []
    for step in range(60):
        x = torch.randn(5, networks.SIZE, device="cuda")
        if step % 3 == 0:
            x = torch.randn(5 * networks.SIZE + 1, device="cuda")[1:].view(5, networks.SIZE)
        kept.append((x, fast(x)))
        if step % 7 == 0:
            kept = kept[::2]
    for x, y in kept:
        assert close(y, networks.mlp8_reference(x))


def test_non_contiguous_unaligned_and_empty_inputs(load):
    engine = load("two_outputs")
    for run in (engine, graphcache.wrap(engine)):
        for _ in range(2):
            a = torch.randn(8, 5, device="cuda").t()
            b = torch.randn(41, device="cuda")[1:].view(5, 8)
            total, product = run(a, b)
            assert torch.equal(total, a + b)
            assert torch.equal(product, a * b)
            wide = torch.randn(5, 1, device="cuda").expand(5, 8)
            assert torch.equal(run(wide, b)[0], wide + b)
            none = torch.empty(0, 8, device="cuda")
            assert [tuple(out.shape) for out in run(none, none)] == [(0, 8), (0, 8)]


def test_empty_inputs_have_nothing_to_capture_or_are_captured_right(load):
    fast = graphcache.wrap(load("two_outputs"))
    none = torch.empty(0, 8, device="cuda")
    fast(none, none)
    assert fast(none, none)[0].shape == (0, 8)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "int32", "int64"])
def test_dtypes(load, name):
    engine = load(f"typed_{name}")
    fast = graphcache.wrap(engine)
    x = torch.arange(1, 9, device="cuda").to(getattr(torch, name))
    for _ in range(3):
        for run in (engine, fast):
            assert run(x).dtype is x.dtype
            assert torch.equal(run(x), x + x)


def test_booleans(load):
    fast = graphcache.wrap(load("logical"))
    x = torch.tensor([True, False, True], device="cuda")
    for _ in range(2):
        assert torch.equal(fast(x), ~x)
        x = ~x


def test_zero_dimensional_inputs(load):
    fast = graphcache.wrap(load("scalar"))
    for factor in (2.0, 3.0, 4.0):
        x = torch.randn(5, device="cuda")
        assert torch.allclose(fast(x, torch.tensor(factor, device="cuda")), x * factor)
    assert fast.cache_info().hits == 2


def test_host_shape_tensors_are_part_of_the_key(load):
    engine = load("slice_by_value")
    fast = graphcache.wrap(engine)
    x = torch.randn(16, 4, device="cuda")
    for _ in range(2):
        for n in (3, 9, 16):
            for stop in (torch.tensor([n]), torch.tensor([n], device="cuda")):
                assert torch.equal(engine(x, stop), x[:n].relu())
                assert torch.equal(fast(x, stop), x[:n].relu())
    info = fast.cache_info()
    assert info.captures <= 6
    assert info.hits >= 6, info


def test_profiles_are_chosen_and_named_in_the_error(load):
    engine = load("two_profiles")
    fast = graphcache.wrap(engine)
    for n in (2, 16, 4, 32, 2, 16):
        x = torch.randn(n, networks.SIZE, device="cuda")
        wanted = (x.double().cpu() @ networks._weights(1)[0].double()).relu()
        assert close(engine(x), wanted)
        assert close(fast(x), wanted)
    for run in (engine, fast):
        with pytest.raises(ProfileRangeError, match=r"profile 0: 1\.\.4 x 64; profile 1: 8\.\.32 x 64"):
            run(torch.randn(6, networks.SIZE, device="cuda"))
    engine.set_optimization_profile(1)
    with pytest.raises(ProfileRangeError, match=r"\(profile 1: 8\.\.32 x 64\)"):
        fast(torch.randn(2, networks.SIZE, device="cuda"))
    engine.set_optimization_profile(None)
    assert fast(torch.randn(2, networks.SIZE, device="cuda")).shape == (2, networks.SIZE)


def test_keyword_arguments(load):
    engine = load("two_outputs")
    fast = graphcache.wrap(engine)
    a, b = torch.randn(2, 3, 4, device="cuda").unbind()
    for run in (engine, fast):
        assert torch.equal(run(b=b, a=a)[0], a + b)
        with pytest.raises(
            InputCountError, match="takes the inputs a, b, each of them once; 1 were given by position, and by name c"
        ):
            run(a, c=b)
        with pytest.raises(InputCountError, match="0 were given by position, and by name a"):
            run(a=a)
        with pytest.raises(InputCountError, match="1 were given by position, and by name a"):
            run(a, a=b)


def test_bad_inputs_raise_their_own_errors_and_leave_nothing(load):
    engine = load("mlp8")
    fast = graphcache.wrap(engine)
    good = torch.randn(2, networks.SIZE, device="cuda")
    for run in (engine, fast):
        with pytest.raises(InputCountError, match=r"takes 1 inputs \(x\), 2 were given"):
            run(good, good)
        with pytest.raises(InputCountError, match="0 were given"):
            run()
        with pytest.raises(InputTypeError, match="of type list"):
            run([1.0])
        with pytest.raises(InputDtypeError, match=r"torch.float16, the engine takes torch.float32; convert it"):
            run(good.half())
        with pytest.raises(InputDeviceError, match=r"lies on cpu, the engine on cuda:0; move it with"):
            run(good.cpu())
        with pytest.raises(InputRankError, match=r"shape \(64,\), the engine takes \[any, 64\]"):
            run(good[0])
        with pytest.raises(ProfileRangeError, match=r"the engine takes \[any, 64\]"):
            run(torch.randn(2, 65, device="cuda"))
        with pytest.raises(ProfileRangeError, match=r"shape \(65, 64\).*profile 0: 1\.\.64 x 64"):
            run(torch.randn(65, networks.SIZE, device="cuda"))
    assert fast.cache_info().graphs == 0
    assert close(fast(good), networks.mlp8_reference(good))


def test_an_engine_that_cannot_be_captured_runs_eagerly_and_says_so_once(load, caplog):
    fast = graphcache.wrap(load("conditional"))
    other = graphcache.wrap(load("mlp8"))
    for sign in (1.0, -1.0, 1.0, -1.0):
        x = sign * torch.rand(3, 4, device="cuda")
        assert torch.equal(fast(x), x.relu() if sign > 0 else -x)
        y = torch.randn(2, networks.SIZE, device="cuda")
        assert close(other(y), networks.mlp8_reference(y))
    info = fast.cache_info()
    assert info.eager == {Reason.NOT_CAPTURABLE: 4}, info
    told = [record.getMessage() for record in caplog.records if record.name == "graphcache"]
    assert len(told) == 1
    assert "conditional ran eagerly: not_capturable" in told[0]
    assert other.cache_info().hits == 3


def test_output_allocator_runs_eagerly_with_a_reason(load):
    engine = load("mlp8")
    fast = graphcache.wrap(engine)
    x = torch.randn(2, networks.SIZE, device="cuda")
    fast(x)
    with graphcache.runtime.enable_output_allocator(fast):
        for n in (2, 7, 3):
            y = torch.randn(n, networks.SIZE, device="cuda")
            assert close(fast(y), networks.mlp8_reference(y))
    assert fast.cache_info().eager == {Reason.OUTPUT_ALLOCATOR: 3}
    assert close(fast(x), networks.mlp8_reference(x))


def test_allocated_outputs_belong_to_the_caller(load):
    engine = load("two_outputs")
    with graphcache.runtime.enable_output_allocator(engine):
        kept = []
        for n in (3, 9, 2, 9):
            a, b = torch.randn(2, n, 4, device="cuda").unbind()
            kept.append((a, b, engine(a, b)))
    for a, b, (total, product) in kept:
        assert torch.equal(total, a + b)
        assert torch.equal(product, a * b)


def test_bare_engines_use_graphs_in_subgraph_mode(load):
    engine = load("mlp8")
    x = torch.randn(2, networks.SIZE, device="cuda")
    with graphcache.runtime.enable_cudagraphs(engine) as fast:
        assert fast.module is engine
        for _ in range(3):
            assert close(fast(x), networks.mlp8_reference(x))
        assert fast.cache_info().hits == 2


def test_set_cudagraphs_mode_switches_bare_engines(load):
    engine = load("mlp8")
    x = torch.randn(2, networks.SIZE, device="cuda")

    def body():
        graphcache.runtime.set_cudagraphs_mode(True)
        for _ in range(3):
            assert close(engine(x), networks.mlp8_reference(x))
        assert engine.with_graphs().cache_info().hits == 2
        graphcache.runtime.set_cudagraphs_mode(False)
        assert close(engine(x), networks.mlp8_reference(x))
        assert engine.with_graphs().cache_info().hits == 2

    contextvars.copy_context().run(body)


def test_alternating_streams_do_not_record_again(load):
    fast = graphcache.wrap(load("mlp8"))
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    answers = []
    for step in range(12):
        stream = streams[step % 3]
        with torch.cuda.stream(stream):
            x = torch.randn(4, networks.SIZE, device="cuda")
            answers.append((x, fast(x)))
    torch.cuda.synchronize()
    for x, y in answers:
        assert close(y, networks.mlp8_reference(x))
    assert fast.cache_info().captures == 1


def test_inside_a_capture_of_the_callers(load):
    engine = load("mlp8")
    fast = graphcache.wrap(engine)
    x = torch.randn(4, networks.SIZE, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        engine(x)
        fast(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fast(x)
    assert fast.cache_info().eager == {Reason.OUTER_CAPTURE: 1}
    for n in (3, 9):
        engine(torch.randn(n, networks.SIZE, device="cuda"))
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert close(y, networks.mlp8_reference(x))


def test_closed_graphs_contexts_and_buffers_are_gone(engine_bytes):
    engine = graphcache.load(engine_bytes("mlp8"))
    fast = graphcache.wrap(engine)
    x = torch.randn(4, networks.SIZE, device="cuda")
    fast(x)
    graph = next(iter(graphs_of(fast).entries.values())).graph.graph
    context = weakref.ref(graph._held[2][0])
    gone = [weakref.ref(graph.outputs[0].buffer), weakref.ref(graph)]
    fast.close()
    fast.close()
    del graph
    gc.collect()
    assert [ref() for ref in gone] == [None] * 2
    assert len(engine.contexts) == 1, "the context waits for the next graph"
    with pytest.raises(ClosedError, match="was closed; wrap its"):
        fast(x)
    assert close(engine(x), networks.mlp8_reference(x))
    engine.close()
    engine.close()
    gc.collect()
    assert context() is None
    with pytest.raises(ClosedError, match="load it again"):
        engine(x)


def test_memory_returns_after_many_captures(load):
    engine = load("mlp8")
    fast = graphcache.wrap(engine, max_graphs=2)
    inputs = [torch.randn(n, networks.SIZE, device="cuda") for n in (1, 2, 3, 4)]
    # Twice: what was evicted is held against eager answers once, for which the engine keeps a context too.
    for x in inputs * 2:
        fast(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for x in inputs * 3:
        fast(x)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 4096


def test_damaged_engines(engine_bytes, tmp_path):
    data = engine_bytes("mlp8")
    with pytest.raises(EngineFormatError, match="truncated"):
        graphcache.load(data[: len(data) // 2])
    with pytest.raises(EngineFormatError, match="is not a TensorRT-RTX engine"):
        graphcache.load(b"x" * 5000)
    with pytest.raises(EngineVersionError, match=r"built by TensorRT-RTX 1\.3\.0\.7"):
        graphcache.load(data[:24] + bytes([1, 3, 0, 7]) + data[28:])
    path = tmp_path / "model.engine"
    path.write_bytes(data)
    assert graphcache.load(path).name == "model"


def test_threads_share_one_module(load):
    from concurrent.futures import ThreadPoolExecutor

    fast = graphcache.wrap(load("mlp8"), max_graphs=4)

    def work(seed):
        generator = torch.Generator(device="cuda").manual_seed(seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            for step in range(30):
                x = torch.randn(1 + (seed + step) % 6, networks.SIZE, device="cuda", generator=generator)
                y = fast(x)
                torch.cuda.current_stream().synchronize()
                if not close(y, networks.mlp8_reference(x)):
                    return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_a_session_is_a_launch_over_the_callers_buffers(load):
    fast = graphcache.wrap(load("mlp8"))
    x = torch.randn(4, networks.SIZE, device="cuda")
    with fast.session(x) as session:
        for _ in range(3):
            value = torch.randn(4, networks.SIZE, device="cuda")
            session.inputs[0].copy_(value)
            session.run()
            assert close(session.outputs, networks.mlp8_reference(value))
            y = torch.randn(4, networks.SIZE, device="cuda")
            assert close(fast(y), networks.mlp8_reference(y))
    with pytest.raises(ClosedError, match="make a new session"):
        session.run()
    with pytest.raises(graphcache.errors.CaptureError, match="not_capturable"):
        graphcache.wrap(load("conditional")).session(torch.rand(3, 4, device="cuda"))


def test_gradients_of_inputs_are_not_recorded_and_said(load):
    fast = graphcache.wrap(load("mlp8"))
    x = torch.randn(4, networks.SIZE, device="cuda", requires_grad=True)
    assert close(fast(x).detach(), networks.mlp8_reference(x.detach()))
    assert fast.cache_info().eager == {Reason.GRAD: 1}
    with torch.inference_mode():
        assert [fast(x).is_inference() for _ in range(3)] == [True] * 3
    with torch.no_grad():
        assert not fast(x).is_inference()
        assert close(fast(x), networks.mlp8_reference(x.detach()))
    assert fast.cache_info().captures == 2


def test_an_uncapturable_bare_engine_in_subgraph_mode(load):
    engine = load("conditional")
    x = torch.rand(3, 4, device="cuda")

    def body():
        graphcache.runtime.set_cudagraphs_mode(True)
        for _ in range(3):
            assert torch.equal(engine(x), x)
        assert engine.with_graphs().cache_info().eager == {Reason.NOT_CAPTURABLE: 3}

    contextvars.copy_context().run(body)


def test_multi_device_safe_mode_moves_inputs(load):
    engine = load("mlp8")
    fast = graphcache.wrap(engine)
    with graphcache.runtime.set_multi_device_safe_mode(True):
        for _ in range(3):
            x = torch.randn(4, networks.SIZE)
            for run in (engine, fast):
                assert run(x).is_cuda
                assert close(run(x), networks.mlp8_reference(x))
            y = torch.randn(4, networks.SIZE, device="cuda")
            assert close(fast(y), networks.mlp8_reference(y))
    assert fast.cache_info().captures == 1
    with pytest.raises(InputDeviceError):
        fast(x)


def test_weight_streaming_runs_eagerly_below_the_full_budget(engine_bytes):
    engine = graphcache.load(engine_bytes("mlp8_streaming"), name="streaming")
    fast = graphcache.wrap(engine)
    full = engine.get_streamable_device_memory_budget()
    assert full > 0
    assert engine.get_device_memory_budget() == full
    assert 0 < engine.get_automatic_device_memory_budget() <= full
    x = torch.randn(4, networks.SIZE, device="cuda")
    wanted = networks.mlp8_reference(x)
    for _ in range(2):
        assert close(fast(x), wanted)
    for budget in (0, full // 2):
        assert engine.set_device_memory_budget(budget) == budget
        for run in (engine, fast):
            assert close(run(x), wanted)
    assert fast.cache_info().eager == {Reason.WEIGHT_STREAMING: 2}
    engine.set_device_memory_budget(full)
    for _ in range(3):
        assert close(fast(x), wanted)
    info = fast.cache_info()
    assert (info.captures, info.hits) == (2, 3), info
    with pytest.raises(graphcache.errors.ConfigError, match="no budget of -1"):
        engine.set_device_memory_budget(-1)
    with fast.session(x) as session:
        with pytest.raises(graphcache.errors.EngineError, match="1 execution contexts are still in use, by sessions"):
            engine.set_device_memory_budget(0)
        session.run()
    assert engine.set_device_memory_budget(0) == 0
    fast.close()
    engine.close()


def test_engines_without_weight_streaming_say_so(load):
    engine = load("mlp8")
    assert engine.get_streamable_device_memory_budget() == 0
    with pytest.raises(graphcache.errors.ConfigError, match="not built for weight streaming"):
        engine.set_device_memory_budget(0)


def test_full_edges_give_the_same_answers(load):
    fast = wrap_recorded(load("mlp8"), io="copy", edges="full")
    for n in (1, 4, 1, 4):
        x = torch.randn(n, networks.SIZE, device="cuda")
        assert close(fast(x), networks.mlp8_reference(x))
    assert fast.cache_info().hits == 2


def test_a_bound_graph_copies_nothing(load):
    """Torch allocates the static buffers one after the other; that must not make their addresses ambiguous."""
    nodes = {}
    for io in ("bind", "copy"):
        fast = wrap_recorded(load("mlp8"), io=io)
        for rows in (1, 2, 8, 32, 64):
            fast(torch.randn(rows, networks.SIZE, device="cuda"))
        nodes[io] = [entry.graph.graph.nodes for entry in graphs_of(fast).entries.values()]
    assert [copied - bound for bound, copied in zip(nodes["bind"], nodes["copy"], strict=True)] == [2] * 5
