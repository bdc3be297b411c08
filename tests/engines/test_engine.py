"""An engine: what it tells of itself, and what is said of bytes that are none; and the stand-in for TensorRT."""

from __future__ import annotations

import gc
import inspect
import json
import re
import types
import weakref
from typing import Any

import pytest
import torch

from graphcache.engines import library
from graphcache.engines.context import Context
from graphcache.engines.engine import Engine
from graphcache.errors import (
    ConfigError,
    EngineError,
    EngineExecutionError,
    EngineFormatError,
    EngineVersionError,
    NoGpuError,
    TensorRTNotFoundError,
)
from tests.engines import fake_tensorrt
from tests.engines.fake_tensorrt import NETWORKS, Network, serialize
from tests.graphs.fake_driver import Torch


def names(engine: Engine) -> tuple[list[str], list[str]]:
    return [each.name for each in engine.inputs], [each.name for each in engine.outputs]


# ---- what it tells


def test_tells_what_it_is(fake: Torch) -> None:
    engine = Engine(serialize("affine"))
    assert (engine.name, engine.profiles, engine.scratch_bytes) == ("Affine", 2, 1000)
    assert (engine.aliases, engine.closed) == ({}, False)
    assert names(engine) == (["x"], ["y"])
    assert Engine(serialize("affine"), name="mine").name == "mine"
    assert Engine(serialize("pair")).name == "engine"


def test_an_output_that_shares_the_memory_of_an_input(fake: Torch) -> None:
    assert Engine(serialize("cache")).aliases == {0: 0}
    assert Engine(serialize("kv")).aliases == {0: 0}


def test_flavours_that_cannot_tell_of_shared_memory(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fake_tensorrt.ICudaEngine, "get_aliased_input_tensor")
    assert not Engine(serialize("cache")).aliases


def test_bindings_in_the_order_asked_for(fake: Torch) -> None:
    assert names(Engine(serialize("pair"))) == (["a", "b"], ["sum", "product"])
    engine = Engine(serialize("pair"), inputs=["b", "a"], outputs=("product", "sum"))
    assert names(engine) == (["b", "a"], ["product", "sum"])


