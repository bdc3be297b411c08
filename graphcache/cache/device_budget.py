"""The budget in bytes of each device of this process."""

from __future__ import annotations

import re
import threading

import torch

from graphcache.cache.graph_cache import DeviceBudget
from graphcache.config import number_in_environment
from graphcache.errors import ConfigError, shown

VARIABLE = "GRAPHCACHE_PROCESS_MAX_BYTES"

_DEVICE = re.compile(r"cpu|[a-z]+:\d{1,4}")

_budgets: dict[str, DeviceBudget] = {}
_default: list[int | None] = []
_lock = threading.Lock()


def budget_of(device: object) -> DeviceBudget:
    """The one budget of a device in this process.

    Example:
        >>> budget_of("cuda:0") is budget_of("cuda:0")
        True
    """
    name = str(device) if isinstance(device, (str, torch.device)) else ""
    if not _DEVICE.fullmatch(name):
        raise ConfigError(f"device={shown(device)}: expected 'cpu' or a device with its index, such as 'cuda:0'")
    with _lock:
        if name not in _budgets:
            _budgets[name] = DeviceBudget(_default[0] if _default else number_in_environment(VARIABLE))
        return _budgets[name]


def set_process_budget(max_bytes: int | None, *, device: object = None) -> None:
    """Bound what the graphs of all modules on a device may own together.

    Args:
        max_bytes: Bytes; ``None`` for no bound. Where it was never called, ``GRAPHCACHE_PROCESS_MAX_BYTES`` counts.
        device: Which device; ``None`` for each of them, those not used yet included.

    Raises:
        ConfigError: If ``max_bytes`` is not a whole number, 1 or more, or ``None``, or ``device`` is none.

    Example:
        >>> set_process_budget(256 * 2**20, device="cuda:7")
        >>> budget_of("cuda:7").max_bytes
        268435456
    """
    if max_bytes is not None and (isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1):
        raise ConfigError(f"max_bytes={shown(max_bytes)}: expected a whole number of bytes, 1 or more, or None")
    if device is not None:
        budget_of(device).set_budget(max_bytes)
        return
    with _lock:
        _default[:] = [max_bytes]
        found = list(_budgets.values())
    for each in found:
        each.set_budget(max_bytes)
