"""The mixed models and what is checked of them, on the host, with torch in the place of engines."""

import importlib.util
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import graphcache
from bench import mixed, networks, record, store, vad
from tests.helpers import Fn
from tests.modules import fake_torch_tensorrt as theirs

CPU = torch.device("cpu")


class Tokens(nn.Module):
    """As an encoder: every token has a vector. Bindings come in an order of their own."""

    input_binding_names = ("attention_mask", "input_ids")

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 8)

    def forward(self, attention_mask, input_ids):
        return self.table(input_ids).tanh() * attention_mask[..., None]


class Silero(nn.Module):
    """As the detector: it takes names, has two outputs, and the host looks at a value."""

    input_binding_names = ("input", "sr", "state")
    host_inputs = ()

    def forward(self, input, sr, state):
        loud = input.abs().mean() * (1.0 if input.sum().item() > 0 else 0.5)
        return torch.sigmoid(loud)[None, None], state * 0.9 + input.mean()


ENGINES = {"minilm_tokens": Tokens, "mlp8": networks.Mlp8, "silero": Silero}


@pytest.fixture
def engines():
    made = {name: make().eval().requires_grad_(False) for name, make in ENGINES.items()}
    return made.__getitem__


@pytest.fixture
def bundles(tmp_path):
    lengths = np.arange(2, 22)
    draw = np.random.default_rng(0)
    shape = ((1, 2), (1, 8), (1, 32))
    sentences = {"kind": "sentences", "shapes": {"input_ids": shape, "attention_mask": shape}, "output": "tokens"}
    store.save(
        tmp_path,
        "minilm_tokens",
        b"none",
        {"ids": draw.integers(0, 50, lengths.sum()), "lengths": lengths, "answers": np.eye(20, dtype=np.float32)},
        sentences,
        compress=False,
    )
    rows = draw.normal(size=(32, 64)).astype(np.float32)
    store.save(
        tmp_path,
        "mlp8",
        b"none",
        {"inputs": rows, "answers": rows},
        {"kind": "rows", "batch": (2, 8, 32)},
        compress=False,
    )
    audio = {"audio": vad.speech(2.0)}
    store.save(tmp_path, "silero", b"none", audio, {"kind": "frames"}, compress=False)
    return lambda name: store.load(tmp_path, name)


@pytest.fixture
def models(engines, bundles):
    return {each.name: each for each in mixed.models(engines, bundles, CPU)}


def test_twelve_shapes_of_each_take_turns(models):
    assert list(models) == ["sentences", "detector", "speech"]
    for model in models.values():
        shapes = [tuple(tuple(value.shape) for value in args) for args in model.calls]
        assert len(set(shapes)) == len(shapes) == mixed.SHAPES


def test_everything_is_right_and_answered_by_graphs(models):
    with torch.inference_mode():
        for model in models.values():
            found, failures = mixed.check(model)
            assert failures == []
            assert ("whole graph" in found) is model.whole
            for account in found.values():
                assert account["largest_relative_error"] == 0.0
                assert account["hits"] > 0


def test_what_forbids_a_graph_costs_only_itself(models):
    with torch.inference_mode():
        detector, _ = mixed.check(models["detector"])
        speech, _ = mixed.check(models["speech"])
    assert detector["found by itself"]["eager"] == {"data_dependent": 4 * mixed.SHAPES}
    assert {"backbone", "before", "head"} <= set(detector["found by itself"]["parts"])
    assert speech["found by itself"]["eager"] == {"host_read": 4 * mixed.SHAPES}
    assert {"before", "after"} <= set(speech["found by itself"]["parts"])
    assert speech["per submodule"]["parts"] == ["after", "before"]


def test_the_head_answers_different_numbers_of_rows(models):
    model = models["detector"]
    with torch.inference_mode():
        assert len({model.module(*args).shape[0] for args in model.calls}) > 3


def test_a_wrong_system_is_found(models):
    class Wrong:
        def __enter__(self):
            return lambda *args: models["sentences"].module(*args) + 0.1

        def __exit__(self, *exc):
            pass

    right = models["sentences"]
    model = mixed.Mixed("net", right.module, right.calls, right.include, others={"wrong": Wrong})
    with torch.inference_mode():
        found, failures = mixed.check(model)
        [failure] = failures
        assert failure.startswith("net, wrong: 48 of 48 answers were wrong, by ")
        assert found["found by itself"]["largest_relative_error"] == 0.0
        result, failures = mixed.measured(model, 4)
        assert result["times"] == {}
        assert len(failures) == 1
        theirs_alone = replace(model, peers=("wrong",))
        result, failures = mixed.measured(theirs_alone, 4)
    assert failures == []
    assert result["checked"]["wrong"]["wrong"].startswith("48 of 48 answers were wrong")
    assert "wrong" in result["times"]


def test_a_peer_that_fails_is_left_out(models):
    def fails(*_):
        raise RuntimeError("not here\nat all")

    right = models["sentences"]
    model = mixed.Mixed("net", right.module, right.calls, right.include, others={"peer": lambda: nullcontext(fails)})
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="not here"):
            mixed.check(model)
        result, failures = mixed.measured(replace(model, peers=("peer",)), 4)
    assert failures == []
    assert result["checked"]["peer"] == {"failed": "RuntimeError: not here"}
    assert "peer" not in result["times"]


