"""The calls of the driver, each checked; and the stand-in that the other tests rely on, held against the binding."""

from __future__ import annotations

import builtins
import ctypes
import importlib.metadata
import inspect
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graphcache.errors import CudaError
from graphcache.graphs import driver
from tests.graphs import fake_driver
from tests.graphs.fake_driver import Affine, Torch, Violation, address, installed, integer, pointer

KINDS = fake_driver.CUgraphNodeType


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(patch=monkeypatch) as fake:
        yield fake


def stream_of(fake: Torch) -> Any:
    return fake_driver.CUstream(fake.new_stream().cuda_stream)


def captured(fake: Torch, stream: Any, count: int = 1) -> Any:
    kernel = fake.driver.kernel([], lambda memory: None)
    fake_driver.begin_capture(stream)
    for _ in range(count):
        fake.driver.launch(kernel, [], int(stream))
    return driver.end_capture(stream)


# ---- graphcache.graphs.driver


def test_call_gives_nothing_one_result_or_several(fake: Torch) -> None:
    stream = stream_of(fake)
    assert driver.call("cuStreamSynchronize", stream) is None
    assert driver.call("cuCtxGetCurrent") == fake_driver.CUcontext(0x77)
    graph = captured(fake, stream, 3)
    nodes, count = driver.call("cuGraphGetNodes", graph, 2)
    assert (len(nodes), count, fake_driver.node_count(graph)) == (2, 2, 3)


def test_a_failing_call_names_itself_and_the_code(fake: Torch) -> None:
    fake.driver.fail("cuEventCreate", "INVALID_VALUE")
    with pytest.raises(CudaError, match=r"^cuEventCreate failed with CUDA_ERROR_INVALID_VALUE \(1\)$"):
        driver.new_event()
    assert int(driver.new_event()) in fake.driver.events


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        ("OUT_OF_MEMORY", "; lower max_graphs or max_bytes, or free device memory"),
        ("ILLEGAL_ADDRESS", "the CUDA context is lost: restart the process"),
        (
            "NOT_INITIALIZED",
            "start processes with multiprocessing's 'spawn' method; if it is ending, call nothing any more",
        ),
        ("LAUNCH_FAILED", "the CUDA context is lost: restart the process"),
    ],
)
def test_codes_with_a_remedy(fake: Torch, code: str, hint: str) -> None:
    fake.driver.fail("cuStreamSynchronize", code)
    with pytest.raises(CudaError) as caught:
        driver.call("cuStreamSynchronize", 0)
    assert str(caught.value).startswith(f"cuStreamSynchronize failed with CUDA_ERROR_{code} (")
    assert str(caught.value).endswith(hint)


def test_is_capturing(fake: Torch) -> None:
    stream = stream_of(fake)
    assert not driver.is_capturing(int(stream))
    fake_driver.begin_capture(stream)
    assert driver.is_capturing(int(stream))
    assert not driver.is_capturing(0), "a non-blocking stream does not concern the legacy stream"
    fake.driver.invalidate(int(stream))
    assert driver.is_capturing(int(stream)), "an invalidated capture must be ended like any other"
    assert driver.end_capture(stream) is None
    assert not driver.is_capturing(int(stream))


def test_the_legacy_stream_counts_as_captured_beside_a_blocking_stream_that_is(fake: Torch) -> None:
    _, blocking = fake.driver.cuStreamCreate(fake_driver.CUstream_flags.CU_STREAM_DEFAULT)
    fake_driver.begin_capture(blocking)
    assert driver.is_capturing(0)
    assert not driver.is_capturing(int(stream_of(fake)))
    driver.call("cuGraphDestroy", driver.end_capture(blocking))


def test_is_capturing_passes_on_other_failures(fake: Torch) -> None:
    fake.driver.fail("cuStreamIsCapturing", "INVALID_HANDLE")
    with pytest.raises(CudaError, match=r"cuStreamIsCapturing failed with CUDA_ERROR_INVALID_HANDLE \(400\)"):
        driver.is_capturing(0)


