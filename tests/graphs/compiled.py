"""The compiled library over the stand-in for the driver: its functions as C functions, and what has to be put where."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from graphcache import native
from graphcache.cache.graph_cache import Entry
from graphcache.capture.recording import Recording
from graphcache.dispatch import fast_path
from graphcache.graphs import driver as room
from graphcache.graphs.cuda import CudaGraph
from tests.graphs.fake_driver import (
    CUDA_GRAPH_INSTANTIATE_PARAMS,
    CUDA_KERNEL_NODE_PARAMS,
    CUDA_MEMCPY3D,
    CUcontext,
    Driver,
    Torch,
)

_u64, _int = ctypes.c_uint64, ctypes.c_int


class Functions:
    """Seven functions of the stand-in at addresses that C code can call.

    What one of them raises cannot pass through C: it is kept in ``raised``, and the answer is an unknown error.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.raised: list[BaseException] = []
        self._kept = [
            ctypes.CFUNCTYPE(_int, _u64, _u64)(self._launch),
            ctypes.CFUNCTYPE(_int, _u64, _u64, _u64)(self._set_kernel),
            ctypes.CFUNCTYPE(_int, _u64, _u64, _u64, _u64)(self._set_copy),
            ctypes.CFUNCTYPE(_int, _u64, ctypes.POINTER(_int))(self._is_capturing),
            ctypes.CFUNCTYPE(_int, ctypes.POINTER(_u64))(self._current_context),
            ctypes.CFUNCTYPE(_int, ctypes.POINTER(_u64), _u64, _u64)(self._instantiate),
            ctypes.CFUNCTYPE(_int, _u64)(self._destroy),
        ]
        self.addresses = tuple(ctypes.cast(function, ctypes.c_void_p).value for function in self._kept)

    def _launch(self, executable: int, stream: int) -> int:
        return self._answer(self._driver.cuGraphLaunch, executable, stream)

    def _set_kernel(self, executable: int, node: int, params: int) -> int:
        given = _struct(CUDA_KERNEL_NODE_PARAMS, params)
        return self._answer(self._driver.cuGraphExecKernelNodeSetParams, executable, node, given)

    def _set_copy(self, executable: int, node: int, params: int, context: int) -> int:
        given = _struct(CUDA_MEMCPY3D, params)
        return self._answer(self._driver.cuGraphExecMemcpyNodeSetParams, executable, node, given, CUcontext(context))

    def _is_capturing(self, stream: int, status: Any) -> int:
        status[0] = int(self._driver.streams[stream].capture is not None)
        return 0

    def _current_context(self, context: Any) -> int:
        context[0] = int(self._driver.cuCtxGetCurrent()[1])
        return 0

    def _instantiate(self, executable: Any, graph: int, params: int) -> int:
        made: list[Any] = []

        def instantiate(*args: Any) -> Any:
            code, handle = self._driver.cuGraphInstantiateWithParams(*args)
            made.append(handle)
            return (code,)

        code = self._answer(instantiate, graph, _struct(CUDA_GRAPH_INSTANTIATE_PARAMS, params))
        if not code:
            executable[0] = int(made[0])
        return code

    def _destroy(self, executable: int) -> int:
        return self._answer(self._driver.cuGraphExecDestroy, executable)

    def _answer(self, function: Callable[..., Any], *args: Any) -> int:
        try:
            return int(function(*args)[0])
        except BaseException as error:
            self.raised.append(error)
            return 999


def _struct(kind: Any, address: int) -> Any:
    made = kind.__new__(kind)
    object.__setattr__(made, "_raw", kind._raw_class.from_address(address))
    return made


def use(library: Any, fake: Torch, patch: pytest.MonkeyPatch) -> Functions:
    """Let wrapped modules use the library, over a stand-in that is installed."""
    functions = Functions(fake.driver)
    patch.setattr(native, "loaded", lambda wait=False: library)
    patch.setattr(room, "addresses", lambda *names: functions.addresses)
    patch.setattr(fast_path, "raw_stream", fake.raw_stream)
    return functions


def single(graph: CudaGraph, *layouts: Tensor) -> tuple[Callable[..., Any], Callable[..., bool], Any]:
    """What replays a graph of one input in native code, for tensors like some; and the entry it counts in.

    The stream is the current one, which the tests give too.
    """
    table = fast_path.new_table()
    entry: Entry[Recording] = Entry(Recording(graph, lambda outputs, _: outputs[0], 0, whole=True, bare=True))
    for inference in (False, True):
        with torch.inference_mode(inference), torch.no_grad():
            for x in layouts:
                fast_path.put(table, (x,), entry)

    def fire(x: Tensor, stream: int) -> Any:
        with torch.no_grad():
            return table.call((x,))

    def into(x: Tensor, out: Tensor, stream: int) -> bool:
        with torch.no_grad():
            written: bool = table.into(out, (x,))
            return written

    return fire, into, SimpleNamespace(entry=entry, table=table)


def call(graph: CudaGraph, *given: Tensor) -> Callable[[list[Tensor]], list[Tensor]]:
    """What replays a graph of any number of inputs, compiled, for tensors like those given."""
    table = fast_path.new_table()
    fast_path.put(table, given, Entry(Recording(graph, lambda outputs, _: outputs, 0, whole=True, bare=False)))

    def replay(inputs: list[Tensor]) -> list[Tensor]:
        answer: list[Tensor] | None = table.call(tuple(inputs))
        assert answer is not None, "it is answered by compiled code"
        return answer

    return replay
