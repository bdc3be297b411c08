"""Engines as modules: loading, checking and running them, eagerly and behind a cache, over the stand-ins."""

from __future__ import annotations

import contextvars
import gc
import itertools
import logging
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphcache
from graphcache import CachedModule, EngineModule, Reason
from graphcache.capture import engine_recorder as record_engine
from graphcache.errors import (
    CaptureError,
    ClosedError,
    ConfigError,
    CudaError,
    EngineError,
    EngineExecutionError,
    EngineFormatError,
    EngineVersionError,
    InputCountError,
    InputDtypeError,
    InputError,
    NoGpuError,
    OutputMismatchError,
    ProfileRangeError,
    Refusal,
    TensorRTNotFoundError,
)
from graphcache.graphs import capture, driver
from graphcache.graphs.cuda import CudaGraph
from graphcache.modules import engine_runner
from tests.engine_modules import MODULES, capture_by_driver, load, made_contexts, numbers, prepare, rows
from tests.engines import fake_tensorrt
from tests.engines.fake_tensorrt import IExecutionContext, serialize
from tests.graphs import compiled as compiled_way
from tests.graphs import fake_driver
from tests.graphs.fake_driver import Stream, Torch, Violation, address, installed, pointer
from tests.helpers import dispatcher_of, graphs_of, in_threads, outcomes, reason, wrap_recorded

SHORT = ("fresh", "into", "into", "change", "back", "set epoch")


def graph_of(fast: CachedModule) -> Any:
    (entry,) = graphs_of(fast).entries.values()
    return entry.graph.graph


# ---- loading


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    for source in (path, str(path)):
        with pytest.raises(EngineFormatError) as caught:
            graphcache.load(source)
        assert (
            str(caught.value) == f"{path} cannot be read (No such file or directory); expected a TensorRT engine file"
        )
    with pytest.raises(EngineFormatError, match="cannot be read"):
        graphcache.load(tmp_path)


def test_an_onnx_model(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"anything")
    with pytest.raises(EngineFormatError) as caught:
        graphcache.load(path)
    assert str(caught.value) == (
        f"{path} is an ONNX model; make an engine of it first: graphcache.build({str(path)!r})"
    )


def test_without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt.use(monkeypatch, "none of them")
    with pytest.raises(TensorRTNotFoundError, match=r"no flavour of TensorRT can be imported\. Tried tensorrt: "):
        graphcache.load(serialize("affine"))


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_tensorrt.use(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "net.engine"
    path.write_bytes(serialize("affine"))
    with pytest.raises(
        NoGpuError, match=r"^running net needs a CUDA device, and torch\.cuda\.is_available\(\) is False"
    ):
        graphcache.load(path)


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (b"", EngineFormatError, "net: expected the bytes of an engine, got none"),
        (serialize("affine")[:100], EngineFormatError, "net has 100 bytes, its header says 256; it was truncated"),
        (b"foreign" * 20, EngineFormatError, "net is not a TensorRT-RTX engine: its 140 bytes begin with b'foreignf'"),
        (
            serialize("affine", version=(1, 4, 0, 76)),
            EngineVersionError,
            "net was built by TensorRT-RTX 1.4.0.76, and 1.5.0.114 is installed",
        ),
        (serialize("nothing"), EngineError, "net (256 bytes) was refused by tensorrt_rtx 1.5.0.114: CUDA_ERROR"),
    ],
)
def test_damaged_files(fake: Torch, tmp_path: Path, data: bytes, kind: type[EngineError], message: str) -> None:
    path = tmp_path / "net.engine"
    path.write_bytes(data)
    for source, name in ((path, ""), (data, "net")):
        with pytest.raises(kind) as caught:
            graphcache.load(source, name=name)
        assert type(caught.value) is kind
        assert str(caught.value).startswith(message)
    assert fake.driver.leaked() == {}


@pytest.mark.parametrize("source", [5, 10**15, 2.5, ["net.engine"], torch.zeros(2)])
def test_what_is_neither_a_path_nor_bytes(fake: Torch, source: Any) -> None:
    with pytest.raises(EngineFormatError, match=f"expected the bytes of an engine, got {type(source).__name__}$"):
        graphcache.load(source)


def test_bytes_must_be_bytes(fake: Torch) -> None:
    with pytest.raises(EngineFormatError, match="net: expected the bytes of an engine, got str"):
        EngineModule("net.engine", name="net")  # type: ignore[arg-type]


def test_names(fake: Torch, tmp_path: Path) -> None:
    path = tmp_path / "some.engine"
    path.write_bytes(serialize("affine"))
    assert graphcache.load(path).name == "some"
    assert graphcache.load(str(path), name="other").name == "other"
    assert graphcache.load(serialize("affine")).name == "Affine"
    assert graphcache.load(bytearray(serialize("pair"))).name == "engine"  # type: ignore[arg-type]


def test_what_torch_tensorrt_code_reads_off_it(fake: Torch) -> None:
    settings, weights = object(), {"w": 1}
    module = EngineModule(
        serialize("pair"), ["b", "a"], ["product", "sum"], name="n", settings=settings, weight_name_map=weights
    )
    assert (module.input_binding_names, module.output_binding_names) == (["b", "a"], ["product", "sum"])
    assert (module.settings, module.weight_name_map, module.serialized_engine) == (settings, weights, serialize("pair"))
    a, b = rows(fake, 2), rows(fake, 2, 5)
    assert torch.equal(module(b, a)[0], a * b)
    assert list(module.parameters()) == []
    assert module.extra_repr() == (
        "n, (b: torch.float32 [-1, -1], a: torch.float32 [-1, -1]) -> (product: torch.float32 [-1, -1], "
        "sum: torch.float32 [-1, -1])"
    )


# ---- arguments

NAMES = ["a", "b"]


@given(st.integers(0, 3), st.lists(st.sampled_from(["a", "b", "c"]), unique=True))
def test_arguments_by_position_and_by_name(count: int, named: list[str]) -> None:
    module = nn.Module.__new__(EngineModule)
    nn.Module.__init__(module)
    module.name, module.input_binding_names = "net", NAMES
    args, kwargs = list(range(count)), {name: name for name in named}
    right = not named or (sorted([*NAMES[:count], *named]) == NAMES)
    if right:
        wanted = args if not named else [*args, *NAMES[count:]]
        assert module.bind(args, kwargs) == wanted
        return
    with pytest.raises(InputCountError) as caught:
        module.bind(args, kwargs)
    assert str(caught.value) == (
        f"net takes the inputs a, b, each of them once; {count} were given by position, and by name {', '.join(named)}"
    )


def test_calls_by_name(fake: Torch) -> None:
    module = load("pair")
    a, b = rows(fake, 2), rows(fake, 2, 5)
    for run in (module, graphcache.wrap(module)):
        for _ in range(2):
            assert torch.equal(run(b=b, a=a)[1], a * b)
            assert torch.equal(run(a, b=b)[0], a + b)


def test_bad_inputs_run_nothing(fake: Torch) -> None:
    module = load("affine")
    fast = graphcache.wrap(module)
    for run in (module, fast):
        with pytest.raises(InputDtypeError, match=r"input 'x' of affine is torch\.float64"):
            run(torch.zeros(2, 4, dtype=torch.float64))
        with pytest.raises(ProfileRangeError, match=r"profile 0: 1\.\.4 x 4; profile 1: 8\.\.16 x 4"):
            run(rows(fake, 5))
        with pytest.raises(InputCountError, match=r"affine takes 1 inputs \(x\), 0 were given"):
            run()
    assert fast.cache_info().graphs == 0
    assert "cuGraphLaunch" not in fake.driver.calls