def test_end_of_a_capture_that_nobody_began(fake: Torch) -> None:
    with pytest.raises(CudaError, match=r"cuStreamEndCapture failed with CUDA_ERROR_ILLEGAL_STATE \(401\)"):
        driver.end_capture(stream_of(fake))


def test_end_of_a_capture_by_another_thread(fake: Torch) -> None:
    stream, said = stream_of(fake), []
    fake_driver.begin_capture(stream)

    def end() -> None:
        with pytest.raises(CudaError, match="WRONG_THREAD") as caught:
            driver.end_capture(stream)
        said.append(caught.value)

    thread = threading.Thread(target=end)
    thread.start()
    thread.join()
    assert said
    assert driver.is_capturing(int(stream))
    driver.call("cuGraphDestroy", driver.end_capture(stream))


def test_end_of_an_unjoined_capture_leaves_both_streams(fake: Torch) -> None:
    stream, other = stream_of(fake), stream_of(fake)
    event = driver.new_event()
    fake_driver.begin_capture(stream)
    fake_driver.order(event, stream, other)
    assert driver.is_capturing(int(other))
    fake.driver.launch(fake.driver.kernel([], lambda memory: None), [], int(other))
    assert driver.end_capture(stream) is None
    assert fake.driver.capturing() == []
    assert "graphs" not in fake.driver.leaked()


def test_a_graph_that_comes_with_an_invalidated_capture_is_destroyed(
    fake: Torch, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, real = stream_of(fake), fake.driver.cuStreamEndCapture

    def end(handle: Any) -> Any:
        return fake_driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, real(handle)[1]

    monkeypatch.setattr(fake.driver, "cuStreamEndCapture", end)
    fake_driver.begin_capture(stream)
    assert driver.end_capture(stream) is None
    assert fake.driver.leaked() == {}


def test_streams_do_not_wait_for_the_legacy_stream(fake: Torch) -> None:
    made = fake.driver.streams[int(fake_driver.new_stream())]
    assert not made.blocking


def test_order_makes_one_stream_wait_for_another(fake: Torch) -> None:
    before, after = stream_of(fake), stream_of(fake)
    kernel = fake.driver.kernel([], lambda memory: None)
    fake.driver.launch(kernel, [], int(before))
    assert not fake.driver.ordered(int(before), int(after))
    fake_driver.order(driver.new_event(), before, after)
    assert fake.driver.ordered(int(before), int(after))
    fake.driver.launch(kernel, [], int(before))
    assert not fake.driver.ordered(int(before), int(after)), "what comes later is not waited for"


def test_without_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def importing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("cuda"):
            raise ModuleNotFoundError("No module named 'cuda'", name="cuda")
        return real(name, *args, **kwargs)

    driver.binding.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(builtins, "__import__", importing)
            expected = r"need cuda-python \(No module named 'cuda'\); pip install cuda-python"
            with pytest.raises(CudaError, match=expected):
                driver.binding()
    finally:
        driver.binding.cache_clear()


def test_the_binding_is_cuda_python() -> None:
    real = pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)
    assert driver.binding() is real


# ---- the stand-in is what it stands in for

FUNCTIONS = [name for name in vars(fake_driver.Driver) if name.startswith("cu")]
ENUMS = [name for name, value in vars(fake_driver.Driver).items() if hasattr(value, "__members__")]
HANDLES = [name for name, value in vars(fake_driver).items() if fake_driver._Handle in getattr(value, "__bases__", ())]
STRUCTS = [name for name, value in vars(fake_driver).items() if fake_driver._Struct in getattr(value, "__bases__", ())]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_what_the_drivers_take(name: str) -> None:
    real = pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)
    # In cuda-python 12 those of edges with data have another name; graphs/edges.py takes whichever there is.
    function = getattr(real, f"{name}_v2", None) or getattr(real, name)
    theirs, ours = inspect.signature(function), inspect.signature(getattr(fake_driver.Driver, name))
    assert list(ours.parameters)[1:] == list(theirs.parameters)


