"""The tensors of a model as one part of a package, by way of safetensors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def written(tensors: Mapping[str, Tensor]) -> bytes:
    """Named tensors as safetensors holds them; those that share memory are written out one by one.

    Example:
        >>> import torch
        >>> read(written({"w": torch.ones(2).half()}))["w"]
        tensor([1., 1.], dtype=torch.float16)
    """
    from safetensors.torch import save

    return save({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()})


def read(data: bytes) -> dict[str, Tensor]:
    """The tensors that :func:`written` wrote, on the CPU.

    Raises:
        ValueError: If that is not what it wrote.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except (SafetensorError, KeyError, AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from error