@pytest.mark.parametrize("given", [["a"], ["a", "b", "c"], ["a", "a"], [], ["x", "y"]])
def test_names_that_the_engine_does_not_have(fake: Torch, given: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Engine(serialize("pair"), inputs=given, name="net")
    assert str(caught.value) == f"net has the inputs a, b; the input names given are {', '.join(given)}"
    with pytest.raises(ConfigError, match="net has the outputs sum, product; the output names given are"):
        Engine(serialize("pair"), outputs=given, name="net")


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_takes_any_buffer(fake: Torch, kind: Any) -> None:
    assert Engine(kind(serialize("affine"))).name == "Affine"


# ---- weight streaming


def test_engines_that_stream_no_weights(fake: Torch) -> None:
    engine = Engine(serialize("affine"), name="net")
    assert (engine.streamable_bytes, engine.weight_budget, engine.automatic_weight_budget) == (0, 0, 0)
    with pytest.raises(ConfigError) as caught:
        engine.set_weight_budget(0)
    assert str(caught.value) == ("net was not built for weight streaming; build it with weight_streaming=True")


def test_a_budget_for_weights(fake: Torch) -> None:
    engine = Engine(serialize("streaming"), name="net")
    assert (engine.streamable_bytes, engine.weight_budget, engine.automatic_weight_budget) == (4096, 4096, 2048)
    assert engine.scratch_bytes == 256
    for budget, scratch in ((1000, 768), (4096, 256), (0, 768)):
        engine.set_weight_budget(budget)
        assert (engine.weight_budget, engine.scratch_bytes) == (budget, scratch)


@pytest.mark.parametrize("budget", [-1, 4097])
def test_a_budget_out_of_range(fake: Torch, budget: int) -> None:
    engine = Engine(serialize("streaming"), name="net")
    with pytest.raises(ConfigError, match=f"^net has 4096 streamable bytes, so no budget of {budget}$"):
        engine.set_weight_budget(budget)
    assert engine.weight_budget == 4096


def test_no_other_budget_while_contexts_live(fake: Torch) -> None:
    engine = Engine(serialize("streaming"), name="net")
    context = Context(engine, fake.empty(1024, dtype=torch.uint8))
    with pytest.raises(EngineError, match=r"^net: 1 execution contexts are still in use, by sessions or by captures"):
        engine.set_weight_budget(0)
    assert engine.weight_budget == 4096
    del context
    gc.collect()
    engine.set_weight_budget(0)
    assert engine.weight_budget == 0


def test_a_budget_that_tensorrt_refuses(fake: Torch) -> None:
    engine = Engine(serialize("streaming"), name="net")
    hidden = engine.new_context()
    with pytest.raises(EngineError) as caught:
        engine.set_weight_budget(0)
    assert str(caught.value) == (
        "net: TensorRT refused a weight budget of 0 bytes: Error Code 3: API Usage Error (the budget cannot change "
        "while execution contexts are active)"
    )
    assert (engine.weight_budget, engine.scratch_bytes) == (4096, 256)
    del hidden


# ---- contexts


def test_contexts_use_memory_of_the_callers_and_share_compiled_kernels(fake: Torch) -> None:
    engine = Engine(serialize("affine"))
    one, two = engine.new_context(), engine.new_context()
    assert one is not two
    runtime, made, kernels, config = engine.native_handles
    assert config.get_execution_context_allocation_strategy().name == "USER_MANAGED"
    assert config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
    gc.collect()
    engine.new_context()
    assert engine.native_handles == (runtime, made, kernels, config)


def test_flavours_without_kernels_compiled_at_run_time(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fake_tensorrt, "DynamicShapesKernelSpecializationStrategy")
    engine = Engine(serialize("affine"))
    engine.new_context()
    assert engine.native_handles[2] is None


def test_no_context(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = Network((), lambda shapes, values: {}, lambda given: {}, name="no context")
    monkeypatch.setitem(NETWORKS, "none", empty)
    engine = Engine(serialize("none"), name="net")
    with pytest.raises(EngineExecutionError) as caught:
        engine.new_context()
    assert str(caught.value) == ("net: no execution context: Error Code 2: OutOfMemory (Requested size was 8 bytes.)")


def test_closing_drops_everything(fake: Torch) -> None:
    engine = Engine(serialize("affine"))
    context = engine.new_context()
    gone = [weakref.ref(each) for each in engine.native_handles]
    engine.close()
    engine.close()
    assert engine.closed
    del context
    gc.collect()
    assert [reference() for reference in gone] == [None] * 4


# ---- bytes that are no engine of this machine


def refusal(data: Any, kind: type[EngineError]) -> str:
    with pytest.raises(kind) as caught:
        Engine(data, name="model")
    assert type(caught.value) is kind
    return str(caught.value)


@pytest.mark.parametrize("data", ["text", None, 5, ["bytes"], torch.zeros(3)])
def test_not_even_bytes(fake: Torch, data: Any) -> None:
    assert refusal(data, EngineFormatError) == f"model: expected the bytes of an engine, got {type(data).__name__}"


def test_what_the_header_tells(fake: Torch) -> None:
    good, older = serialize("affine"), serialize("affine", version=(1, 4, 0, 76))
    assert "expected the bytes of an engine, got none" in refusal(b"", EngineFormatError)
    assert "model has 128 bytes, its header says 256" in refusal(good[:128], EngineFormatError)
    assert "model is not a TensorRT-RTX engine" in refusal(b"onnx" + good, EngineFormatError)
    assert "was built by TensorRT-RTX 1.4.0.76" in refusal(older, EngineVersionError)


@pytest.fixture
def classic(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flavour whose files graphcache cannot read by itself."""
    fake_tensorrt.use(monkeypatch, "tensorrt")


CALL = "IRuntime::deserializeCudaEngine: Error Code 1:"
ELSEWHERE = (
    "An engine runs only under the version, and on the kind of GPU, it was built for: build it again here, or install "
    "the version that built it"
)
REFUSED = [
    (
        b"garbage" * 100,
        EngineFormatError,
        (
            f"MALFORMED_ENGINE; {CALL} Serialization (Serialization assertion magicTagRead == kMAGIC_TAG failed. Magic "
            "tag does not match). Expected a complete engine file of tensorrt; build it with graphcache.build, or copy "
            "it again"
        ),
    ),
    (
        serialize("affine", version=(10, 8, 0, 43)),
        EngineVersionError,
        f"VERSION_MISMATCH; {CALL} Serialization (Version tag does not match.). {ELSEWHERE}",
    ),
    (
        b"sm75" + bytes(300),
        EngineVersionError,
        f"UNSUPPORTED_CC; {CALL} The engine was built for compute capability 7.5. {ELSEWHERE}",
    ),
    (
        serialize("no such network"),
        EngineError,
        (
            f"CUDA_ERROR; {CALL} Cuda Runtime (operation not supported). Build it again here, or try another flavour "
            "with GRAPHCACHE_TENSORRT"
        ),
    ),
]


@pytest.mark.usefixtures("classic")
@pytest.mark.parametrize(("data", "kind", "text"), REFUSED)
def test_what_tensorrt_says(data: bytes, kind: type[EngineError], text: str) -> None:
    assert refusal(data, kind) == f"model ({len(data)} bytes) was refused by tensorrt 1.5.0.114: {text}"


@pytest.mark.usefixtures("classic")
@pytest.mark.parametrize(("data", "kind", "text"), REFUSED)
def test_flavours_that_only_log(
    monkeypatch: pytest.MonkeyPatch, data: bytes, kind: type[EngineError], text: str
) -> None:
    monkeypatch.delattr(fake_tensorrt.Runtime, "get_engine_validity")
    _, _, said = text.partition("; ")
    assert refusal(data, kind) == f"model ({len(data)} bytes) was refused by tensorrt 1.5.0.114: {said}"


@pytest.mark.usefixtures("classic")
def test_a_refusal_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fake_tensorrt.Runtime, "get_engine_validity")
    monkeypatch.setattr(fake_tensorrt.Runtime, "deserialize_cuda_engine", lambda self, data: None)
    assert "was refused by tensorrt 1.5.0.114: nothing. Expected a complete engine" in refusal(b"x", EngineFormatError)


def test_nothing_half_made_remains(fake: Torch) -> None:
    before = len(fake_tensorrt.IExecutionContext.made)
    for data in (b"", b"onnx", serialize("affine")[:-1]):
        refusal(data, EngineFormatError)
    with pytest.raises(ConfigError):
        Engine(serialize("pair"), inputs=["z"])
    assert len(fake_tensorrt.IExecutionContext.made) == before
    assert fake.driver.leaked() == {}


# ---- without a GPU, without TensorRT


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt.use(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NoGpuError, match=r"^running model needs a CUDA device, and torch\.cuda\.is_available\(\) is"):
        Engine(serialize("affine"), name="model")
    with pytest.raises(EngineFormatError, match="truncated"):
        Engine(serialize("affine")[:100], name="model")


def test_no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt.use(monkeypatch, "none of them")
    with pytest.raises(TensorRTNotFoundError, match="no flavour of TensorRT can be imported") as caught:
        Engine(serialize("affine"))
    assert isinstance(caught.value, ModuleNotFoundError)
    with pytest.raises(TensorRTNotFoundError, match="tensorrt_lean cannot be imported"):
        monkeypatch.setenv("GRAPHCACHE_TENSORRT", "lean")
        Engine(serialize("affine"))


# ---- the stand-in is what it stands in for

CLASSES = ["Runtime", "ICudaEngine", "IExecutionContext", "IOutputAllocator", "IRuntimeConfig", "ILogger", "Refitter"]
ENUMS = [
    "DataType",
    "TensorIOMode",
    "TensorLocation",
    "ExecutionContextAllocationStrategy",
    "DynamicShapesKernelSpecializationStrategy",
    "EngineValidity",
    "EngineInvalidityDiagnostics",
]
FLAVOURS = ["tensorrt_rtx", "tensorrt_lean", "tensorrt"]
RTX_ONLY = {
    "get_engine_validity",
    "create_runtime_cache",
    "set_runtime_cache",
    "dynamic_shapes_kernel_specialization_strategy",
    "DynamicShapesKernelSpecializationStrategy",
    "EngineValidity",
    "EngineInvalidityDiagnostics",
}


def real(flavour: str) -> Any:
    return pytest.importorskip(flavour, exc_type=ImportError)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", CLASSES)
def test_methods_have_the_names_and_arguments_of_tensorrts(flavour: str, name: str) -> None:
    theirs, ours = getattr(real(flavour), name), getattr(fake_tensorrt, name)
    for attribute, value in vars(ours).items():
        if attribute.startswith("_") or attribute in ("made",):
            continue
        if attribute in RTX_ONLY and flavour != "tensorrt_rtx":
            continue
        found = getattr(theirs, attribute)
        if isinstance(value, types.FunctionType):
            assert list(inspect.signature(value).parameters) in arguments(found.__doc__ or ""), attribute
        else:
            assert not callable(found) or name == "ILogger", attribute


def arguments(text: str) -> list[list[str]]:
    """The names in the signatures that pybind11 puts first in a docstring, one list for each overload."""
    found = []
    for signature in re.findall(r"^(?:\d+\. )?\w+\((self: .*)\) -> ", text, re.MULTILINE):
        plain = re.sub(r"\[[^\]]*\]|<[^>]*>", "", signature)
        found.append([part.split(":")[0].strip() for part in plain.split(", ")])
    return found


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", ENUMS)
def test_enumerations_have_tensorrts_members(flavour: str, name: str) -> None:
    module = real(flavour)
    if name in RTX_ONLY and flavour != "tensorrt_rtx":
        return
    theirs = getattr(module, name).__members__
    ours = getattr(fake_tensorrt, name).__members__
    assert {each: int(value) for each, value in ours.items()} == {each: int(theirs[each]) for each in ours}
    if name == "DataType":
        assert set(theirs) == set(ours)
        assert str(theirs["HALF"]) == str(ours["HALF"])


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_real_runtime_takes_the_logger(flavour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = real(flavour)
    monkeypatch.setattr(library, "_found", {})
    found = library.library(flavour)
    assert isinstance(found.logger, module.ILogger)
    with pytest.raises(TypeError):
        fake_tensorrt.Runtime(object())


# ---- layers


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        (
            ["node_of_y", "  Reformatting CopyNode for Input Tensor 0"],
            ["node_of_y", "Reformatting CopyNode for Input Tensor 0"],
        ),
        ([{"Name": "node_of_y", "LayerType": "gemm"}], ["node_of_y"]),
        ([], []),
    ],
)
def test_names_of_layers(fake: Torch, monkeypatch: pytest.MonkeyPatch, layers: list[Any], names: list[str]) -> None:
    text = json.dumps({"Layers": layers, "Bindings": ["x", "y"]})
    monkeypatch.setattr(fake_tensorrt.EngineInspector, "get_engine_information", lambda self, form: text)
    engine = Engine(serialize("affine"))
    assert engine.layers() == names
    assert engine.layer_information() == text


def test_a_tensorrt_without_an_inspector_has_no_layers(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(serialize("affine"))
    monkeypatch.setattr(fake_tensorrt.EngineInspector, "get_engine_information", lambda self, form: None)
    assert engine.layers() == []
    monkeypatch.delattr(fake_tensorrt.ICudaEngine, "create_engine_inspector")
    assert engine.layers() == []
