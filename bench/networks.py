"""The PyTorch networks that the benchmarks run, with deterministic weights.

Their weights are chosen so that answers depend on inputs. With the usual random weights, mlp8 forgets its input after
a few layers and returns almost the same answer for everything: a graph that returned a stale buffer would pass.
Random matrices are rounded to TF32, which the device's fp32 products read anyway; that leaves the tolerance to what a
device can get wrong.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from pathlib import Path

_TF32_DROPPED_BITS = 13


class Mlp8(nn.Module):
    """Eight layers of matmul (64 x 64), relu and softmax: much launching, hardly any work.

    All layers but the first are a negated permutation on a positive ground, plus noise. That keeps a perturbation about
    as large as it came in, so that different inputs stay at least 10 % apart while rounding to TF32 stays below 1e-3;
    random weights alone either collapse or become chaotic.

    Args:
        seed: Of the weights.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        weights = [0.125 * torch.randn(64, 64, generator=draw)]
        for _ in range(7):
            permutation = torch.eye(64)[torch.randperm(64, generator=draw)]
            weights.append(2 + 2 * torch.randn(64, 64, generator=draw) - 64 * permutation)
        self.weights = nn.ParameterList(weights)
        round_to_tf32(self)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 64)`` to ``(batch, 64)``."""
        for weight in self.weights:
            x = torch.softmax(torch.relu(x @ weight), dim=-1)
        return x


class Policy(nn.Module):
    """A robot's policy: 48 observations, two hidden layers of 256, 12 actions in -1..1.

    Args:
        seed: Of the weights.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        sizes = (48, 256, 256, 12)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight, generator=draw)
            nn.init.uniform_(layer.bias, -0.1, 0.1, generator=draw)
        round_to_tf32(self)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 48)`` to ``(batch, 12)``."""
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def mobilenet(seed: int = 0) -> nn.Module:
    """MobileNetV3-small of torchvision, ``(batch, 3, 224, 224)`` to ``(batch, 1000)``, with random weights.

    Its running statistics are those of random images; the initial ones let the signal die out on the way, and with it
    any difference between answers.

    Raises:
        SystemExit: If torchvision cannot be imported beside this torch.
    """
    try:
        from torchvision.models import mobilenet_v3_small
    except (ImportError, RuntimeError) as error:
        raise SystemExit(
            f"mobilenet needs a torchvision that fits torch {torch.__version__}, and importing it failed ({error}); "
            f"build this engine in an environment where both come from one release, with the same TensorRT version"
        ) from error
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network: nn.Module = mobilenet_v3_small(weights=None)
        round_to_tf32(network)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # a plain average over what it sees
        with torch.no_grad():
            for _ in range(4):
                network.train()(images(16, seed=int(torch.randint(1 << 30, ()))))
    return network.eval()


def images(count: int, seed: int) -> Tensor:
    """Random images ``(count, 3, 224, 224)`` in -2..2, made of large patches: pooling would remove mere noise."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 7, 7, generator=draw) * 4 - 2
    return functional.interpolate(coarse, size=(224, 224), mode="bilinear", align_corners=False)


class SentenceEncoder(nn.Module):
    """The MiniLM-L6 sentence encoder: a BERT of six layers, mean pooling over the tokens, unit length.

    Args:
        config: As in the model's config.json.
    """

    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.word = nn.Embedding(config["vocab_size"], width)
        self.position = nn.Embedding(config["max_position_embeddings"], width)
        self.segment = nn.Parameter(torch.zeros(width))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(
            _EncoderLayer(width, config["num_attention_heads"], config["intermediate_size"])
            for _ in range(config["num_hidden_layers"])
        )

    @classmethod
    def from_folder(cls, folder: Path) -> SentenceEncoder:
        """Read config.json and model.safetensors as Hugging Face lays them out."""
        from safetensors.torch import load_file

        model = cls(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        state = {}
        for name, value in load_file(folder / "model.safetensors").items():
            if name == "embeddings.token_type_embeddings.weight":
                state["segment"] = value[0]  # a single sentence is all segment 0
            elif not name.startswith("pooler.") and not name.endswith("position_ids"):
                for theirs, ours in _NAMES:
                    name = name.replace(theirs, ours)
                state[name] = value
        model.load_state_dict(state)
        return model.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings of some sentences.

        Args:
            input_ids: Token ids, ``(batch, length)`` int64.
            attention_mask: 1 for tokens, 0 for padding, ``(batch, length)`` int64.

        Returns:
            ``(batch, 384)``, each row of length 1.
        """
        mask = attention_mask.to(self.segment.dtype)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.norm(self.word(input_ids) + self.position(places) + self.segment)
        bias = ((1 - mask) * -10000.0)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, bias)
        mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return mean / mean.norm(dim=-1, keepdim=True)


class _EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias
        mixed = (torch.softmax(scores, dim=-1) @ value).transpose(1, 2).flatten(-2)
        x = self.attention_norm(x + self.out(mixed))
        return self.norm(x + self.down(functional.gelu(self.up(x))))


_NAMES = (
    ("embeddings.word_embeddings", "word"),
    ("embeddings.position_embeddings", "position"),
    ("embeddings.LayerNorm", "norm"),
    ("encoder.layer.", "layers."),
    ("attention.self.", ""),
    ("attention.output.dense", "out"),
    ("attention.output.LayerNorm", "attention_norm"),
    ("intermediate.dense", "up"),
    ("output.dense", "down"),
    ("output.LayerNorm", "norm"),
)


def round_to_tf32(module: nn.Module) -> None:
    """Round a module's matrices to the 10 bits of mantissa that TF32 products read, in place.

    Where fp32 products run in TF32, the weights of a matmul lose nothing by it. What it buys is size: 13 of 32 bits are
    zero, so an fp32 engine compresses to less than half.
    """
    half = 1 << (_TF32_DROPPED_BITS - 1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                bits = parameter.view(torch.int32)
                bits.add_(half).bitwise_and_(-1 << _TF32_DROPPED_BITS)
