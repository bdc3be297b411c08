"""A decode loop with a KV cache, token by token: ``python -m bench.decode``.

A small decoder with random weights keeps its keys and values in buffers, which each call updates in place. graphcache
and a copy that runs eagerly decode the same tokens in turn. Every answer and, at the end, every buffer is compared.
It runs on the CPU too, where a graph saves nothing.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench import record

if TYPE_CHECKING:
    from collections.abc import Sequence

SEED = 0
WIDTH, HEADS, VOCABULARY = 256, 4, 1000


class DecoderLayer(nn.Module):
    """Attention over a cache of ``length`` tokens, and an MLP."""

    keys: Tensor
    values: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, HEADS, length, WIDTH // HEADS))

    def forward(self, x: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """One token; its key and value are written at ``position``."""
        parts = self.project(self.norms[0](x)).view(1, 1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        query, key, value = parts[0], parts[1], parts[2]
        self.keys.index_copy_(2, position, key)
        self.values.index_copy_(2, position, value)
        seen = functional.scaled_dot_product_attention(query, self.keys, self.values, attn_mask=mask)
        x = x + self.out(seen.transpose(1, 2).reshape(1, 1, WIDTH))
        return x + self.mlp(self.norms[1](x))


class Decoder(nn.Module):
    """Logits of the next token.

    Args:
        layers: How many.
        length: Tokens that the caches hold.
    """

    places: Tensor

    def __init__(self, layers: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([DecoderLayer(length) for _ in range(layers)])
        self.register_buffer("places", torch.arange(length))

    def forward(self, token: Tensor, position: Tensor) -> Tensor:
        """Logits after ``token`` at ``position``, both of shape ``(1,)``."""
        x, mask = self.embed(token)[None], (self.places <= position)[None, None, None]
        for layer in self.layers:
            x = layer(x, position, mask)
        return functional.linear(x[0], self.embed.weight)


def main(arguments: Sequence[str] | None = None) -> int:
    """Decode, compare, print and record."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="of the decoder (default 8)")
    parser.add_argument("--tokens", type=int, default=512, help="to decode (default 512)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON; default: bench/results")
    options = parser.parse_args(arguments)
    if options.layers < 1 or options.tokens < 10:
        parser.error("--layers is 1 or more, --tokens 10 or more")
    with record.stream_scope(default_stream=False), torch.inference_mode():
        result = decode(options.layers, options.tokens)
    payload = {"benchmark": "decode", "environment": record.environment(SEED), **result}
    file = record.write("decode", payload, options.out)
    rows = [[name, *(each["total_us"][key] for key in ("p50", "p90", "p99"))] for name, each in result["times"].items()]
    record.table(f"{options.tokens} tokens, {options.layers} layers", ["system", "p50 µs", "p90", "p99"], rows)
    print(f"{result['hits']} hits, {result['captures']} captures, eager calls: {result['eager']}")
    print(f"largest error {result['largest_relative_error']:.1e}; written to {file}")
    return 1 if result["failures"] else 0


def decode(layers: int, tokens: int) -> dict[str, Any]:
    """Decode random tokens with graphcache and eagerly, in turn."""
    import graphcache

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(SEED)
    eager = Decoder(layers, tokens).eval().requires_grad_(False).to(device)
    fast = graphcache.wrap(copy.deepcopy(eager))
    given = torch.randint(0, VOCABULARY, (tokens, 1), device=device)
    places = torch.arange(tokens, device=device)[:, None]
    turn = {"graphcache": iter(range(tokens)), "eager": iter(range(tokens))}
    answers: dict[str, list[Tensor]] = {"graphcache": [], "eager": []}

    def step(name: str, module: nn.Module) -> None:
        index = next(turn[name])
        answers[name].append(module(given[index], places[index]))

    warmup = tokens // 10
    systems = {"graphcache": lambda: step("graphcache", fast), "eager": lambda: step("eager", eager)}
    samples = record.interleave(systems, tokens - warmup, warmup, SEED)
    error = max(map(record.relative_error, answers["graphcache"], answers["eager"]))
    caches = zip(fast.module.buffers(), eager.buffers(), strict=True)
    error = max(error, *(record.relative_error(one, other) for one, other in caches))
    info = fast.cache_info()
    fast.close()
    return {
        "layers": layers,
        "tokens": tokens,
        "times": {name: each.summary() for name, each in samples.items()},
        "largest_relative_error": min(error, 1e30),
        "hits": info.hits,
        "captures": info.captures,
        "eager": {str(reason): count for reason, count in info.eager.items()},
        "failures": [] if error < 1e-3 else [f"relative error {error:.1e}; expected below 1e-3"],
    }


if __name__ == "__main__":
    raise SystemExit(main())
