"""Engines in a state_dict, copied, pickled and in other processes, over the stand-ins."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import CachedModule, EngineModule
from graphcache.capture.engine_like import traced_engines
from graphcache.errors import ClosedError, ConfigError, EngineError, EngineFormatError, EngineVersionError
from graphcache.modules import portable
from graphcache.modules.portable import bytes_of, tensor_of
from tests.engine_modules import MODULES, numbers, prepare, rows
from tests.engine_modules import load as load_engine
from tests.engines.fake_tensorrt import IExecutionContext, serialize
from tests.graphs.fake_driver import Torch, installed
from tests.helpers import outcomes


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(*MODULES, portable, patch=monkeypatch) as fake:
        yield prepare(fake, monkeypatch)


class Mixed(nn.Module):
    """An engine between torch modules."""

    def __init__(self, engine: EngineModule) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.engine = engine

    def forward(self, x: Tensor) -> Any:
        return self.engine(x) * self.scale


def saved(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def whole(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: list[Callable[[Any], Any]] = [copy.deepcopy, copy.copy, pickled, whole]


# ---- state_dict


def test_a_state_dict_through_a_file_gives_the_engine_to_an_empty_module(fake: Torch, tmp_path: Path) -> None:
    module = Mixed(EngineModule(serialize("pair"), ["b", "a"], ["product", "sum"], name="n"))
    torch.save(module.state_dict(), tmp_path / "model.pt")
    again = Mixed(EngineModule())
    result = again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    a, b = rows(fake, 2), rows(fake, 2, 5)
    assert torch.equal(again.engine(b, a)[0], a * b)
    assert (again.engine.input_binding_names, again.engine.output_binding_names) == (["b", "a"], ["product", "sum"])
    assert again.engine.name == "n"
    assert again.engine.serialized_engine == serialize("pair")


def test_options_are_part_of_the_state(fake: Torch) -> None:
    module = load_engine("affine", requires_output_allocator=True)
    module.set_optimization_profile(1)
    again = EngineModule()
    again.load_state_dict(saved(module.state_dict()))
    assert again.requires_output_allocator
    assert again.profile_choice == 1


def test_the_state_shares_the_bytes_with_the_module(fake: Torch) -> None:
    module = load_engine("affine")
    first, second = (module.state_dict()["_extra_state"]["engine"] for _ in range(2))
    assert first.data_ptr() == second.data_ptr()


def test_a_model_without_its_engine_says_so(fake: Torch) -> None:
    module = EngineModule(name="detector")
    assert module.extra_repr() == "empty"
    assert module.serialized_engine == b""
    module.close()
    for use in (module, graphcache.wrap, lambda m: m.set_optimization_profile(0)):
        with pytest.raises(EngineError, match=r"detector holds no engine yet; load_state_dict\(\) gives it one"):
            use(module if use is not module else rows(fake, 1))
    with pytest.raises(EngineError, match="this EngineModule holds no engine yet"):
        EngineModule()(rows(fake, 1))
    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        _ = module.missing


def test_a_state_dict_without_the_engine_is_reported_missing(fake: Torch) -> None:
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "engine._extra_state"'):
        Mixed(EngineModule()).load_state_dict({"scale": torch.tensor(1.0)})


def test_graphs_of_the_engine_before_are_dropped(fake: Torch) -> None:
    module = load_engine("affine")
    fast = graphcache.wrap(module)
    x = rows(fake, 2)
    fast(x)
    assert torch.equal(fast(x), x * 3 + 1)
    before = module.epoch
    old = weakref.ref(module.engine)
    wide = EngineModule(serialize("refittable"))
    fast.load_state_dict(wide.state_dict())
    y = fake.driver.heap.tensor([[1.0, 1.0]])
    wanted = wide(y)
    assert torch.equal(fast(y), wanted)
    assert torch.equal(fast(y), wanted)
    assert fast.cache_info().hits == 2
    assert module.epoch > before
    gc.collect()
    assert old() is None


def test_the_same_state_again_keeps_the_engine(fake: Torch) -> None:
    module = load_engine("affine")
    engine = module.engine
    module.load_state_dict(module.state_dict())
    assert module.engine is engine


WRONG: list[tuple[Any, str]] = [
    ([], r"the state of net: it is \[\]; expected an object"),
    ({}, "engine is missing; expected what state_dict.. of an EngineModule holds: save it again with this release"),
    ({"version": 2}, r"version is 2; expected Literal\[1\]; .*or install the release that saved it"),
    ({"engine": None}, "engine is None; expected Tensor"),
    ({"engine": torch.zeros(3)}, r"engine is tensor\(\[0., 0., 0.\]\); expected the bytes as a uint8 tensor"),
    ({"engine": torch.zeros(0, dtype=torch.uint8)}, r"engine is tensor\(\[\], dtype=torch.uint8\)"),
    ({"inputs": "x"}, "inputs is 'x'"),
    ({"outputs": [1]}, r"outputs\[0\] is 1; expected str"),
    ({"name": None}, "name is None"),
    ({"requires_output_allocator": 1}, "requires_output_allocator is 1"),
    ({"profile": -1}, "profile is -1"),
    ({"profile": True}, "profile is True"),
    ({"output_shapes": 0}, "output_shapes is 0"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_state_that_is_none(fake: Torch, wrong: Any, message: str) -> None:
    module = EngineModule(serialize("affine"), name="net")
    engine, state = module.engine, module.get_extra_state()
    given = {**state, **wrong} if isinstance(wrong, dict) and wrong else wrong
    with pytest.raises(EngineFormatError, match=message):
        module.set_extra_state(given)
    assert module.engine is engine
    x = rows(fake, 1)
    assert torch.equal(module(x), x * 3 + 1)


@pytest.mark.parametrize("field", ["inputs", "outputs", "name", "requires_output_allocator", "profile"])
def test_a_field_that_is_missing(fake: Torch, field: str) -> None:
    state = load_engine("affine").get_extra_state()
    del state[field]
    with pytest.raises(EngineFormatError, match=f"{field} is missing"):
        EngineModule().set_extra_state(state)


def test_an_engine_of_another_version_is_refused_and_nothing_changes(fake: Torch) -> None:
    module, state = load_engine("affine"), load_engine("scaled").get_extra_state()
    state["engine"] = tensor_of(serialize("scaled", version=(1, 4, 0, 76)))
    with pytest.raises(EngineVersionError, match=r"was built by TensorRT-RTX 1\.4\.0\.76"):
        module.set_extra_state(state)
    with pytest.raises(ConfigError, match="profiles 0 to 0, not 3"):
        module.set_extra_state({**load_engine("scaled").get_extra_state(), "profile": 3})
    with pytest.raises(ConfigError, match="profiles 0 to 1, not 3"):
        module.set_extra_state({**module.get_extra_state(), "profile": 3})
    x = rows(fake, 1)
    assert torch.equal(module(x), x * 3 + 1)


def test_a_session_keeps_its_engine_from_being_replaced(fake: Torch) -> None:
    module, state = load_engine("scaled"), load_engine("affine").get_extra_state()
    fast = graphcache.wrap(module)
    session = fast.session(numbers(fake, 1, 2))
    with pytest.raises(EngineError, match="1 execution contexts are still in use, by sessions"):
        module.set_extra_state(state)
    session.run()
    session.close()
    module.set_extra_state(state)
    x = rows(fake, 1)
    assert torch.equal(fast(x), x * 3 + 1)


def test_a_wrapped_module_keeps_its_host_inputs(fake: Torch) -> None:
    module = load_engine("affine")
    fast = graphcache.wrap(module)
    with pytest.raises(EngineError, match="is wrapped, and the other engine reads other inputs on the host"):
        module.set_extra_state(load_engine("head").get_extra_state())
    assert fast.module is module


def test_weights_that_were_refitted_are_part_of_the_state(fake: Torch) -> None:
    module = load_engine("refittable")
    x = fake.driver.heap.tensor([[1.0, 2.0]])
    module.refit({"shift": torch.tensor([5.0, 5.0])})
    wanted = module(x)
    for again in (copy.deepcopy(module), pickled(module)):
        assert torch.equal(again(x), wanted)
    empty = EngineModule()
    empty.load_state_dict(saved(module.state_dict()))
    assert torch.equal(empty(x), wanted)


def test_an_engine_that_cannot_be_serialised_again(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_engine("refittable")
    module.refit({"shift": torch.tensor([5.0, 5.0])})
    monkeypatch.setattr(type(module.engine.native_handles[1]), "serialize", lambda self: None)
    with pytest.raises(EngineError, match=r"TensorRT does not serialise it: nothing\. Keep the file it came from"):
        module.state_dict()


# ---- copies


@pytest.mark.parametrize("duplicate", COPIES)
def test_a_copy_of_an_engine_is_a_module_of_its_own(fake: Torch, duplicate: Callable[[Any], Any]) -> None:
    module = load_engine("affine")
    module.set_optimization_profile(0)
    module.remark = ["mine"]
    x = rows(fake, 2)
    graphcache.wrap(module)(x)
    again = duplicate(module)
    assert (again.epoch, len(again.users), again.remark) == (0, 0, ["mine"])
    assert again.profile_choice == 0
    assert again.engine is not module.engine
    module.close()
    fast = graphcache.wrap(again)
    assert torch.equal(fast(x), x * 3 + 1)
    assert torch.equal(fast(x), x * 3 + 1)
    assert outcomes(fast) == (1, 1, {})


def test_a_deep_copy_shares_the_bytes(fake: Torch) -> None:
    module = Mixed(load_engine("affine"))
    again = copy.deepcopy(module)
    assert again.engine.engine_tensor() is module.engine.engine_tensor()
    assert again.scale is not module.scale


def test_what_happens_to_a_module_does_not_show_in_a_copy_that_shares_its_bytes(fake: Torch) -> None:
    module = load_engine("affine")
    module.set_optimization_profile(0)
    again = copy.deepcopy(module)
    assert traced_engines(again) == []
    fast, x = graphcache.wrap(again), rows(fake, 2)
    for _ in range(3):
        assert torch.equal(fast(x), x * 3 + 1)
        module.set_optimization_profile(None if module.profile_choice == 0 else 0)
    assert outcomes(fast) == (2, 1, {})


@pytest.mark.parametrize("duplicate", COPIES)
@pytest.mark.parametrize("mixed", [False, True], ids=["engine", "model"])
def test_a_copy_of_a_wrapped_module_captures_its_own_graphs(
    fake: Torch, duplicate: Callable[[Any], Any], mixed: bool
) -> None:
    engine = load_engine("affine")
    options: dict[str, Any] = {"max_graphs": 3, "strategy": "per_submodule"} if mixed else {"max_graphs": 3}
    fast = graphcache.wrap(Mixed(engine) if mixed else engine, **options)
    x = rows(fake, 2)
    wanted = fast(x)
    again: CachedModule = duplicate(fast)
    assert type(again) is CachedModule
    assert again.config == fast.config
    assert again.ledger.name == fast.ledger.name
    assert outcomes(again) == (0, 0, {})
    assert (again.module is fast.module) is (duplicate is copy.copy)
    assert torch.equal(again(x), wanted)
    again.close()
    assert torch.equal(fast(x), wanted)


def test_what_stands_at_two_places_stands_there_in_the_copy_too(fake: Torch) -> None:
    module = nn.ModuleList([load_engine("affine")])
    module.append(module[0])
    fast = graphcache.wrap(module, strategy="whole_graph")
    for again in (copy.deepcopy([module, fast]), pickled([module, fast])):
        assert again[0][0] is again[0][1]
        assert again[1].module is again[0]


@pytest.mark.parametrize("duplicate", COPIES)
def test_what_was_closed_has_no_copies(fake: Torch, duplicate: Callable[[Any], Any]) -> None:
    module = load_engine("affine")
    fast = graphcache.wrap(module)
    fast.close()
    with pytest.raises(ClosedError):
        duplicate(fast)
    module.close()
    with pytest.raises(ClosedError, match=r"^affine was closed, so it cannot be copied or pickled; load it again$"):
        duplicate(module)


def test_an_empty_module_is_copied_empty(fake: Torch) -> None:
    again = pickled(copy.deepcopy(EngineModule(name="later")))
    assert (again.name, again.extra_repr()) == ("later", "empty")


def test_nothing_of_the_first_is_left_behind_by_copies(fake: Torch) -> None:
    gc.collect()
    # Whatever an earlier test has left is none of this one's.
    before = set(IExecutionContext.made)
    module = load_engine("affine")
    again = copy.deepcopy(module)
    again(rows(fake, 1))
    again.close()
    del again
    gc.collect()
    module.close()
    assert set(IExecutionContext.made) <= before
    assert fake.driver.leaked() == {}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_host_graphs_are_captured_anew(duplicate: Callable[[Any], Any]) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).requires_grad_(False)
    fast, x = graphcache.wrap(module, max_graphs=2, buckets={"input": {0: [2, 4]}}), torch.randn(3, 4)
    fast(x)
    again = duplicate(fast)
    # Some processors give other last bits for a padded product.
    torch.testing.assert_close(again(x), module(x))
    again.module[0].weight.zero_()
    assert not torch.allclose(again(x), module(x))
    torch.testing.assert_close(fast(x), module(x))


def answer(fast: CachedModule, x: Tensor, results: Any) -> None:
    results.put((fast(x).tolist(), fast(x).tolist(), outcomes(fast)[:2]))


def test_a_spawned_process_gets_the_module_and_captures_for_itself() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).requires_grad_(False)
    fast, x = graphcache.wrap(module), torch.randn(3, 4)
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    process = spawn.Process(target=answer, args=(fast, x, results))
    process.start()
    first, second, counts = results.get(timeout=120)
    process.join()
    assert (process.exitcode, counts) == (0, (1, 1))
    assert first == second == module(x).tolist()


def test_bytes_become_a_tensor_and_come_back() -> None:
    for data in (b"", b"\0", bytes(range(256)) * 5):
        assert bytes_of(tensor_of(data)) == data
