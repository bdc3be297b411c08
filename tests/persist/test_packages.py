"""Packages of engines and models, saved and loaded over the stand-ins."""

from __future__ import annotations

import json
import pickle
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphcache
from graphcache import CachedModule, EngineModule, GraphConfig, Mask
from graphcache.engines import library
from graphcache.errors import (
    ConfigError,
    EngineError,
    EngineFormatError,
    EngineVersionError,
    GraphCacheError,
    NoGpuError,
    PackageError,
)
from graphcache.modules.packaging import Source
from graphcache.persist import loading, saving
from graphcache.persist.package_file import config_of, options_of, part_of, write_parts
from tests.engine_modules import rows
from tests.engines import fake_tensorrt
from tests.engines.fake_tensorrt import serialize
from tests.graphs.fake_driver import Torch
from tests.helpers import bits, mlp, same, tensors
from tests.standins import Mixed, engines, in_a_new_process

OF_0_1 = Path(__file__).parent
"""Files that version 0.1.0 wrote."""
STORED = OF_0_1 / "version-1.gcache"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with engines(monkeypatch) as fake:
        yield fake


def affine(**options: Any) -> EngineModule:
    return EngineModule(serialize("affine"), name="net", **options)


def repacked(path: Path, change: Callable[[dict[str, Any], dict[str, bytes]], Any], *, seal: bool = True) -> Path:
    """The package with its header or parts changed by somebody who knows the format."""
    with zipfile.ZipFile(path) as archive:
        parts = {each.filename: archive.read(each) for each in archive.infolist()}
    header = json.loads(parts.pop("header.json"))
    change(header, parts)
    if seal:
        header["parts"] = {name: asdict(part_of(data)) for name, data in parts.items()}
    write_parts(path, {"header.json": json.dumps(header).encode(), **parts})
    return path


# ---- engines


def test_an_engine_by_itself(fake: Torch, tmp_path: Path) -> None:
    module = EngineModule(serialize("pair"), ["b", "a"], ["product", "sum"], name="n", requires_output_allocator=True)
    module.set_optimization_profile(0)
    module.save(tmp_path / "m.gcache")
    again = graphcache.load(tmp_path / "m.gcache")
    assert type(again) is EngineModule
    a, b = rows(fake, 2), rows(fake, 2, 5)
    assert torch.equal(again(b, a)[0], a * b)
    assert (again.name, again.requires_output_allocator, again.profile_choice) == ("n", True, 0)
    assert graphcache.load(tmp_path / "m.gcache", name="other").name == "other"


def test_what_is_in_the_file(fake: Torch, tmp_path: Path) -> None:
    affine().save(tmp_path / "m.gcache", onnx=b"model", build={"shapes": {"x": [(1, 4), (2, 4), (4, 4)]}})
    with zipfile.ZipFile(tmp_path / "m.gcache") as archive:
        assert archive.namelist() == ["header.json", "engines/0.engine", "engines/0.onnx"]
        assert archive.read("engines/0.engine") == serialize("affine")
        header = json.loads(archive.read("header.json"))
    (engine,) = header["engines"]
    assert (header["format"], header["version"]) == ("graphcache.package", 1)
    assert (engine["flavour"], engine["tensorrt"], engine["capability"]) == ("tensorrt_rtx", "1.5.0.114", None)
    assert engine["bindings"][0] == {
        "name": "x",
        "input": True,
        "dtype": "float32",
        "shape": [-1, 4],
        "host": False,
        "ranges": [[[1, 4], [4, 4]], [[8, 16], [4, 4]]],
    }
    assert engine["build"] == {"shapes": {"x": [[1, 4], [2, 4], [4, 4]]}}


