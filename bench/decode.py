"""A decode loop with a KV cache, token by token: ``python -m bench.decode``.

A LLaMA of Transformers with random weights decodes greedily with a ``StaticCache``. The same Python loop runs it
eagerly, through graphcache, as one graph captured by hand, as ``torch.compile(mode="reduce-overhead")`` makes it, and
through graphcache around ``torch.compile``. They take turns, each with a KV cache of its own; a turn is some tokens
long, as a loop finds the caches of the CPU warm. Tokens are compared with those of eager calls. On the CPU, where a
graph saves nothing, only eager calls and graphcache run.
"""

from __future__ import annotations

import argparse
import copy
import gc
import inspect
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import record

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SEED = 0
WIDTH, VOCABULARY, LENGTH = 1024, 32_000, 512
TURN = 20
"""Tokens that a system decodes before it is the turn of the next one."""
WARM_UP = 4
"""Calls of each system before any is timed: it compiles and captures in them."""
EXACT = ("graphcache", "by hand")
"""Systems that run the kernels of eager calls, and so must give their tokens."""


def make(layers: int) -> Any:
    """A model with random weights, in half precision where there is a GPU."""
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    width = WIDTH if device == "cuda" else 64
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        vocab_size=VOCABULARY if device == "cuda" else 100,
        max_position_embeddings=LENGTH,
    )
    torch.manual_seed(SEED)
    model: Any = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    return model.to(device, torch.float16 if device == "cuda" else torch.float32)


class Decoding:
    """A system that decodes, in the loop that is the same for all.

    Args:
        model: Called with a token and a cache.
        plain: The model itself, which fills the cache first: what ``torch.compile`` makes while it captures is its own.
    """

    def __init__(self, model: Callable[..., Any], plain: Any) -> None:
        import transformers

        self.model = model
        # Transformers 5.24 has renamed it.
        parameters = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
        self.name = "cache" if "cache" in parameters else "past_key_values"
        self.cache = transformers.StaticCache(config=plain.config, max_cache_len=LENGTH)
        self.device = plain.device
        self.token = torch.ones((1, 1), dtype=torch.long, device=self.device)
        plain(input_ids=self.token, **{self.name: self.cache})
        self.start()

    def start(self) -> None:
        """Begin with an empty cache."""
        self.cache.reset()
        self.token = torch.ones((1, 1), dtype=torch.long, device=self.device)
        self.tokens: list[torch.Tensor] = []

    def logits(self) -> torch.Tensor:
        """Those of the next token."""
        found: torch.Tensor = self.model(input_ids=self.token, **{self.name: self.cache}).logits
        return found

    def step(self) -> None:
        """Decode one token."""
        self.token = self.logits()[:, -1].argmax(-1, keepdim=True)
        self.tokens.append(self.token)


class ByHand(Decoding):
    """One graph of the whole step, as a careful user captures it."""

    graph: torch.cuda.CUDAGraph | None = None

    def logits(self) -> torch.Tensor:
        """Those of the next token."""
        if len(self.tokens) < WARM_UP - 1 and self.graph is None:
            return super().logits()
        if self.graph is None:
            self.given, given = self.token.clone(), self.token
            self.graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(self.graph):
                self.token = self.given
                self.found = super().logits()
            self.token = given
        self.given.copy_(self.token)
        self.graph.replay()
        return self.found


def decode(layers: int, tokens: int, compiles: bool = True) -> dict[str, Any]:
    """Decode with all systems in turn, with those that compile if wanted."""
    import graphcache

    model = make(layers)
    fast = graphcache.wrap(copy.deepcopy(model))
    systems: dict[str, Any] = {"eager": Decoding(model, model), "graphcache": Decoding(fast, model)}
    if torch.cuda.is_available():
        systems["by hand"] = ByHand(model, model)
    if torch.cuda.is_available() and compiles:
        compiled = [torch.compile(copy.deepcopy(model), mode=mode) for mode in ("reduce-overhead", "default")]
        systems["reduce-overhead"] = Decoding(compiled[0], model)
        systems["graphcache around torch.compile"] = Decoding(graphcache.wrap(compiled[1]), model)
    seconds = {}
    for name, system in systems.items():
        before = time.perf_counter()
        for _ in range(WARM_UP):
            system.step()
        record.synchroniser()()
        seconds[name] = time.perf_counter() - before
        system.start()
    samples = timed(systems, tokens)
    found = {name: torch.cat(each.tokens).flatten() for name, each in systems.items()}
    equal = {name: int((each == found["eager"]).sum()) for name, each in found.items()}
    wrapped = {name: each.model.cache_info() for name, each in systems.items() if name.startswith("graphcache")}
    return {
        "layers": layers,
        "tokens": tokens,
        "times": {name: each.summary() for name, each in samples.items()},
        "warm_up_seconds": seconds,
        "equal_tokens": equal,
        "graphs": {
            name: {"hits": info.hits, "captures": info.captures, "eager": {str(k): v for k, v in info.eager.items()}}
            for name, info in wrapped.items()
        },
        "failures": [
            f"{name}: {equal[name]} of {tokens} tokens are those of eager calls"
            for name in EXACT
            if equal.get(name, tokens) != tokens
        ],
    }


def timed(systems: dict[str, Any], tokens: int) -> dict[str, record.Samples]:
    """Time the tokens of systems that take turns, in another order every time, without the collector of cycles."""
    samples = {name: record.Samples() for name in systems}
    wait, order, shuffle = record.synchroniser(), list(systems), random.Random(SEED).shuffle
    gc.collect()
    gc.disable()
    try:
        for begin in range(0, tokens, TURN):
            shuffle(order)
            for name in order:
                for _ in range(min(TURN, tokens - begin)):
                    start = time.perf_counter_ns()
                    systems[name].step()
                    returned = time.perf_counter_ns()
                    wait()
                    samples[name].total.append(time.perf_counter_ns() - start)
                    samples[name].cpu.append(returned - start)
    finally:
        gc.enable()
    return samples


def main(arguments: Sequence[str] | None = None) -> int:
    """Decode, compare, print and record."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=12, help="of the model (default 12)")
    parser.add_argument("--tokens", type=int, default=400, help="to decode (default 400)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON; default: bench/results")
    options = parser.parse_args(arguments)
    if options.layers < 1 or not 1 <= options.tokens < LENGTH:
        parser.error(f"--layers is 1 or more, --tokens from 1 to {LENGTH - 1}")
    with record.stream_scope(default_stream=False), torch.no_grad():
        result = decode(options.layers, options.tokens, not options.no_compile)
    payload = {"benchmark": "decode", "environment": record.environment(SEED), **result}
    file = record.write("decode", payload, options.out)
    rows = [
        [name, *(each["total_us"][key] for key in ("p50", "p90", "p99")), each["cpu_us"]["p50"]]
        for name, each in result["times"].items()
    ]
    title = f"{options.tokens} tokens, {options.layers} layers"
    record.table(title, ["system", "p50 µs", "p90", "p99", "CPU p50"], rows)
    for name in ("graphs", "equal_tokens", "warm_up_seconds"):
        print(f"{name}: {result[name]}")
    print(f"written to {file}")
    for text in result["failures"]:
        print(f"FAILED: {text}")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
