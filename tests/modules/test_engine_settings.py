"""What one sets on an engine under the names of Torch-TensorRT, over the stand-ins."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import graphcache
from graphcache import Reason
from graphcache.engines.kernel_cache import RuntimeCache
from graphcache.errors import ClosedError, ConfigError
from tests.engine_modules import MODULES, load, numbers, prepare, rows
from tests.engines import fake_tensorrt
from tests.engines.fake_tensorrt import DynamicShapesKernelSpecializationStrategy as Strategy
from tests.engines.fake_tensorrt import IExecutionContext, IProfiler
from tests.graphs.fake_driver import Torch, installed
from tests.helpers import in_threads, reason


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(*MODULES, patch=monkeypatch) as fake:
        yield prepare(fake, monkeypatch)


class Times(IProfiler):
    """Remembers what was reported."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        self.seen.append(layer_name)


def test_a_profiler_hears_of_every_call_and_no_graph_is_used_meanwhile(fake: Torch) -> None:
    engine, times = load("affine"), Times()
    fast = graphcache.wrap(engine)
    x = rows(fake, 2)
    wanted = fast(x).clone()
    fast(x)
    engine.enable_profiling(times)
    assert engine.profiling_enabled
    for _ in range(2):
        assert reason(fast, x) is Reason.PROFILING
        assert torch.equal(fast(x), wanted)
    assert times.seen == ["Affine"] * 4
    engine.disable_profiling()
    engine.disable_profiling()
    assert not engine.profiling_enabled
    captures = fast.cache_info().captures
    assert torch.equal(fast(x), wanted)
    assert torch.equal(fast(x), wanted)
    assert fast.cache_info().captures == captures + 1
    assert len(times.seen) == 4


def test_without_a_profiler_tensorrts_own_prints(fake: Torch, capsys: pytest.CaptureFixture[str]) -> None:
    engine = load("affine")
    engine.enable_profiling()
    engine(rows(fake, 2))
    assert capsys.readouterr().out == "Affine: 0.5ms\n"


@pytest.mark.parametrize("odd", [3, "trex", object()])
def test_what_is_no_profiler(fake: Torch, odd: Any) -> None:
    engine = load("affine")
    with pytest.raises(ConfigError, match=r"^profiler=.*: expected an IProfiler, which has report_layer_time$"):
        engine.enable_profiling(odd)
    assert not engine.profiling_enabled


def test_layers_are_told_as_json(fake: Torch) -> None:
    assert json.loads(load("affine").get_layer_info()) == {"Layers": ["Affine"], "Bindings": ["x", "y"]}


