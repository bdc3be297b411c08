"""A context tells TensorRT exactly what changed, and keeps what TensorRT was given addresses of."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphcache.engines import context, engine, library
from graphcache.engines.context import Context
from graphcache.engines.engine import Engine
from graphcache.errors import EngineExecutionError
from graphcache.graphs import driver
from tests.engines import fake_tensorrt
from tests.engines.fake_tensorrt import IExecutionContext, serialize
from tests.graphs import fake_driver
from tests.graphs.fake_driver import Torch, installed

METHODS = (
    "set_optimization_profile_async",
    "set_input_shape",
    "set_tensor_address",
    "set_output_allocator",
    "infer_shapes",
    "execute_async_v3",
)


class Runner:
    """An engine, one context of it, and what TensorRT was told through it."""

    def __init__(self, fake: Torch, network: str, scratch: int | None = None) -> None:
        self.fake = fake
        self.engine = Engine(serialize(network), name="net")
        nbytes = self.engine.scratch_bytes if scratch is None else scratch
        self.context = Context(self.engine, fake.empty(nbytes, dtype=torch.uint8))
        self.stream = fake.new_stream().cuda_stream
        self.told: list[str] = []
        self.trt: IExecutionContext = self.context._context
        for name in METHODS:
            setattr(self.trt, name, self._spy(name, getattr(self.trt, name)))

    def _spy(self, name: str, method: Any) -> Any:
        def told(*args: Any) -> Any:
            self.told.append(name)
            return method(*args)

        return told

    def set(self, *inputs: Tensor, profile: int = 0) -> list[Tensor | None]:
        self.context.set_inputs(inputs, profile, self.stream)
        outputs = [
            None if shape is None else self.fake.empty(shape, dtype=binding.dtype)
            for binding, shape in zip(self.engine.outputs, self.context.output_shapes(), strict=True)
        ]
        self.context.set_outputs(outputs)
        return outputs

    def __call__(self, *inputs: Tensor, profile: int = 0) -> list[Tensor]:
        outputs = self.set(*inputs, profile=profile)
        assert self.context.enqueue(self.stream)
        return [
            self.context.allocated_output(binding) if value is None else value
            for binding, value in zip(self.engine.outputs, outputs, strict=True)
        ]


def rows(fake: Torch, count: int, start: float = 0.0) -> Tensor:
    return fake.driver.heap.tensor([[start + row + column for column in range(4)] for row in range(count)])


# ---- answers


@given(
    st.lists(
        st.tuples(st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from(["plain", "turned", "wide", "unaligned"])),
        min_size=1,
        max_size=6,
    )
)
def test_any_sequence_of_shapes_profiles_and_layouts(steps: list[tuple[int, str]]) -> None:
    with (
        pytest.MonkeyPatch.context() as patch,
        installed(context, engine, library, patch=patch) as fake,
    ):
        fake_tensorrt.use(patch)
        patch.setattr(fake_tensorrt, "device", fake.driver)
        run = Runner(fake, "affine")
        for number, (count, layout) in enumerate(steps):
            x = rows(fake, count, number)
            if layout == "turned":
                x = fake.empty(4, count).t().copy_(x)
            elif layout == "wide":
                x = fake.empty(count, 8)[:, ::2].copy_(x)
            elif layout == "unaligned":
                x = fake.empty(count, 4, offset=4).copy_(x)
            before = x.clone()
            (y,) = run(x, profile=int(count > 4))
            assert torch.equal(y, before * 3 + 1)
            assert torch.equal(x, before)
            run.context.copies.clear()


def test_several_inputs_and_outputs(fake: Torch) -> None:
    run = Runner(fake, "pair")
    a, b = rows(fake, 3), rows(fake, 3, 5)
    total, product = run(a, b)
    assert torch.equal(total, a + b)
    assert torch.equal(product, a * b)


def test_empty_tensors_have_an_address_too(fake: Torch) -> None:
    run = Runner(fake, "pair")
    a = fake.empty(0, 4)
    assert a.data_ptr() == 0
    assert [tuple(each.shape) for each in run(a, a)] == [(0, 4), (0, 4)]


def test_scalars(fake: Torch) -> None:
    run = Runner(fake, "scalar")
    x, factor = fake.driver.heap.tensor([1, 2, 3]), fake.driver.heap.tensor(4)
    assert run(x, factor)[0].tolist() == [4, 8, 12]


# ---- what TensorRT is told


def test_nothing_twice(fake: Torch) -> None:
    run = Runner(fake, "affine")
    x = rows(fake, 2)
    run(x)
    assert run.told == [
        "set_input_shape",
        "set_tensor_address",
        "infer_shapes",
        "set_tensor_address",
        "execute_async_v3",
    ]
    run.told.clear()
    output = run.set(x)
    run.told.clear()
    run.context.set_inputs([x], 0, run.stream)
    run.context.set_outputs(output)
    assert run.told == []
    run(rows(fake, 2))
    assert run.told == ["set_tensor_address", "set_tensor_address", "execute_async_v3"]


def test_shapes_again_after_a_change_of_profile_and_addresses_not(fake: Torch) -> None:
    run = Runner(fake, "affine")
    small, large = rows(fake, 2), rows(fake, 8)
    run(small)
    assert run.context.profile == 0
    run.told.clear()
    run(large, profile=1)
    assert run.told[:3] == ["set_optimization_profile_async", "set_input_shape", "set_tensor_address"]
    assert (run.context.profile, run.trt.active_optimization_profile) == (1, 1)
    run.context.set_inputs([small], 0, run.stream)
    run.told.clear()
    run.context.set_inputs([small], 0, run.stream)
    assert run.told == []
    assert torch.equal(run(small)[0], small * 3 + 1)


def test_the_same_shape_under_another_profile_is_told_again(fake: Torch) -> None:
    run = Runner(fake, "overlapping")
    x = fake.driver.heap.tensor(range(6))
    for profile in (0, 1, 0):
        assert torch.equal(run(x, profile=profile)[0], x * 2)
        assert run.trt.active_optimization_profile == profile


# ---- what TensorRT refuses


def refused(run: Runner, *inputs: Tensor, profile: int = 0) -> str:
    with pytest.raises(EngineExecutionError) as caught, run.engine.collect_errors():
        run.set(*inputs, profile=profile)
    return str(caught.value)


def test_a_shape_outside_of_the_profile(fake: Torch) -> None:
    run = Runner(fake, "affine")
    assert refused(run, rows(fake, 5)) == (
        "net: shape (5, 4) of input 'x' was refused; TensorRT says: IExecutionContext: Error Code 3: API Usage Error "
        "(shape (5, 4) of x is outside of profile 0)"
    )
    x = rows(fake, 4)
    assert torch.equal(run(x)[0], x * 3 + 1)


def test_a_profile_that_is_not_there(fake: Torch) -> None:
    run = Runner(fake, "affine")
    assert "net: optimisation profile 2 was refused; TensorRT says: " in refused(run, rows(fake, 2), profile=2)
    assert run.context.profile == 0
    x = rows(fake, 8)
    assert torch.equal(run(x, profile=1)[0], x * 3 + 1)


def test_shapes_that_do_not_go_together(fake: Torch) -> None:
    run = Runner(fake, "pair")
    expected = "net: shapes do not go together (shape inference failed: a has shape (2, 4), b (3, 4)); TensorRT says: "
    for _ in range(2):
        assert refused(run, rows(fake, 2), rows(fake, 3)) == expected + "nothing"
    a = rows(fake, 3)
    assert torch.equal(run(a, a)[0], a + a)


def test_shapes_that_are_not_enough(fake: Torch) -> None:
    run = Runner(fake, "affine")
    x = rows(fake, 2)
    known, run.trt.infer_shapes = run.trt.infer_shapes, lambda: ["x", "z"]
    for _ in range(2):
        assert refused(run, x) == "net: shapes of x, z are still unknown; TensorRT says: nothing"
    run.trt.infer_shapes = known
    assert torch.equal(run(x)[0], x * 3 + 1)


def test_an_address_that_is_refused(fake: Torch) -> None:
    run = Runner(fake, "affine")
    run.context.set_inputs([rows(fake, 2)], 0, run.stream)
    match = r"net: the address of 'y' was refused; TensorRT says: .*not aligned"
    with pytest.raises(EngineExecutionError, match=match), run.engine.collect_errors():
        run.context.set_outputs([fake.empty(2, 4, offset=16)])
    x = rows(fake, 2)
    assert torch.equal(run(x)[0], x * 3 + 1)


def test_scratch_memory_that_is_too_small(fake: Torch) -> None:
    run = Runner(fake, "affine", scratch=999)
    run.set(rows(fake, 2))
    with run.engine.collect_errors() as said:
        assert not run.context.enqueue(run.stream)
    assert "no device memory was set" in said[0]


def test_engines_without_scratch_memory_need_none(fake: Torch) -> None:
    run = Runner(fake, "pair", scratch=0)
    assert run.engine.scratch_bytes == 0
    a = rows(fake, 1)
    assert torch.equal(run(a, a)[1], a * a)


# ---- values that the host reads


def test_values_are_read_at_each_call(fake: Torch) -> None:
    run = Runner(fake, "head")
    x = rows(fake, 16, -20)
    stop = torch.tensor([3])
    assert torch.equal(run(x, stop)[0], x[:3].relu())
    stop[0] = 5
    assert torch.equal(run(x, stop)[0], x[:5].relu())
    run.told.clear()
    run(x, torch.tensor([5]))
    assert run.told.count("set_input_shape") == 0, "equal values change nothing"


def test_host_values_outlive_the_call(fake: Torch) -> None:
    run = Runner(fake, "head")
    x, stop = rows(fake, 16), torch.tensor([7])
    run(x, stop)
    stop[0] = 99
    del stop
    assert sorted(run.context._host_values) == ["stop"]
    (y,) = run.set(x, torch.tensor([7]))
    assert y is not None
    assert y.shape == (7, 4)


def test_host_values_are_those_of_the_time_when_they_were_set(fake: Torch) -> None:
    run = Runner(fake, "head")
    x, stop = rows(fake, 16), torch.tensor([7])
    (y,) = run.set(x, stop)
    stop[0] = 12
    assert run.context.enqueue(run.stream)
    assert y is not None
    assert torch.equal(y, x[:7].relu())


def test_the_strides_of_host_values_do_not_matter(fake: Torch) -> None:
    run = Runner(fake, "head")
    x = rows(fake, 16)
    assert run(x, torch.tensor([2, 9, 4, 9])[::2][1:])[0].shape == (4, 4)


# ---- outputs that grow


def test_outputs_of_unknown_shape(fake: Torch) -> None:
    run = Runner(fake, "positive")
    kept = []
    for values in ([1, -2, 3], [-1, -1], [5, 6, 7, 8], [], [9]):
        x = fake.driver.heap.tensor(values)
        assert run.set(x) == [None]
        kept.append((run(x)[0], x[x > 0].clone()))
    assert all(torch.equal(got, wanted) for got, wanted in kept)


def test_without_an_allocator_it_would_have_been_refused(fake: Torch) -> None:
    run = Runner(fake, "positive")
    run.context.set_inputs([fake.driver.heap.tensor([1, 2])], 0, run.stream)
    with run.engine.collect_errors() as said:
        assert not run.context.enqueue(run.stream)
    assert "known only at run time" in said[0]


def test_back_to_an_address_of_the_callers(fake: Torch) -> None:
    run = Runner(fake, "affine")
    x = rows(fake, 2)
    for _ in range(2):
        run.context.set_inputs([x], 0, run.stream)
        run.context.set_outputs([None])
        assert run.context.enqueue(run.stream)
        assert torch.equal(run.context.allocated_output(run.engine.outputs[0]), x * 3 + 1)
        run.told.clear()
        assert torch.equal(run(x)[0], x * 3 + 1)
        assert run.told[:2] == ["set_output_allocator", "set_tensor_address"]
        run.told.clear()
        run(x)
        assert "set_output_allocator" not in run.told


def test_back_to_the_very_address_there_was_before(fake: Torch) -> None:
    run = Runner(fake, "affine")
    x, y = rows(fake, 2), rows(fake, 2)
    for outputs in ([y], [None], [y]):
        y.zero_()
        run.context.set_inputs([x], 0, run.stream)
        run.context.set_outputs(outputs)
        assert run.context.enqueue(run.stream)
    assert torch.equal(y, x * 3 + 1)


# ---- captures


def captured(run: Runner) -> bool:
    handle = driver.binding().CUstream(run.stream)
    fake_driver.begin_capture(handle)
    accepted = run.context.enqueue(run.stream)
    graph = driver.end_capture(handle)
    if graph is not None:
        driver.call("cuGraphDestroy", graph)
    return accepted and graph is not None


def test_an_enqueue_into_a_capture_needs_one_before_it(fake: Torch) -> None:
    run = Runner(fake, "affine")
    run.set(rows(fake, 2))
    assert not captured(run)
    run(rows(fake, 2))
    assert captured(run)
    run.set(rows(fake, 2))
    assert captured(run), "other addresses change nothing"
    run.set(rows(fake, 3))
    assert not captured(run), "another shape does"


@pytest.mark.parametrize(("network", "values"), [("conditional", [1, 2]), ("positive", [1, -2])])
def test_what_cannot_be_captured_is_refused(fake: Torch, network: str, values: Sequence[float]) -> None:
    run = Runner(fake, network)
    x = fake.driver.heap.tensor(values)
    run(x)
    run.set(x)
    assert not captured(run)
    assert run(x)[0].tolist() == [max(value, 0) for value in values if network == "conditional" or value > 0]


# ---- lifetime


def test_a_context_survives_its_engine(fake: Torch) -> None:
    run = Runner(fake, "affine")
    run.engine.close()
    gc.collect()
    x = rows(fake, 2)
    assert torch.equal(run(x)[0], x * 3 + 1)


def test_nothing_outlives_a_context(fake: Torch) -> None:
    run = Runner(fake, "affine")
    run(rows(fake, 2))
    gone = [weakref.ref(each) for each in (run.context, run.trt, run.engine.native_handles[1], run.engine)]
    run.engine.close()
    run.__dict__.clear()
    gc.collect()
    assert [reference() for reference in gone] == [None] * 4
    assert fake.driver.heap.blocks == {}


def test_what_was_copied_is_kept_and_what_was_given_is_not(fake: Torch) -> None:
    run = Runner(fake, "affine")
    x = rows(fake, 2)
    place = x.data_ptr()
    (y,) = run(x)
    del x
    assert fake.driver.heap.find(place, 4) is None
    assert y.tolist()[0][0] == 1.0
    run.set(fake.empty(2, 4, offset=4).copy_(y))
    (copied,) = run.context.copies
    assert torch.equal(copied, y), "TensorRT will read it"
    run.set(y)
    assert run.context.copies == []


@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_the_current_device_stays(fake: Torch, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """TensorRT-RTX 1.5.0.114 makes the device of what it destroys the current one."""
    gc.collect()
    gone: list[str] = []

    def leaves_its_device(self: object) -> None:
        gone.append(type(self).__name__)
        fake.cuda.set_device(1)

    for kind in (fake_tensorrt.ICudaEngine, fake_tensorrt.IExecutionContext):
        monkeypatch.setattr(kind, "__del__", leaves_its_device, raising=False)
    owner = Engine(serialize("affine"))
    context = Context(owner, fake.driver.heap.empty(1 << 10))
    del context
    gc.collect()
    assert gone == ["IExecutionContext"]
    assert fake.cuda.current_device() == 0
    if how == "closed":
        owner.close()
    del owner
    gc.collect()
    assert gone == ["IExecutionContext", "ICudaEngine"]
    assert fake.cuda.current_device() == 0
