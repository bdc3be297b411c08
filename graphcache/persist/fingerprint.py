"""The environment of a module: what must be the same for costs that were measured in one process to hold in another."""

from __future__ import annotations

import hashlib
import platform
import re
from functools import cache

import torch
from torch import nn

from graphcache.errors import CudaError
from graphcache.graphs import driver
from graphcache.modules.engine import EngineModule
from graphcache.modules.wrapped import device_of
from graphcache.version import __version__

_VERSION = re.compile(r"\d{3,}\.\d+(?:\.\d+)?")
_DRIVER_VERSION_FILE = "/proc/driver/nvidia/version"


def environment(module: nn.Module) -> dict[str, str]:
    """The environment of a module, by name: the module itself, the device, the driver, versions.

    An engine is known by the bytes of its file, any other module by its classes and the names, shapes and dtypes of its
    parameters and buffers: retrained weights are the same module.
    """
    device = device_of(module)
    found = {"module": _digest(module), "graphcache": __version__, "torch": str(torch.__version__)}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["driver"] = _driver()
    else:
        found["device"] = f"{device.type}, {platform.machine()}"
    for each in module.modules():
        if isinstance(each, EngineModule):
            found[each.engine.library.flavour] = each.engine.library.version
    return found


def _digest(module: nn.Module) -> str:
    """The class of a module, and a hash of its structure and its engines."""
    found = hashlib.sha256()

    def add(*values: object) -> None:
        found.update("".join(f"{value}\0" for value in values).encode("utf-8", "backslashreplace"))

    for name, each in module.named_modules():
        add(name, type(each).__qualname__)
        if isinstance(each, EngineModule):
            found.update(hashlib.sha256(each.serialized_engine).digest())
        for own, tensor in (*each._parameters.items(), *each._buffers.items()):
            # A lazy parameter has no shape yet.
            shape = "lazy" if nn.parameter.is_lazy(tensor) else getattr(tensor, "shape", None)
            add(own, shape, getattr(tensor, "dtype", None))
    return f"{type(module).__qualname__[:200]} {found.hexdigest()}"


@cache
def _driver() -> str:
    """The driver's own version where the system tells, and the newest CUDA that it supports."""
    versions = []
    try:
        with open(_DRIVER_VERSION_FILE, encoding="utf-8", errors="replace") as file:
            versions += _VERSION.findall(file.readline())[:1]
    except OSError:
        pass
    try:
        supported = driver.call("cuDriverGetVersion")
        versions.append(f"CUDA {supported // 1000}.{supported % 1000 // 10}")
    except CudaError:
        pass
    return ", ".join(versions) or "unknown"
