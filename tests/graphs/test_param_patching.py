"""Where addresses stand in captured graphs: every place, and only those."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphcache.graphs import driver, param_patching
from graphcache.graphs.param_patching import COPY_ADDRESSES, CannotBind, find_pointers
from tests.graphs import fake_driver
from tests.graphs.fake_driver import CUDA_MEMCPY3D, CUmemorytype, Torch, installed, integer, pointer

SIZE = 16
Record = Callable[[list[Tensor], int], None]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(patch=monkeypatch) as fake:
        yield fake


def fresh(fake: Torch, count: int) -> list[Tensor]:
    return [fake.driver.heap.tensor(range(SIZE)) for _ in range(count)]


def capture(fake: Torch, record: Record, tensors: list[Tensor]) -> Any:
    stream = fake_driver.new_stream()
    fake_driver.begin_capture(stream)
    record(tensors, int(stream))
    return driver.end_capture(stream)


def find(fake: Torch, record: Record, count: int = 2, other: Record | None = None) -> Found:
    ours, theirs = fresh(fake, count), fresh(fake, count)
    first, second = capture(fake, record, ours), capture(fake, other or record, theirs)
    places = find_pointers(first, second, ours, theirs)
    driver.call("cuGraphDestroy", second)
    return Found(fake, first, ours, places)


def refusal(fake: Torch, record: Record, count: int = 2, other: Record | None = None) -> str:
    with pytest.raises(CannotBind) as caught:
        find(fake, record, count, other)
    return str(caught.value)


@dataclass
class Found:
    fake: Torch
    graph: Any
    tensors: list[Tensor]
    places: list[list[param_patching.Pointer]]

    def pointed_at(self, tensors: Sequence[Tensor]) -> list[list[bytes]]:
        """What each node of the executable holds once all pointers are set."""
        stream = fake_driver.new_stream()
        executable = fake_driver.instantiate(self.graph, int(stream))
        for places, tensor in zip(self.places, tensors, strict=True):
            for each in places:
                point(each, executable, tensor)
        return [node.arguments for node in self.fake.driver.executables[int(executable)].nodes.values()]


def point(place: param_patching.Pointer, executable: Any, tensor: Tensor) -> None:
    place.word.value = tensor.data_ptr() + place.offset
    driver.call(place.setter, executable, *place.arguments)


def nothing(memory: Any, *arguments: bytes) -> None:
    """A kernel that is never launched."""


# ---- every place, and only those


@dataclass(frozen=True)
class Word:
    """Eight bytes of an argument: an address inside of, or at the end of, a tensor; or a number."""

    tensor: int | None
    value: int

    def bytes(self, tensors: Sequence[Tensor]) -> bytes:
        return integer(self.value) if self.tensor is None else pointer(tensors[self.tensor], self.value)


words = st.one_of(
    st.builds(Word, st.integers(0, 2), st.integers(0, 4 * SIZE)),
    st.builds(Word, st.none(), st.integers(0, 2**63 - 1)),
)
arguments = st.tuples(st.lists(words, min_size=0, max_size=4), st.binary(max_size=7)).filter(
    lambda pair: len(pair[0]) * 8 + len(pair[1]) > 0
)
kernels = st.lists(st.lists(arguments, min_size=1, max_size=4), min_size=1, max_size=4)


@given(kernels, st.booleans())
def test_finds_every_place_and_only_those(layout: list[list[tuple[list[Word], bytes]]], complete: bool) -> None:
    if complete:
        layout = [*layout, [([Word(index, 4 * index)], b"") for index in range(3)]]
    with installed() as fake:

        def pack(tensors: Sequence[Tensor]) -> list[list[bytes]]:
            return [[b"".join(word.bytes(tensors) for word in head) + tail for head, tail in node] for node in layout]

        functions = [fake.driver.kernel([len(each) for each in node], nothing) for node in pack(fresh(fake, 3))]

        def record(tensors: list[Tensor], stream: int) -> None:
            for function, packed in zip(functions, pack(tensors), strict=True):
                fake.driver.launch(function, packed, stream)

        counts = [
            sum(word.tensor == index for node in layout for head, _ in node for word in head) for index in range(3)
        ]
        if 0 in counts:
            missing = counts.index(0)
            assert refusal(fake, record, 3) == f"tensor {missing} stands in no node's arguments"
            return
        found = find(fake, record, 3)
        assert [len(places) for places in found.places] == counts
        assert found.pointed_at(found.tensors) == pack(found.tensors)
        others = fresh(fake, 3)
        assert found.pointed_at(others) == pack(others), "each place follows its own tensor, nothing else changed"
        del others
        driver.call("cuGraphDestroy", found.graph)
        assert "graphs" not in fake.driver.leaked()


def test_a_pointer_in_a_structure_with_an_offset(fake: Torch) -> None:
    kernel = fake.driver.kernel([24, 4], nothing)

    def record(tensors: list[Tensor], stream: int) -> None:
        structure = integer(5) + pointer(tensors[0], 12) + pointer(tensors[1])
        fake.driver.launch(kernel, [structure, integer(9, 4)], stream)

    found = find(fake, record)
    (inside,), (plain,) = found.places
    assert (inside.offset, plain.offset) == (12, 0)


def test_one_past_the_end_of_a_tensor(fake: Torch) -> None:
    kernel = fake.driver.kernel([8, 8, 8], nothing)

    def record(tensors: list[Tensor], stream: int) -> None:
        begin, end = pointer(tensors[0]), pointer(tensors[0], 4 * SIZE)
        fake.driver.launch(kernel, [begin, end, pointer(tensors[1])], stream)

    assert [[place.offset for place in places] for places in find(fake, record).places] == [[0, 4 * SIZE], [0]]


def test_two_past_the_end_is_nobodys(fake: Torch) -> None:
    kernel = fake.driver.kernel([8, 8], nothing)

    def record(tensors: list[Tensor], stream: int) -> None:
        fake.driver.launch(kernel, [pointer(tensors[0], 4 * SIZE + 1), pointer(tensors[1])], stream)

    assert refusal(fake, record) == "arguments differ in something that is no address of an input or output"


def test_an_end_that_is_anothers_beginning_is_told_apart_by_how_it_moved(fake: Torch) -> None:
    kernel = fake.driver.kernel([8, 8, 8], nothing)
    whole = fresh(fake, 1)[0]
    adjacent = [whole[: SIZE // 2], whole[SIZE // 2 :]]
    apart = fresh(fake, 2)

    def record(tensors: list[Tensor], stream: int) -> None:
        end = pointer(tensors[0], 2 * SIZE)
        fake.driver.launch(kernel, [pointer(tensors[0]), end, pointer(tensors[1])], stream)

    first, second = capture(fake, record, adjacent), capture(fake, record, apart)
    found = find_pointers(first, second, adjacent, apart)
    assert [[place.offset for place in places] for places in found] == [[0, 2 * SIZE], [0]]


def test_an_ambiguous_address_is_refused(fake: Torch) -> None:
    kernel = fake.driver.kernel([8, 8, 8], nothing)
    whole, other = fresh(fake, 2)
    halves = [(each[: SIZE // 2], each[SIZE // 2 :]) for each in (whole, other)]

    def record(tensors: list[Tensor], stream: int) -> None:
        fake.driver.launch(kernel, [pointer(tensors[0]), pointer(tensors[0], 2 * SIZE), pointer(tensors[1], 4)], stream)

    graphs = [capture(fake, record, list(pair)) for pair in halves]
    with pytest.raises(CannotBind, match="no address of an input or output"):
        find_pointers(*graphs, list(halves[0]), list(halves[1]))


@given(st.lists(st.integers(1, 3), min_size=2, max_size=6))
def test_tensors_that_were_allocated_one_after_the_other_are_told_apart(sizes: list[int]) -> None:
    """As torch does: the end of each is the beginning of the next, here and elsewhere."""
    with installed() as fake, pytest.MonkeyPatch.context() as patch:
        memory = fake.driver.heap.empty(4096)
        begin = itertools.accumulate(itertools.repeat(64))

        def carve(like: Tensor) -> Tensor:
            pieces = [next(begin) for _ in range(like.numel() // 64)]
            return memory[pieces[0] :][: like.numel()]

        patch.setattr(fake, "empty_like", carve)
        ours = [carve(torch.empty(64 * size)) for size in sizes]
        others = param_patching.elsewhere(ours)
        assert len({other.data_ptr() - one.data_ptr() for one, other in zip(ours, others, strict=True)}) == len(ours)
        kernel = fake.driver.kernel([8] * len(sizes), nothing)
        graphs = [
            capture(fake, lambda given, stream: fake.driver.launch(kernel, [*map(pointer, given)], stream), tensors)
            for tensors in (ours, others)
        ]
        found = find_pointers(*graphs, ours, others)
        assert [[place.offset for place in places] for places in found] == [[0]] * len(sizes)


def test_several_nodes_with_one_input_and_copies_among_them(fake: Torch) -> None:
    kernel = fake.driver.kernel([8, 8], nothing)
    scratch = fresh(fake, 1)[0]

    def record(tensors: list[Tensor], stream: int) -> None:
        x, y = tensors
        fake.driver.launch(kernel, [pointer(x), pointer(scratch)], stream)
        driver.call("cuMemcpyDtoDAsync", scratch.data_ptr() + 8, x.data_ptr() + 4, 8, stream)
        fake.driver.memset(scratch, 0, stream)
        fake.driver.empty_node(stream)
        driver.call("cuMemcpyDtoDAsync", y.data_ptr(), x.data_ptr(), 16, stream)
        fake.driver.launch(kernel, [pointer(scratch), pointer(y, 8)], stream)

    found = find(fake, record)
    assert [[place.offset for place in places] for places in found.places] == [[0, 4, 0], [0, 8]]
    others = fresh(fake, 2)
    found.pointed_at(others)
    executable = next(reversed(fake.driver.executables.values()))
    copies = [node.params for node in executable.nodes.values() if isinstance(node.params, CUDA_MEMCPY3D)]
    assert [(int(each.srcDevice), int(each.dstDevice)) for each in copies] == [
        (others[0].data_ptr() + 4, scratch.data_ptr() + 8),
        (others[0].data_ptr(), others[1].data_ptr()),
    ]


def test_what_is_the_same_in_both_captures_stays(fake: Torch) -> None:
    kernel = fake.driver.kernel([8, 8, 128, 3], nothing)

    def record(tensors: list[Tensor], stream: int) -> None:
        fake.driver.launch(kernel, [pointer(tensors[0]), integer(-1), bytes(range(128)), b"abc"], stream)

    found = find(fake, record, 1)
    assert found.pointed_at(fresh(fake, 1))[0][1:] == [integer(-1), bytes(range(128)), b"abc"]


def test_library_kernels_too(fake: Torch) -> None:
    kernel = fake.driver.kernel([8, 4], nothing)

    def record(tensors: list[Tensor], stream: int) -> None:
        fake.driver.launch(kernel, [pointer(tensors[0]), integer(3, 4)], stream, by_kern=True)

    found = find(fake, record, 1)
    other = fresh(fake, 1)
    assert found.pointed_at(other) == [[pointer(other[0]), integer(3, 4)]]


def test_setting_one_pointer_of_a_node_keeps_the_others(fake: Torch) -> None:
    kernel = fake.driver.kernel([8, 8], nothing)

    def record(tensors: list[Tensor], stream: int) -> None:
        fake.driver.launch(kernel, [pointer(tensors[0]), pointer(tensors[1])], stream)

    found = find(fake, record)
    executable = fake_driver.instantiate(found.graph, 0)
    made = fresh(fake, 4)
    for index, tensor in ((0, made[0]), (1, made[1]), (0, made[2]), (1, made[3])):
        point(found.places[index][0], executable, tensor)
    (node,) = fake.driver.executables[int(executable)].nodes.values()
    assert node.arguments == [pointer(made[2]), pointer(made[3])]


# ---- refused


def test_a_tensor_map_descriptor(fake: Torch) -> None:
    kernel = fake.driver.kernel([128, 8], nothing)

    def record(tensors: list[Tensor], stream: int) -> None:
        fake.driver.launch(kernel, [pointer(tensors[0]) * 16, pointer(tensors[1])], stream)

    assert refusal(fake, record) == "a tensor-map descriptor holds an address"


@pytest.mark.parametrize(
    "options", [{"grid": (2, 1, 1)}, {"grid": (1, 1, 2)}, {"block": (64, 1, 1)}, {"block": (32, 2, 1)}, {"shared": 4}]
)
def test_a_differing_launch_shape(fake: Torch, options: dict[str, Any]) -> None:
    kernel = fake.driver.kernel([8], nothing)

    def record(tensors: list[Tensor], stream: int) -> None:
        fake.driver.launch(kernel, [pointer(tensors[0])], stream)

    def other(tensors: list[Tensor], stream: int) -> None:
        fake.driver.launch(kernel, [pointer(tensors[0])], stream, **options)

    assert refusal(fake, record, 1, other) == "two captures launch different kernels"


@pytest.mark.parametrize("by_kern", [False, True])
def test_differing_kernels(fake: Torch, by_kern: bool) -> None:
    choice = itertools.cycle(fake.driver.kernel([8], nothing) for _ in range(2))

    def record(tensors: list[Tensor], stream: int) -> None:
        fake.driver.launch(next(choice), [pointer(tensors[0])], stream, by_kern=by_kern)

    assert refusal(fake, record, 1) == "two captures launch different kernels"


def test_packed_arguments(fake: Torch) -> None:
    kernel = fake.driver.kernel([8], nothing)

    def record(tensors: list[Tensor], stream: int) -> None:
        fake.driver.launch(kernel, [pointer(tensors[0])], stream, packed=True)

    assert refusal(fake, record, 1) == "a kernel takes its arguments as one packed buffer"


@pytest.mark.parametrize("size", [1, 4, 8, 12, 20])
def test_an_unexplained_difference(fake: Torch, size: int) -> None:
    kernel, counter = fake.driver.kernel([8, size], nothing), itertools.count(1)

    def record(tensors: list[Tensor], stream: int) -> None:
        fake.driver.launch(kernel, [pointer(tensors[0]), integer(next(counter), size)], stream)

    assert "arguments differ in something that is no address" in refusal(fake, record, 1)


def test_an_address_that_straddles_two_words(fake: Torch) -> None:
    kernel = fake.driver.kernel([16, 8], nothing)

    def record(tensors: list[Tensor], stream: int) -> None:
        fake.driver.launch(kernel, [b"abcd" + pointer(tensors[0]) + b"efgh", pointer(tensors[0])], stream)

    assert "no address" in refusal(fake, record, 1)


def test_a_distance_between_two_tensors_is_no_address(fake: Torch) -> None:
    kernel = fake.driver.kernel([8, 8, 8], nothing)
    ours = fresh(fake, 2)
    theirs = list(reversed(fresh(fake, 2)))

    def record(tensors: list[Tensor], stream: int) -> None:
        distance = (tensors[1].data_ptr() - tensors[0].data_ptr()) % 2**64
        fake.driver.launch(kernel, [pointer(tensors[0]), pointer(tensors[1]), integer(distance)], stream)

    with pytest.raises(CannotBind, match="no address of an input or output"):
        find_pointers(capture(fake, record, ours), capture(fake, record, theirs), ours, theirs)


def test_a_tensor_that_no_node_uses(fake: Torch) -> None:
    kernel = fake.driver.kernel([8], nothing)

    def record(tensors: list[Tensor], stream: int) -> None:
        fake.driver.launch(kernel, [pointer(tensors[1])], stream)

    assert refusal(fake, record) == "tensor 0 stands in no node's arguments"


def test_differing_counts_and_kinds_of_nodes(fake: Torch) -> None:
    kernel = fake.driver.kernel([8], nothing)

    def once(tensors: list[Tensor], stream: int) -> None:
        fake.driver.launch(kernel, [pointer(tensors[0])], stream)

    def twice(tensors: list[Tensor], stream: int) -> None:
        once(tensors, stream)
        once(tensors, stream)

    def another(tensors: list[Tensor], stream: int) -> None:
        fake.driver.memset(tensors[0], 0, stream)

    assert refusal(fake, once, 1, twice) == "two captures gave 1 and 2 nodes"
    assert refusal(fake, once, 1, another) == "two captures gave nodes of different kinds"


def test_a_memset_of_an_output(fake: Torch) -> None:
    def record(tensors: list[Tensor], stream: int) -> None:
        fake.driver.memset(tensors[0], 0, stream)

    assert refusal(fake, record, 1) == "two captures set memory differently"


def test_a_node_of_another_kind(fake: Torch) -> None:
    kernel = fake.driver.kernel([], nothing)
    inner = capture(fake, lambda tensors, stream: fake.driver.launch(kernel, [], stream), [])
    executable = fake_driver.instantiate(inner, 0)

    def record(tensors: list[Tensor], stream: int) -> None:
        driver.call("cuGraphLaunch", executable, stream)

    assert refusal(fake, record, 1) == "a node of kind CU_GRAPH_NODE_TYPE_GRAPH"


def test_copies_that_differ_in_their_size(fake: Torch) -> None:
    sizes = itertools.cycle([16, 32])

    def record(tensors: list[Tensor], stream: int) -> None:
        driver.call("cuMemcpyDtoDAsync", tensors[1].data_ptr(), tensors[0].data_ptr(), next(sizes), stream)

    assert "differ" in refusal(fake, record)


def test_memsets_that_differ_in_what_they_write(fake: Torch) -> None:
    kernel, scratch, values = fake.driver.kernel([8], nothing), fresh(fake, 1)[0], itertools.cycle([0, 1])

    def record(tensors: list[Tensor], stream: int) -> None:
        fake.driver.launch(kernel, [pointer(tensors[0])], stream)
        fake.driver.memset(scratch, next(values), stream)

    assert "differ" in refusal(fake, record, 1)


def test_a_copy_of_rows_cannot_be_pointed_elsewhere(fake: Torch) -> None:
    """``cuGraphExecMemcpyNodeSetParams`` takes one-dimensional copies only, so that it would fail at every replay."""

    def record(tensors: list[Tensor], stream: int) -> None:
        params = CUDA_MEMCPY3D()
        params.srcMemoryType = params.dstMemoryType = CUmemorytype.CU_MEMORYTYPE_DEVICE
        params.srcDevice, params.dstDevice = tensors[0].data_ptr(), tensors[1].data_ptr()
        params.WidthInBytes, params.Height, params.Depth, params.srcPitch, params.dstPitch = 8, 2, 1, 16, 16
        fake.driver.copy(params, stream)

    assert "cop" in refusal(fake, record)


def test_captures_of_other_tensors_than_said(fake: Torch) -> None:
    kernel = fake.driver.kernel([8], nothing)

    def record(tensors: list[Tensor], stream: int) -> None:
        fake.driver.launch(kernel, [pointer(tensors[0])], stream)

    ours, theirs = fresh(fake, 1), fresh(fake, 2)
    graphs = capture(fake, record, ours), capture(fake, record, theirs)
    with pytest.raises(ValueError):
        find_pointers(*graphs, ours, theirs)


def real_copy() -> Any:
    return pytest.importorskip("cuda.bindings.driver", exc_type=ImportError).CUDA_MEMCPY3D()


@pytest.mark.parametrize("make", [CUDA_MEMCPY3D, real_copy])
def test_where_addresses_stand_in_a_copy(make: Callable[[], Any]) -> None:
    params = make()
    for name, offset in COPY_ADDRESSES.items():
        ctypes.c_uint64.from_address(params.getPtr() + offset).value = 0x1234
        assert int(getattr(params, name)) == 0x1234


@pytest.mark.parametrize("by_kern", [False, True])
def test_not_being_told_of_an_argument_is_not_the_end_of_them(fake: Torch, by_kern: bool) -> None:
    """The driver would read the arguments that were left out from behind the array, at every launch that follows."""
    kernel = fake.driver.kernel([8, 8, 4], nothing)

    def record(tensors: list[Tensor], stream: int) -> None:
        arguments = [pointer(tensors[0]), pointer(tensors[1]), integer(3, 4)]
        fake.driver.launch(kernel, arguments, stream, by_kern=by_kern)

    name = "cuKernelGetParamInfo" if by_kern else "cuFuncGetParamInfo"
    fake.driver.fail(name, after=2)
    with pytest.raises(CannotBind, match=r"did not tell of argument 2 of a kernel \(CUDA_ERROR_UNKNOWN\)"):
        find(fake, record)
