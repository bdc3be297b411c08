"""The CUDA driver through cuda-python: calls of it, each checked, by the driver's own names.

Nothing here is imported before a CUDA graph is made, so that a machine without CUDA needs no cuda-python.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from graphcache.errors import CudaError


@cache
def binding() -> Any:
    """``cuda.bindings.driver``."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise CudaError(f"CUDA graphs need cuda-python ({error}); pip install cuda-python") from error
    return driver


def call(name: str, *args: Any) -> Any:
    """Call a driver function: its one result, a tuple of several, or ``None``; raises :class:`CudaError` on failure."""
    code, *results = getattr(binding(), name)(*args)
    if int(code) != 0:
        raise failure(name, code)
    return None if not results else results[0] if len(results) == 1 else tuple(results)


def addresses(*names: str) -> tuple[int, ...]:
    """Addresses of driver functions, as the C interface of CUDA 12 declares them, for compiled code."""
    found = []
    for name in names:
        # 12.0 is where CUDA_KERNEL_NODE_PARAMS became what it is; 1 leaves out the per-thread default stream.
        flags = int(binding().CUdriverProcAddress_flags.CU_GET_PROC_ADDRESS_LEGACY_STREAM)
        address, _ = call("cuGetProcAddress", name.encode(), 12000, flags)
        if not int(address):
            raise CudaError(f"the driver has no function {name}; graphcache needs one for CUDA 12.0 or later")
        found.append(int(address))
    return tuple(found)


def is_capturing(stream: int) -> bool:
    """Whether a stream is being captured by anyone; ``stream`` is a raw handle, 0 for the legacy default stream."""
    driver = binding()
    code, status = driver.cuStreamIsCapturing(stream)
    if code == driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT:
        # The legacy stream, while a stream that synchronises with it is being captured.
        return True
    if int(code) != 0:
        raise failure("cuStreamIsCapturing", code)
    return bool(status != driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE)


def end_capture(stream: Any) -> Any:
    """End a capture: the graph, or ``None`` if the capture was invalidated. The stream is usable again either way."""
    driver = binding()
    code, graph = driver.cuStreamEndCapture(stream)
    if int(code) == 0:
        return graph
    results = driver.CUresult
    if code not in (results.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, results.CUDA_ERROR_STREAM_CAPTURE_UNJOINED):
        raise failure("cuStreamEndCapture", code)
    if graph is not None and int(graph):
        driver.cuGraphDestroy(graph)
    return None


def is_finished(query: str, handle: Any) -> bool:
    """Whether a stream or event has finished (``cuStreamQuery``, ``cuEventQuery``), without waiting for it."""
    (code,) = getattr(binding(), query)(handle)
    if code == binding().CUresult.CUDA_ERROR_NOT_READY:
        return False
    if int(code) != 0:
        raise failure(query, code)
    return True


def new_event() -> Any:
    """An event without timing, which is cheaper to record."""
    return call("cuEventCreate", binding().CUevent_flags.CU_EVENT_DISABLE_TIMING)


@contextmanager
def on_device(index: int) -> Iterator[None]:
    """Inside, the current context, whose stream 0 and events are meant, is the one that torch uses for a device."""
    call("cuCtxPushCurrent", primary_context(index))
    try:
        yield
    finally:
        call("cuCtxPopCurrent")


def is_current(index: int) -> bool:
    """Whether the current context is the one that torch uses for a device."""
    code, context = binding().cuCtxGetCurrent()
    return not int(code) and int(context) == int(primary_context(index))


@cache
def primary_context(index: int) -> Any:
    """The ``CUcontext`` that torch, like everything of the CUDA runtime, uses for a device; kept for good."""
    return call("cuDevicePrimaryCtxRetain", call("cuDeviceGet", index))


def total_memory(index: int) -> int:
    """The memory of a device, in bytes."""
    return int(call("cuDeviceTotalMem", call("cuDeviceGet", index)))


def failure(name: str, code: Any) -> CudaError:
    """The error to raise when a driver function returned ``code``, a ``CUresult`` or its number."""
    try:
        known = binding().CUresult(int(code)).name
    except ValueError:
        return CudaError(f"{name} failed with code {code}, which this cuda-python does not know")
    return CudaError(f"{name} failed with {known} ({int(code)}){_HINTS.get(known, '')}")


_LOST = "; an earlier kernel of this process failed and the CUDA context is lost: restart the process"
_NO_CUDA = (
    "; CUDA does not work in this process: if it was forked after CUDA had been used, start processes with "
    "multiprocessing's 'spawn' method; if it is ending, call nothing any more"
)
_HINTS = {
    "CUDA_ERROR_ILLEGAL_ADDRESS": _LOST,
    "CUDA_ERROR_LAUNCH_FAILED": _LOST,
    "CUDA_ERROR_NOT_INITIALIZED": _NO_CUDA,
    "CUDA_ERROR_DEINITIALIZED": _NO_CUDA,
    "CUDA_ERROR_OUT_OF_MEMORY": "; lower max_graphs or max_bytes, or free device memory",
}
"""What to do about an error."""