# ---- eager


def test_answers_on_any_stream(fake: Torch) -> None:
    """The stand-in finds every pair of unordered accesses of the context's scratch memory."""
    module = load("affine")
    streams = [Stream(fake.driver, 0), fake.new_stream(), fake.new_stream()]
    kept = []
    for step, index in enumerate([0, 1, 2, 0, 0, 2, 1, 1]):
        x = rows(fake, 1 + step % 4, step)
        with fake.on(streams[index]):
            kept.append((module(x), x * 3 + 1))
            assert fake.raw_stream(0) == streams[index].cuda_stream
    assert all(torch.equal(got, wanted) for got, wanted in kept)
    module.close()
    assert fake.driver.leaked() == {}


def test_the_default_stream_keeps_its_order(fake: Torch) -> None:
    module = load("affine")
    x, y = rows(fake, 2), rows(fake, 2)
    writes = fake.driver.kernel([8], lambda memory, place: memory.store(address(place), y))
    fake.driver.launch(writes, [pointer(x)], 0)
    y = y * 2
    fake.driver.launch(writes, [pointer(x)], 0)
    assert torch.equal(module(x), y * 3 + 1), "it runs after what the caller enqueued, or the two would race"
    fake.driver.launch(writes, [pointer(x)], 0)


def test_never_on_the_default_stream_itself(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = IExecutionContext.execute_async_v3
    monkeypatch.setattr(
        IExecutionContext, "execute_async_v3", lambda self, stream: (seen.append(stream), real(self, stream))[1]
    )
    load("affine")(rows(fake, 2))
    assert seen
    assert 0 not in seen


def test_threads_take_turns(fake: Torch) -> None:
    module, streams = load("affine"), [fake.new_stream() for _ in range(4)]

    def work(index: int) -> None:
        with fake.on(streams[index]):
            for step in range(10):
                x = rows(fake, 1 + step % 4, 10 * index + step)
                assert torch.equal(module(x), x * 3 + 1)

    in_threads(work)


def test_outputs_never_require_gradients(fake: Torch) -> None:
    y = load("affine")(rows(fake, 2).requires_grad_())
    assert not y.requires_grad


def test_values_that_the_host_reads(fake: Torch) -> None:
    module = load("head")
    fast = graphcache.wrap(module)
    assert module.host_inputs == (1,)
    x = rows(fake, 16, -10)
    for _ in range(2):
        for n in (3, 9, 16):
            for run in (module, fast):
                assert torch.equal(run(x, torch.tensor([n])), x[:n].relu())
    assert outcomes(fast) == (3, 3, {})
    for run in (module, fast):
        with pytest.raises(ProfileRangeError, match=r"input 'stop' of head has values \[17\]"):
            run(x, torch.tensor([17]))


def test_outputs_in_host_memory(fake: Torch) -> None:
    module = load("length")
    fast = graphcache.wrap(module)
    x = numbers(fake, 1, 2, 3)
    for run in (module, fast):
        y, n = run(x)
        assert torch.equal(y, -x)
        assert n.tolist() == [3]
    assert fast.cache_info().eager == {Reason.HOST_READ: 1}


def test_outputs_of_unknown_shape(fake: Torch) -> None:
    module = load("positive")
    fast = graphcache.wrap(module)
    kept = []
    for values in ([1, -1, 2], [-1], [3, 4, 5, 6]):
        x = numbers(fake, *values)
        kept += [(run(x), x[x > 0].clone()) for run in (module, fast)]
    assert all(torch.equal(got, wanted) for got, wanted in kept)
    assert fast.cache_info().eager == {Reason.OUTPUT_ALLOCATOR: 3}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to")])
def test_what_happened_while_tensorrt_asked_for_memory_is_told(
    fake: Torch, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    module, x, real = load("positive"), numbers(fake, 1, -1, 2), fake.empty

    def empty(*shape: Any, **options: Any) -> Tensor:
        if (
            module._runner.context is not None
            and options["dtype"] is torch.uint8
            and "y" in module._runner.context._allocated
        ):
            raise error
        return real(*shape, **options)

    with monkeypatch.context() as patch:
        patch.setattr(fake, "empty", empty)
        if isinstance(error, Exception):
            with pytest.raises(EngineExecutionError, match="no memory for output 'y': CUDA out of memory") as caught:
                module(x)
            assert caught.value.__cause__ is error
        else:
            with pytest.raises(KeyboardInterrupt):
                module(x)
    assert module(x).tolist() == [1, 2]


def test_letting_tensorrt_allocate_what_it_need_not(fake: Torch) -> None:
    module = load("pair")
    fast = graphcache.wrap(module)
    a = rows(fake, 2)
    fast(a, a)
    assert module.set_use_output_allocator(True) is False
    assert module.uses_output_allocator
    kept = [fast(rows(fake, n), rows(fake, n)) for n in (2, 5, 1)]
    assert [each[0].shape[0] for each in kept] == [2, 5, 1]
    assert torch.equal(kept[0][1], a * a)
    assert module.set_use_output_allocator(False) is True
    assert fast.cache_info().eager == {Reason.OUTPUT_ALLOCATOR: 3}
    assert torch.equal(fast(a, a)[1], a * a)
    assert EngineModule(serialize("pair"), requires_output_allocator=True).uses_output_allocator


def test_a_refusal_names_the_engine_and_what_was_said(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("affine")
    monkeypatch.setattr(IExecutionContext, "execute_async_v3", lambda self, stream: self._no("Myelin failed"))
    with pytest.raises(EngineExecutionError) as caught:
        module(rows(fake, 2))
    assert str(caught.value) == (
        "affine: TensorRT refused to run: IExecutionContext: Error Code 3: API Usage Error (Myelin failed)"
    )
    monkeypatch.undo()


def test_profiles(fake: Torch) -> None:
    module = load("affine")
    fast = graphcache.wrap(module)
    for n in (2, 8, 4, 16, 2, 8):
        x = rows(fake, n)
        assert torch.equal(module(x), x * 3 + 1)
        assert torch.equal(fast(x), x * 3 + 1)
    assert outcomes(fast) == (2, 4, {})
    module.set_optimization_profile(1)
    assert module.profile_choice == 1
    for run in (module, fast):
        with pytest.raises(ProfileRangeError, match=r"\(profile 1: 8\.\.16 x 4\)"):
            run(rows(fake, 2))
    for bad in (-1, 2):
        with pytest.raises(ConfigError, match=f"^affine has optimisation profiles 0 to 1, not {bad}$"):
            module.set_optimization_profile(bad)
    module.set_optimization_profile(None)
    assert torch.equal(fast(rows(fake, 2)), rows(fake, 2) * 3 + 1)


# ---- the short way


@pytest.mark.parametrize("way", ["python", "compiled"])
@pytest.mark.parametrize("io", ["bind", "copy"])
@given(steps=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.sampled_from(SHORT)), max_size=14))
def test_any_sequence_on_the_short_ways(
    way: str, io: str, request: pytest.FixtureRequest, steps: list[tuple[int, int, str]]
) -> None:
    """Fresh answers and answers into the caller's memory, in any order: each is right, and those of before stay."""
    with pytest.MonkeyPatch.context() as patch, installed(*MODULES, patch=patch) as fake, torch.no_grad():
        prepare(fake, patch)
        functions = None
        if way == "compiled":
            functions = compiled_way.use(request.getfixturevalue("compiled"), fake, patch)
        module = load("affine")
        fast = wrap_recorded(module, io=io, max_graphs=2)
        inputs = [rows(fake, 2), rows(fake, 2, 9), rows(fake, 3)]
        outs = [[fake.driver.heap.tensor(x * 0) for x in inputs] for _ in range(2)]
        kept: list[tuple[Tensor, Tensor]] = []
        with fake.on(fake.new_stream()):
            for which, place, how in steps:
                x = inputs[which]
                if how == "change":
                    x += 1
                elif how == "into" and place < 2:
                    assert fast.forward_into(outs[place][which], x) is outs[place][which]
                    assert torch.equal(outs[place][which], x * 3 + 1)
                elif how == "back":
                    # What is read and written is one memory.
                    wanted = x * 3 + 1
                    assert torch.equal(fast.forward_into(x, x), wanted)
                    x.copy_(torch.arange(x.numel()).reshape(x.shape))
                elif how == "set epoch":
                    module.epoch += 1
                else:
                    kept.append((fast(x), x * 3 + 1))
                    assert torch.equal(*kept[-1])
        assert all(torch.equal(answer, wanted) for answer, wanted in kept)
        fast.close()
        module.close()
        assert fake.driver.leaked() == {}
        assert functions is None or functions.raised == []


@pytest.mark.parametrize("into", [False, True])
def test_what_is_remembered_after_a_change_is_of_before_it(
    fake: Torch, monkeypatch: pytest.MonkeyPatch, into: bool
) -> None:
    """As if another thread had changed the engine between a replay and the moment when its graph is remembered."""
    module = load("affine")
    fast = graphcache.wrap(module)
    x = rows(fake, 2)
    out = fake.driver.heap.tensor(x * 0)
    call = (lambda: fast.forward_into(out, x)) if into else (lambda: fast(x))
    path = dispatcher_of(fast).fast_path
    remember, changes = path.remember, [module]

    def changed_meanwhile(*args: Any) -> None:
        if changes:
            changes.pop().epoch += 1
        remember(*args)

    with torch.no_grad(), fake.on(fake.new_stream()):
        fast(x)
        monkeypatch.setattr(path, "remember", changed_meanwhile)
        assert torch.equal(call(), x * 3 + 1)
        assert not changes
        assert torch.equal(call(), x * 3 + 1)
    assert fast.cache_info().captures == 2, "the graph of before is not used again"


def test_answering_into_the_same_memory_again_is_the_launch_alone(fake: Torch) -> None:
    fast = graphcache.wrap(load("affine"))
    x = rows(fake, 2)
    out = fake.driver.heap.tensor(x * 0)
    with torch.no_grad(), fake.on(fake.new_stream()):
        fast(x)
        # The second answer into it finds what the first one remembered; no other call is needed.
        for _ in range(2):
            fast.forward_into(out, x)
        fake.driver.calls.clear()
        x += 1
        assert torch.equal(fast.forward_into(out, x), x * 3 + 1)
        assert fake.driver.calls == ["cuGraphLaunch"]
        hits = fast.cache_info().hits
        with torch.enable_grad():
            assert torch.equal(fast.forward_into(out, x), x * 3 + 1)
        assert fast.cache_info().captures == 2, "another signature"
        module = fast.module
        module.epoch += 1
        x += 1
        assert torch.equal(fast.forward_into(out, x), x * 3 + 1)
    assert (fast.cache_info().hits, fast.cache_info().captures) == (hits, 3)


@pytest.mark.parametrize("io", ["bind", "copy"])
def test_into_memory_that_no_graph_can_write_straight(fake: Torch, io: str) -> None:
    fast = wrap_recorded(load("affine"), io=io)
    x = rows(fake, 4)
    whole = fake.driver.heap.tensor([[0.0] * 4 for _ in range(9)])
    with torch.no_grad(), fake.on(fake.new_stream()):
        for _ in range(3):
            fast(x)
        for out in (whole[:4], whole[1:5], whole[::2][:4], whole.t()[:, :4], x[:], whole[:4].T.contiguous().T):
            wanted = x * 3 + 1
            target = out if out.shape == x.shape else out.t()
            if target.shape != x.shape:
                continue
            assert torch.equal(fast.forward_into(target, x), wanted)
            x.copy_(rows(fake, 4))
        for bad in (None, 5, [x], torch.zeros(4, 4, dtype=torch.float64), torch.zeros(3, 4)):
            with pytest.raises(OutputMismatchError):
                fast.forward_into(bad, x)


def test_a_call_of_another_mode_on_the_short_way_is_counted_once(fake: Torch) -> None:
    fast = graphcache.wrap(load("affine"))
    x = rows(fake, 2)
    with torch.no_grad():
        for _ in range(3):
            fast(x)
    with torch.enable_grad():
        for _ in range(3):
            assert torch.equal(fast(x), x * 3 + 1)
    assert (fast.cache_info().captures, fast.cache_info().hits) == (2, 4)


# ---- refit


def test_no_graph_survives_a_refit(fake: Torch) -> None:
    """The stand-in freezes weights into what is captured, which TensorRT may do."""
    module = load("refittable")
    fast, other = graphcache.wrap(module), graphcache.wrap(module, max_graphs=1)
    x = fake.driver.heap.tensor([[1.0, 2.0], [3.0, 4.0]])
    before = x * torch.tensor([2.0, 3.0]) + 1
    for _ in range(2):
        assert torch.equal(fast(x), before)
        assert torch.equal(other(x), before)
    module.refit({"shift": torch.tensor([10.0, 20.0])})
    after = x * torch.tensor([2.0, 3.0]) + torch.tensor([10.0, 20.0])
    assert (len(graphs_of(fast).entries), len(graphs_of(other).entries)) == (0, 0)
    for run in (module, fast, fast, other, other):
        assert torch.equal(run(x), after)
    assert (fast.cache_info().captures, fast.cache_info().hits) == (2, 2)
    assert fake.driver.leaked().get("executables", 0) <= 2


def test_a_graph_captured_beside_a_refit_is_of_before(fake: Torch) -> None:
    """As if another thread had captured between the drop and the refit."""
    module = load("refittable")
    fast = graphcache.wrap(module)
    x = fake.driver.heap.tensor([[1.0, 2.0]])
    patch = pytest.MonkeyPatch()
    wait = module.order.wait

    def captured_meanwhile() -> None:
        patch.undo()
        fast(x)
        wait()

    patch.setattr(module.order, "wait", captured_meanwhile)
    module.refit({"shift": torch.tensor([5.0, 5.0])})
    assert torch.equal(fast(x), x * torch.tensor([2.0, 3.0]) + 5)
    assert fast.cache_info().captures == 2


@pytest.mark.parametrize(
    "names", [{"shift": "net.bias"}, {"shift": ("net.bias", "float32")}, {"shift": ["net.bias"], "scale.a": "w"}]
)
def test_weights_by_the_names_of_a_state_dict(fake: Torch, names: dict[str, Any]) -> None:
    module = load("refittable", weight_name_map=names)
    x = fake.driver.heap.tensor([[1.0, 2.0]])
    module.refit({"net.bias": torch.tensor([4.0, 4.0]), "of another part": torch.zeros(9)})
    assert torch.equal(module(x), x * torch.tensor([2.0, 3.0]) + 4)
    module.refit({"shift": torch.tensor([6.0, 6.0])})
    assert torch.equal(module(x), x * torch.tensor([2.0, 3.0]) + 6)


def test_no_refit_beside_work_that_nobody_can_wait_for(fake: Torch) -> None:
    module = load("refittable")
    stream = fake.new_stream()
    x = fake.driver.heap.tensor([[1.0, 2.0]])
    with fake.on(stream):
        wanted = module(x)
        fake_driver.begin_capture(driver.binding().CUstream(stream.cuda_stream))
        with pytest.raises(CudaError, match=r"is being captured, so nothing can wait for it; do this when the capture"):
            module.refit({"shift": torch.tensor([9.0, 9.0])})
        driver.call("cuGraphDestroy", driver.end_capture(driver.binding().CUstream(stream.cuda_stream)))
        assert torch.equal(module(x), wanted)
        module.refit({"shift": torch.tensor([9.0, 9.0])})
        assert torch.equal(module(x), x * torch.tensor([2.0, 3.0]) + 9)


@pytest.mark.parametrize("same", [True, False], ids=["one stream", "two streams"])
def test_a_refit_in_the_order_of_the_callers_stream(fake: Torch, same: bool) -> None:
    """Nobody waits for what is on that stream; for work on another one, as TensorRT demands, the host does."""
    module = load("refittable")
    fast = graphcache.wrap(module)
    x = fake.driver.heap.tensor([[1.0, 2.0]])
    one, two = fake.new_stream(), fake.new_stream()
    with torch.no_grad(), fake.on(one):
        for _ in range(2):
            assert fast(x).tolist() == [[3.0, 7.0]]
    fake.driver.busy.add(one.cuda_stream)
    fake.driver.calls.clear()
    with torch.no_grad(), fake.on(one if same else two):
        module.refit({"shift": torch.tensor([10.0, 20.0])}, wait=False)
        assert ("cuStreamSynchronize" in fake.driver.calls) is not same
        assert fast.cache_info().graphs == 0
        assert len(fake.driver.executables) == 1, "its replay has not finished, as far as one can tell"
    with torch.no_grad(), fake.on(two):
        for _ in range(2):
            assert fast(x).tolist() == [[12.0, 26.0]]
    assert (fast.cache_info().captures, fast.cache_info().hits) == (2, 2)
    assert len(fake.driver.executables) == 1
    fast.close()
    module.close()
    assert fake.driver.leaked() == {}


def test_an_eviction_waits_for_no_replay_and_frees_nothing_early(fake: Torch) -> None:
    """The stand-in refuses to destroy what still runs."""
    fast = graphcache.wrap(load("affine"), max_graphs=1)
    two, three, stream = rows(fake, 2), rows(fake, 3), fake.new_stream()
    with torch.no_grad(), fake.on(stream):
        fast(two)
        fake.driver.busy.add(stream.cuda_stream)
        fast(two)
        fast(three)
        assert (fast.cache_info().graphs, fast.cache_info().evictions) == (1, 1)
        assert len(fake.driver.executables) == 2
        # Nobody asks while graphs are replayed, and the next capture finds the memory free.
        fast(three)
        fast(two)
        assert len(fake.driver.executables) == 2
    fast.close()
    assert not fake.driver.executables


def test_clearing_gives_back_what_was_put_off_before_even_where_no_graph_is_left(fake: Torch) -> None:
    """Fails if clearing an empty cache leaves alone what waited for a replay."""
    fast = graphcache.wrap(load("affine"))
    x, stream = rows(fake, 2), fake.new_stream()
    with torch.no_grad(), fake.on(stream):
        for _ in range(2):
            fast(x)
        fake.driver.busy.add(stream.cuda_stream)
        fast.clear(wait=False)
        assert (fast.cache_info().graphs, len(fake.driver.executables)) == (0, 1)
        fast.clear(wait=False)
        assert len(fake.driver.executables) == 1
        fast.clear()
        assert not fake.driver.executables
    fast.close()


def test_a_refit_that_is_refused_leaves_a_working_module(fake: Torch) -> None:
    module = load("refittable")
    fast = graphcache.wrap(module)
    x = fake.driver.heap.tensor([[1.0, 2.0]])
    wanted = fast(x)
    for bad, error in (({"nothing": torch.zeros(1)}, EngineError), ([1, 2], ConfigError), (None, ConfigError)):
        with pytest.raises(error, match=r"^refittable"):
            module.refit(bad)
        assert torch.equal(fast(x), wanted)
        assert torch.equal(fast(x), wanted)
    module.close()
    with pytest.raises(ClosedError, match=r"^refittable was closed; load it again$"):
        module.refit({"shift": torch.zeros(2)})


# ---- where answers go


def launches(fake: Torch) -> int:
    return fake.driver.calls.count("cuGraphLaunch")


def test_a_hit_writes_straight_into_the_callers_tensor(fake: Torch) -> None:
    fast = graphcache.wrap(load("affine"))
    x = rows(fake, 2)
    fast(x)
    out = fake.empty(2, 4)
    fast.forward_into(out, x)
    patched = fake.driver.calls.count("cuGraphExecKernelNodeSetParams")
    copied = fake.driver.calls.count("cuMemcpyDtoDAsync")
    for start in range(3):
        x.add_(start)
        assert fast.forward_into(out, x) is out
        assert torch.equal(out, x * 3 + 1)
    assert fake.driver.calls.count("cuGraphExecKernelNodeSetParams") == patched, "the same places are not set again"
    assert fake.driver.calls.count("cuMemcpyDtoDAsync") == copied
    assert fast.cache_info().hits == 4
    # The next call owns its answer again.
    y = fast(x)
    fast.forward_into(out, x.add_(5))
    assert torch.equal(y, (x - 5) * 3 + 1)


@pytest.mark.parametrize("place", ["unaligned", "turned", "the input", "two outputs in one"])
def test_where_a_graph_cannot_write_the_answer_is_copied(fake: Torch, place: str) -> None:
    fast = graphcache.wrap(load("affine"))
    x = rows(fake, 4)
    wanted = x * 3 + 1
    fast(x)
    out = {
        "unaligned": fake.empty(4, 4, offset=4),
        "turned": fake.empty(4, 4).t(),
        "the input": x,
        "two outputs in one": fake.empty(8, 4)[::2],
    }[place]
    before = launches(fake)
    assert fast.forward_into(out, x) is out
    assert torch.equal(out, wanted)
    assert launches(fake) == before + 1


@pytest.mark.parametrize("part", [slice(None), slice(0, 2)], ids=["all of it", "a view of it"])
def test_an_answer_that_is_fed_back_is_not_read_while_it_is_written(fake: Torch, part: slice) -> None:
    fast = graphcache.wrap(load("affine"))
    state = rows(fake, 2)
    wanted = state.clone()
    for _ in range(5):
        state = fast(state[part])
        wanted = wanted * 3 + 1
        graph = next(iter(graphs_of(fast).entries.values())).graph.graph
        read, written = graph.pointed
        assert read != written
        assert torch.equal(state, wanted)
    assert fast.cache_info().hits == 4


# ---- contexts


def test_an_enqueue_into_a_capture_meets_no_other(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX crashes otherwise, even where they are of two engines."""
    inside: list[bool] = []
    met: list[list[bool]] = []
    enqueue = IExecutionContext.execute_async_v3
    lock = threading.Lock()

    def watched(self: IExecutionContext, stream: int) -> bool:
        captured = fake.driver.streams[stream].capture is not None
        with lock:
            inside.append(captured)
            met.append(list(inside))
        try:
            return enqueue(self, stream)
        finally:
            with lock:
                inside.remove(captured)

    monkeypatch.setattr(IExecutionContext, "execute_async_v3", watched)
    modules = [load("affine") for _ in range(4)]
    wrapped = [graphcache.wrap(module, max_graphs=1) if index % 2 else module for index, module in enumerate(modules)]

    def work(index: int) -> None:
        with fake.on(fake.new_stream()):
            for turn in range(30):
                x = rows(fake, 1 + turn % 3, turn)
                assert torch.equal(wrapped[index](x), x * 3 + 1)

    in_threads(work, 4)
    assert any(True in found for found in met)
    assert all(found == [True] for found in met if True in found)


def test_the_context_of_an_evicted_graph_serves_the_next_one(fake: Torch) -> None:
    module = load("affine")
    fast = wrap_recorded(module, max_graphs=2, contexts="private")
    for count in (1, 2, 3):
        fast(rows(fake, count))
    before = made_contexts(module)
    for start, count in enumerate([4, 1, 8, 2, 16, 3, 1] * 3):
        x = rows(fake, count).add_(start)
        assert torch.equal(fast(x), x * 3 + 1)
        assert torch.equal(fast(x), x * 3 + 1)
    assert made_contexts(module) == before
    assert len(module.contexts) == 1
    fast.clear()
    assert len(module.contexts) == 3
    session = graphcache.wrap(module).session(rows(fake, 2))
    assert (made_contexts(module), len(module.contexts)) == (before, 2)
    session.close()
    fast.close()
    assert len(module.contexts) == 3
    module.close()
    assert len(module.contexts) == 0


def test_a_context_whose_graph_was_wrong_is_not_used_again(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("affine")
    fast = graphcache.wrap(module)

    def wrong(graph: CudaGraph, *_: Any, **__: Any) -> None:
        graph.close()
        raise Refusal(Reason.MISMATCH)

    with monkeypatch.context() as patch:
        patch.setattr(record_engine, "verify", wrong)
        assert torch.equal(fast(rows(fake, 2)), rows(fake, 2) * 3 + 1)
    assert fast.cache_info().eager == {Reason.MISMATCH: 1}
    assert len(module.contexts) == 0


def test_graphs_of_a_shared_context_keep_it(fake: Torch) -> None:
    module = load("affine")
    fast = wrap_recorded(module, contexts="shared", max_graphs=1)
    for count in (1, 2, 1, 2):
        x = rows(fake, count)
        assert torch.equal(fast(x), x * 3 + 1)
    assert len(module.contexts) == 0
    fast.close()


# ---- closing


def test_closing_gives_everything_back(fake: Torch) -> None:
    module = load("affine")
    fast = graphcache.wrap(module)
    x = rows(fake, 2)
    kept = [module(x), fast(x), fast(x)]
    contexts = [weakref.ref(each) for each in IExecutionContext.made if each.engine is module.engine.native_handles[1]]
    assert len(contexts) == 2
    fast.close()
    module.close()
    module.close()
    gc.collect()
    assert [reference() for reference in contexts] == [None, None]
    assert fake.driver.leaked() == {}
    assert len(fake.driver.heap.blocks) == 4, "the input and the answers"
    assert all(torch.equal(each, x * 3 + 1) for each in kept)
    with pytest.raises(ClosedError, match=r"^affine was closed; load it again$"):
        module(x)
    with pytest.raises(ClosedError, match=r"^affine was closed; wrap its \.module again$"):
        fast(x)


def test_closing_an_engine_closes_the_graphs_it_made_itself(fake: Torch) -> None:
    module = load("affine")

    def body() -> None:
        graphcache.runtime.set_cudagraphs_mode(True)
        for _ in range(3):
            assert torch.equal(module(rows(fake, 2)), rows(fake, 2) * 3 + 1)
        assert module.with_graphs().cache_info().hits == 2

    contextvars.copy_context().run(body)
    module.close()
    gc.collect()
    assert fake.driver.leaked() == {}


# ---- inside of a capture of the caller's


def test_a_capture_of_the_callers(fake: Torch) -> None:
    module = load("affine")
    fast = graphcache.wrap(module)
    stream, x = fake.new_stream(), rows(fake, 2)
    handle = driver.binding().CUstream(stream.cuda_stream)
    with fake.on(stream):
        module(x)
        fast(x)
        fake_driver.begin_capture(handle)
        y = fast(x)
        graph = driver.end_capture(handle)
        assert graph is not None
        assert fast.cache_info().eager == {Reason.OUTER_CAPTURE: 1}
        # The context that was captured is nobody else's from now on.
        for n in (3, 4):
            module(rows(fake, n))
        executable = fake_driver.instantiate(graph, stream.cuda_stream)
        x.fill_(5)
        driver.call("cuGraphLaunch", executable, handle)
        assert torch.equal(y, x * 3 + 1)
    (recorded,) = module._runner.recorded
    assert recorded is not module._runner.context


def test_a_capture_of_the_callers_before_any_eager_call_is_refused_and_not_spoilt(fake: Torch) -> None:
    """A context cannot be made within a capture, and one that was always replayed has none."""
    fast = graphcache.wrap(load("affine"))
    stream, x = fake.new_stream(), rows(fake, 2)
    handle = driver.binding().CUstream(stream.cuda_stream)
    with fake.on(stream):
        fast(x)
        fake_driver.begin_capture(handle)
        with pytest.raises(
            EngineExecutionError, match=r"^affine: the current stream is being captured.*set_cudagraphs"
        ):
            fast(x)
        assert driver.end_capture(handle) is not None
        assert torch.equal(fast(x), x * 3 + 1)


def test_a_session_does_not_spoil_a_capture_that_it_cannot_join(fake: Torch) -> None:
    fast = graphcache.wrap(load("affine"))
    here, there = fake.new_stream(), fake.new_stream()
    handle = driver.binding().CUstream(there.cuda_stream)
    with fake.on(here):
        session = fast.session(rows(fake, 2))
        session.run()
    with fake.on(there):
        fake_driver.begin_capture(handle)
        with pytest.raises(CudaError, match=r"is being captured, and this session ran last on stream 0x"):
            session.run()
        graph = driver.end_capture(handle)
        assert graph is not None, "the capture goes on as if nothing had been asked"
        driver.call("cuGraphDestroy", graph)
        session.run()
        assert torch.equal(session.outputs, rows(fake, 2) * 3 + 1)


# ---- behind a cache


def test_there_and_back_again(fake: Torch) -> None:
    fast = graphcache.wrap(load("affine"))
    kept = []
    for step, n in enumerate((2, 3, 2, 3, 2)):
        x = rows(fake, n, step)
        kept.append((fast(x), x * 3 + 1))
    assert all(torch.equal(got, wanted) for got, wanted in kept)
    assert outcomes(fast) == (3, 2, {})
    assert all(fake_driver.copies(entry.graph.graph) == 0 for entry in graphs_of(fast).entries.values())


@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, 2, 9]), st.sampled_from(["plain", "same", "unaligned", "turned"]), st.integers(0, 2)
        ),
        max_size=8,
    ),
    st.sampled_from(["bind", "copy"]),
    st.sampled_from(["auto", "private", "shared"]),
    st.booleans(),
)
def test_any_calls(steps: list[tuple[int, str, int]], io: str, contexts: str, verified: bool) -> None:
    with pytest.MonkeyPatch.context() as patch, installed(*MODULES, patch=patch) as fake:
        prepare(fake, patch)
        module = load("affine")
        fast = wrap_recorded(module, io=io, contexts=contexts, verify=verified, max_graphs=2)
        streams = [Stream(fake.driver, 0), fake.new_stream(), fake.new_stream()]
        kept: list[tuple[Tensor, Tensor]] = []
        same = {n: rows(fake, n, 50) for n in (1, 2, 9)}
        for number, (n, how, stream) in enumerate(steps):
            x = same[n] if how == "same" else rows(fake, n, number)
            if how == "unaligned":
                x = fake.empty(n, 4, offset=4).copy_(x)
            elif how == "turned":
                x = fake.empty(4, n).t().copy_(x)
            with fake.on(streams[stream]):
                kept.append((fast(x), x * 3 + 1))
            assert fast.cache_info().graphs <= 2
        assert all(torch.equal(got, wanted) for got, wanted in kept)
        assert fast.cache_info().eager == {}
        fast.close()
        module.close()
        gc.collect(0)
        assert fake.driver.leaked() == {}
        assert not fake.driver.capturing()


def test_where_the_address_is_not_among_the_arguments_it_copies(fake: Torch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "graphcache")
    fast = graphcache.wrap(load("hidden"))
    for step in range(3):
        x = numbers(fake, step, 1, 2)
        assert torch.equal(fast(x), x * 2)
    assert outcomes(fast) == (2, 1, {})
    assert "hidden copies its inputs and outputs: tensor 1 stands in no node's arguments" in caplog.messages
    assert fake_driver.copies(graph_of(fast)) == 0, "by nodes of the graph"
    assert graph_of(fast).nodes == 3


def test_where_an_argument_is_not_what_is_written_to_it_copies(fake: Torch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "graphcache")
    fast = graphcache.wrap(load("deceiving"))
    for step in range(3):
        x = numbers(fake, step, 1, 2)
        assert torch.equal(fast(x), x * 2)
    assert outcomes(fast) == (2, 1, {})
    (told,) = [each for each in caplog.messages if "copies its inputs" in each]
    assert told.startswith("deceiving copies its inputs and outputs: pointed at others, output 0 differed by")
    assert graph_of(fast).nodes == 3


@pytest.mark.parametrize("wrapped", [True, False])
def test_what_an_engine_updates_in_place(fake: Torch, wrapped: bool) -> None:
    module = load("kv")
    run = graphcache.wrap(module) if wrapped else module
    caches = [fake.empty(4).fill_(index) for index in range(3)]
    wanted = [cache.clone() for cache in caches]
    for step in range(12):
        index, update = step % 3, numbers(fake, step, 1, 2, 3)
        wanted[index] = wanted[index] * 0.5 + update
        kept, twice = run(caches[index], update)
        assert kept is caches[index]
        assert torch.equal(kept, wanted[index])
        assert torch.equal(twice, update * 2)
    if wrapped:
        assert outcomes(run) == (11, 1, {})


def test_an_engine_with_nothing_but_what_it_updates(fake: Torch) -> None:
    fast, x = graphcache.wrap(load("cache")), numbers(fake, 1, 2)
    for step in range(1, 6):
        version = x._version
        assert fast(x) is x
        assert x.tolist() == [1 + step, 2 + step]
        assert x._version > version
    assert outcomes(fast) == (4, 1, {})


@pytest.mark.parametrize("wrapped", [True, False])
def test_what_cannot_be_updated_where_it_is(fake: Torch, wrapped: bool) -> None:
    module = load("kv")
    run = graphcache.wrap(module) if wrapped else module
    whole, update = fake.empty(16).fill_(1), numbers(fake, 0, 1, 2, 3)
    for _ in range(3):
        run(fake.empty(4).fill_(1), update)
    for cache in (whole[:8:2], whole[1:5]):
        with pytest.raises(InputError, match="updates input 'cache' in place"):
            run(cache, update)
    assert torch.equal(whole, torch.ones(16))
    with pytest.raises(ConfigError, match="updates an input in place"):
        graphcache.wrap(module, buckets={"cache": {0: [4, 8]}, "update": {0: [4, 8]}})


def test_a_module_around_an_engine_that_updates_its_input(fake: Torch) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.engine = load("kv")
            self.cache = fake.empty(4).fill_(0)

        def forward(self, x: Tensor) -> Tensor:
            kept, twice = self.engine(self.cache, x)
            return kept + twice

    fast, wanted = graphcache.wrap(Around()), torch.zeros(4)
    for step in range(6):
        x = numbers(fake, step, 1, 2, 3)
        wanted = wanted * 0.5 + x
        assert torch.equal(fast(x), wanted + 2 * x)
        assert torch.equal(fast.cache, wanted)
    assert Reason.MUTATES in outcomes(fast)[2]


def test_empty_inputs(fake: Torch) -> None:
    fast = graphcache.wrap(load("pair"))
    none = fake.empty(0, 4)
    for _ in range(2):
        assert [tuple(each.shape) for each in fast(none, none)] == [(0, 4), (0, 4)]
    assert outcomes(fast)[1] == 1


def test_scalars(fake: Torch) -> None:
    fast = graphcache.wrap(load("scalar"))
    for factor in (2, 3, 4):
        assert fast(numbers(fake, 1, 2), fake.driver.heap.tensor(factor)).tolist() == [factor, 2 * factor]
    assert outcomes(fast) == (2, 1, {})


def test_what_cannot_be_captured_runs_eagerly_and_says_so_once(fake: Torch, caplog: pytest.LogCaptureFixture) -> None:
    fast, other = graphcache.wrap(load("conditional")), graphcache.wrap(load("affine"))
    for sign in (1, -1, 1):
        x = numbers(fake, 3 * sign, -1 * sign)
        assert torch.equal(fast(x), x.relu() if sign > 0 else -x)
        assert torch.equal(other(rows(fake, 2)), rows(fake, 2) * 3 + 1)
        assert not fake.driver.capturing()
    assert fast.cache_info().eager == {Reason.NOT_CAPTURABLE: 3}
    told = [each.getMessage() for each in caplog.records if each.name == "graphcache"]
    assert len(told) == 1
    assert "conditional ran eagerly: not_capturable" in told[0]
    assert "IIfConditionalOutputLayer cannot be captured" in told[0]
    assert other.cache_info().hits == 2
    strict = graphcache.wrap(load("conditional"), on_failure="raise")
    with pytest.raises(CaptureError, match="conditional: not_capturable"):
        strict(numbers(fake, 1))


def test_an_engine_that_gives_another_answer_each_time(fake: Torch) -> None:
    fast = graphcache.wrap(load("unsteady"))
    first, second = (fast(numbers(fake, 1, 2)) for _ in range(2))
    assert not torch.equal(first, second)
    assert fast.cache_info().eager == {Reason.NONDETERMINISTIC: 2}


@pytest.mark.parametrize(("edges", "count"), [("captured", 0), ("full", 1)])
def test_edges_of_an_engine(fake: Torch, edges: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(capture, "make_all_full", made.append)
    fast = wrap_recorded(load("affine"), io="copy", edges=edges)
    x = rows(fake, 2)
    for _ in range(2):
        assert torch.equal(fast(x), x * 3 + 1)
    assert len(made) == count


@pytest.mark.parametrize(("edges", "count"), [("captured", 0), ("full", 1)])
def test_edges_of_whole_modules(whole: Torch, edges: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(capture, "make_all_full", made.append)
    fast = wrap_recorded(Chain(load("affine"), load("affine")), strategy="whole_graph", edges=edges)
    x = rows(whole, 2)
    with whole.on(whole.new_stream()):
        for _ in range(2):
            assert torch.equal(fast(x)["last"], x * 9 + 4)
    assert len(made) == count


def test_several_wrapped_modules_of_one_engine_on_several_streams(fake: Torch) -> None:
    module = load("affine")
    wrapped = [wrap_recorded(module, io=io) for io in ("bind", "copy")]
    streams = [fake.new_stream() for _ in range(2)]
    for step in range(6):
        x = rows(fake, 2, step)
        for index, fast in enumerate([*wrapped, module]):
            with fake.on(streams[(index + step) % 2]):
                assert torch.equal(fast(x), x * 3 + 1)


def test_threads_behind_a_cache(fake: Torch) -> None:
    fast = graphcache.wrap(load("affine"), max_graphs=2)
    streams = [fake.new_stream() for _ in range(4)]

    def work(index: int) -> None:
        with fake.on(streams[index]):
            for step in range(12):
                x = rows(fake, 1 + (index + step) % 3, step)
                assert torch.equal(fast(x), x * 3 + 1)

    in_threads(work)
    assert fast.cache_info().graphs <= 2


def test_sessions(fake: Torch) -> None:
    fast = graphcache.wrap(load("affine"))
    x = rows(fake, 2)
    with fast.session(x) as session:
        assert torch.equal(session.inputs[0], x)
        for start in range(3):
            session.inputs[0].copy_(rows(fake, 2, start))
            session.run()
            assert torch.equal(session.outputs, rows(fake, 2, start) * 3 + 1)
        with fake.on(fake.new_stream()):
            session.run()
            fake.driver.calls.clear()
            session.run()
        assert fake.driver.calls == ["cuGraphLaunch"]
        run = session.run
    with pytest.raises(ClosedError, match=r"^the graph was closed; make a new session$"):
        run()
    with pytest.raises(CaptureError, match="conditional: not_capturable"):
        graphcache.wrap(load("conditional")).session(numbers(fake, 1))


# ---- engines inside of a captured module


class Chain(nn.Module):
    """Engines one after another, captured as one graph; the last output is handed out, and the first one too."""

    def __init__(self, *engines: EngineModule) -> None:
        super().__init__()
        self.engines = nn.ModuleList(engines)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = [x]
        for each in self.engines:
            y.append(each(y[-1]))
        return {"last": y[-1], "first": y[1]}


@pytest.fixture
def whole(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> Torch:
    """Whole modules are captured by the driver, as they are where tensors lie on a CUDA device."""
    capture_by_driver(fake, monkeypatch)
    return fake


def test_a_whole_module_writes_its_answer_where_the_caller_wants_it(whole: Torch) -> None:
    """The tensors of the capture are let go of before anybody asks how the answer is made of the graph's outputs."""
    fast = graphcache.wrap(Chain(load("affine"), load("affine")), strategy="whole_graph")
    x, out = rows(whole, 2), {"last": rows(whole, 2), "first": rows(whole, 2)}
    with whole.on(whole.new_stream()):
        fast(x)
        assert fast.forward_into(out, x) is out
    assert torch.equal(out["last"], x * 9 + 4)
    assert torch.equal(out["first"], x * 3 + 1)
    (entry,) = graphs_of(fast).entries.values()
    assert entry.graph.whole


def test_two_engines_are_one_graph(whole: Torch) -> None:
    engines = load("affine"), load("affine")
    model = Chain(*engines)
    fast = graphcache.wrap(model, strategy="whole_graph")
    streams, kept = [whole.new_stream() for _ in range(2)], []
    for step in range(9):
        x = rows(whole, 1 + step % 3, step)
        with whole.on(streams[step % 2]):
            kept.append((fast(x), x * 9 + 4, x * 3 + 1))
    for got, last, first in kept:
        assert torch.equal(got["last"], last)
        assert torch.equal(got["first"], first)
    assert outcomes(fast) == (6, 3, {})
    assert all(entry.graph.graph.nodes == 5 for entry in graphs_of(fast).entries.values()), (
        "a copy in, two engines, two copies out"
    )
    fast.close()
    for each in engines:
        assert not each._runner.recorded
        each.close()
    gc.collect()
    assert "graphs" not in whole.driver.leaked()
    assert "executables" not in whole.driver.leaked()


def test_one_engine_twice_in_a_graph(whole: Torch) -> None:
    module = load("affine")
    fast = graphcache.wrap(Chain(module, module), strategy="whole_graph")
    for step in range(4):
        x = rows(whole, 2, step)
        assert torch.equal(fast(x)["last"], x * 9 + 4)
    assert outcomes(fast) == (3, 1, {})


def test_outputs_that_were_made_ahead_are_the_calls_own(whole: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_runner, "torch", whole)
    modules = load("affine"), load("affine")
    x = rows(whole, 2)
    for module in modules:
        module.set_pre_allocated_outputs(True)
        module(x)
    fast = graphcache.wrap(Chain(*modules), strategy="whole_graph")
    kept = [fast(x) for _ in range(3)]
    assert all(torch.equal(each["first"], x * 3 + 1) and torch.equal(each["last"], x * 9 + 4) for each in kept)
    assert outcomes(fast) == (2, 1, {})


def test_every_engine_call_has_a_context_of_its_own_that_lives_with_the_graph(whole: Torch) -> None:
    module = load("affine")
    before = set(IExecutionContext.made)
    fast = graphcache.wrap(Chain(module, module), strategy="whole_graph")
    fast(rows(whole, 2))
    made = weakref.WeakSet(set(IExecutionContext.made) - before)
    assert len(made) == 3, "one for each call in the graph, one for eager calls"
    del before
    fast.close()
    module.close()
    gc.collect()
    assert len(made) == 0


@pytest.mark.parametrize(
    ("network", "why"),
    [
        ("conditional", Reason.NOT_CAPTURABLE),
        ("unsteady", Reason.NONDETERMINISTIC),
    ],
)
def test_an_engine_inside_that_cannot_be_captured(whole: Torch, network: str, why: Reason) -> None:
    fast = graphcache.wrap(Chain(load("scaled"), load(network)), strategy="whole_graph")
    for values in ([1, 2], [3, 4]):
        x = numbers(whole, *values)
        got = fast(x)
        assert torch.equal(got["first"], x * 2)
        assert not whole.driver.capturing()
        if network != "unsteady":
            assert torch.equal(got["last"], x * 2)
    assert fast.cache_info().eager == {why: 2}


def test_a_module_that_catches_the_refusal_is_not_captured_either(whole: Torch) -> None:
    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = load("scaled"), load("length")

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.one(x)
            try:
                return self.two(y)[0]  # type: ignore[no-any-return]
            except Exception:
                return y

    fast = graphcache.wrap(Catches(), strategy="whole_graph")
    for _ in range(2):
        assert fast(numbers(whole, 1, 2)).tolist() == [-2, -4]
    assert fast.cache_info().eager == {Reason.HOST_READ: 2}


def test_an_engine_on_another_path_than_before_gets_a_context_of_its_own(whole: Torch) -> None:
    """The warm-up ran the engines in another order than the capture does."""

    forwards = itertools.cycle([True, False])

    class Alternates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = load("affine"), load("affine")

        def forward(self, x: Tensor) -> Tensor:
            first, second = (self.one, self.two) if next(forwards) else (self.two, self.one)
            return second(first(x))  # type: ignore[no-any-return]

    model = Alternates()
    fast = graphcache.wrap(model, strategy="whole_graph", ignore=["*forwards"])
    for step in range(4):
        x = rows(whole, 2, step)
        assert torch.equal(fast(x), x * 9 + 4)
        assert not whole.driver.capturing()
    assert fast.cache_info().eager == {Reason.NOT_CAPTURABLE: 4}, "that context has not run before"


def test_an_interrupt_inside_of_a_whole_graph(whole: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("affine")
    fast = graphcache.wrap(Chain(module, module), strategy="whole_graph")
    real, countdown = IExecutionContext.execute_async_v3, iter([False] * 5 + [True])

    def execute(self: IExecutionContext, stream: int) -> bool:
        if next(countdown, False):
            raise KeyboardInterrupt
        return bool(real(self, stream))

    x = rows(whole, 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(IExecutionContext, "execute_async_v3", execute)
        fast(x)
    assert not whole.driver.capturing()
    assert whole.raw_stream(0) == 0
    for _ in range(2):
        assert torch.equal(fast(x)["last"], x * 9 + 4)
    assert outcomes(fast) == (1, 1, {})


# ---- weight streaming


def test_a_budget_for_weights(fake: Torch) -> None:
    module = load("streaming")
    fast = graphcache.wrap(module)
    x = numbers(fake, 1, 2)
    assert torch.equal(fast(x), x + 1)
    assert torch.equal(module(x), x + 1)
    assert module.get_streamable_device_memory_budget() == module.get_device_memory_budget() == 4096
    assert module.get_automatic_device_memory_budget() == 2048
    assert module.set_device_memory_budget(100) == 100
    assert reason(fast, x) is Reason.WEIGHT_STREAMING
    assert torch.equal(fast(x), x + 1)
    assert module.set_device_memory_budget(4096) == 4096
    for _ in range(2):
        assert torch.equal(fast(x), x + 1)
    assert fast.cache_info().hits == 1


def test_no_other_budget_while_a_session_lives(fake: Torch) -> None:
    module = load("streaming")
    fast = graphcache.wrap(module)
    session = fast.session(numbers(fake, 1, 2))
    with pytest.raises(EngineError, match="1 execution contexts are still in use, by sessions or by captures"):
        module.set_device_memory_budget(0)
    session.run()
    assert session.outputs.tolist() == [2, 3]
    session.close()
    del session
    gc.collect()
    assert module.set_device_memory_budget(0) == 0


# ---- faults

CALLS = [
    "cuCtxGetCurrent",
    "cuGraphExecKernelNodeSetParams",
    "cuGraphGetEdges",
    "cuGraphGetNodes",
    "cuGraphInstantiateWithParams",
    "cuGraphKernelNodeGetParams",
    "cuGraphLaunch",
    "cuGraphMemcpyNodeGetParams",
    "cuGraphNodeGetType",
    "cuMemcpyDtoDAsync",
    "cuStreamBeginCapture",
]

ORDER = ["cuEventCreate", "cuEventRecord", "cuStreamWaitEvent"]


@pytest.mark.parametrize("io", ["bind", "copy"])
@pytest.mark.parametrize("name", [*CALLS, *ORDER])
def test_wherever_the_driver_fails_the_call_is_answered_and_nothing_leaks(name: str, io: str) -> None:
    failed: list[str] = []
    for after in range(6):
        with pytest.MonkeyPatch.context() as patch, installed(*MODULES, patch=patch) as fake:
            prepare(fake, patch)
            module = load("affine")
            fast = wrap_recorded(module, io=io, edges="full")
            stream, x = fake.new_stream(), rows(fake, 2)
            with fake.on(stream):
                fake.driver.fail(name, after=after)
                try:
                    assert torch.equal(fast(x), x * 3 + 1)
                except (CudaError, RuntimeError) as error:
                    failed.append(str(error))
                assert not fake.driver.capturing()
                assert fake.raw_stream(0) == stream.cuda_stream
                fake.driver.forgive()
                fast.clear()
                for _ in range(2):
                    assert torch.equal(fast(x), x * 3 + 1)
                assert fast.cache_info().hits == 1
            fast.close()
            module.close()
            gc.collect(0)
            assert fake.driver.leaked() == {}, (name, after)
    if name not in ORDER:
        assert failed == [], "what only a capture needs does not keep a call from its answer"
    assert all("CUDA_ERROR_UNKNOWN" in each for each in failed)


@pytest.mark.parametrize("io", ["bind", "copy"])
def test_wherever_memory_runs_out(io: str) -> None:
    answered = 0
    for after in range(40):
        with pytest.MonkeyPatch.context() as patch, installed(*MODULES, patch=patch) as fake:
            prepare(fake, patch)
            module = load("affine")
            fast = wrap_recorded(module, io=io)
            stream, x = fake.new_stream(), rows(fake, 2)
            with fake.on(stream):
                fake.driver.heap.refuse_after = after
                try:
                    answer = fast(x)
                except torch.cuda.OutOfMemoryError:
                    answer = None
                fake.driver.heap.refuse_after = None
                if answer is not None:
                    assert torch.equal(answer, x * 3 + 1)
                    answered += 1
                assert not fake.driver.capturing()
                fast.clear()
                for _ in range(2):
                    assert torch.equal(fast(x), x * 3 + 1)
                assert fast.cache_info().hits == 1
            fast.close()
            module.close()
            gc.collect(0)
            assert fake.driver.leaked() == {}, after
    assert answered, "with enough memory there is an answer"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("io", ["bind", "copy"])
def test_wherever_it_is_interrupted(io: str, error: type[BaseException]) -> None:
    interrupted = 0
    for after in range(6):
        with pytest.MonkeyPatch.context() as patch, installed(*MODULES, patch=patch) as fake:
            prepare(fake, patch)
            module = load("affine")
            fast = wrap_recorded(module, io=io)
            stream, x = fake.new_stream(), rows(fake, 2)
            countdown = iter([False] * after + [True])
            real = IExecutionContext.execute_async_v3

            def execute(self: IExecutionContext, stream: int, real: Any = real, countdown: Any = countdown) -> bool:
                if next(countdown, False):
                    raise error
                return bool(real(self, stream))

            with fake.on(stream):
                with pytest.MonkeyPatch.context() as inner:
                    inner.setattr(IExecutionContext, "execute_async_v3", execute)
                    try:
                        assert torch.equal(fast(x), x * 3 + 1)
                    except error:
                        interrupted += 1
                assert not fake.driver.capturing()
                assert gc.isenabled()
                assert fake.raw_stream(0) == stream.cuda_stream
                for _ in range(2):
                    assert torch.equal(fast(x), x * 3 + 1)
                assert fast.cache_info().eager == {}
            fast.close()
            module.close()
            gc.collect(0)
            assert fake.driver.leaked() == {}
    assert interrupted >= 4


def test_an_error_of_a_device_that_is_lost_is_told(fake: Torch) -> None:
    module = load("affine")
    fast = graphcache.wrap(module)
    x = rows(fake, 2)
    fast(x)
    fake.driver.lost = "ILLEGAL_ADDRESS"
    with pytest.raises(CudaError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        fast(x)
    fake.driver.forgive()


def test_the_stand_in_would_find_unordered_work(fake: Torch) -> None:
    """What the tests above rest on: without the order, two calls on two streams are found to race."""
    module = load("affine")
    with fake.on(fake.new_stream()):
        module(rows(fake, 2))
    module.order.handle, module.order.stream = None, -1
    with fake.on(fake.new_stream()), pytest.raises(Violation, match="race for memory"):
        module(rows(fake, 2))
