"""Modules of Torch-TensorRT behind graphcache, and exactly as they were afterwards."""

from __future__ import annotations

import copy
import gc
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphcache
from graphcache import EngineModule, Reason
from graphcache.capture.engine_like import is_foreign
from graphcache.errors import ConfigError, EngineVersionError, ModeConflictError
from graphcache.integrations.torch_tensorrt import adopted_engine, adoption
from graphcache.integrations.torch_tensorrt.adopted_engine import AdoptedEngine
from graphcache.integrations.torch_tensorrt.foreign import described
from graphcache.runtime import enable_cudagraphs, enable_output_allocator, weight_streaming
from tests.engine_modules import MODULES, capture_by_driver, load, prepare, rows
from tests.engines.fake_tensorrt import serialize
from tests.graphs.fake_driver import Torch, installed
from tests.helpers import outcomes
from tests.integrations import fake_torch_tensorrt as theirs

KINDS: dict[str, Callable[..., nn.Module]] = {
    "python 2.11": theirs.PythonTorchTensorRTModule,
    "cpp 2.11": theirs.TorchTensorRTModule,
    "cpp 2.11, loaded": lambda network: theirs.TorchTensorRTModule(network, loaded=True),
    "python 2.14": theirs.module_of_2_14,
    "cpp 2.14": lambda network: theirs.module_of_2_14(network, bound="cpp"),
    "python 2.14, loaded": lambda network: theirs.module_of_2_14(network, loaded=True),
    "cpp 2.14, loaded": lambda network: theirs.module_of_2_14(network, bound="cpp", loaded=True),
}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(*MODULES, adopted_engine, adoption, patch=monkeypatch) as fake:
        monkeypatch.setattr(fake.cuda, "device_count", lambda: 1, raising=False)
        yield prepare(fake, monkeypatch)


