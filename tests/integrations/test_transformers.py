"""``generate`` of small random models: the tokens are those of a copy without graphs; the model is left as it was."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import Reason
from graphcache.errors import ConfigError

transformers = pytest.importorskip("transformers")

from graphcache.integrations.transformers import GenerationGraphs, enable_generation_graphs  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

NEW = 12
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
WHISPER = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 30,
    "max_target_positions": 64,
    "decoder_start_token_id": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
MODELS: dict[str, Any] = {
    "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**TEXT)),
    "qwen2": lambda t: t.Qwen2ForCausalLM(t.Qwen2Config(**TEXT)),
    "gpt2": lambda t: t.GPT2LMHeadModel(t.GPT2Config(**GPT)),
    "whisper": lambda t: t.WhisperForConditionalGeneration(t.WhisperConfig(**WHISPER)),
    "sliding window": lambda t: t.MistralForCausalLM(t.MistralConfig(**TEXT, sliding_window=8)),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name](transformers).eval().requires_grad_(False)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def prompt(name: str, length: int = 5, batch: int = 1) -> Tensor:
    return torch.randn(batch, 8, 60) if name == "whisper" else torch.randint(3, 64, (batch, length))


def tokens(model: Any, given: Tensor, **options: Any) -> Tensor:
    answer = model.generate(given, **{"max_new_tokens": NEW, "do_sample": False, **options})
    return answer if isinstance(answer, Tensor) else answer.sequences


def counts(graphs: GenerationGraphs) -> tuple[int, int]:
    info = graphs.fast.cache_info()
    return info.captures, info.hits


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_without_graphs_and_a_second_run_captures_nothing(name: str) -> None:
    model = make(name)
    twin, before, before_hits = copy.deepcopy(model), dict(vars(model)), 0
    with enable_generation_graphs(model) as graphs:
        for step in range(4):
            given = prompt(name, 5 + step % 2)
            assert torch.equal(tokens(model, given), tokens(twin, given, cache_implementation="static"))
            if name != "sliding window":
                captures, hits = counts(graphs)
                # Of the first tokens one finds a new cache, another one is captured, and one may find new functions.
                assert captures == 1
                assert hits >= NEW - 1 - 3 if step == 0 else hits == before_hits + NEW - 1
                before_hits = hits
        assert name == "sliding window" or graphs.fast.cache_info().eager[Reason.DISABLED] == 4
    assert vars(model) == before
    given = prompt(name)
    assert torch.equal(tokens(model, given), tokens(twin, given))


def test_sampling_draws_the_same_tokens() -> None:
    model = make("llama")
    twin = copy.deepcopy(model)
    with enable_generation_graphs(model) as graphs:
        for seed in range(3):
            given = prompt("llama", batch=2)
            torch.manual_seed(seed)
            found = tokens(model, given, do_sample=True)
            torch.manual_seed(seed)
            assert torch.equal(found, tokens(twin, given, do_sample=True, cache_implementation="static"))
        assert counts(graphs)[0] == 1


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"use_cache": False}], ids=str)
def test_what_graphs_are_not_for_runs_without_them(options: dict[str, Any]) -> None:
    model = make("llama")
    with enable_generation_graphs(model) as graphs:
        given = prompt("llama")
        assert torch.equal(tokens(model, given, **options), tokens(copy.deepcopy(model), given, **options))
        assert counts(graphs) == (0, 0)


def test_a_cache_that_the_caller_has_is_not_used_again() -> None:
    model = make("llama")
    with enable_generation_graphs(model):
        given = prompt("llama")
        first = model.generate(given, max_new_tokens=NEW, return_dict_in_generate=True)  # type: ignore[operator]
        kept = first.past_key_values.layers[0].keys.clone()
        second = model.generate(prompt("llama"), max_new_tokens=NEW, return_dict_in_generate=True)  # type: ignore[operator]
        assert second.past_key_values is not first.past_key_values
        assert torch.equal(first.past_key_values.layers[0].keys, kept)


def test_a_cache_of_the_callers_own() -> None:
    model = make("llama")
    twin = copy.deepcopy(model)
    with enable_generation_graphs(model) as graphs:
        cache = transformers.StaticCache(model.config, max_cache_len=64)
        for _ in range(3):
            given = prompt("llama")
            cache.reset()
            wanted = tokens(twin, given, past_key_values=transformers.StaticCache(model.config, max_cache_len=64))
            assert torch.equal(tokens(model, given, past_key_values=cache), wanted)
        assert counts(graphs)[0] == 1


def test_threads_have_caches_of_their_own() -> None:
    model = make("llama")
    twin = copy.deepcopy(model)
    given = [prompt("llama") for _ in range(8)]
    wanted = [tokens(twin, each, cache_implementation="static") for each in given]
    with enable_generation_graphs(model), ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda each: tokens(model, each), given))
    assert all(map(torch.equal, found, wanted))


def test_a_copy_has_no_graphs() -> None:
    model = make("llama")
    given = prompt("llama")
    with enable_generation_graphs(model) as graphs:
        twin = copy.deepcopy(model)
        again = pickle.loads(pickle.dumps(model))
        wanted = tokens(model, given)
        before = counts(graphs)
        for each in (twin, again):
            assert torch.equal(tokens(each, given, cache_implementation="static"), wanted)
        assert counts(graphs) == before


def test_a_cache_serves_only_where_it_fits() -> None:
    model, given = make("llama"), prompt("llama")
    wanted = tokens(copy.deepcopy(model), given)
    with enable_generation_graphs(model):
        with torch.inference_mode():
            assert torch.equal(tokens(model, given), wanted)
        assert torch.equal(tokens(model, given), wanted)
        model.double()
        assert torch.equal(tokens(model, given), tokens(copy.deepcopy(model), given))


def test_few_caches_are_kept() -> None:
    model = make("llama")
    with enable_generation_graphs(model, round_to=8, max_caches=1) as graphs:
        for length in (4, 12, 20):
            tokens(model, prompt("llama", length))
            assert graphs.fast.cache_info().graphs <= 2


@pytest.mark.parametrize(
    ("make_model", "options", "message"),
    [
        (lambda: nn.Linear(2, 2), {}, "without generate"),
        (lambda: graphcache.wrap(make("llama")), {}, "not wrapped"),
        (lambda: make("llama"), {"round_to": 0}, "round_to=0"),
        (lambda: make("llama"), {"max_caches": -1}, "max_caches=-1"),
        (lambda: make("llama"), {"round_to": 1.5}, "round_to=1.5"),
        (lambda: make("llama"), {"max_caches": None}, "max_caches=None"),
        (lambda: make("llama"), {"ignore": "self.n"}, "ignore='self.n'"),
        (lambda: make("llama"), {"ignore": 3}, "ignore=3"),
    ],
)
def test_what_cannot_be_enabled_is_an_error_and_changes_nothing(
    make_model: Any, options: dict[str, Any], message: str
) -> None:
    model = make_model()
    before = dict(vars(model))
    with pytest.raises(ConfigError, match=message):
        enable_generation_graphs(model, **options)
    assert vars(model) == before


def test_it_is_enabled_once_and_closed_as_often_as_one_likes() -> None:
    model = make("llama")
    graphs = enable_generation_graphs(model)
    with pytest.raises(ConfigError, match="replaced already"):
        enable_generation_graphs(model)
    graphs.close()
    graphs.close()
    enable_generation_graphs(model).close()