def test_a_wrapped_engine_brings_its_options_and_begins_with_hits(fake: Torch, tmp_path: Path) -> None:
    fast = graphcache.wrap(affine(), max_graphs=5, capture="prepared", buckets={"x": {0: [2, 4]}})
    fast.prepare((2, 4), (3, 4))
    x = rows(fake, 2)
    fast(x)
    fast.save(tmp_path / "m.gcache")
    again = graphcache.load(tmp_path / "m.gcache", prepare=True)
    assert type(again) is CachedModule
    assert (again.config.max_graphs, again.config.capture) == (5, "prepared")
    assert again.config.buckets == {"x": {0: [2, 4]}}
    assert again.ledger.name == "net"
    assert torch.equal(again(x), x * 3 + 1)
    assert again.cache_info().hits == 1
    assert again.cache_info().eager == {}
    assert len(again.manifest.entries) == 2
    later = graphcache.load(tmp_path / "m.gcache")
    assert later.prepare(later.manifest).signatures == 2


def test_calls_of_another_machine_are_prepared_without_their_costs(fake: Torch, tmp_path: Path) -> None:
    fast = graphcache.wrap(affine(), capture="worthwhile")
    fast.prepare((2, 4))
    fast(rows(fake, 2))
    fast.save(tmp_path / "m.gcache")

    def elsewhere(header: dict[str, Any], parts: dict[str, bytes]) -> None:
        found = graphcache.Manifest.of_data(parts["manifest.json"], "m")
        other = graphcache.Manifest({**found.environment, "driver": "1.2"}, found.entries)
        parts["manifest.json"] = other.data

    again = graphcache.load(repacked(tmp_path / "m.gcache", elsewhere), prepare=True)
    (entry,) = again.manifest.entries
    assert (entry.hits > 0, entry.eager_seconds, entry.nbytes) == (True, None, 0)
    x = rows(fake, 2)
    again(x)
    assert again.cache_info().hits == 1


def test_without_a_manifest_there_is_nothing_to_prepare(fake: Torch, tmp_path: Path) -> None:
    for module in (affine(), graphcache.wrap(affine())):
        module.save(tmp_path / "m.gcache")
        with pytest.raises(ConfigError, match="has no manifest to prepare; save the wrapped module after"):
            graphcache.load(tmp_path / "m.gcache", prepare=True)
    graphcache.wrap(affine()).save(tmp_path / "m.gcache", manifest=False)
    assert graphcache.load(tmp_path / "m.gcache").manifest is None


def test_a_module_that_was_loaded_is_saved_again_with_its_model(fake: Torch, tmp_path: Path) -> None:
    affine().save(tmp_path / "a.gcache", onnx=b"model", build={"workspace": 4096})
    graphcache.load(tmp_path / "a.gcache").save(tmp_path / "b.gcache")
    assert (tmp_path / "a.gcache").read_bytes() == (tmp_path / "b.gcache").read_bytes()


def test_a_model_of_other_weights_is_not_kept(fake: Torch, tmp_path: Path) -> None:
    module = EngineModule(serialize("refittable"))
    module.save(tmp_path / "a.gcache", onnx=b"model")
    module = graphcache.load(tmp_path / "a.gcache")
    x = fake.driver.heap.tensor([[1.0, 2.0]])
    before, tensor = module(x), module.engine_tensor()
    with pytest.raises(EngineError, match="has no weights 'nothing'"):
        module.refit({"nothing": torch.tensor([5.0, 5.0])})
    assert module.engine_tensor() is tensor
    assert module.source is not None
    module.refit({"shift": torch.tensor([5.0, 5.0])})
    module.save(tmp_path / "b.gcache")
    again = graphcache.load(tmp_path / "b.gcache")
    assert again.source is None
    assert torch.equal(again(x), before + 4)
    again.source = Source(b"model", {})
    again.load_state_dict(affine().state_dict())
    assert again.source is None


# ---- models


def test_a_model_is_loaded_into_one_of_its_make(fake: Torch, tmp_path: Path) -> None:
    model = Mixed(affine())
    model.scale.data.fill_(7.0)
    fast = graphcache.wrap(model)
    fast.save(tmp_path / "m.gcache")
    into = Mixed()
    again = graphcache.load(tmp_path / "m.gcache", into=into)
    assert again.module is into
    x = rows(fake, 2)
    assert torch.equal(again.engine(x), x * 3 + 1)
    assert into.scale.item() == 7.0
    assert into.engine.name == "net"


