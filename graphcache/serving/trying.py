"""Whether requests of a kind may be padded and put together, tried before the first of them is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from graphcache.buckets.independence import dependence, observed_outputs
from graphcache.errors import shown
from graphcache.graphs.verify import padded_gap
from graphcache.modules.examples import varied
from graphcache.serving.batching import Batcher, Tensors
from graphcache.serving.kinds import Kind

Called = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def refusal(batcher: Batcher, module: Callable[..., Any], called: Called, example: Tensors, device: Any) -> str:
    """Why requests must be run one by one, as they are; empty if nothing speaks against putting them together.

    Margins are tried as :mod:`graphcache.buckets.independence` tries them, neighbours by holding what two requests get
    together against what each gets alone. Trying is no proof for other values. The batcher is told which axes of the
    answer are as long as which of the inputs, if nobody said that.
    """
    there = {name: tensor.to(device) for name, tensor in example.items()}
    try:
        if batcher.buckets.outputs is None:
            batcher.with_outputs(observed_outputs(module, (), there, batcher.padder))
        text = dependence(module, (), there, batcher.padder)
        return _neighbours(batcher, called, example) if text is None else text
    except Exception as error:
        return f"a call of other sizes raised {type(error).__name__}: {shown(str(error))}"


def valued(batcher: Batcher, kind: Kind) -> dict[str, Tensor]:
    """As many rows of a kind as go together, with values that differ; masks say that all of it is real.

    Integers are 0 or 1, which any table can look up, and 1 at the start of each row: they may be a mask by another
    name, and one that hides everything has no answer.
    """
    generator = torch.Generator().manual_seed(0)
    # Tensors of inference mode could not be filled outside of it.
    with torch.inference_mode(False), torch.no_grad():
        inputs = {name: torch.zeros((batcher.largest, *shape), dtype=dtype) for name, dtype, shape in kind}
        for name, tensor in inputs.items():
            if name in batcher.buckets.masks:
                tensor.fill_(1)
            elif tensor.is_floating_point() or tensor.is_complex():
                varied((), {name: tensor})
            elif tensor.numel():
                tensor.copy_(torch.randint(2, tensor.shape, generator=generator))
                tensor.view(len(tensor), -1)[:, 0] = 1
    return inputs


def _neighbours(batcher: Batcher, called: Called, example: Tensors) -> str:
    last = batcher.largest - 1
    if last < 1:
        return ""
    # What is last has everything else before it, which is where a sum along the rows would show.
    parts = [
        {name: tensor[rows].clone() for name, tensor in example.items()} for rows in (slice(last), slice(last, None))
    ]
    [batch] = batcher.batches([batcher.request(part) for part in parts])
    for part, got in zip(parts, batch.split(called(batch.inputs())), strict=True):
        for name, wanted in called(part).items():
            if (gap := padded_gap(got[name], wanted)) is not None:
                return f"output {name!r} of a request depends on the requests beside it (differs by {gap:.3g})"
    return ""
