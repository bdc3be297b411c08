"""Idle contexts serve again, on whichever scratch memory, and only while their engine lives."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphcache.engines import context, engine, library
from graphcache.engines.context import Context, ContextPool
from graphcache.engines.engine import Engine
from tests.engines import fake_tensorrt
from tests.engines.fake_tensorrt import serialize
from tests.graphs.fake_driver import Torch, installed


def scratch(fake: Torch, owner: Engine) -> torch.Tensor:
    return fake.empty(owner.scratch_bytes, dtype=torch.uint8)


def answer(fake: Torch, used: Context, stream: int, count: int, start: float) -> bool:
    """Whether a context computes 3 x + 1."""
    x = fake.driver.heap.tensor([[start + row + column for column in range(4)] for row in range(count)])
    used.set_inputs([x], int(count > 4), stream)
    (shape,) = used.output_shapes()
    y = fake.empty(shape, dtype=torch.float32)
    used.set_outputs([y])
    assert used.enqueue(stream)
    return torch.equal(y, x * 3 + 1)


def test_what_was_given_back_is_taken_before_anything_is_made(fake: Torch) -> None:
    owner = Engine(serialize("affine"))
    pool = ContextPool(owner)
    one, two = pool.take(scratch(fake, owner)), pool.take(scratch(fake, owner))
    assert one is not two
    pool.give_back(one)
    pool.give_back(two)
    assert len(pool) == 2
    assert {pool.take(scratch(fake, owner)), pool.take(scratch(fake, owner))} == {one, two}
    assert len(pool) == 0
    assert pool.take(scratch(fake, owner)) not in (one, two)


def test_a_context_moves_to_the_scratch_memory_of_the_next_graph(fake: Torch) -> None:
    owner = Engine(serialize("affine"))
    pool = ContextPool(owner)
    first, second = scratch(fake, owner), scratch(fake, owner)
    used = pool.take(first)
    assert answer(fake, used, fake.new_stream().cuda_stream, 2, 0)
    pool.give_back(used)
    told: list[tuple[int, int]] = []
    used._context.set_device_memory = lambda address, nbytes: told.append((address, nbytes))
    assert pool.take(second) is used
    assert told == [(second.data_ptr(), second.numel())]
    pool.give_back(used)
    pool.take(second)
    assert len(told) == 1, "the same memory is not set again"
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None


def test_idle_contexts_keep_no_tensors(fake: Torch) -> None:
    owner = Engine(serialize("affine"))
    pool = ContextPool(owner)
    used = pool.take(scratch(fake, owner))
    empty = len(fake.driver.heap.blocks)
    assert answer(fake, used, fake.new_stream().cuda_stream, 2, 0)
    gc.collect()
    assert len(fake.driver.heap.blocks) == empty
    used.set_inputs([fake.empty(2, 4, offset=4).zero_()], 0, fake.new_stream().cuda_stream)
    assert len(fake.driver.heap.blocks) == empty + 1, "an aligned copy of the input"
    pool.give_back(used)
    gc.collect()
    assert len(fake.driver.heap.blocks) == empty


@given(st.lists(st.tuples(st.sampled_from([1, 2, 4, 8, 16]), st.booleans()), min_size=1, max_size=8))
def test_whatever_a_context_did_before(steps: list[tuple[int, bool]]) -> None:
    with (
        pytest.MonkeyPatch.context() as patch,
        installed(context, engine, library, patch=patch) as fake,
    ):
        fake_tensorrt.use(patch)
        patch.setattr(fake_tensorrt, "device", fake.driver)
        owner = Engine(serialize("affine"))
        pool = ContextPool(owner)
        shared = scratch(fake, owner)
        stream = fake.new_stream().cuda_stream
        for number, (count, anew) in enumerate(steps):
            used = pool.take(scratch(fake, owner) if anew else shared)
            assert answer(fake, used, stream, count, number)
            pool.give_back(used)
        assert len(owner.contexts) == 1


def test_nothing_outlives_the_engine(fake: Torch) -> None:
    owner = Engine(serialize("affine"))
    pool = ContextPool(owner)
    late, idle = pool.take(scratch(fake, owner)), pool.take(scratch(fake, owner))
    pool.give_back(idle)
    owner.close()
    pool.clear()
    pool.give_back(late)
    assert len(pool) == 0
    gone = [weakref.ref(late), weakref.ref(idle)]
    del late, idle
    gc.collect()
    assert [each() for each in gone] == [None, None]
