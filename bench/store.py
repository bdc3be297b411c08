"""Engines on disk, with the inputs and reference answers that belong to them.

A folder holds, per model, ``NAME.engine`` (or ``NAME.engine.xz``, made to travel), ``NAME.npz`` with inputs and answers
and ``NAME.json`` with facts: who built the engine, and how far ONNX is from torch on the CPU. Whoever runs the engine
needs neither the packages nor the network that it was made with. A model that is only measured as a torch network has
no engine: its file is empty.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

TOLERANCE = 5e-3
"""Largest relative error of a right answer. fp32 products run in TF32 on the device, which alone costs about 1e-3."""


@dataclass(frozen=True)
class Case:
    """One call and its answer, on the CPU.

    Args:
        inputs: In the order of :attr:`Bundle.inputs`.
        answer: What torch returns for them.
    """

    inputs: tuple[Tensor, ...]
    answer: Tensor


@dataclass(frozen=True)
class Bundle:
    """An engine with what belongs to it.

    Args:
        name: Of the model.
        engine: The engine's file.
        arrays: Inputs and reference answers.
        facts: How it was made.
    """

    name: str
    engine: Path
    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the engine's inputs, in the order in which :meth:`cases` gives them."""
        return ("input_ids", "attention_mask") if self.facts["kind"] == "sentences" else ("x",)

    @property
    def has_engine(self) -> bool:
        """Whether there is an engine, and not the torch network alone."""
        return bool(self.facts["engine_bytes"])

    @property
    def tolerance(self) -> float:
        """Largest relative error of a right answer of this engine."""
        return float(self.facts.get("tolerance", TOLERANCE))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the engine's outputs."""
        default = "sentence_embedding" if self.facts["kind"] == "sentences" else "y"
        return (str(self.facts.get("output", default)),)

    def usual(self) -> int:
        """The size that the engine was tuned for."""
        if self.facts["kind"] == "sentences":
            return int(self.facts["shapes"]["input_ids"][1][1])
        return int(self.facts["batch"][1])

    def sizes(self) -> list[int]:
        """Every size that can be called: batch sizes, or for sentences, numbers of tokens."""
        if self.facts["kind"] == "sentences":
            return sorted({int(length) for length in self.arrays["lengths"]})
        low, _, high = self.facts["batch"]
        return list(range(low, high + 1))

    def cases(self, size: int, count: int) -> list[Case]:
        """Calls of one size, with different values as far as there are any.

        Args:
            size: One of :meth:`sizes`.
            count: How many; they repeat where there are fewer.
        """
        if self.facts["kind"] == "sentences":
            found = [case for case in self.sentences() if case.inputs[0].shape[1] == size]
            return [found[index % len(found)] for index in range(count)]
        inputs, answers = torch.from_numpy(self.arrays["inputs"]), torch.from_numpy(self.arrays["answers"])
        rows = [(torch.arange(size) + 7 * index) % len(inputs) for index in range(count)]
        return [Case((inputs[chosen].float(),), answers[chosen]) for chosen in rows]

    def sentences(self) -> list[Case]:
        """Token ids and attention mask of every sentence, with its embedding: ``(1, n)``, ``(1, n)``, ``(1, 384)``."""
        parts = np.split(self.arrays["ids"], np.cumsum(self.arrays["lengths"])[:-1])
        cases = []
        for ids, answer in zip(parts, self.arrays["answers"], strict=True):
            tokens = torch.from_numpy(ids)[None]
            cases.append(Case((tokens, torch.ones_like(tokens)), torch.from_numpy(answer)[None]))
        return cases


def save(
    folder: Path, name: str, engine: bytes, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any], compress: bool
) -> list[Path]:
    """Write a bundle.

    Args:
        folder: Made if it is not there.
        name: Of the model.
        engine: The engine; empty if there is none.
        arrays: Inputs and reference answers.
        facts: How it was made.
        compress: Write ``NAME.engine.xz`` in place of ``NAME.engine``.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain, packed = folder / f"{name}.engine", folder / f"{name}.engine.xz"
    # One of the two would be left from another build.
    for file in (plain, packed):
        file.unlink(missing_ok=True)
    if compress:
        packed.write_bytes(lzma.compress(engine, preset=6))
    else:
        plain.write_bytes(engine)
    files = [packed if compress else plain, folder / f"{name}.npz", folder / f"{name}.json"]
    np.savez_compressed(files[1], **arrays)
    about = {**facts, "engine_bytes": len(engine), "engine_sha256": hashlib.sha256(engine).hexdigest()}
    files[2].write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return files


def load(folder: Path, name: str) -> Bundle:
    """Read a bundle; an engine that travelled compressed is unpacked beside it, once.

    Raises:
        SystemExit: If a file is missing or belongs to another engine, with the command that makes it.
    """
    remedy = f"make it with: python -m bench.models --out {folder} {name}"
    engine, packed = folder / f"{name}.engine", folder / f"{name}.engine.xz"
    for needed in (folder / f"{name}.json", folder / f"{name}.npz"):
        if not needed.is_file():
            raise SystemExit(f"there is no {needed}; {remedy}")
    facts = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    if not engine.is_file() and not packed.is_file():
        raise SystemExit(f"there is neither {engine} nor {packed}; {remedy}")
    if packed.is_file() and not _is(engine, facts["engine_sha256"]):
        engine.write_bytes(lzma.decompress(packed.read_bytes()))
    if not _is(engine, facts["engine_sha256"]):
        raise SystemExit(f"{engine} is not the engine that {name}.json and {name}.npz belong to; {remedy}")
    with np.load(folder / f"{name}.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    return Bundle(name, engine, arrays, facts)


def _is(file: Path, sha256: str) -> bool:
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256
