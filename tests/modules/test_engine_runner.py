"""Eager calls of an engine: the first of a layout is checked, the others are not, and all of them are right."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import graphcache
from graphcache import EngineModule
from graphcache.errors import ClosedError, EngineExecutionError, InputCountError, InputDtypeError, ProfileRangeError
from graphcache.graphs import driver
from graphcache.modules import engine_runner
from tests.engine_modules import load, numbers, rows
from tests.engines.fake_tensorrt import IExecutionContext
from tests.graphs import fake_driver
from tests.graphs.fake_driver import Torch
from tests.standins import engines

PACKAGE = str(Path(graphcache.__file__).parent)
TOLD = (
    "set_optimization_profile_async",
    "set_input_shape",
    "infer_shapes",
    "set_output_allocator",
    "set_tensor_address",
    "execute_async_v3",
)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with engines(monkeypatch) as fake:
        yield fake


def frames(work: Callable[[], object]) -> int:
    """How many functions of graphcache are called."""
    count = 0

    def look(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.fixture
def told(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What TensorRT and the driver are told, in order."""
    calls: list[str] = []

    def spy(owner: type, name: str) -> None:
        method = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: calls.append(name) or method(*given))

    for name in TOLD:
        spy(IExecutionContext, name)
    for name in ("cuStreamIsCapturing", "cuEventCreate", "cuEventRecord", "cuStreamWaitEvent", "cuEventDestroy"):
        spy(type(fake.driver), name)
    return calls


@pytest.mark.parametrize(("network", "count", "same", "changed"), [("affine", 1, 18, 23), ("pair", 2, 19, 27)])
@pytest.mark.parametrize("default", [True, False])
def test_a_repeated_call_is_short(
    fake: Torch, network: str, count: int, same: int, changed: int, default: bool
) -> None:
    module = load(network)
    small, large = [rows(fake, 2)] * count, [rows(fake, 3)] * count
    with fake.on(fake.new_stream()) if not default else graphcache.config.graphs_off():
        for _ in range(2):
            module(*small)
            module(*large)
        assert frames(lambda: module(*large)) <= same
        assert frames(lambda: module(*small)) <= changed


def test_what_tensorrt_and_the_driver_are_told(fake: Torch, told: list[str]) -> None:
    module = load("affine")
    small, large = rows(fake, 2), rows(fake, 8)
    with fake.on(fake.new_stream()):
        module(small)
        module(large)
        told.clear()
        module(large)
        # The output is another tensor.
        assert told == ["cuStreamIsCapturing", "set_tensor_address", "execute_async_v3"]
        told.clear()
        module(large.clone())
        assert told == ["cuStreamIsCapturing", "set_tensor_address", "set_tensor_address", "execute_async_v3"]
        # Of another profile, and the first time in this one.
        module(small)
        module(large)
        told.clear()
        module(small)
        assert told[:3] == ["cuStreamIsCapturing", "set_optimization_profile_async", "set_input_shape"]
        assert Counter(told)["set_tensor_address"] == 2
        assert told[-1] == "execute_async_v3"
        assert "infer_shapes" not in told


def test_on_the_default_stream_a_side_stream_waits_and_is_waited_for(fake: Torch, told: list[str]) -> None:
    module, x = load("affine"), rows(fake, 2)
    for _ in range(2):
        told.clear()
        assert torch.equal(module(x), x * 3 + 1)
    waits = ["cuEventCreate", "cuEventRecord", "cuStreamWaitEvent", "cuEventDestroy"]
    assert told == ["cuStreamIsCapturing", *waits, "set_tensor_address", "execute_async_v3", *waits]


def test_first_calls_infer_shapes_and_repeated_ones_do_not(fake: Torch, told: list[str]) -> None:
    module = load("affine")
    for _ in range(3):
        for count in (1, 2, 3):
            module(rows(fake, count))
    assert told.count("infer_shapes") == 3
    assert told.count("set_input_shape") == 9


CALLS = ("small", "large", "turned", "unaligned", "parameter", "wrong dtype", "too many", "too large")
SETTINGS = ("choose 0", "choose 1", "choose any", "allocator", "no allocator", "preallocate", "profile", "stream")
STEPS = st.sampled_from([*CALLS, *CALLS, *SETTINGS, "default stream"])


