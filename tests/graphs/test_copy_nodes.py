"""Copies in graphs: found again, and pointed elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphcache.errors import CudaError
from graphcache.graphs import driver
from graphcache.graphs.param_patching import CannotBind, Pointer, find_copies
from tests.graphs import fake_driver
from tests.graphs.fake_driver import Torch, installed

SIZE = 16


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(patch=monkeypatch) as fake:
        yield fake


def fresh(fake: Torch, count: int) -> list[Tensor]:
    return [fake.driver.heap.tensor(range(SIZE)) for _ in range(count)]


def captured(fake: Torch, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
    stream = fake_driver.new_stream()
    fake_driver.begin_capture(stream)
    for target, source in pairs:
        nbytes = target.numel() * target.element_size()
        driver.call("cuMemcpyDtoDAsync", target.data_ptr(), source.data_ptr(), nbytes, int(stream))
    return driver.end_capture(stream)


def run(graph: Any, patched: Sequence[tuple[Pointer, int]] = ()) -> None:
    """Instantiate a graph, point it elsewhere, launch it once."""
    stream = fake_driver.new_stream()
    executable = fake_driver.instantiate(graph, int(stream))
    for place, elsewhere in patched:
        place.word.value = elsewhere + place.offset
    for place, _ in patched:
        driver.call(place.setter, executable, *place.arguments)
    driver.call("cuGraphLaunch", executable, stream)


@given(st.integers(1, 9), st.data())
def test_each_is_found_and_pointed_elsewhere_alone(count: int, data: st.DataObject) -> None:
    with installed() as fake:
        outwards = [data.draw(st.booleans(), label=f"tensor {index} is written") for index in range(count)]
        static, outside, others = (fresh(fake, count) for _ in range(3))
        pairs = [
            (theirs, ours) if out else (ours, theirs)
            for ours, theirs, out in zip(static, outside, outwards, strict=True)
        ]
        graph = captured(fake, pairs)
        found = find_copies(graph, outside)
        assert [[place.offset for place in places] for places in found] == [[0]] * count
        moved = data.draw(st.sets(st.integers(0, count - 1)), label="pointed elsewhere")
        for index in range(count):
            static[index].fill_(index)
            outside[index].fill_(100 + index)
            others[index].fill_(200 + index)
        run(graph, [(place, others[index].data_ptr()) for index in sorted(moved) for place in found[index]])
        for index, out in enumerate(outwards):
            theirs = others[index] if index in moved else outside[index]
            assert torch.equal(static[index], theirs)
            value = index if out else (200 if index in moved else 100) + index
            assert static[index].tolist() == [value] * SIZE


def test_a_tensor_copied_never_or_twice(fake: Torch) -> None:
    static, outside = fresh(fake, 2), fresh(fake, 1)
    behind = fake.driver.heap.tensor(range(SIZE + 1))
    with pytest.raises(CannotBind, match="tensor 0 is copied by 0 nodes instead of one"):
        find_copies(captured(fake, [(static[0], behind[1:])]), [behind[:-1]])
    with pytest.raises(CannotBind, match="tensor 0 is copied by 0 nodes instead of one"):
        find_copies(captured(fake, [(static[0][1:], outside[0][1:])]), [outside[0]])
    with pytest.raises(CannotBind, match="tensor 0 is copied by 2 nodes instead of one"):
        find_copies(captured(fake, [(target, outside[0]) for target in static]), outside)


@pytest.mark.parametrize("name", ["cuGraphGetNodes", "cuGraphNodeGetType", "cuGraphMemcpyNodeGetParams"])
def test_a_failing_call_is_a_cuda_error(fake: Torch, name: str) -> None:
    static, outside = fresh(fake, 2)
    graph = captured(fake, [(static, outside)])
    fake.driver.fail(name)
    with pytest.raises(CudaError, match=f"{name} failed with CUDA_ERROR_UNKNOWN"):
        find_copies(graph, [outside])