def test_outputs_made_ahead_are_the_callers_and_never_the_same_twice(fake: Torch) -> None:
    engine = load("pair")
    assert engine.set_pre_allocated_outputs(True) is False
    assert engine.set_pre_allocated_outputs(True) is True
    assert engine.use_pre_allocated_outputs
    kept: list[tuple[Tensor, Tensor]] = []
    for step in range(6):
        x = rows(fake, 2 + step // 3, step)
        total, product = engine(x, x)
        kept.append((total, x * 2))
        assert torch.equal(product, x * x)
    for answer, wanted in kept:
        assert torch.equal(answer, wanted)
    assert len({answer.data_ptr() for answer, _ in kept}) == len(kept)
    assert engine.set_pre_allocated_outputs(False) is True
    assert torch.equal(engine(x, x)[0], x * 2)


def test_outputs_made_ahead_go_with_the_engine(fake: Torch) -> None:
    engine = load("affine")
    engine.set_pre_allocated_outputs(True)
    engine(rows(fake, 2))
    assert engine._runner.ahead[3]
    engine.close()
    assert engine._runner.ahead[3] == []


def test_outputs_made_ahead_for_one_stream_serve_no_other(fake: Torch) -> None:
    engine = load("affine")
    engine.set_pre_allocated_outputs(True)
    x = rows(fake, 2)
    first, second = fake.new_stream(), fake.new_stream()
    for stream in (first, second, first, first):
        with fake.on(stream):
            assert torch.equal(engine(x), x * 3 + 1)


def test_outputs_made_ahead_are_no_part_of_graphs(fake: Torch) -> None:
    engine = load("affine")
    engine.set_pre_allocated_outputs(True)
    fast = graphcache.wrap(engine)
    for count in (2, 3, 2, 3, 2):
        x = rows(fake, count)
        assert torch.equal(engine(x), x * 3 + 1)
        assert torch.equal(fast(x), x * 3 + 1)
    assert (fast.cache_info().captures, fast.cache_info().hits) == (2, 3)


def test_outputs_of_unknown_shape_are_not_made_ahead(fake: Torch) -> None:
    engine = load("positive", requires_output_allocator=True)
    engine.set_pre_allocated_outputs(True)
    for values in ((1.0, -1.0), (1.0, 2.0), (2.0, 3.0), (-1.0, -2.0)):
        x = numbers(fake, *values)
        assert torch.equal(engine(x), x[x > 0])


@pytest.mark.parametrize("name", ["set_pre_allocated_outputs", "set_output_tensors_as_unowned"])
@pytest.mark.parametrize("value", [1, None, "yes"])
def test_switches_take_a_bool(fake: Torch, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^enabled?=.*: expected True or False$"):
        getattr(load("affine"), name)(value)


def test_who_owns_outputs_is_kept_and_changes_nothing(fake: Torch) -> None:
    engine, x = load("affine"), rows(fake, 2)
    assert engine.are_output_tensors_unowned() is False
    engine.set_output_tensors_as_unowned(True)
    assert engine.are_output_tensors_unowned() is True
    assert engine(x).data_ptr() != engine(x).data_ptr()
    engine.setup_engine()


def contexts_of(engine: Any) -> set[Any]:
    return {each._specialization for each in IExecutionContext.made if each.engine is engine.engine.native_handles[1]}


def test_how_kernels_are_compiled_is_that_of_contexts_made_afterwards(fake: Torch) -> None:
    engine = load("affine")
    fast, x = graphcache.wrap(engine), rows(fake, 2)
    wanted = fast(x).clone()
    assert contexts_of(engine) == {Strategy.EAGER}
    engine.configure_runtime("none")
    assert engine.runtime_choice == ("none", None)
    assert fast.cache_info().graphs == 0
    assert torch.equal(fast(x), wanted)
    assert contexts_of(engine) == {Strategy.NONE}
    graphs = fast.cache_info().graphs
    engine.configure_runtime("none")
    assert fast.cache_info().graphs == graphs, "nothing has changed"
    engine.configure_runtime()
    fast(x)
    assert contexts_of(engine) == {Strategy.EAGER}


def test_with_1_4_nothing_is_specialised_unless_asked_for(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_tensorrt, "__version__", "1.4.0.76")
    engine = graphcache.EngineModule(fake_tensorrt.serialize("affine", version=(1, 4, 0, 76)))
    engine(rows(fake, 2))
    assert contexts_of(engine) == {Strategy.NONE}


def test_kernels_of_several_engines_in_one_cache(fake: Torch) -> None:
    cache = RuntimeCache()
    engines = [load("affine"), load("scaled")]
    for engine in engines:
        engine.configure_runtime(kernels=cache)
    engines[0](rows(fake, 2))
    engines[1](numbers(fake, 1.0))
    assert cache.has_cache()
    assert cache._cache._compiled == ["Affine", ""]


def test_a_closed_engine_refuses(fake: Torch) -> None:
    engine = load("affine")
    engine.close()
    for call in (engine.enable_profiling, engine.disable_profiling, engine.get_layer_info, engine.configure_runtime):
        with pytest.raises(ClosedError, match=r"^affine was closed; load it again$"):
            call()


def test_threads_that_switch_while_others_call(fake: Torch) -> None:
    engine = load("affine")
    fast, x = graphcache.wrap(engine), rows(fake, 2)

    def work(index: int) -> None:
        for step in range(15):
            if index == 0:
                engine.set_pre_allocated_outputs(step % 2 == 0)
            elif index == 1 and step % 5 == 0:
                engine.configure_runtime("none" if step % 2 else None)
            assert torch.equal(fast(x) if index % 2 else engine(x), x * 3 + 1)

    in_threads(work, 4)


def test_nothing_is_kept_alive(fake: Torch) -> None:
    engine, times = load("affine"), Times()
    engine.enable_profiling(times)
    engine(rows(fake, 2))
    gone = weakref.ref(times)
    del times
    engine.disable_profiling()
    assert gone() is None
