"""The kernel of copy nodes on a device: every byte, whatever sizes and alignments, and never before it was written."""

import ctypes
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphcache
from graphcache.capture import engine_recorder as record_engine
from graphcache.graphs import driver
from graphcache.graphs.capture import capture_enqueue
from graphcache.graphs.copies import (
    LARGEST,
    MAX_COPIES,
    CopyList,
    copy_kernels,
    edges_of,
    find_copies,
    order_copies,
    with_copies,
)
from graphcache.graphs.stream_order import StreamOrder
from tests.helpers import graphs_of, wrap_recorded

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


@pytest.fixture
def kernels():
    found = copy_kernels(0)
    assert found is not None, "the driver takes the kernels"
    assert found.waits is (torch.cuda.get_device_capability() >= (9, 0))
    return found


def run(graph, patched=()):
    """Instantiate a graph, point it elsewhere, launch it, wait."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    executable = driver.instantiate(graph, stream.cuda_stream)
    try:
        for pointer, address in patched:
            pointer.word.value = address
        for pointer, _ in patched:
            driver.call(pointer.setter, executable, *pointer.arguments)
        driver.call("cuGraphLaunch", executable, stream.cuda_stream)
        stream.synchronize()
    finally:
        driver.call("cuGraphExecDestroy", executable)


def noise(nbytes, seed):
    draw = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device="cuda", generator=draw)


SIZES = st.one_of(st.integers(1, 70), st.integers(1, 20_000), st.sampled_from([LARGEST - 1, LARGEST, LARGEST + 1]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(SIZES, *[st.integers(0, 17)] * 3), min_size=1, max_size=2 * MAX_COPIES + 1), st.booleans())
def test_every_byte_and_no_other(tensors, inwards):
    """Captured between some addresses, then pointed at others that are aligned otherwise."""
    kernels, lane = copy_kernels(0), StreamOrder(0)
    static, outside, others = [], [], []
    for seed, (nbytes, at, first, second) in enumerate(tensors):
        for kept, offset in ((static, at), (outside, first), (others, second)):
            kept.append(noise(nbytes + 64, 3 * seed + len(kept))[offset:][:nbytes])
    pairs = list(zip(static, outside, strict=True)) if inwards else list(zip(outside, static, strict=True))
    before = [[each._base.clone() for each in kept] for kept in (static, outside, others)]
    idle = torch.zeros(1, device="cuda")

    def enqueue(stream):
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            idle.add_(1)
        return True

    torch.cuda.synchronize()
    graph = capture_enqueue(with_copies(enqueue, pairs, [], kernels), lane, "")
    order_copies(graph, kernels)
    found = find_copies(graph, outside, kernels)
    run(graph, [(place, tensor.data_ptr()) for (place,), tensor in zip(found, others, strict=True)])
    driver.call("cuGraphDestroy", graph)
    for index, (nbytes, at, _, second) in enumerate(tensors):
        source, target = (2, 0) if inwards else (0, 2)
        wanted = before[target][index].clone()
        to, start = (at, second) if inwards else (second, at)
        wanted[to : to + nbytes] = before[source][index][start : start + nbytes]
        kept = (static, outside, others)
        assert torch.equal(kept[target][index]._base, wanted), "what was to be written, and nothing around it"
        assert torch.equal(kept[source][index]._base, before[source][index])
        assert torch.equal(outside[index]._base, before[1][index]), "nobody is where it was captured"


def test_it_waits_for_the_work_that_it_is_launched_beside(kernels):
    """Work that ends long after the copy behind it could begin, a thousand times over, with other values each time."""
    lane, rows = StreamOrder(0), 1 << 20
    x, y, out = (torch.zeros(rows, device="cuda") for _ in range(3))
    parts = [(out[start : start + 1024], y[start : start + 1024]) for start in range(0, rows, rows // MAX_COPIES)]

    def work(stream):
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            torch.cumsum(x, 0, out=y)
            for _ in range(4):
                y.add_(1)
        return True

    early = kernels.waits
    enqueue = with_copies(work, [], parts, kernels)
    enqueue(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    graph = capture_enqueue(enqueue, lane, "")
    order_copies(graph, kernels)
    assert [edge.is_programmatic for edge in edges_of(graph)].count(True) == early
    stream = torch.cuda.Stream()
    executable = driver.instantiate(graph, stream.cuda_stream)
    for step in range(1000):
        with torch.cuda.stream(stream):
            x.fill_(step % 7)
            out.fill_(-1)
            driver.call("cuGraphLaunch", executable, stream.cuda_stream)
            assert all(torch.equal(*part) for part in parts)
            assert parts[1][0][0].item() == (step % 7) * (rows // MAX_COPIES + 1) + 4
    stream.synchronize()
    driver.call("cuGraphExecDestroy", executable)
    driver.call("cuGraphDestroy", graph)


def test_an_engine_waits_for_its_inputs(kernels, load):
    """TensorRT-RTX launches the first kernel of mlp8 programmatically: behind a kernel of ours it would not wait."""
    fast = wrap_recorded(load("mlp8"), io="copy")
    with torch.inference_mode():
        for rows in (1, 8, 64):
            x = torch.randn(rows, 64, device="cuda")
            assert torch.equal(fast(x), fast(x))
    for entry in graphs_of(fast).entries.values():
        edges = edges_of(entry.graph.graph.captured)
        ends = {int(edge.end) for edge in edges}
        first = [edge for edge in edges if int(edge.start) not in ends]
        assert len(first) == 1
        assert not first[0].is_programmatic
        func = driver.call("cuGraphKernelNodeGetParams", first[0].start).func
        assert int(func) == int(kernels.before)


class Many(nn.Module):
    """More inputs and outputs than one kernel takes, small and large ones."""

    def forward(self, *tensors):
        return tuple(tensor * (index + 2) for index, tensor in enumerate(tensors))


def test_modules_with_many_tensors_of_all_sizes():
    module = Many()
    fast = graphcache.wrap(module)
    draw = random.Random(0)
    sizes = [1, 3, 5, 64, 1000, LARGEST // 4, LARGEST // 4 + 1, 7, 2, 48, 100_000]
    kept = []
    with torch.no_grad():
        for step in range(12):
            given_ = [torch.randn(size + 4, device="cuda")[draw.choice([0, 1, 3]) :][:size] for size in sizes]
            if step % 3 == 0:
                given_ = [tensor.clone() for tensor in given_]
            kept.append((fast(*given_), module(*given_)))
    torch.cuda.synchronize()
    assert all(torch.equal(left, right) for got, wanted in kept for left, right in zip(got, wanted, strict=True))
    info = fast.cache_info()
    assert (info.captures, info.hits, info.eager) == (1, 11, {})
    (entry,) = graphs_of(fast).entries.values()
    # Eight small and three large ones in, as many out, and one kernel of torch's for each.
    small = sum(4 * size <= LARGEST for size in sizes)
    assert entry.graph.graph.nodes == len(sizes) + 2 * (-(-small // MAX_COPIES) + len(sizes) - small)


def test_an_engine_copies_as_it_did(load, monkeypatch):
    """By kernels and by the driver's own nodes: the same bits, in any order of shapes."""
    engine = load("mlp8")
    by_kernel = wrap_recorded(engine, io="copy")
    by_driver = wrap_recorded(engine, io="copy")
    inputs = [torch.randn(n, 64, device="cuda") for n in (1, 3, 8, 17, 64)]
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        for x in inputs:
            by_kernel(x)
        monkeypatch.setattr(record_engine, "copy_kernels", lambda index: None)
        for x in inputs:
            by_driver(x)
        for _ in range(50):
            for x in inputs:
                assert torch.equal(by_kernel(x), by_driver(x))
        torch.cuda.synchronize()
    assert by_kernel.cache_info().hits == by_driver.cache_info().hits == 250
    nodes = [{entry.graph.graph.nodes for entry in graphs_of(fast).entries.values()} for fast in (by_kernel, by_driver)]
    assert nodes[0] == nodes[1]


def test_its_argument_is_as_large_as_its_source_says():
    found = copy_kernels(0)
    offset, size = driver.call("cuFuncGetParamInfo", found.before, 0)
    assert (int(offset), int(size)) == (0, ctypes.sizeof(CopyList))
