"""Optional packages, imported where they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from graphcache.errors import ExtraNotFoundError

EXTRAS = {
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "plots": ("jinja2", "matplotlib"),
    "metrics": ("prometheus_client",),
    "tensors": ("safetensors",),
    "nvtx": ("nvtx",),
    "ray": ("ray",),
}
"""The modules of each extra, but for those that install TensorRT."""


def optional(module: str, purpose: str) -> Any:
    """Import a module of an extra, or one below it.

    Args:
        module: Its dotted name.
        purpose: What it is needed for, for the message.

    Raises:
        ExtraNotFoundError: If its package is not installed.

    Example:
        >>> optional("prometheus_client.nothing_there", "an example")
        Traceback (most recent call last):
        graphcache.errors.ExtraNotFoundError: an example needs prometheus_client...pip install "graphcache[metrics]"
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        extra = next((name for name, modules in EXTRAS.items() if package in modules), None)
        how = f'pip install "graphcache[{extra}]"' if extra else f"pip install {package}"
        raise ExtraNotFoundError(f"{purpose} needs {package} ({error}); {how}", name=package) from error