@given(st.lists(STEPS, max_size=14))
def test_any_sequence_of_calls_and_settings(steps: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch, engines(patch) as fake:
        module, stream, current = load("affine"), fake.new_stream(), False
        chosen: int | None = None
        for number, step in enumerate(steps):
            x = rows(fake, 8 if step == "large" else 9 if step == "too large" else 2, number)
            error: type[Exception] | None = None
            if step.startswith("choose"):
                chosen = None if step == "choose any" else int(step[-1])
                module.set_optimization_profile(chosen)
            elif step in ("allocator", "no allocator"):
                module.set_use_output_allocator(step == "allocator")
            elif step == "preallocate":
                module.set_pre_allocated_outputs(not module.use_pre_allocated_outputs)
            elif step == "profile":
                module.enable_profiling(Silent())
                module.disable_profiling()
            elif "stream" in step:
                current = step == "stream"
            given: list[Any] = [x]
            if step == "turned":
                given = [fake.empty(4, 2).t().copy_(x)]
            elif step == "unaligned":
                given = [fake.empty(2, 4, offset=4).copy_(x)]
            elif step == "parameter":
                given = [torch.nn.Parameter(x, requires_grad=False)]
            elif step == "wrong dtype":
                given, error = [x.int()], InputDtypeError
            elif step == "too many":
                given, error = [x, x], InputCountError
            fits = profiles(module, x)
            if error is None and not any(fits if chosen is None else [fits[chosen]]):
                error = ProfileRangeError
            with fake.on(stream) if current else graphcache.config.graphs_off():
                if error is not None:
                    with pytest.raises(error):
                        module(*given)
                else:
                    assert torch.equal(module(*given), x * 3 + 1)


class Silent:
    """A profiler that reports to nobody."""

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        """Do nothing."""


def profiles(module: EngineModule, x: Tensor) -> list[bool]:
    """Which profiles an input fits."""
    return [module.engine.inputs[0].fits(x.shape, profile) for profile in range(module.engine.profiles)]


def test_a_layout_is_known_for_one_active_profile(fake: Torch, told: list[str]) -> None:
    """Where two profiles fit, the active one is used, whichever ran the layout first."""
    module, x = load("overlapping"), numbers(fake, *range(6))
    both = [profile for profile, fits in enumerate(profiles(module, x)) if fits]
    assert both == [0, 1]
    module(x)
    module.set_optimization_profile(1)
    module(x)
    module.set_optimization_profile("auto")
    told.clear()
    for _ in range(3):
        assert torch.equal(module(x), x * 2)
    assert "set_optimization_profile_async" not in told


def test_a_closed_engine_knows_no_layout(fake: Torch) -> None:
    module, x = load("affine"), rows(fake, 2)
    module(x)
    module(x)
    module.close()
    with pytest.raises(ClosedError):
        module(x)


def test_a_refused_run_says_why_and_the_next_one_is_right(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = load("affine"), rows(fake, 2)
    module(x)
    with monkeypatch.context() as patch:

        def refuse(self: IExecutionContext, stream: int) -> bool:
            module.engine.library.logger.log(module.engine.trt.ILogger.ERROR, "no luck")
            return False

        patch.setattr(IExecutionContext, "execute_async_v3", refuse)
        with pytest.raises(EngineExecutionError, match=r"^affine: TensorRT refused to run: no luck$"):
            module(x)
    assert torch.equal(module(x), x * 3 + 1)


def test_a_capture_of_the_callers_takes_a_context_whose_layouts_are_known(fake: Torch) -> None:
    module, stream = load("affine"), fake.new_stream()
    x, other = rows(fake, 2), rows(fake, 3)
    handle = driver.binding().CUstream(stream.cuda_stream)
    with fake.on(stream):
        for _ in range(2):
            module(other)
            module(x)
        fake_driver.begin_capture(handle)
        y = module(x)
        graph = driver.end_capture(handle)
        assert graph is not None
        executable = fake_driver.instantiate(graph, stream.cuda_stream)
        for each in (other, x):
            assert torch.equal(module(each), each * 3 + 1)
        x.fill_(5)
        driver.call("cuGraphLaunch", executable, handle)
        assert torch.equal(y, x * 3 + 1)


def test_values_on_the_host_have_no_layout(fake: Torch) -> None:
    module = load("head")
    x = rows(fake, 16)
    for stop in (3, 5, 3, 3):
        assert torch.equal(module(x, torch.tensor([stop])), x[:stop].relu())


def test_outputs_of_unknown_shape_have_no_layout(fake: Torch) -> None:
    module = load("positive", requires_output_allocator=True)
    for values in ((1.0, -1.0), (1.0, 2.0), (-1.0, -2.0)):
        x = numbers(fake, *values)
        assert torch.equal(module(x), x[x > 0])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_cannot_be_looked_at_are_refused_as_before(fake: Torch) -> None:
    module, x = load("affine"), rows(fake, 2)
    module(x)
    nested = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(1, 4)])
    for odd in (x.to_sparse(), nested, torch._efficientzerotensor((2, 4)), 3, None):
        with pytest.raises(graphcache.errors.InputTypeError):
            module(odd)


def test_layouts_are_bounded(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_runner, "_MAX_LAYOUTS", 2)
    module = load("affine")
    for _ in range(2):
        for count in (1, 2, 3, 4):
            x = rows(fake, count)
            assert torch.equal(module(x), x * 3 + 1)
    assert len(module._runner.known) == 2


def test_another_engine_has_other_layouts(fake: Torch) -> None:
    module, other = load("affine"), load("pair")
    x = rows(fake, 2)
    module(x)
    module(x)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(x, x)[0], x + x)
    with pytest.raises(InputCountError):
        module(x)
