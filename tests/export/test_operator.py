"""Engines in exported and compiled programs, over the stand-ins."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim, export

import graphcache
from graphcache import EngineModule
from graphcache.engines.output_shapes import OutputShapes, Size
from graphcache.errors import (
    EngineError,
    EngineExecutionError,
    EngineFormatError,
    InputCountError,
    InputDtypeError,
    InputRankError,
)
from graphcache.export import op_kernel
from graphcache.export.op_kernel import call_engine, execute_engine, unload_engines
from graphcache.export.op_schema import EngineSpec, describe_engine, read_spec
from tests.engines.fake_tensorrt import serialize
from tests.graphs.fake_driver import Torch
from tests.standins import Mixed, engines, in_a_new_process

X = torch.arange(8.0).reshape(2, 4) - 3
FROM_TORCH = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
"""What torch's own compiler warns itself of."""
ROWS = {"x": {0: Dim("rows", min=1, max=4)}}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with engines(monkeypatch, streams=False) as fake:
        yield fake
        unload_engines()
        torch._dynamo.reset()


def mixed(network: str = "affine") -> Mixed:
    return Mixed(EngineModule(serialize(network)))


def wanted(x: Tensor) -> Tensor:
    return (x.relu() * 3 + 1) * 2


def exported(module: nn.Module, *inputs: Tensor, strict: bool = False, dynamic: Any = ROWS) -> Any:
    return export(module, inputs, dynamic_shapes=dynamic, strict=strict)


# ---- export


@pytest.mark.parametrize("strict", [False, True])
def test_a_program_has_one_operation_for_the_engine_and_open_sizes(fake: Torch, strict: bool) -> None:
    program = exported(mixed(), X, strict=strict)
    called = [node for node in program.graph.nodes if node.target is call_engine]
    assert len(called) == 1
    rows, columns = called[0].meta["val"][0].shape
    assert isinstance(rows, torch.SymInt)
    assert columns == 4
    for count in (1, 2, 4):
        x = torch.randn(count, 4)
        assert torch.allclose(program.module()(x), wanted(x))


def test_a_program_that_was_saved_runs_in_a_new_process_and_can_be_wrapped_there(fake: Torch, tmp_path: Path) -> None:
    torch.export.save(exported(mixed(), X), tmp_path / "model.pt2")
    code = """
program = torch.export.load(arguments[0])
module = program.module()
x = torch.arange(12.0).reshape(3, 4) - 3
fast = graphcache.wrap(module)
print(module(x).tolist(), fast(x).tolist(), fast(x).tolist(), fast.cache_info().hits)
"""
    x = torch.arange(12.0).reshape(3, 4) - 3
    answer = wanted(x).tolist()
    assert in_a_new_process(code, tmp_path / "model.pt2") == f"{answer} {answer} {answer} 1\n"


def test_a_program_is_loaded_where_there_is_neither_a_gpu_nor_tensorrt(fake: Torch, tmp_path: Path) -> None:
    torch.export.save(exported(mixed(), X), tmp_path / "model.pt2")
    code = """
from tests.engines import fake_tensorrt
fake_tensorrt.use(patch, "none of them")
program = torch.export.load(arguments[0])
program.run_decompositions()
with pytest.raises(graphcache.errors.TensorRTNotFoundError):
    program.module()(torch.zeros(2, 4))
print([type(size).__name__ for size in list(program.graph.nodes)[-1].args[0][0].meta["val"].shape])
"""
    assert in_a_new_process(code, tmp_path / "model.pt2") == "['SymInt', 'int']\n"


def test_several_inputs_outputs_and_keywords(fake: Torch) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.engine = EngineModule(serialize("pair"))

        def forward(self, a: Tensor, b: Tensor) -> Any:
            total, product = self.engine(a, b=b)
            return {"total": total, "product": product}

    sizes = {0: Dim("n", min=2, max=32), 1: Dim("m", min=2, max=32)}
    program = exported(Pair(), torch.ones(2, 3), torch.ones(2, 3), dynamic={"a": sizes, "b": sizes})
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    answer = program.module()(a, b)
    assert torch.equal(answer["total"], a + b)
    assert torch.equal(answer["product"], a * b)


def test_a_size_that_only_the_run_tells_is_unbacked(fake: Torch) -> None:
    program = exported(EngineModule(serialize("positive")), torch.ones(3), dynamic=None)
    (size,) = next(node for node in program.graph.nodes if node.target is call_engine).meta["val"][0].shape
    assert isinstance(size, torch.SymInt)
    assert size.node.shape_env.is_unbacked_symint(size.node.expr)
    assert program.module()(torch.tensor([1.0, -1.0, 2.0])).tolist() == [1.0, 2.0]