def test_a_model_without_engines(tmp_path: Path) -> None:
    module, other, x = mlp(), mlp(), torch.randn(3, 4)
    fast = graphcache.wrap(module, include=["0"])
    fast(x)
    fast.save(tmp_path / "m.gcache")
    again = graphcache.load(tmp_path / "m.gcache", into=other, prepare=True)
    assert same(again(x), module(x))
    assert (again.cache_info().hits, again.config.include) == (1, ("0",))
    assert same(dict(other.state_dict()), dict(module.state_dict()))


def holding(buffers: dict[str, torch.Tensor]) -> nn.Module:
    module = nn.Module()
    for name, value in buffers.items():
        module.register_buffer(name, value)
    return module


@given(st.dictionaries(st.sampled_from(["w", "bias", "ü", "a b", "\n"]), tensors()))
def test_tensors_come_back_bit_for_bit(values: dict[str, torch.Tensor]) -> None:
    into = holding({name: torch.zeros(value.shape, dtype=value.dtype) for name, value in values.items()})
    with tempfile.TemporaryDirectory() as folder:
        saving.save(holding(values), f"{folder}/m.gcache", onnx=None, build=None)
        assert graphcache.load(f"{folder}/m.gcache", into=into) is into
    for name, value in values.items():
        assert torch.equal(bits(into.get_buffer(name)), bits(value))


def test_tensors_that_share_memory_come_back(tmp_path: Path) -> None:
    weight = torch.arange(6.0)
    shared = {"a": weight, "b": weight[2:4], "c": weight.view(2, 3).t()}
    into = holding({name: torch.zeros(value.shape) for name, value in shared.items()})
    saving.save(holding(shared), tmp_path / "m.gcache", onnx=None, build=None)
    graphcache.load(tmp_path / "m.gcache", into=into)
    assert all(torch.equal(into.get_buffer(name), value) for name, value in shared.items())


@pytest.mark.parametrize(
    ("into", "message"),
    [
        (
            nn.ReLU,
            "is no package of this model: 'engine' is 'an engine' in the package, not given in the model",
        ),
        (lambda: nn.Linear(4, 4), r"'bias' is not given in the package, 'torch.float32 \[4\]' in the model"),
        (lambda: nn.ModuleDict({"engine": EngineModule()}), "is no package of this model: 'scale' is"),
        (
            lambda: nn.ModuleDict({"engine": EngineModule(), "more": EngineModule()}),
            "'more' is not given in the package, 'an engine' in the model",
        ),
    ],
)
def test_a_model_of_another_make_is_left_alone(
    fake: Torch, tmp_path: Path, into: Callable[[], nn.Module], message: str
) -> None:
    graphcache.wrap(Mixed(affine())).save(tmp_path / "m.gcache")
    target = into()
    before = {name: value.clone() for name, value in target.state_dict().items() if isinstance(value, torch.Tensor)}
    with pytest.raises(PackageError, match=message):
        graphcache.load(tmp_path / "m.gcache", into=target)
    after = {name: value for name, value in target.state_dict().items() if isinstance(value, torch.Tensor)}
    assert same(before, after)


def test_a_model_needs_its_code(fake: Torch, tmp_path: Path) -> None:
    graphcache.wrap(Mixed(affine())).save(tmp_path / "m.gcache")
    with pytest.raises(ConfigError, match="holds the weights and engines of a model, not its code; pass the model"):
        graphcache.load(tmp_path / "m.gcache")
    affine().save(tmp_path / "e.gcache")
    with pytest.raises(ConfigError, match="holds one engine; load it without into"):
        graphcache.load(tmp_path / "e.gcache", into=Mixed())
    target = EngineModule()
    assert graphcache.load(tmp_path / "e.gcache", into=target) is target


