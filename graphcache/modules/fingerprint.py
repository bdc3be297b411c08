"""What must be the same for what was measured in one process to mean anything in another."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterator
from functools import cache

import torch
from torch import nn

from graphcache.errors import CudaError
from graphcache.graphs import driver
from graphcache.modules.engine import EngineModule
from graphcache.version import __version__

_VERSION = re.compile(r"\d{3,}\.\d+(?:\.\d+)?")
_SAID_BY_DRIVER = "/proc/driver/nvidia/version"


def environment(module: nn.Module) -> dict[str, str]:
    """The environment of a module, by name: the module itself, the device, the driver, versions.

    An engine is known by the bytes of its file, any other module by its classes and the names, shapes and dtypes of its
    parameters and buffers: retrained weights are the same module.

    Args:
        module: The module, not wrapped.

    Example:
        >>> one, other = (environment(nn.Linear(2, width)) for width in (3, 4))
        >>> [name for name in one if one[name] != other[name]]
        ['module']
    """
    device = device_of(module)
    found = {"module": _digest(module), "graphcache": __version__, "torch": str(torch.__version__)}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["driver"] = _driver()
    else:
        found["device"] = f"{device.type}, {platform.machine()}"
    for engine in _engines(module):
        library = engine.engine.library
        found[library.flavour] = library.version
    return found


def device_of(module: nn.Module) -> torch.device:
    """Where a module's calls run: an engine's device, that of the first parameter or buffer, else CUDA if there is one.

    Example:
        >>> device_of(nn.Linear(2, 3))
        device(type='cpu')
    """
    for engine in _engines(module):
        return torch.device(engine.device)
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _engines(module: nn.Module) -> Iterator[EngineModule]:
    return (each for each in module.modules() if isinstance(each, EngineModule))


def _digest(module: nn.Module) -> str:
    found = hashlib.sha256()
    for name, each in module.named_modules():
        found.update(f"{name}\0{type(each).__qualname__}\0".encode("utf-8", "backslashreplace"))
        if isinstance(each, EngineModule):
            found.update(hashlib.sha256(each.serialized_engine).digest())
        for table in (each._parameters, each._buffers):
            for own, tensor in table.items():
                # A lazy parameter has no shape yet.
                shape = getattr(tensor, "shape", None) if not nn.parameter.is_lazy(tensor) else "lazy"
                told = f"{own}\0{shape}\0{getattr(tensor, 'dtype', None)}\0"
                found.update(told.encode("utf-8", "backslashreplace"))
    return f"{type(module).__qualname__[:200]} {found.hexdigest()}"


@cache
def _driver() -> str:
    """The driver's own version where the system tells, and the newest CUDA that it serves."""
    told = []
    try:
        with open(_SAID_BY_DRIVER, encoding="utf-8", errors="replace") as file:
            told += _VERSION.findall(file.readline())[:1]
    except OSError:
        pass
    try:
        serves = driver.call("cuDriverGetVersion")
        told.append(f"CUDA {serves // 1000}.{serves % 1000 // 10}")
    except CudaError:
        pass
    return ", ".join(told) or "unknown"
