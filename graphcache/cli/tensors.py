"""Inputs and outputs as files of safetensors, which hold tensors and nothing that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from torch import Tensor
from torch.utils import _pytree as pytree

from graphcache.cli.output import one_line, writing
from graphcache.extras import optional


def load_inputs(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name, on the CPU."""
    torch_files = optional("safetensors.torch", "reading inputs")
    try:
        found: dict[str, Tensor] = torch_files.load(path.read_bytes())
    except OSError as error:
        raise click.ClickException(f"{path} cannot be read ({error.strerror}); expected a safetensors file") from error
    except Exception as error:
        # What the reader raises for damaged files is a type of its own.
        raise click.ClickException(f"{path} is no safetensors file: {one_line(error)}") from error
    if not found:
        raise click.ClickException(f"{path} holds no tensors; expected one for each input, by name")
    return found


def save_outputs(path: Path, answers: dict[str, Any], names: list[str]) -> None:
    """Write answers: one tensor for each output, named as the outputs are, or by its place in the answer."""
    torch_files = optional("safetensors.torch", "writing outputs")
    tensors = {}
    for label, answer in answers.items():
        leaves = [
            (pytree.keystr(place).strip("[]'") or "output", leaf)
            for place, leaf in pytree.tree_flatten_with_path(answer)[0]
            if isinstance(leaf, Tensor)
        ]
        for index, (place, leaf) in enumerate(leaves):
            name = names[index] if len(names) == len(leaves) else place
            # A copy: tensors that share memory are refused by the format.
            tensors[name if len(answers) == 1 else f"{label}/{name}"] = leaf.detach().cpu().clone().contiguous()
    with writing(path, "--save-outputs") as file:
        file.write(torch_files.save(tensors))
