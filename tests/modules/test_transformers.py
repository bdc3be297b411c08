"""Small random models of Transformers: answers and state are those of a copy that runs eagerly.

Each has two layers and a width of 32. It is called with two shapes in turn, with its cache of keys and values and
without; the answers, the parameters and buffers, and the attributes of all submodules are compared after every call.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
GPT = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}
SPEECH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 32,
}
CLIP = {key: IMAGE[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}


@dataclass(frozen=True)
class Model:
    """Args:
    name: The prefix of the model's classes.
    options: Of its configuration.
    inputs: What it takes.
    """

    name: str
    options: dict[str, Any]
    inputs: str = "text"


MODELS = [
    Model("Bert", TEXT),
    Model("Roberta", {**TEXT, "max_position_embeddings": 66}),
    Model("DistilBert", {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    Model("Albert", {**TEXT, "embedding_size": 16}),
    Model("Electra", {**TEXT, "embedding_size": 16}),
    Model("DebertaV2", {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}),
    Model("MPNet", {**TEXT, "max_position_embeddings": 66}),
    Model("T5", T5, "both"),
    Model("Bart", BART, "both"),
    Model("Marian", BART, "both"),
    Model("Pegasus", BART, "both"),
    Model("GPT2", GPT, "decoder"),
    Model(
        "GPTNeo", {**TEXT, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}, "decoder"
    ),
    Model("GPTNeoX", TEXT, "decoder"),
    Model("GPTJ", {**GPT, "rotary_dim": 4}, "decoder"),
    Model("OPT", {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}, "decoder"),
    Model("Bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "decoder"),
    Model("Falcon", TEXT, "decoder"),
    Model("Llama", GROUPED, "decoder"),
    Model("Mistral", {**GROUPED, "sliding_window": 16}, "decoder"),
    Model("Mixtral", {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1}, "decoder"),
    Model("Qwen2", GROUPED, "decoder"),
    Model("Qwen3", {**GROUPED, "head_dim": 8}, "decoder"),
    Model("Gemma", {**GROUPED, "head_dim": 8}, "decoder"),
    Model("Gemma2", {**GROUPED, "head_dim": 8, "sliding_window": 16}, "decoder"),
    Model("Phi", GROUPED, "decoder"),
    Model("Phi3", GROUPED, "decoder"),
    Model("StableLm", GROUPED, "decoder"),
    Model("Olmo", GROUPED, "decoder"),
    Model("Mamba", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, "decoder"),
    Model("ViT", IMAGE, "image"),
    Model("DeiT", IMAGE, "image"),
    Model(
        "Swin",
        {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
        "image",
    ),
    Model("Dinov2", IMAGE, "image"),
    Model("CLIP", {"text_config": {**CLIP, **TEXT}, "vision_config": IMAGE, "projection_dim": 16}, "clip"),
    Model("Whisper", {**BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64}, "whisper"),
    Model("Wav2Vec2", SPEECH, "speech"),
]
WHOLE = {"DebertaV2", "T5", "OPT", "Bloom", "Mamba", "ViT", "DeiT", "Swin", "Dinov2", "CLIP", "Wav2Vec2"}
"""Captured as one graph on the CPU. The others read a mask on the host first, which no graph of the CPU may."""
CACHED = ("decoder", "both", "whisper")
"""What takes these inputs keeps keys and values in a cache of its own, unless it is told not to."""
SHOWN = ("T5", "GPT2", "Llama", "Mistral", "Mamba", "Whisper")
NAMES = [model.name for model in MODELS]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is fetched; one core."""
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(model: Model) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{model.name}Config")(**model.options)
    module: nn.Module = getattr(transformers, f"{model.name}Model")(config)
    return module.eval().requires_grad_(False)


def inputs(model: Model, size: int, seed: int) -> dict[str, Any]:
    """Keyword arguments; ``size`` is the batch, and the length of a text."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (size, 4 + size), generator=generator)
    image = torch.randn(size, 3, 16, 16, generator=generator)
    return {
        "text": lambda: {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "decoder": lambda: {"input_ids": ids},
        "both": lambda: {"input_ids": ids, "decoder_input_ids": ids.flip(1)},
        "image": lambda: {"pixel_values": image},
        "clip": lambda: {"input_ids": ids, "pixel_values": image},
        "whisper": lambda: {
            "input_features": torch.randn(size, 8, 32, generator=generator),
            "decoder_input_ids": ids,
        },
        "speech": lambda: {"input_values": torch.randn(size, 400, generator=generator)},
    }[model.inputs]()


def tensors(answer: Any) -> list[Tensor]:
    """All tensors of an answer, in order: also those in objects, such as caches."""
    if isinstance(answer, Tensor):
        return [answer]
    if isinstance(answer, dict):
        return [tensor for value in answer.values() for tensor in tensors(value)]
    if isinstance(answer, (list, tuple)):
        return [tensor for value in answer for tensor in tensors(value)]
    if type(answer).__module__.startswith("transformers"):
        return tensors({name: value for name, value in vars(answer).items() if name != "config"})
    return []


def plain(module: nn.Module) -> dict[str, Any]:
    """The plain values among the attributes of all submodules."""
    return {
        f"{path}.{name}": value
        for path, each in module.named_modules()
        for name, value in vars(each).items()
        if isinstance(value, (bool, int, float, str, type(None)))
    }


def drive(model: Model, sizes: tuple[int, ...], calls: int, **options: Any) -> tuple[Any, list[int]]:
    """Call a model and its copy; the wrapped one, and the calls that were hits."""
    module = build(model)
    twin = copy.deepcopy(module)
    fast = graphcache.wrap(module)
    hits = []
    with torch.no_grad():
        for call in range(calls):
            arguments = {**inputs(model, sizes[call % len(sizes)], call), **options}
            given = copy.deepcopy(arguments)
            before = fast.cache_info().hits
            answer, expected = fast(**arguments), twin(**given)
            if fast.cache_info().hits > before:
                hits.append(call)
            assert type(answer) is type(expected)
            left, right = tensors(answer), tensors(expected)
            assert len(left) == len(right)
            for one, other in zip(left + tensors(arguments), right + tensors(given), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
            for (name, one), (_, other) in zip(module.state_dict().items(), twin.state_dict().items(), strict=True):
                assert torch.equal(one, other), name
            assert plain(module) == plain(twin)
    return fast, hits


@pytest.mark.parametrize("name", NAMES)
def test_without_a_cache(name: str) -> None:
    model = MODELS[NAMES.index(name)]
    options = {"use_cache": False} if model.inputs in CACHED else {}
    fast, hits = drive(model, (1, 2), 10, **options)
    info = fast.cache_info()
    assert hits[-4:] == [6, 7, 8, 9]
    # A call of which only parts are graphs counts as eager; the first ones may set something up.
    if name in WHOLE:
        assert info.captures == 2
        assert sum(info.eager.values()) <= 2


@pytest.mark.parametrize("name", [model.name for model in MODELS if model.inputs in CACHED])
def test_with_its_own_cache(name: str, request: pytest.FixtureRequest) -> None:
    if name not in SHOWN and not request.config.getoption("--full", default=False):
        pytest.skip("one of its kind is enough, without --full")
    _, hits = drive(MODELS[NAMES.index(name)], (1, 2), 10)
    assert hits