def test_a_system_without_a_hit_is_found():
    module = nn.Sequential(Fn(lambda _, x: x * x.sum().item()))
    model = mixed.Mixed("net", module, [(torch.ones(size),) for size in (1, 2)], include=("0",))
    with torch.inference_mode():
        _, failures = mixed.check(model)
    assert [each.split(": ")[:2] for each in failures] == [
        [f"net, {name}", "nothing was answered by a graph"] for name in mixed.STRATEGIES
    ]


def test_every_system_is_timed(models):
    with torch.inference_mode():
        times = mixed.timed(models["sentences"], 24)
    assert set(times) == {"eager", "found by itself", "whole graph", "per submodule"}
    assert all(len(each.total) == 24 for each in times.values())


def test_without_torch_tensorrt_there_is_no_compiled_model(monkeypatch):
    monkeypatch.setattr(mixed.importlib.util, "find_spec", lambda name: None)
    assert mixed.compiled(CPU) is None


@pytest.fixture
def torch_tensorrt(monkeypatch):
    """As much of torch_tensorrt as is used: what it compiles runs as it was."""
    package = ModuleType("torch_tensorrt")
    package.asked = {}

    def compile(program, inputs, **options):
        package.asked = options
        return program.module()

    package.dynamo, package.runtime = ModuleType("dynamo"), ModuleType("runtime")
    package.dynamo.compile = compile
    package.Input = lambda **options: options

    class enable_cudagraphs:
        def __init__(self, module):
            self.module = module

        def __enter__(self):
            return self.module

        def __exit__(self, *exc):
            pass

    package.runtime.enable_cudagraphs = enable_cudagraphs
    monkeypatch.setitem(sys.modules, "torch_tensorrt", package)
    # Dynamo looks for packages too, and asks where they are.
    find = importlib.util.find_spec
    monkeypatch.setattr(
        mixed.importlib.util,
        "find_spec",
        lambda name, *args: package if name == "torch_tensorrt" else find(name, *args),
    )
    return package


def test_a_model_of_theirs_is_compiled_with_a_graph_break(torch_tensorrt):
    model = mixed.compiled(CPU)
    assert torch_tensorrt.asked["torch_executed_ops"] == {"torch.ops.aten.cumsum.default"}
    assert set(model.others) == {"torch_tensorrt, whole graph", "its runtime in a whole graph"}
    assert len(model.calls) == mixed.SHAPES
    assert torch.isfinite(model.module(*model.calls[0])).all()


def test_engines_that_are_exchanged_are_back_between_two_systems():
    class Doubles(nn.Module):
        def forward(self, x):
            return x * 2

    Doubles.__name__ = "TorchTensorRTModule"
    module = nn.Sequential(Doubles(), nn.ReLU())
    others = {"theirs": lambda: graphcache.wrap(module, runtime="torch_tensorrt")}
    model = mixed.Mixed("net", module, [(torch.ones(size),) for size in (1, 2)], include=("1",), others=others)
    with torch.inference_mode():
        found, failures = mixed.check(model)
        times = mixed.timed(model, 6)
    assert failures == []
    assert found["theirs"]["hits"] > 0
    assert set(times) == {"eager", "found by itself", "whole graph", "per submodule", "theirs"}
    assert theirs.ENGINE == 3


def test_without_a_gpu_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match=r"^bench\.mixed runs TensorRT engines, which needs a CUDA device"):
        mixed.main(["--engines", str(tmp_path)])


def test_a_run_writes_its_result(models, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(record, "require_cuda", lambda what: CPU)
    monkeypatch.setattr(store, "load", lambda folder, name: None)
    monkeypatch.setattr(mixed, "models", lambda *_: list(models.values()))
    monkeypatch.setattr(mixed, "compiled", lambda device: None)
    assert mixed.main(["--engines", str(tmp_path), "--out", str(tmp_path), "--rounds", "24"]) == 0
    written = json.loads((tmp_path / "mixed.json").read_text())
    assert written["failures"] == []
    assert set(written["models"]) == {"sentences", "detector", "speech"}
    assert written["models"]["speech"]["times"]["found by itself"]["total_us"]["n"] == 24
    assert "detector, 12 shapes in turn" in capsys.readouterr().out


def test_pooling_outside_is_pooling_inside():
    config = {"hidden_size": 8, "vocab_size": 20, "max_position_embeddings": 9, "num_attention_heads": 2}
    encoder = networks.SentenceEncoder({**config, "intermediate_size": 16, "num_hidden_layers": 2}).eval()
    ids, mask = torch.arange(6).reshape(2, 3), torch.tensor([[1, 1, 0], [1, 1, 1]])
    tokens = networks.TokenEncoder(encoder)(ids, mask)
    assert tokens.shape == (2, 3, 8)
    assert torch.equal(networks.pooled(tokens, mask), encoder(ids, mask))
