"""What this machine has: driver, devices, packages, and the variables that graphcache reads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any, get_args

import torch

import graphcache
from graphcache.engines.library import Flavour, library
from graphcache.errors import CudaError, GraphCacheError
from graphcache.extras import EXTRAS
from graphcache.graphs import driver

_DISTRIBUTIONS = {"prometheus_client": "prometheus-client"}
VARIABLES = (
    "GRAPHCACHE_DISABLE",
    "GRAPHCACHE_MAX_GRAPHS",
    "GRAPHCACHE_MAX_BYTES",
    "GRAPHCACHE_PROCESS_MAX_BYTES",
    "GRAPHCACHE_NATIVE",
    "GRAPHCACHE_TENSORRT",
    "GRAPHCACHE_CACHE_DIR",
    "GRAPHCACHE_CACHE_MAX_BYTES",
    "GRAPHCACHE_SERVE_TOKEN",
)
_SECRET = frozenset({"GRAPHCACHE_SERVE_TOKEN"})
"""Told as set, and no more: what this prints ends in reports of problems."""


def machine() -> dict[str, Any]:
    """Everything that a report of a problem needs; ``None`` for what is not here."""
    try:
        used = library()
        tensorrt: str | None = f"{used.flavour} {used.version}"
    except GraphCacheError:
        tensorrt = None
    return {
        "graphcache": graphcache.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cuda_python": version_of("cuda-bindings"),
        "driver": driver_version(),
        "driver_cuda": served_cuda(),
        "devices": [
            f"{torch.cuda.get_device_name(index)}, compute capability "
            f"{'.'.join(map(str, torch.cuda.get_device_capability(index)))}"
            for index in range(torch.cuda.device_count())
        ],
        "tensorrt": tensorrt,
        "tensorrt_installed": [flavour for flavour in get_args(Flavour) if version_of(flavour) is not None],
        "extras": {
            name: {module: version_of(_DISTRIBUTIONS.get(module, module)) for module in modules}
            for name, modules in EXTRAS.items()
        },
        "variables": {
            name: "(set)" if name in _SECRET else os.environ[name] for name in VARIABLES if name in os.environ
        },
    }


def driver_version() -> str | None:
    """The version of NVIDIA's kernel driver, such as ``"580.65.06"``; ``None`` where there is none or it is not told.

    Linux alone tells it without a library of NVIDIA's.
    """
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else None


def served_cuda() -> str | None:
    """The newest CUDA that the driver serves, such as ``"13.0"``; ``None`` without a driver."""
    if not torch.cuda.is_available():
        return None
    try:
        version = driver.call("cuDriverGetVersion")
    except CudaError:
        return None
    return f"{version // 1000}.{version % 1000 // 10}"


def version_of(distribution: str) -> str | None:
    """The installed version of a package, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
