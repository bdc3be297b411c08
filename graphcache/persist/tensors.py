"""The tensors of a model as one part of a package, by way of safetensors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def write_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Named tensors in the format of safetensors; those that share memory are written out one by one.

    Example:
        >>> import torch
        >>> read_tensors(write_tensors({"w": torch.ones(2).half()}))["w"]
        tensor([1., 1.], dtype=torch.float16)
    """
    from safetensors.torch import save

    return save({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()})


def read_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors that :func:`write_tensors` wrote, on the CPU.

    Raises:
        ValueError: If the data is of another format, or damaged.
    """
    from safetensors.torch import load

    try:
        return load(data)
    except Exception as error:  # safetensors raises several kinds
        raise ValueError(" ".join(str(error).split())[:200]) from error