@pytest.mark.parametrize("name", ENUMS)
def test_enumerations_have_the_drivers_members(name: str) -> None:
    real = pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)
    theirs = getattr(real, name).__members__
    ours = getattr(fake_driver, name).__members__
    assert {each: int(value) for each, value in ours.items()} == {each: int(theirs[each]) for each in ours}


@pytest.mark.parametrize("name", HANDLES)
def test_handles_are_numbers_that_compare(name: str) -> None:
    real = pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)
    # Those of cuda-python 12 compare by identity: nothing may rely on either.
    major = int(importlib.metadata.version("cuda-bindings").partition(".")[0])
    for kind, compares in ((getattr(real, name), major >= 13), (getattr(fake_driver, name), True)):
        assert int(kind(0x50)) == 0x50
        assert (kind(0x50) == kind(0x50)) is (compares and name != "CUdeviceptr")
        assert kind(0x50) != kind(0x60)


@pytest.mark.parametrize("name", STRUCTS)
def test_structures_have_the_drivers_layout(name: str) -> None:
    real = pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)
    theirs, ours = getattr(real, name)(), getattr(fake_driver, name)()
    size = ctypes.sizeof(ours._raw)
    for field, kind in ours._raw_class._fields_:
        if field.startswith("reserved") or field.endswith(("Array", "_out")):
            continue
        if field in ("srcHost", "dstHost", "extra") or (name == "CUDA_MEMCPY3D" and field.endswith("Type")):
            continue
        value = 0x5A5A123456 if ctypes.sizeof(kind) == 8 else 0x5A
        setattr(theirs, field, value)
        setattr(ours, field, value)
        assert type(getattr(ours, field)).__name__ == type(getattr(theirs, field)).__name__, field
        assert ctypes.string_at(theirs.getPtr(), size) == ctypes.string_at(ours.getPtr(), size), field
    with pytest.raises(AttributeError):
        ours.no_such_field = 1


# ---- the stand-in holds the rules


def test_parameters_are_copied_for_the_launches_that_follow(fake: Torch) -> None:
    seen: list[int] = []
    kernel = fake.driver.kernel([8], lambda memory, value: seen.append(address(value)))
    stream = stream_of(fake)
    fake_driver.begin_capture(stream)
    fake.driver.launch(kernel, [integer(1)], int(stream))
    graph = driver.end_capture(stream)
    one, two = (fake_driver.instantiate(graph, int(stream)) for _ in range(2))
    ((node,), _) = driver.call("cuGraphGetNodes", graph, 1)
    params = driver.call("cuGraphKernelNodeGetParams", node)
    word = ctypes.c_uint64(2)
    array = (ctypes.c_void_p * 1)(ctypes.addressof(word))
    params.kernelParams = ctypes.addressof(array)
    driver.call("cuGraphExecKernelNodeSetParams", one, node, params)
    word.value = 3
    for executable in (one, two, fake_driver.instantiate(graph, int(stream))):
        driver.call("cuGraphLaunch", executable, stream)
    assert seen == [2, 1, 1], "only of that executable, and copied when they were set"


def test_destroyed_objects_cannot_be_used(fake: Torch) -> None:
    stream = stream_of(fake)
    graph = captured(fake, stream)
    executable = fake_driver.instantiate(graph, int(stream))
    ((node,), _) = driver.call("cuGraphGetNodes", graph, 1)
    driver.call("cuGraphDestroy", graph)
    driver.call("cuGraphLaunch", executable, stream)
    for name, handle in (("cuGraphDestroy", graph), ("cuGraphGetNodes", graph), ("cuGraphKernelNodeGetParams", node)):
        with pytest.raises(Violation, match="was destroyed"):
            driver.call(name, *((handle, 0) if name == "cuGraphGetNodes" else (handle,)))
    with pytest.raises(Violation, match="before its last launch was waited for"):
        fake.driver.cuGraphExecDestroy(executable)


