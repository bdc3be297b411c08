"""The kernel of copy nodes: it moves several small tensors at once.

A node that the driver makes of a copy moves one tensor, and pointing it elsewhere takes the host twice as long as
pointing a kernel (1.3 against 0.6 µs for an input and an output, H200, driver 580): the driver checks the memory anew.

The kernel is written in PTX, which the driver translates for whatever device there is: neither a compiler nor a library
of CUDA is needed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

import torch

from graphcache.errors import CudaError
from graphcache.events import log
from graphcache.graphs import driver

MOST = 8
"""How many copies one launch makes."""

LARGEST = 256 * 1024
"""Bytes; what is larger is left to the driver's own copies, next to which pointing them costs little."""

Copies = ctypes.c_uint64 * (3 * MOST)
"""The kernel's only argument: from, to and the number of bytes, for each copy."""

_THREADS = 256
"""Of a block."""

_WAITS = (9, 0)
"""The least compute capability at which a kernel can be launched while the one before still runs, and wait for it."""

_PTX = """
.version {version}
.target {target}
.address_size 64
{entries}
"""

_SOURCE = Path(__file__).with_name("copy_kernel.ptx")
"""A row of blocks for each copy, 16 bytes at a time and a rest of single bytes, or 4 at a time, or single bytes: the
alignment of addresses may change with every launch."""


@dataclass(frozen=True, slots=True)
class CopyKernel:
    """The kernel, loaded on one device."""

    function: Any
    """A ``CUfunction``."""
    waits: bool
    """Whether it waits by itself for what comes before it, so that it may begin earlier."""

    def launch(self, copies: Sequence[tuple[int, int, int]], stream: int) -> None:
        """Enqueue at most :data:`MOST` copies (to, from, number of bytes), of which none reads what another writes."""
        values = Copies()
        for index, (to, source, nbytes) in enumerate(copies):
            values[3 * index : 3 * index + 3] = [source, to, nbytes]
        # Enough threads for 4 bytes each: a loop would wait for memory in every turn.
        grid = -(-max(nbytes for _, _, nbytes in copies) // (4 * _THREADS)), len(copies), 1
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(values))
        driver.call("cuLaunchKernel", self.function, *grid, _THREADS, 1, 1, 0, stream, ctypes.addressof(arguments), 0)


@dataclass(frozen=True, slots=True)
class CopyKernels:
    """The kernels of one device: for copies before some work, and for copies after it."""

    before: CopyKernel
    after: CopyKernel

    def __contains__(self, function: int) -> bool:
        return function in (int(self.before.function), int(self.after.function))


@cache
def copy_kernels(index: int) -> CopyKernels | None:
    """The kernels, kept for good; ``None`` if the driver refuses them: its own copies do too.

    Not to be called within a capture, which loading code might break.
    """
    waits = torch.cuda.get_device_capability(index) >= _WAITS
    try:
        with driver.on_device(index):
            module = driver.call("cuModuleLoadData", ptx(waits).encode() + b"\0")
            before = after = CopyKernel(driver.call("cuModuleGetFunction", module, b"graphcache_copy"), waits=False)
            if waits:
                after = CopyKernel(driver.call("cuModuleGetFunction", module, b"graphcache_copy_after"), waits=True)
            return CopyKernels(before, after)
    except CudaError as error:
        log.debug("copies are the driver's own on device %d: %s", index, error)
        return None


def ptx(waits: bool) -> str:
    """The source; ``graphcache_copy_after`` needs compute capability 9.0."""
    entry, nbytes = Template("\n" + _SOURCE.read_text(encoding="ascii")), ctypes.sizeof(Copies)
    entries = entry.substitute(name="graphcache_copy", nbytes=nbytes, wait="")
    if waits:
        entries += entry.substitute(name="graphcache_copy_after", nbytes=nbytes, wait="griddepcontrol.wait;")
    version, target = ("7.8", "sm_90") if waits else ("6.3", "sm_75")
    return _PTX.format(version=version, target=target, entries=entries)
