"""``EngineModule`` has the constructor and the methods of Torch-TensorRT's module, and each does what it does there.

The names are those of ``PythonTorchTensorRTModule`` 2.11 and ``TorchTensorRTModule`` 2.14, read from their sources.
"""

import inspect
import json

import pytest
import torch

import graphcache
from graphcache import EngineModule, Reason
from graphcache.errors import InputDtypeError, ProfileRangeError
from tests.helpers import reason, replays

CONSTRUCTOR = {
    "serialized_engine": None,
    "input_binding_names": None,
    "output_binding_names": None,
    "name": "",
    "settings": None,
    "weight_name_map": None,
    "requires_output_allocator": False,
}
"""With the defaults; ``name`` and what follows are given by name. ``settings`` is not looked at, so it has none."""

METHODS = {
    "are_output_tensors_unowned": [],
    "disable_profiling": [],
    "enable_profiling": ["profiler"],
    "forward": ["args", "kwargs"],
    "get_automatic_device_memory_budget": [],
    "get_device_memory_budget": [],
    "get_layer_info": [],
    "get_streamable_device_memory_budget": [],
    "set_device_memory_budget": ["budget_bytes"],
    "set_optimization_profile": ["profile"],
    "set_output_tensors_as_unowned": ["enabled"],
    "set_pre_allocated_outputs": ["enable"],
    "set_use_output_allocator": ["enable"],
    "setup_engine": [],
}


def test_the_constructor():
    parameters = inspect.signature(EngineModule).parameters
    assert {name: parameters[name].default for name in CONSTRUCTOR} == CONSTRUCTOR
    assert list(parameters)[: len(CONSTRUCTOR)] == list(CONSTRUCTOR)
    by_name = [name for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY]
    assert by_name[:4] == ["name", "settings", "weight_name_map", "requires_output_allocator"]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_what_it_takes_there(name):
    parameters = inspect.signature(getattr(EngineModule, name)).parameters
    assert list(parameters) == ["self", *METHODS[name]]


def test_what_the_constructor_was_given_is_kept(load):
    settings, weights = object(), {"w": 1}
    engine = load("affine", settings=settings, weight_name_map=weights)
    assert (engine.settings, engine.weight_name_map, engine.requires_output_allocator) == (settings, weights, False)
    assert (engine.input_binding_names, engine.output_binding_names) == (["x"], ["y"])
    assert engine.name == "affine"
    engine.setup_engine()


def test_a_call_by_position_and_by_name_and_several_outputs(load, rows):
    a, b = rows(2), rows(2, 5)
    engine = load("pair")
    for answer in (engine(a, b), engine(a, b=b), engine(b=b, a=a)):
        assert isinstance(answer, tuple)
        assert torch.equal(answer[0], a + b)
        assert torch.equal(answer[1], a * b)


def test_bindings_are_in_the_order_that_was_asked_for(load, rows):
    a, b = rows(2), rows(2, 5)
    engine = load("pair", input_binding_names=["b", "a"], output_binding_names=["product", "sum"])
    assert torch.equal(engine(b, a)[0], a * b)


def test_inputs_are_checked_and_never_cast(load, rows):
    engine = load("affine")
    with pytest.raises(InputDtypeError):
        engine(torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(ProfileRangeError):
        engine(rows(5))


def test_profiling_runs_eagerly_and_prints(load, rows, capsys):
    engine = load("affine")
    fast = graphcache.wrap(engine)
    fast(rows(2))
    engine.enable_profiling()
    assert reason(fast, rows(2)) is Reason.PROFILING
    assert "Affine" in capsys.readouterr().out
    engine.disable_profiling()
    fast(rows(2))
    assert replays(fast, rows(2))


def test_layers_are_told_as_json(load):
    assert json.loads(load("affine").get_layer_info())["Layers"] == ["Affine"]


def test_weights_are_streamed_within_a_budget(load, numbers):
    engine = load("streaming")
    assert engine.get_streamable_device_memory_budget() == engine.get_device_memory_budget() == 4096
    assert 0 <= engine.get_automatic_device_memory_budget() <= 4096
    assert engine.set_device_memory_budget(1024) == 1024
    fast, x = graphcache.wrap(engine), numbers(1.0, 2.0)
    assert reason(fast, x) is Reason.WEIGHT_STREAMING
    assert torch.equal(fast(x), x + 1)


def test_an_optimisation_profile_is_chosen(load, rows):
    engine = load("affine")
    engine.set_optimization_profile(1)
    with pytest.raises(ProfileRangeError):
        engine(rows(2))
    engine.set_optimization_profile("auto")
    assert torch.equal(engine(rows(2)), rows(2) * 3 + 1)


def test_switches_of_outputs_give_what_was_set_before(load, rows):
    engine = load("affine")
    assert (engine.set_pre_allocated_outputs(True), engine.set_pre_allocated_outputs(True)) == (False, True)
    answers = [engine(rows(2, start)) for start in range(3)]
    assert [answer[0, 0].item() for answer in answers] == [1, 4, 7]
    assert (engine.set_use_output_allocator(True), engine.set_use_output_allocator(False)) == (False, True)
    assert engine.are_output_tensors_unowned() is False
    engine.set_output_tensors_as_unowned(True)
    assert engine.are_output_tensors_unowned() is True


def test_the_state_dict_holds_the_engine(load, rows):
    empty = EngineModule()
    empty.load_state_dict(load("affine").state_dict())
    assert torch.equal(empty(rows(2)), rows(2) * 3 + 1)


def test_new_weights_drop_the_graphs(load, fake):
    engine = load("refittable")
    fast, x = graphcache.wrap(engine), fake.driver.heap.tensor([[1.0, 1.0]])
    assert fast(x).tolist() == [[3, 4]]
    engine.refit({"scale.a": torch.tensor([5.0, 5.0]), "scale.b": torch.tensor([0.0, 0.0])})
    assert fast(x).tolist() == [[6, 6]]
    assert fast.cache_info().captures == 2