def test_a_destroyed_executable_cannot_be_launched(fake: Torch) -> None:
    stream = stream_of(fake)
    graph = captured(fake, stream)
    executable = fake_driver.instantiate(graph, int(stream))
    driver.call("cuGraphExecDestroy", executable)
    with pytest.raises(Violation, match="CUgraphExec"):
        driver.call("cuGraphLaunch", executable, stream)


def test_freed_memory_is_an_illegal_address_and_the_context_is_lost(fake: Torch) -> None:
    kernel = fake.driver.kernel([8], lambda memory, x: memory.read(address(x), 16))
    tensor = fake.driver.heap.tensor([1, 2, 3, 4])
    argument, stream = pointer(tensor), stream_of(fake)
    fake.driver.launch(kernel, [argument], int(stream))
    del tensor
    with pytest.raises(fake_driver._Failed):
        fake.driver.launch(kernel, [argument], int(stream))
    with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
        driver.new_event()


def test_memory_behind_the_end_is_an_illegal_address(fake: Torch) -> None:
    tensor = fake.driver.heap.tensor([1, 2, 3, 4])
    memory = fake_driver.Memory(fake.driver, fake.driver.streams[0])
    assert memory.load(tensor.data_ptr() + 4, (3,), torch.float32).tolist() == [2, 3, 4]
    with pytest.raises(fake_driver._Failed):
        memory.read(tensor.data_ptr() + 4, 16)


def test_unordered_streams_race(fake: Torch) -> None:
    work = Affine(fake, 4, fake_driver.stream_order.StreamOrder(0))
    work.x.fill_(1)
    one, two = stream_of(fake), stream_of(fake)
    work.enqueue(int(one))
    with pytest.raises(Violation, match="race for memory"):
        work.enqueue(int(two))


def test_nothing_but_captured_work_may_be_ordered_before_captured_work(fake: Torch) -> None:
    stream, other, event = stream_of(fake), stream_of(fake), driver.new_event()
    driver.call("cuEventRecord", event, other)
    fake_driver.begin_capture(stream)
    with pytest.raises(CudaError, match="STREAM_CAPTURE_ISOLATION"):
        driver.call("cuStreamWaitEvent", stream, event, 0)
    assert driver.end_capture(stream) is None


def test_waiting_for_a_captured_stream_invalidates_the_capture(fake: Torch) -> None:
    stream = stream_of(fake)
    fake_driver.begin_capture(stream)
    with pytest.raises(CudaError, match="STREAM_CAPTURE_UNSUPPORTED"):
        driver.call("cuStreamSynchronize", stream)
    assert driver.end_capture(stream) is None


def test_an_event_must_be_recorded_before_it_is_waited_for(fake: Torch) -> None:
    with pytest.raises(Violation, match="never recorded"):
        driver.call("cuStreamWaitEvent", stream_of(fake), driver.new_event(), 0)


def test_the_legacy_stream_cannot_be_captured(fake: Torch) -> None:
    with pytest.raises(CudaError, match="STREAM_CAPTURE_UNSUPPORTED"):
        fake_driver.begin_capture(fake_driver.CUstream(0))


