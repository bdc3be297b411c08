"""A loop on the device, on the stand-in for the driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphcache.errors import ClosedError, CudaError
from graphcache.graphs import while_loop as whole
from graphcache.graphs.cuda import CudaGraph
from graphcache.graphs.stream_order import StreamOrder
from graphcache.graphs.while_loop import Move, while_loop
from tests.graphs.fake_driver import Affine, Memory, Torch, address, installed

KINDS = ("bound", "copying", "staged")
SIZE, MOVE_BYTES = 6, 32


def number(argument: bytes) -> int:
    return int.from_bytes(argument, "little")


def advance(fake: Torch) -> Callable[..., None]:
    """What the kernel does, one thread after the other."""

    def run(memory: Memory, loop: bytes, moves: bytes, count: bytes, until: bytes, *rest: bytes) -> None:
        until_bytes, state, ran, steps = map(number, rest)
        step = number(memory.read(state, 4))
        ends = step + ran >= steps or any(memory.read(address(until), until_bytes) if until_bytes else b"")
        for place in range(number(count)):
            row = moves[place * MOVE_BYTES :][:MOVE_BYTES]
            source, target, nbytes, stride = (number(row[at : at + 8]) for at in range(0, MOVE_BYTES, 8))
            memory.write(target + step * stride, memory.read(source, nbytes))
        memory.write(state, (step + ran).to_bytes(4, "little"))
        handle = number(loop)
        fake.driver.conditions[handle] = int(not ends), fake.driver.conditions[handle][1]

    return run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(whole, patch=monkeypatch) as fake:
        kernel = fake.driver.kernel([8, MOVE_BYTES * 32, 4, 8, 4, 8, 4, 4], advance(fake))
        monkeypatch.setattr(whole, "_kernel", lambda index: kernel)
        yield fake


@pytest.fixture
def new(fake: Torch) -> Callable[..., tuple[CudaGraph, CudaGraph, Tensor, Tensor]]:
    """Makes a graph of ``y = 3 x + 1``, a loop of it with ``y`` fed to ``x``, the steps taken, and what is kept."""

    def make(kind: str, steps: int, until: Tensor | None = None, fed: bool = True, collected: bool = True) -> Any:
        step: CudaGraph = getattr(Affine(fake, SIZE, StreamOrder(0)), kind)()
        ((x,), (y,)) = step.pin()
        kept = fake.driver.heap.empty(steps, SIZE).fill_(-1)
        moves = [Move(y, kept, by_step=True)] * collected + [Move(y, x, by_step=False)] * fed
        return step, *while_loop(step, moves, until, steps), kept

    return make


@given(st.sampled_from(KINDS), st.integers(1, 20), st.integers(0, 4), st.booleans(), st.booleans())
def test_steps_follow_one_another(kind: str, steps: int, start: int, fed: bool, collected: bool) -> None:
    with pytest.MonkeyPatch.context() as patch, installed(whole, patch=patch) as fake:
        kernel = fake.driver.kernel([8, MOVE_BYTES * 32, 4, 8, 4, 8, 4, 4], advance(fake))
        patch.setattr(whole, "_kernel", lambda index: kernel)
        step: CudaGraph = getattr(Affine(fake, SIZE, StreamOrder(0)), kind)()
        ((x,), (y,)) = step.pin()
        kept = fake.driver.heap.empty(steps, SIZE).fill_(-1)
        moves = [Move(y, kept, by_step=True)] * collected + [Move(y, x, by_step=False)] * fed
        loop, taken = while_loop(step, moves, None, steps)
        for _ in range(2):
            value = x.fill_(start).clone()
            loop.launch()
            wanted = []
            for _ in range(steps):
                wanted.append(value * 3 + 1)
                value = wanted[-1] if fed else value
            assert int(taken) == steps
            assert torch.equal(y, wanted[-1])
            assert torch.equal(x, value)
            assert torch.equal(kept, torch.stack(wanted) if collected else torch.full((steps, SIZE), -1.0))
        loop.close()
        step.close()
        assert not fake.driver.leaked().get("executables")


@pytest.mark.parametrize("kind", KINDS)
def test_a_byte_that_is_not_zero_ends_the_loop_after_its_step(fake: Torch, new: Any, kind: str) -> None:
    until = fake.driver.heap.empty(1, dtype=torch.int32).fill_(1 << 24)
    step, loop, taken, kept = new(kind, 7, until)
    step.pin()[0][0].fill_(1)
    loop.launch()
    assert int(taken) == 1
    assert kept[0].tolist() == [4.0] * SIZE
    assert (kept[1:] == -1).all()
    until.zero_()
    loop.launch()
    assert int(taken) == 7


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_driver_refuses_leaves_nothing_behind(fake: Torch, new: Any, kind: str) -> None:
    step: CudaGraph = getattr(Affine(fake, SIZE, StreamOrder(0)), kind)()
    ((x,), (y,)) = step.pin()
    before, start = fake.driver.leaked(), len(fake.driver.calls)
    while_loop(step, [Move(y, x, by_step=False)], None, 16)[0].close()
    functions = set(fake.driver.calls[start:]) - {"cuGraphDestroy", "cuGraphExecDestroy", "cuCtxPopCurrent"}
    assert {"cuGraphAddNode", "cuGraphAddChildGraphNode", "cuGraphInstantiateWithParams"} <= functions
    for name in sorted(functions):
        fake.driver.fail(name)
        with pytest.raises(CudaError, match=name):
            while_loop(step, [Move(y, x, by_step=False)], None, 16)
        assert fake.driver.leaked() == before, name
    x.fill_(2)
    loop, taken = while_loop(step, [Move(y, x, by_step=False)], None, 2)
    loop.launch()
    assert (int(taken), y[0].item()) == (2, 22.0)


def test_a_node_that_no_loop_holds_and_too_many_moves_are_refused(fake: Torch, new: Any) -> None:
    step: CudaGraph = Affine(fake, SIZE, StreamOrder(0)).staged()
    ((x,), (y,)) = step.pin()
    with pytest.raises(CudaError, match="copies at most 32 tensors after a step, not 33"):
        while_loop(step, [Move(y, x, by_step=False)] * 33, None, 2)
    fake.driver.graphs[int(step.captured)].nodes[0].kind = fake.driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_HOST
    with pytest.raises(CudaError, match="cannot hold a node of kind HOST"):
        while_loop(step, [], None, 2)


def test_a_graph_that_was_closed_makes_no_loop(fake: Torch, new: Any) -> None:
    step, loop, *_ = new("bound", 2)
    loop.close()
    with pytest.raises(ClosedError):
        loop.launch()
    step.close()
    with pytest.raises(ClosedError, match="closed"):
        while_loop(step, [], None, 2)
