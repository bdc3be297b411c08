"""Another runtime to hold answers against: onnxruntime, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphcache.cli.build import check_onnx
from graphcache.cli.output import one_line
from graphcache.cli.targets import TargetCall
from graphcache.cli.timing import RELATIVE
from graphcache.extras import optional


class OnnxRuntime:
    """An ONNX model under onnxruntime."""

    def __init__(self, path: Path) -> None:
        check_onnx(path)
        runtime = optional("onnxruntime", "comparing with onnxruntime")
        try:
            self._session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:
            raise click.ClickException(f"{path} does not run under onnxruntime: {one_line(error)}") from error
        self._path = path

    def difference(self, call: TargetCall, answer: Any) -> str | None:
        """How an answer differs from the model's, in one line; ``None`` if it does not.

        Floating values must agree to a thousandth of the largest: other kernels add in another order.
        """
        given = {name: tensor.detach().cpu().numpy() for name, tensor in call.inputs.items()}
        try:
            expected = [torch.as_tensor(each) for each in self._session.run(None, given)]
        except Exception as error:
            names = ", ".join(each.name for each in self._session.get_inputs())
            raise click.ClickException(
                f"{self._path} refused {call.label}: {one_line(error)}; its inputs are {names}"
            ) from error
        got = [leaf for leaf in pytree.tree_leaves(answer) if isinstance(leaf, Tensor)]
        if len(got) != len(expected):
            return f"{len(got)} outputs, onnxruntime gives {len(expected)}"
        for index, (one, other) in enumerate(zip(got, expected, strict=True)):
            scale = float(other.double().abs().nan_to_num().max()) if other.numel() else 0.0
            try:
                torch.testing.assert_close(
                    one.detach().cpu(), other, rtol=0, atol=RELATIVE * scale, equal_nan=True, check_stride=False
                )
            except AssertionError as error:
                return f"output {index}: {one_line(error)}"
        return None