@pytest.fixture
def whole(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> Torch:
    """Whole modules are captured by the driver."""
    capture_by_driver(fake, monkeypatch)
    return fake


class Between(nn.Module):
    """Another engine, as torch's operations cannot be captured by the stand-in for the driver."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = load("affine")

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.engine(x)
        return answer


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Callable[..., nn.Module]:
    return KINDS[request.param]


def answer_of(x: Tensor) -> Tensor:
    return ((x * 3 + 1) * 3 + 1) * 3 + 1


def test_engines_are_adopted_for_as_long_as_the_module_is_wrapped(whole: Torch, kind: Any) -> None:
    model = theirs.compiled(kind("affine"), kind("affine"), Between())
    before, children = dict(model._modules), [name for name, _ in model.named_modules()]
    state = list(model.state_dict())
    fast = graphcache.wrap(model)
    for step in range(6):
        x = rows(whole, 1 + step % 2, step)
        assert torch.equal(fast(x), answer_of(x))
    assert outcomes(fast) == (4, 2, {})
    assert isinstance(model._run_on_acc_0, AdoptedEngine)
    assert [name for name, _ in fast.named_modules()] == children
    assert list(fast.state_dict()) == state
    assert before["_run_on_acc_0"].calls == 0, "its own runtime was never asked"
    fast.close()
    fast.close()
    assert list(model._modules.items()) == list(before.items())
    assert all(model._modules[name] is each for name, each in before.items())
    x = rows(whole, 2)
    assert torch.equal(model(x), answer_of(x))
    assert before["_run_on_acc_0"].calls == 1


def test_one_by_one_or_found_around_a_culprit(fake: Torch, kind: Any) -> None:
    class Picks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = fake.driver.heap.tensor(x[x[:, 0] >= 1].tolist())
            return found

    model = theirs.compiled(kind("affine"), kind("affine"), Picks())
    with graphcache.wrap(model, strategy="per_submodule") as fast:
        assert set(fast.parts) == {"_run_on_acc_0", "_run_on_acc_2"}
        for step in range(4):
            x = rows(fake, 3, step)
            assert torch.equal(fast(x), (x * 3 + 1) * 3 + 1)
        assert outcomes(fast) == (6, 2, {})


def test_a_module_by_itself(fake: Torch, kind: Any) -> None:
    model = kind("affine")
    fast = graphcache.wrap(model)
    for step in range(3):
        x = rows(fake, 2, step)
        assert torch.equal(fast(x), x * 3 + 1)
    assert outcomes(fast) == (2, 1, {})
    assert isinstance(fast.module, EngineModule)
    fast.close()
    assert model.calls == 0


def test_the_order_of_bindings_is_theirs(fake: Torch) -> None:
    model = theirs.PythonTorchTensorRTModule("pair", inputs=["b", "a"], outputs=["product", "sum"])
    with graphcache.wrap(model) as fast:
        x, y = rows(fake, 2), rows(fake, 2, 5)
        for _ in range(2):
            product, total = fast(x, y)
            assert torch.equal(product, x * y)
            assert torch.equal(total, x + y)
        assert fast.module.input_binding_names == ["b", "a"]


@pytest.mark.parametrize(("kind_of", "container"), [("python 2.11", list), ("cpp 2.11", tuple)])
def test_several_outputs_come_as_they_do_there(fake: Torch, kind_of: str, container: type) -> None:
    model = KINDS[kind_of]("pair")
    x = rows(fake, 2)
    assert type(model(x, x)) is container
    holder = nn.ModuleList([model])
    with graphcache.wrap(nn.Sequential(holder), strategy="per_submodule"):
        assert type(holder[0](x, x)) is container
    assert holder[0] is model


def test_numbers_that_a_compiled_module_passes_for_sizes(fake: Torch) -> None:
    model = nn.Sequential(nn.ModuleList([theirs.TorchTensorRTModule("head")]))
    with graphcache.wrap(model, strategy="per_submodule"):
        x = fake.driver.heap.tensor([[float(row - 8)] * 4 for row in range(16)])
        engine = model[0][0]
        assert isinstance(engine, AdoptedEngine)
        assert torch.equal(engine(x, 3), x[:3].relu())
        assert torch.equal(engine(x, torch.tensor([5])), x[:5].relu())


def test_numbers_in_the_place_of_tensors_on_the_device(fake: Torch) -> None:
    model = theirs.TorchTensorRTModule("scalar")
    with graphcache.wrap(model) as fast:
        x = fake.driver.heap.tensor([1.0, 2.0])
        for factor in (3.0, 4.0, 3.0, 2, 3.0):
            assert torch.equal(fast(x, factor), x * factor)


def test_hooks_and_the_training_flag_are_theirs(fake: Torch, kind: Any) -> None:
    model, seen = theirs.compiled(kind("affine"), kind("affine"), Between()), []
    model._run_on_acc_0.register_forward_hook(lambda *_: seen.append("after"))
    model._run_on_acc_0.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.train()
    with graphcache.wrap(model, strategy="per_submodule") as fast:
        fast(rows(fake, 2))
        assert seen == ["before", "after"]
        assert fast.training
        fast.eval()
    assert not model._run_on_acc_0.training
    assert not any(each.training for each in model.modules())


def test_a_module_in_several_places_is_one_engine(fake: Torch) -> None:
    shared = theirs.TorchTensorRTModule("affine")
    model = nn.Sequential(nn.ModuleDict({"a": shared, "b": shared}), nn.Identity())
    fast = graphcache.wrap(model, strategy="per_submodule")
    assert model[0]["a"] is model[0]["b"]
    assert set(fast.parts) == {"0.a"}
    fast.close()
    assert model[0]["a"] is model[0]["b"] is shared


def test_who_wraps_it_twice_has_the_same_engines_until_the_last_one_closes(fake: Torch) -> None:
    model = theirs.compiled(theirs.TorchTensorRTModule("affine"), theirs.TorchTensorRTModule("affine"), Between())
    original = model._run_on_acc_0
    first = graphcache.wrap(model, strategy="per_submodule")
    engine = model._run_on_acc_0
    second = graphcache.wrap(model, strategy="per_submodule")
    assert model._run_on_acc_0 is engine
    first.close()
    x = rows(fake, 2)
    assert torch.equal(second(x), answer_of(x))
    second.close()
    assert model._run_on_acc_0 is original


def test_what_somebody_put_in_its_place_meanwhile_stays(fake: Torch) -> None:
    model = theirs.compiled(theirs.TorchTensorRTModule("affine"), theirs.TorchTensorRTModule("affine"))
    other = model._run_on_acc_2
    fast = graphcache.wrap(model, strategy="per_submodule")
    model._run_on_acc_0 = mine = nn.Identity()
    fast.close()
    assert model._run_on_acc_0 is mine
    assert model._run_on_acc_2 is other


def test_everything_is_back_when_nobody_holds_the_wrapped_module(fake: Torch) -> None:
    model = theirs.compiled(theirs.TorchTensorRTModule("affine"), theirs.TorchTensorRTModule("affine"))
    before = dict(model._modules)
    fast = graphcache.wrap(model, strategy="per_submodule")
    del fast
    gc.collect()
    assert dict(model._modules) == before


def test_for_the_length_of_a_block_and_after_an_exception(whole: Torch, kind: Any) -> None:
    model = theirs.compiled(kind("affine"), kind("affine"), Between())
    before = dict(model._modules)
    with pytest.raises(KeyError), enable_cudagraphs(model) as fast:
        x = rows(whole, 2)
        assert torch.equal(fast(x), answer_of(x))
        raise KeyError
    assert dict(model._modules) == before


def test_left_to_their_own_runtime_nothing_is_exchanged(fake: Torch) -> None:
    model = theirs.compiled(theirs.TorchTensorRTModule("affine"), theirs.TorchTensorRTModule("affine"))
    before = dict(model._modules)
    with graphcache.wrap(model, runtime="torch_tensorrt") as fast:
        assert dict(model._modules) == before
        x = rows(fake, 2)
        assert torch.equal(fast(x), ((x * 3 + 1).relu()) * 3 + 1)
        assert model._run_on_acc_0.calls > 0


def test_what_their_runtime_notes_for_itself_is_no_state() -> None:
    class PythonTorchTensorRTModule(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * 2

    model = nn.Sequential(PythonTorchTensorRTModule(), nn.ReLU())
    fast, x = graphcache.wrap(model, runtime="torch_tensorrt"), torch.ones(3)
    for _ in range(3):
        assert torch.equal(fast(x), x * 2)
    assert outcomes(fast) == (2, 1, {})


def test_what_cannot_be_adopted_is_left_to_them_and_said_so(fake: Torch, caplog: pytest.LogCaptureFixture) -> None:
    in_place = theirs.module_of_2_14("affine", aliased_io={"y": ("x", "kv")})
    model = theirs.compiled(theirs.TorchTensorRTModule("affine"), in_place)
    with caplog.at_level(logging.INFO), graphcache.wrap(model) as fast:
        assert isinstance(fast._run_on_acc_0, AdoptedEngine)
        assert fast._run_on_acc_2 is in_place
    assert "_run_on_acc_2 is left to Torch-TensorRT: an output lies in the memory of an input" in caplog.text
    with pytest.raises(ConfigError, match=r"^runtime='graphcache': _run_on_acc_2 cannot be adopted: an output lies in"):
        graphcache.wrap(model, runtime="graphcache")
    assert not any(isinstance(each, AdoptedEngine) for each in model.modules())


def test_an_engine_of_another_version(fake: Torch, caplog: pytest.LogCaptureFixture) -> None:
    model = theirs.compiled(theirs.TorchTensorRTModule("affine"), theirs.TorchTensorRTModule("affine"))
    model._run_on_acc_2.serialized_engine = serialize("affine", version=(1, 4, 0, 76))
    before = dict(model._modules)
    with pytest.raises(EngineVersionError, match=r"was built by TensorRT-RTX 1\.4\.0\.76"):
        graphcache.wrap(model, runtime="graphcache")
    assert dict(model._modules) == before
    with graphcache.wrap(model):
        assert is_foreign(model._run_on_acc_2)
        assert not is_foreign(model._run_on_acc_0)
    assert "_run_on_acc_2 is left to Torch-TensorRT: " in caplog.text


def test_a_bad_option_leaves_the_module_as_it_was(fake: Torch) -> None:
    model = theirs.compiled(theirs.TorchTensorRTModule("affine"), theirs.TorchTensorRTModule("affine"))
    before = dict(model._modules)
    for options in ({"include": ["nothing"]}, {"max_graphs": 0}, {"exclude": ["*"]}, {"runtime": "rt"}):
        with pytest.raises(ConfigError):
            graphcache.wrap(model, **options)
    assert dict(model._modules) == before


def test_without_their_modules_their_runtime_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^runtime='torch_tensorrt': there is no module of Torch-TensorRT in ReLU"):
        graphcache.wrap(nn.ReLU(), runtime="torch_tensorrt")
    assert graphcache.wrap(nn.ReLU(), runtime="graphcache").module


def test_their_runtime_while_somebody_has_adopted_the_engines(fake: Torch) -> None:
    model = theirs.compiled(theirs.TorchTensorRTModule("affine"), theirs.TorchTensorRTModule("affine"))
    with graphcache.wrap(model, strategy="per_submodule"):
        with pytest.raises(ConfigError, match="engines in GraphModule are adopted by another wrapped module"):
            graphcache.wrap(model, runtime="torch_tensorrt")
        assert isinstance(model._run_on_acc_0, AdoptedEngine)
    graphcache.wrap(model, runtime="torch_tensorrt").close()


def test_a_device_that_is_not_here(fake: Torch, caplog: pytest.LogCaptureFixture) -> None:
    model = theirs.compiled(theirs.TorchTensorRTModule("affine"), theirs.TorchTensorRTModule("affine"))
    model._run_on_acc_2.settings.device.gpu_id = 7
    with caplog.at_level(logging.INFO), graphcache.wrap(model):
        assert is_foreign(model._run_on_acc_2)
    assert "_run_on_acc_2 is left to Torch-TensorRT: its device is cuda:7, and there are 1 here" in caplog.text
    with pytest.raises(ConfigError, match="_run_on_acc_2 cannot be adopted: its device is cuda:7"):
        graphcache.wrap(model, runtime="graphcache")


def test_an_engine_that_streams_weights_begins_with_the_automatic_budget(fake: Torch) -> None:
    model = nn.Sequential(theirs.TorchTensorRTModule("streaming"), theirs.TorchTensorRTModule("affine"))
    for each in model:
        each.settings.enable_weight_streaming = True
    with graphcache.wrap(model, strategy="per_submodule"):
        assert model[0].get_device_memory_budget() == model[0].get_automatic_device_memory_budget() == 2048
        assert model[1].get_device_memory_budget() == 0


def test_strictly_an_output_allocator_is_refused(fake: Torch) -> None:
    model = nn.Sequential(theirs.PythonTorchTensorRTModule("positive", requires_output_allocator=True))
    with pytest.raises(ModeConflictError, match="and 0 uses one"):
        enable_cudagraphs(model, strict=True).__enter__()
    with enable_cudagraphs(model, strategy="per_submodule") as fast:
        x = fake.driver.heap.tensor([1.0, -1.0, 2.0])
        for _ in range(2):
            assert torch.equal(fast(x), x[x > 0])
        assert fast.cache_info().eager == {Reason.OUTPUT_ALLOCATOR: 2}


@pytest.mark.parametrize("function", [enable_output_allocator, weight_streaming])
def test_what_is_set_on_engines_needs_them_adopted(fake: Torch, function: Any) -> None:
    model = nn.Sequential(theirs.TorchTensorRTModule("affine"))
    with pytest.raises(ConfigError, match=r"^0 is Torch-TensorRT's and nobody has adopted its engine; give the module"):
        function(model).__enter__()
    with graphcache.wrap(model, strategy="per_submodule") as fast, function(fast):
        pass


def test_nothing_is_imported(fake: Torch) -> None:
    with graphcache.wrap(theirs.TorchTensorRTModule("affine")):
        assert "torch_tensorrt" not in sys.modules


def test_a_copy_of_the_original_is_none_of_ours(fake: Torch) -> None:
    model = theirs.compiled(theirs.TorchTensorRTModule("affine"), theirs.TorchTensorRTModule("affine"))
    twin = copy.deepcopy(model)
    with graphcache.wrap(model, strategy="per_submodule"):
        assert is_foreign(twin._run_on_acc_0)


# ---- what they hold


class TorchTensorRTModule(nn.Module):
    """Only the name."""


WILD = st.one_of(st.none(), st.integers(), st.text(max_size=5), st.binary(max_size=5), st.lists(st.text(max_size=3)))


@given(st.dictionaries(st.sampled_from(["serialized_engine", "engine", "name", "target_device_id", "settings"]), WILD))
def test_anything_of_that_name_is_described_or_refused_in_words(attributes: dict[str, Any]) -> None:
    module = TorchTensorRTModule()
    module.__dict__.update(attributes)
    assert is_foreign(module)
    found = described(module)
    if isinstance(found, str):
        assert found
    else:
        assert isinstance(found.serialized, bytes)
        assert found.device is None or found.device >= 0
        assert isinstance(found.name, str)


@given(st.lists(WILD, max_size=12))
def test_any_state_of_an_engine(state: list[Any]) -> None:
    class Engine:
        def __getstate__(self) -> Any:
            return (state,)

    module = TorchTensorRTModule()
    module.engine = Engine()
    found = described(module)
    assert isinstance(found, str) or found.serialized


@pytest.mark.parametrize("other", [nn.ReLU(), None, 3, "TorchTensorRTModule", EngineModule])
def test_what_is_none_of_theirs(other: Any) -> None:
    assert not is_foreign(other)


def test_subclasses_are_theirs_too() -> None:
    class Mine(TorchTensorRTModule):
        pass

    assert is_foreign(Mine())
    assert described(Mine()) == "it has no engine as yet"


def test_names_that_are_no_text(fake: Torch) -> None:
    model = theirs.TorchTensorRTModule("affine")
    model.input_binding_names = [3]
    assert described(model) == "the names of its inputs and outputs are no lists of text"