class Odd(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def get_extra_state(self) -> Any:
        return self.value


def test_state_that_is_more_than_tensors_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    for model, message in (
        (nn.ModuleDict({"odd": Odd({1: 2})}), r"odd\._extra_state is a state of its own kind"),
        (nn.ParameterDict({"p": nn.Parameter(torch.eye(2).to_sparse(), False)}), "p is no dense tensor"),
    ):
        with pytest.raises(ConfigError, match=message):
            graphcache.wrap(model).save(tmp_path / "m.gcache")
    assert list(tmp_path.iterdir()) == []


# ---- other machines


def version(text: str) -> Callable[[dict[str, Any], dict[str, bytes]], None]:
    return lambda header, parts: header["engines"][0].update(tensorrt=text)


def test_an_engine_of_another_version_never_reaches_tensorrt(
    fake: Torch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    affine().save(tmp_path / "m.gcache")
    repacked(tmp_path / "m.gcache", version("1.4.0.76"))
    monkeypatch.setattr(fake_tensorrt.Runtime, "__init__", lambda *_: pytest.fail("TensorRT was asked"))
    with pytest.raises(EngineVersionError) as caught:
        graphcache.load(tmp_path / "m.gcache", rebuild="if_needed")
    assert str(caught.value) == (
        f"{tmp_path / 'm.gcache'}: 'net' (engines/0.engine) was built by tensorrt_rtx 1.4.0.76, and tensorrt_rtx "
        "1.5.0.114 is used here; an engine runs only under the version that built it, and the package holds no ONNX "
        "model to build it again from. Build it here with graphcache.build, or save the package with onnx=..."
    )


def test_an_engine_of_another_gpu_never_reaches_tensorrt(
    fake: Torch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    affine().save(tmp_path / "m.gcache")

    def full(header: dict[str, Any], parts: dict[str, bytes]) -> None:
        header["engines"][0].update(capability=[8, 6], device="NVIDIA A10")

    repacked(tmp_path / "m.gcache", full)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(
        EngineVersionError, match=r"was built for GPUs of compute capability 8.6 \(NVIDIA A10\), and this"
    ):
        graphcache.load(tmp_path / "m.gcache")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert graphcache.load(tmp_path / "m.gcache").name == "net"


def test_an_engine_of_the_full_tensorrt_is_for_its_gpu(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt.use(monkeypatch, "tensorrt")
    fake.cuda.get_device_capability = lambda device: (9, 0)
    module = affine()
    assert module.engine.capability == (9, 0)
    monkeypatch.setattr(fake_tensorrt.ICudaEngine, "hardware_compatibility_level", 1, raising=False)
    assert module.engine.capability is None


def test_an_engine_is_built_again_where_it_has_to_be(
    fake: Torch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    affine().save(tmp_path / "m.gcache", onnx=b"model", build={"shapes": {"x": [1, 4]}})
    repacked(tmp_path / "m.gcache", version("1.4.0.76"))
    with pytest.raises(EngineVersionError, match="The package holds its ONNX model: load it with rebuild='if_needed'"):
        graphcache.load(tmp_path / "m.gcache")
    built: list[Any] = []

    def build(onnx: bytes, **options: Any) -> bytes:
        built.append((onnx, options))
        return serialize("affine")

    monkeypatch.setattr(loading, "build", build)
    module = graphcache.load(tmp_path / "m.gcache", rebuild="if_needed")
    assert built == [(b"model", {"shapes": {"x": [1, 4]}, "cache": True})]
    x = rows(fake, 2)
    assert torch.equal(module(x), x * 3 + 1)
    module.save(tmp_path / "n.gcache")
    graphcache.load(tmp_path / "n.gcache", rebuild="if_needed")
    assert len(built) == 1


def test_without_a_gpu_the_package_is_checked_all_the_same(
    fake: Torch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    affine().save(tmp_path / "m.gcache")
    monkeypatch.setattr(library, "torch", torch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NoGpuError, match="running net needs a CUDA device"):
        graphcache.load(tmp_path / "m.gcache")
    repacked(tmp_path / "m.gcache", lambda header, parts: parts.update({"engines/0.engine": b"no"}), seal=False)
    with pytest.raises(PackageError, match=r"part 'engines/0.engine': it has 2 bytes, and the header says 256"):
        graphcache.load(tmp_path / "m.gcache")


# ---- damage


CHANGES: list[tuple[Callable[[Any, Any], Any], bool, str]] = [
    (
        lambda header, parts: header.update(version=2),
        True,
        "in format version 2, and graphcache .* reads version 1: pip install --upgrade graphcache, or save it again",
    ),
    (lambda header, parts: header.update(format="x"), True, "part 'header.json': its format is 'x'"),
    (lambda header, parts: header["options"].update(speed=9), True, "options: unknown option 'speed'"),
    (
        lambda header, parts: header["options"].update(max_graphs=0),
        True,
        "options: max_graphs=0: expected a whole number",
    ),
    (lambda header, parts: header["options"].update(buckets={"map": 5}), True, "options: buckets="),
    (lambda header, parts: header["options"].update(buckets={"map": [[[], 5]]}), True, "options: buckets="),
    (lambda header, parts: parts.pop("manifest.json"), False, "part 'manifest.json': it is missing"),
    (
        lambda header, parts: parts.update({"engines/7.onnx": b""}),
        False,
        "part 'engines/7.onnx': the header does not list",
    ),
    (
        lambda header, parts: parts.update({"manifest.json": parts["manifest.json"][:-1] + b" "}),
        False,
        "its SHA-256 is",
    ),
]


@pytest.mark.parametrize(("change", "seal", "message"), CHANGES, ids=[message for _, _, message in CHANGES])
def test_a_package_that_was_changed(
    fake: Torch, tmp_path: Path, change: Callable[[Any, Any], Any], seal: bool, message: str
) -> None:
    fast = graphcache.wrap(affine())
    fast.prepare((2, 4))
    fast.save(tmp_path / "m.gcache")
    with pytest.raises(PackageError, match=message):
        graphcache.load(repacked(tmp_path / "m.gcache", change, seal=seal))


@given(st.binary(max_size=80))
def test_tensors_that_are_none(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gcache"
        graphcache.wrap(mlp()).save(path)
        repacked(path, lambda header, parts: parts.update({"weights.safetensors": content}))
        with pytest.raises(PackageError, match=r"part 'weights.safetensors': it holds no tensors \("):
            graphcache.load(path, into=mlp())


def test_a_manifest_that_is_none_is_a_problem_and_no_error(fake: Torch, tmp_path: Path) -> None:
    fast = graphcache.wrap(affine())
    fast.prepare((2, 4))
    fast.save(tmp_path / "m.gcache")
    repacked(tmp_path / "m.gcache", lambda header, parts: parts.update({"manifest.json": b"{}"}))
    again = graphcache.load(tmp_path / "m.gcache")
    assert again.manifest.entries == ()
    assert "m.gcache: manifest.json" in str(again.manifest.problems[0])


@given(st.data())
def test_damage_anywhere_gives_the_same_module_or_a_typed_error(data: st.DataObject) -> None:
    content = bytearray(STORED.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch, engines(patch) as fake:
        path = Path(name) / "m.gcache"
        path.write_bytes(content)
        try:
            again = graphcache.load(path)
        except GraphCacheError:
            return
        x = rows(fake, 2)
        assert torch.equal(again(x), x * 3 + 1)
        again.close()


def test_a_stored_package_of_version_1(fake: Torch) -> None:
    again = graphcache.load(STORED, prepare=True)
    x = rows(fake, 2)
    assert torch.equal(again(x), x * 3 + 1)
    assert (again.config.max_graphs, again.ledger.name) == (7, "stored")
    assert [problem.field for problem in again.manifest.problems] == ["version"], "its manifest is of an old version"
    assert again.module.source == Source(b"an ONNX model", {"shapes": {"x": [[1, 4], [2, 4], [4, 4]]}})


def test_a_stored_pickle_and_a_stored_state_of_version_0_1(fake: Torch) -> None:
    again = pickle.loads((OF_0_1 / "version-0.1.pickle").read_bytes())
    x = rows(fake, 2)
    for _ in range(3):
        assert torch.equal(again(x), x * 3 + 1)
    assert (type(again), again.config.max_graphs, again.ledger.name) == (CachedModule, 7, "net")
    assert again.cache_info().hits == 2
    assert again.module.source == Source(b"model", {"workspace": 4096})
    empty = EngineModule()
    empty.load_state_dict(torch.load(OF_0_1 / "version-0.1-state.pt", weights_only=True)["state"])
    assert torch.equal(empty(x), x * 3 + 1)


# ---- options


@given(
    st.builds(
        GraphConfig,
        max_graphs=st.integers(1, 99),
        capture=st.sampled_from(["first", "worthwhile", "prepared"]),
        include=st.lists(st.text(max_size=3), max_size=2),
        buckets=st.one_of(
            st.none(),
            st.dictionaries(
                st.one_of(st.text(min_size=1, max_size=3), st.integers(0, 5)),
                st.dictionaries(st.integers(0, 3), st.lists(st.integers(1, 64), min_size=1), min_size=1),
                min_size=1,
            ),
        ),
    )
)
def test_options_come_back(config: GraphConfig) -> None:
    assert config_of(json.loads(json.dumps(options_of(config)))) == config


OPTIONS_OF_0_1: dict[str, Any] = {
    "strategy": "auto",
    "include": [],
    "exclude": [],
    "capture": "first",
    "capture_in": "foreground",
    "max_graphs": 7,
    "max_bytes": None,
    "templates": 256,
    "buckets": None,
    "verify": True,
    "io": "copy",
    "outputs": "view",
    "contexts": "private",
    "edges": "full",
    "weights": "frozen",
    "runtime": None,
    "on_failure": "eager",
}
"""What version 0.1 wrote; some of these options are gone."""


def test_a_package_of_version_0_1_loads_without_the_options_that_are_gone(fake: Torch, tmp_path: Path) -> None:
    graphcache.wrap(affine()).save(tmp_path / "m.gcache")

    def as_before(header: Any, parts: Any) -> None:
        header.update(graphcache="0.1.0", options=OPTIONS_OF_0_1)

    again = graphcache.load(repacked(tmp_path / "m.gcache", as_before))
    assert again.config.max_graphs == 7
    x = rows(fake, 2)
    for _ in range(3):
        assert torch.equal(again(x), x * 3 + 1)
    assert again.cache_info().hits == 2


def test_buckets_that_json_cannot_hold(fake: Torch, tmp_path: Path) -> None:
    config = GraphConfig(buckets={"x": {0: [1, 2]}, "mask": Mask(["x[0]"])})
    with pytest.raises(ConfigError, match=r"buckets holds Mask.*; give plain lists, dictionaries and numbers, or wrap"):
        options_of(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"onnx": 5}, "onnx=5: expected the path of an ONNX model, or its bytes"),
        ({"onnx": b""}, "onnx=b'': expected the path"),
        ({"onnx": "missing.onnx"}, "onnx='missing.onnx' cannot be read: No such file"),
        ({"onnx": b"..\x0a\x08location\x12\x05w.bin"}, "the model has its weights in other files"),
        ({"build": {}}, "build says how to build from an ONNX model, and none was given"),
        ({"onnx": b"m", "build": {"speed": 1}}, "expected keyword arguments of graphcache.build, of shapes"),
        ({"onnx": b"m", "build": {"shapes": {"x": object()}}}, "expected what JSON can hold"),
        ({"onnx": b"m", "build": [1]}, "expected keyword arguments of graphcache.build"),
    ],
)
def test_bad_options_of_save(fake: Torch, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        affine().save(tmp_path / "m.gcache", **options)
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written(fake: Torch, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "m.gcache", "\0", 5):
        with pytest.raises(ConfigError, match=r"cannot be written: .*; what was there is as it was"):
            affine().save(path)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="onnx is for a module that is an engine"):
        graphcache.wrap(Mixed(affine())).save(tmp_path / "m.gcache", onnx=b"m")


def test_bad_options_of_load(fake: Torch, tmp_path: Path) -> None:
    (tmp_path / "net.engine").write_bytes(serialize("affine"))
    for options, message in (
        ({"rebuild": "always"}, "rebuild='always': expected one of 'never', 'if_needed'"),
        ({"into": 5}, "into=5: expected an nn.Module"),
        ({"into": nn.ReLU()}, "into is for packages, and .*net.engine is none"),
        ({"prepare": True}, "prepare is for packages"),
    ):
        with pytest.raises(ConfigError, match=message):
            graphcache.load(tmp_path / "net.engine", **options)  # type: ignore[arg-type]
    with pytest.raises(EngineFormatError, match="expected the path of a file or the bytes of an engine, got None"):
        graphcache.load(None)  # type: ignore[arg-type]
    with pytest.raises(PackageError, match="cannot be read"):
        graphcache.load(tmp_path / "missing.gcache")
    (tmp_path / "unnamed").write_bytes(STORED.read_bytes())
    assert graphcache.load(tmp_path / "unnamed").ledger.name == "stored"
    with pytest.raises(EngineFormatError):
        graphcache.load(tmp_path)


# ---- another process


def test_every_form_gives_the_same_answers_in_a_new_process(fake: Torch, tmp_path: Path) -> None:
    module = affine()
    fast = graphcache.wrap(module)
    fast.prepare((2, 4))
    x = rows(fake, 2)
    wanted = fast(x).tolist()
    fast.save(tmp_path / "m.gcache")
    torch.save(module.state_dict(), tmp_path / "state.pt")
    torch.save(module, tmp_path / "module.pt")
    (tmp_path / "fast.pickle").write_bytes(pickle.dumps(fast))
    code = """
import pickle
from dataclasses import asdict
from pathlib import Path
folder = Path(arguments[0])
package = graphcache.load(folder / "m.gcache", prepare=True)
empty = graphcache.EngineModule()
empty.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
whole = torch.load(folder / "module.pt", weights_only=False)
unpickled = pickle.loads((folder / "fast.pickle").read_bytes())
x = fake.driver.heap.tensor([[0.0 + row + column for column in range(4)] for row in range(2)])
for module in (package, empty, whole, unpickled):
    print(module(x).tolist())
print(package.cache_info().hits, unpickled.cache_info().captures)
"""
    printed = in_a_new_process(code, tmp_path, streams=True).splitlines()
    assert printed == [str(wanted)] * 4 + ["1 1"]


# ---- what is refused changes nothing


def all_of(model: nn.Module) -> dict[str, Any]:
    """The state of a model, and the attributes of its engines."""
    engines = [each for each in model.modules() if isinstance(each, EngineModule)]
    return {
        "state": [value.clone() for value in model.state_dict().values() if isinstance(value, torch.Tensor)],
        "engines": [vars(each).keys() | {each.name} for each in engines],
        "bytes": [each.serialized_engine for each in engines],
    }


@pytest.mark.parametrize(
    ("option", "value"),
    [("buckets", "x"), ("include", ["nope"]), ("exclude", ["nope"]), ("buckets", {"map": [["nope", [1, 2]]]})],
)
@pytest.mark.parametrize("full", [True, False])
def test_options_that_do_not_fit_leave_the_model_as_it_was(
    fake: Torch, tmp_path: Path, option: str, value: Any, full: bool
) -> None:
    saved = Mixed(affine())
    saved.scale.data.fill_(7.0)
    graphcache.wrap(saved).save(tmp_path / "m.gcache")
    repacked(tmp_path / "m.gcache", lambda header, parts: header["options"].update({option: value}))
    target = Mixed(EngineModule(serialize("pair"), name="other")) if full else Mixed()
    before = all_of(target)
    with pytest.raises(PackageError, match="option"):
        graphcache.load(tmp_path / "m.gcache", into=target)
    assert str(all_of(target)) == str(before)


@pytest.mark.parametrize("full", [True, False])
def test_an_engine_that_is_refused_leaves_the_others_as_they_were(
    fake: Torch, tmp_path: Path, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two(*engines: EngineModule) -> nn.Module:
        return nn.ModuleDict({str(index): each for index, each in enumerate(engines)})

    graphcache.wrap(two(affine(), affine())).save(tmp_path / "m.gcache")
    # Not a valid engine, which only TensorRT finds out.
    repacked(tmp_path / "m.gcache", lambda header, parts: parts.update({"engines/1.engine": b"damaged"}))
    kept = EngineModule(serialize("pair"), name="other") if full else EngineModule()
    target = two(kept, EngineModule())
    before = all_of(target)
    with pytest.raises(EngineError):
        graphcache.load(tmp_path / "m.gcache", into=target)
    assert str(all_of(target)) == str(before)
    if full:
        assert torch.equal(kept(rows(fake, 2), rows(fake, 2))[0], rows(fake, 2) * 2)
    else:
        with pytest.raises(EngineError, match="holds no engine yet"):
            kept(rows(fake, 2))


def test_options_that_do_not_fit_an_engine_leave_it_as_it_was(fake: Torch, tmp_path: Path) -> None:
    graphcache.wrap(affine()).save(tmp_path / "e.gcache")
    change = {"buckets": {"map": [["nope", {"map": [[0, [1, 2]]]}]]}}
    repacked(tmp_path / "e.gcache", lambda header, parts: header["options"].update(change))
    target = EngineModule(serialize("pair"), name="other")
    before = all_of(target)
    with pytest.raises(PackageError, match="option"):
        graphcache.load(tmp_path / "e.gcache", into=target)
    assert str(all_of(target)) == str(before)


@pytest.mark.parametrize("kind", ["meta", "inference"])
def test_a_model_that_takes_no_weights_is_refused(tmp_path: Path, kind: str) -> None:
    graphcache.wrap(mlp()).save(tmp_path / "m.gcache")
    with torch.device("meta") if kind == "meta" else torch.inference_mode():
        target = mlp()
    with pytest.raises(PackageError, match=f"{kind}.*takes no weights"):
        graphcache.load(tmp_path / "m.gcache", into=target)


def test_what_cannot_be_saved_is_a_config_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gcache"
    graphcache.wrap(mlp()).save(path)
    before = path.read_bytes()
    bad: list[tuple[nn.Module, dict[str, Any]]] = [
        (nn.Linear(2, 2, device="meta"), {}),
        (nn.LazyLinear(2), {}),
        (mlp(), {"manifest": torch.zeros(2)}),
        (mlp(), {"manifest": None}),
        (mlp(), {"build": {}}),
    ]
    for module, options in bad:
        with pytest.raises(ConfigError):
            graphcache.wrap(module).save(path, **options)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_manifest_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = graphcache.wrap(mlp())
    fast(torch.zeros(2, 4))
    fast.save(tmp_path / "m.gcache")
    monkeypatch.setattr(loading, "MOST_BYTES", 100)
    with pytest.raises(PackageError, match=r"manifest.json.* bytes; expected at most 100"):
        graphcache.load(tmp_path / "m.gcache", into=mlp())


@pytest.mark.parametrize("kind", ["expanded", "hook"])
def test_a_model_that_cannot_take_all_weights_takes_none(kind: str, tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self, last: torch.Tensor) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.register_buffer("last", last)

        def forward(self, x: torch.Tensor) -> Any:
            return self.first(x) + self.last

    graphcache.wrap(Model(torch.zeros(3))).save(tmp_path / "m.gcache")
    into = Model(torch.zeros(1).expand(3) if kind == "expanded" else torch.ones(3))
    if kind == "hook":
        into.register_load_state_dict_pre_hook(lambda *_: {}["missing"])
    before = {name: value.clone() for name, value in into.state_dict().items()}
    with pytest.raises(PackageError, match="share memory" if kind == "expanded" else "missing"):
        graphcache.load(tmp_path / "m.gcache", into=into)
    assert all(torch.equal(value, before[name]) for name, value in into.state_dict().items())
