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
    """Import a module of an extra, or one below it; ``purpose`` says what for, in the error if it is not installed."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        extra = next((name for name, modules in EXTRAS.items() if package in modules), None)
        how = f'pip install "graphcache[{extra}]"' if extra else f"pip install {package}"
        raise ExtraNotFoundError(f"{purpose} needs {package} ({error}); {how}", name=package) from error