def test_rules_that_are_given_are_not_looked_for(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    module = mixed()
    rules = OutputShapes(((Size(((1, ((0, 0),)),)), Size(plus=4)),))
    module.engine.output_shapes = rules.text
    monkeypatch.setattr("graphcache.modules.engine.output_shapes", lambda engine: pytest.fail("TensorRT was asked"))
    assert torch.allclose(exported(module, X).module()(X), wanted(X))


def test_an_engine_that_updates_its_inputs_cannot_be_exported(fake: Torch) -> None:
    with pytest.raises(EngineError, match="updates an input in place, which a traced program cannot express"):
        exported(EngineModule(serialize("cache")), torch.ones(3), dynamic=None)


def test_what_does_not_fit_is_found_while_tracing(fake: Torch) -> None:
    module = EngineModule(serialize("affine"), name="net")
    for x, kind, message in (
        (torch.ones(2, 4, dtype=torch.float16), InputDtypeError, "input 'x' of net is torch.float16, the engine takes"),
        (torch.ones(4), InputRankError, "has 1 dimensions, the engine takes 2"),
    ):
        with pytest.raises(kind, match=message):
            exported(module, x, dynamic=None)
    text = described(module)
    with pytest.raises(InputCountError, match="net takes 1 inputs"), torch._subclasses.FakeTensorMode() as mode:
        given_tensors = [mode.from_tensor(torch.ones(2, 4)) for _ in range(2)]
        call_engine(given_tensors, mode.from_tensor(module.engine_tensor()), text)


@pytest.mark.parametrize("strict", [False, True])
def test_a_wrapped_module_is_exported_as_the_module_that_it_wraps(fake: Torch, strict: bool) -> None:
    for module in (mixed(), EngineModule(serialize("affine"))):
        program = exported(graphcache.wrap(module), X, strict=strict, dynamic={"args": (ROWS["x"],)})
        assert sum(node.target is call_engine for node in program.graph.nodes) == 1
        for x in (X, torch.ones(3, 4)):
            assert torch.equal(program.module()(x), module(x))


# ---- compile


@FROM_TORCH
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_does_not_break_at_the_engine(fake: Torch, backend: str) -> None:
    if backend == "inductor":
        compiler_or_skip()
    fast = torch.compile(mixed(), fullgraph=True, backend=backend)
    for count in (2, 3, 4):
        x = torch.randn(count, 4)
        assert torch.allclose(fast(x), wanted(x))
    again = torch.compile(graphcache.wrap(mixed()), fullgraph=True, backend="eager")
    assert torch.allclose(again(X), wanted(X))


def test_new_weights_show_in_a_compiled_program(fake: Torch) -> None:
    module = nn.Sequential(EngineModule(serialize("refittable")))
    fast = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.tensor([[1.0, 2.0]])
    before = fast(x)
    module[0].refit({"shift": torch.tensor([5.0, 7.0])})
    assert torch.equal(fast(x), before + torch.tensor([4.0, 6.0]))
    module.state_dict()
    assert torch.equal(fast(x), before + torch.tensor([4.0, 6.0]))


def test_another_engine_in_the_module_of_a_compiled_program(fake: Torch) -> None:
    module = nn.Sequential(EngineModule(serialize("refittable")))
    fast = torch.compile(module, fullgraph=True, backend="aot_eager")
    fast(torch.tensor([[1.0, 2.0]]))
    module[0].load_state_dict(EngineModule(serialize("positive")).state_dict())
    with pytest.raises(graphcache.GraphCacheError):
        fast(torch.tensor([[1.0, 2.0]]))


@FROM_TORCH
@pytest.mark.full
def test_aot_inductor(fake: Torch, tmp_path: Path) -> None:
    compiler_or_skip()
    program = exported(mixed(), X)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    code = """
run = torch._inductor.aoti_load_package(arguments[0])
print(run(torch.arange(8.0).reshape(2, 4) - 3).tolist(), run(torch.ones(3, 4)).tolist())
"""
    assert in_a_new_process(code, path) == f"{wanted(X).tolist()} {wanted(torch.ones(3, 4)).tolist()}\n"


# ---- the operator


def test_a_program_runs_the_module_that_was_traced_while_it_lives(fake: Torch) -> None:
    module = mixed()
    program = exported(module, X).module()
    program(X)
    assert unload_engines() == 0
    del module
    gc.collect()
    assert torch.allclose(program(X), wanted(X))
    assert unload_engines() == 1
    assert unload_engines() == 0
    assert torch.allclose(program(X), wanted(X))


def test_a_module_that_was_closed_leaves_the_program_its_bytes(fake: Torch) -> None:
    module = mixed()
    program = exported(module, X).module()
    module.engine.close()
    assert torch.allclose(program(X), wanted(X))
    assert unload_engines() == 1


def test_a_copy_with_other_weights_is_not_taken_for_the_module(fake: Torch, tmp_path: Path) -> None:
    module = EngineModule(serialize("refittable"))
    x = torch.tensor([[1.0, 2.0]])
    before = module(x)
    torch.export.save(exported(module, x, dynamic=None), tmp_path / "model.pt2")
    module.refit({"shift": torch.tensor([5.0, 7.0])})
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x), before)
    assert not torch.equal(module(x), before)