def test_a_copy_node_takes_one_dimensional_copies_in_its_own_context(fake: Torch) -> None:
    heap, stream = fake.driver.heap, stream_of(fake)
    source, target = heap.tensor([1, 2, 3, 4]), heap.tensor([0, 0, 0, 0])
    fake_driver.begin_capture(stream)
    driver.call("cuMemcpyDtoDAsync", target.data_ptr(), source.data_ptr(), 16, stream)
    graph = driver.end_capture(stream)
    executable = fake_driver.instantiate(graph, int(stream))
    ((node,), _) = driver.call("cuGraphGetNodes", graph, 1)
    assert driver.call("cuGraphNodeGetType", node) is KINDS.CU_GRAPH_NODE_TYPE_MEMCPY
    params = driver.call("cuGraphMemcpyNodeGetParams", node)
    context = driver.call("cuCtxGetCurrent")
    other = heap.tensor([5, 6, 7, 8])
    params.srcDevice = fake_driver.CUdeviceptr(other.data_ptr())
    driver.call("cuGraphExecMemcpyNodeSetParams", executable, node, params, context)
    driver.call("cuGraphLaunch", executable, stream)
    assert target.tolist() == [5, 6, 7, 8]
    params.Height = 2
    for args in ((params, context), (driver.call("cuGraphMemcpyNodeGetParams", node), fake_driver.CUcontext(1))):
        with pytest.raises(CudaError, match="INVALID_VALUE"):
            driver.call("cuGraphExecMemcpyNodeSetParams", executable, node, *args)
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        driver.call("cuGraphExecKernelNodeSetParams", executable, node, fake_driver.CUDA_KERNEL_NODE_PARAMS())


def test_nodes_belong_to_the_graph_that_was_instantiated(fake: Torch) -> None:
    stream = stream_of(fake)
    mine, other = captured(fake, stream), captured(fake, stream)
    executable = fake_driver.instantiate(mine, int(stream))
    ((node,), _) = driver.call("cuGraphGetNodes", other, 1)
    params = driver.call("cuGraphKernelNodeGetParams", node)
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        driver.call("cuGraphExecKernelNodeSetParams", executable, node, params)


def test_memory_of_a_nodes_parameters_is_the_drivers(fake: Torch) -> None:
    kernel, stream = fake.driver.kernel([8], lambda memory, x: None), stream_of(fake)
    fake_driver.begin_capture(stream)
    fake.driver.launch(kernel, [integer(7)], int(stream))
    graph = driver.end_capture(stream)
    ((node,), _) = driver.call("cuGraphGetNodes", graph, 1)
    params = driver.call("cuGraphKernelNodeGetParams", node)
    place = ctypes.c_void_p.from_address(params.kernelParams).value
    assert place is not None
    ctypes.c_uint64.from_address(place).value = 8
    with pytest.raises(Violation, match="was written"):
        driver.call("cuGraphDestroy", graph)


def test_handles_of_another_kind_are_refused(fake: Torch) -> None:
    with pytest.raises(TypeError, match="expected a CUgraph"):
        driver.call("cuGraphDestroy", stream_of(fake))
    with pytest.raises(TypeError):
        fake.driver.cuGraphDestroy()


# ---- for native code


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {b"cuGraphLaunch": 0x10, b"cuMissing": 0}
    flags = SimpleNamespace(CU_GET_PROC_ADDRESS_LEGACY_STREAM=1)

    def get(symbol: bytes, version: int, flag: int) -> Any:
        assert (version, flag) == (12000, 1)
        return 0, known[symbol], 0

    fake = SimpleNamespace(cuGetProcAddress=get, CUdriverProcAddress_flags=flags)
    monkeypatch.setattr(driver, "binding", lambda: fake)
    assert driver.addresses("cuGraphLaunch", "cuGraphLaunch") == (0x10, 0x10)
    with pytest.raises(CudaError, match=r"^the driver has no function cuMissing; graphcache needs one for CUDA 12.0"):
        driver.addresses("cuGraphLaunch", "cuMissing")


def test_failures_by_number() -> None:
    real = pytest.importorskip("cuda.bindings.driver")
    assert str(driver.failure("cuGraphLaunch", 999)) == "cuGraphLaunch failed with CUDA_ERROR_UNKNOWN (999)"
    assert str(driver.failure("cuGraphLaunch", 123456)).startswith("cuGraphLaunch failed with")
    assert real.CUresult(999).name == "CUDA_ERROR_UNKNOWN"