def test_a_wrapped_program_notices_new_weights(fake: Torch) -> None:
    module = EngineModule(serialize("refittable"))
    x = torch.tensor([[1.0, 2.0]])
    fast = graphcache.wrap(exported(module, x, dynamic=None).module())
    before = fast(x)
    assert torch.equal(fast(x), before)
    module.refit({"shift": torch.tensor([5.0, 7.0])})
    assert torch.equal(fast(x), before + torch.tensor([4.0, 6.0]))


def test_an_engine_is_deserialised_once_for_all_calls_and_threads(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    module = EngineModule(serialize("affine"))
    text, data = described(module), module.engine_tensor()
    module.close()
    del module
    made: list[Any] = []
    load = op_kernel._load
    monkeypatch.setattr(op_kernel, "_load", lambda *given: made.append(given) or load(*given))
    for _ in range(3):
        assert torch.allclose(execute_engine([X], data.clone(), text)[0], X * 3 + 1)
    assert len(made) == 1


def test_bytes_that_were_changed_never_reach_tensorrt(fake: Torch) -> None:
    module = EngineModule(serialize("affine"))
    text, data = described(module), module.engine_tensor().clone()
    data[100] ^= 1
    with pytest.raises(EngineFormatError, match="the program's constant is not the engine that was exported"):
        execute_engine([X], data, text)


def test_a_rule_that_does_not_hold_is_found_at_the_call(fake: Torch) -> None:
    module = mixed()
    module.engine.output_shapes = OutputShapes(((Size(plus=2), Size(plus=4)),)).text
    program = exported(module, X).module()
    assert torch.allclose(program(X), wanted(X))
    with pytest.raises(
        EngineExecutionError, match=r"answered with torch.float32 \[3, 4\], and the program was traced for"
    ):
        program(torch.ones(3, 4))


def test_answers_require_no_gradients(fake: Torch) -> None:
    module = EngineModule(serialize("affine"))
    x = torch.ones(2, 4, requires_grad=True)
    (answer,) = call_engine([x], module.engine_tensor(), described(module))
    assert not answer.requires_grad


# ---- what a program says


def described(module: EngineModule) -> str:
    module.output_shapes = OutputShapes(((Size(((1, ((0, 0),)),)), Size(plus=4)),)).text
    return describe_engine(module)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "does not describe its engine: version is 2; expected .*1.*; export it again"),
        ({"more": 1}, "does not describe its engine"),
        ({"output_shapes": "[["}, "does not describe its engine"),
    ],
)
def test_text_of_another_release(fake: Torch, change: dict[str, Any], message: str) -> None:
    tree = {**json.loads(described(EngineModule(serialize("affine")))), **change}
    with pytest.raises(EngineFormatError, match=message):
        read_spec(json.dumps(tree))


@given(st.one_of(st.text(max_size=20), st.sampled_from(["5", "[]", "null", "{}", '{"version": 1}'])))
def test_text_that_is_none(text: str) -> None:
    with pytest.raises(EngineFormatError):
        read_spec(text)


def test_a_call_is_written_and_read(fake: Torch) -> None:
    text = described(EngineModule(serialize("affine"), name="net"))
    call, rules = read_spec(text)
    assert isinstance(call, EngineSpec)
    assert (call.text, call.name, call.inputs, call.outputs) == (text, "net", ["x"], ["y"])
    assert rules.of([(3, 4)]) == [(3, 4)]


def compiler_or_skip() -> None:
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("there is no C++ compiler")
