"""The floor and the common alternative: graphs captured by hand, without graphcache's cache, copies or checks."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class Recorded:
    """An engine's call with an execution context and buffers of its own, ready to be captured, by either way or both.

    Args:
        module: A ``graphcache`` engine module. The context comes from its engine, so that kernels are the same ones.
        inputs: Inputs on the device; their shapes are captured, their values copied.
        scratch: At least ``module.engine.scratch_bytes`` bytes on the device; may be shared between calls that follow
            one another.

    Raises:
        RuntimeError: If TensorRT refuses the shapes, an address or the enqueue.
    """

    def __init__(self, module: Any, inputs: Sequence[Tensor], scratch: Tensor) -> None:
        engine = module.engine
        self._keep = (engine, scratch)
        self._context = engine.new_context()
        if engine.scratch_bytes:
            self._context.set_device_memory(scratch.data_ptr(), scratch.numel())
        self.inputs = [value.clone() for value in inputs]
        for binding, value in zip(engine.inputs, self.inputs, strict=True):
            _require(self._context.set_input_shape(binding.name, tuple(value.shape)), f"shape of {binding.name}")
            _require(self._context.set_tensor_address(binding.name, value.data_ptr()), f"address of {binding.name}")
        self.outputs = []
        for binding in engine.outputs:
            shape = tuple(self._context.get_tensor_shape(binding.name))
            self.outputs.append(torch.empty(shape, dtype=binding.dtype, device=module.device))
            address = self.outputs[-1].data_ptr()
            _require(self._context.set_tensor_address(binding.name, address), f"address of {binding.name}")
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        # The first enqueues of a shape compile and allocate, which a capture does not allow.
        for _ in range(2):
            self.enqueue()
        self.stream.synchronize()

    def enqueue(self) -> None:
        """Enqueue the engine on this call's stream.

        Raises:
            RuntimeError: If TensorRT refuses.
        """
        _require(self._context.execute_async_v3(self.stream.cuda_stream), "the enqueue")


@dataclass(frozen=True)
class Launchable:
    """A captured graph.

    Args:
        launch: Launches it and does nothing else.
        nodes: How many nodes it has.
        close: Destroys it; no launch may be under way.
    """

    launch: Callable[[], object]
    nodes: int
    close: Callable[[], object]


class Enqueues(Protocol):
    """What can be captured: work that was enqueued before, with the same shapes."""

    @property
    def stream(self) -> torch.cuda.Stream:
        """Where to, any but the legacy stream."""

    def enqueue(self) -> None:
        """Enqueue it once more."""


def driver_graph(call: Enqueues) -> Launchable:
    """Capture a call with the CUDA driver, to be launched by ``cuGraphLaunch`` on the stream that is current now.

    It is launched once, and waited for.

    Raises:
        RuntimeError: If a driver call fails.
    """
    from cuda.bindings import driver

    capture = driver.CUstream(call.stream.cuda_stream)
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    _check(driver.cuStreamBeginCapture(capture, mode))
    try:
        call.enqueue()
    finally:
        graph = _check(driver.cuStreamEndCapture(capture))
    try:
        return _launchable(graph, call.stream)
    finally:
        _check(driver.cuGraphDestroy(graph))


@contextmanager
def own_workspaces() -> Iterator[None]:
    """Captures inside allocate the workspaces of cuBLAS in their own memory pools, where nobody can take them away.

    PyTorch keeps a workspace per stream (32 MiB on an H100), and a capture writes down the address of the one that it
    finds. A warm-up leaves one in the pool of all tensors. It is given back as soon as anybody calls
    ``torch._C._cuda_clearCublasWorkspaces``, which clears those of every stream: graphcache does so before and after it
    captures a torch module, and so does ``torch.compile(mode="reduce-overhead")``. The graph's kernels then write into
    memory of others, or, after ``torch.cuda.empty_cache()``, into none: ``CUDA_ERROR_ILLEGAL_ADDRESS``, from which a
    process does not recover. That is a fault of those who clear what is not theirs, graphcache among them; a floor that
    takes turns with them has to stand it.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        # The next capture on this stream, of which PyTorch has 32, must not find what belongs to this one.
        torch._C._cuda_clearCublasWorkspaces()


class RecordedModule:
    """A torch module's call with buffers of its own, captured by PyTorch and launched by the driver.

    Args:
        module: On the device, without gradients.
        inputs: Inputs on the device; their shapes are captured, their values copied.
    """

    def __init__(self, module: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        self.inputs = [value.clone() for value in inputs]
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            # What libraries allocate and choose at their first calls does not belong into the capture.
            for _ in range(3):
                module(*self.inputs)
        self.stream.synchronize()
        # Kept for its memory, which is its own until this object is gone, and so that what is instantiated here is the
        # graph as it was captured.
        self._captured = torch.cuda.CUDAGraph(keep_graph=True)
        with (
            own_workspaces(),
            torch.cuda.graph(self._captured, stream=self.stream, capture_error_mode="thread_local"),
        ):
            self.outputs = [module(*self.inputs)]

    def replay(self) -> None:
        """Replay it as PyTorch does, on the stream that is current."""
        self._captured.replay()

    def graph(self) -> Launchable:
        """The graph, to be launched on the stream that is current now.

        Raises:
            RuntimeError: If a driver call fails.
        """
        from cuda.bindings import driver

        return _launchable(driver.CUgraph(self._captured.raw_cuda_graph()), self.stream)


def _launchable(graph: Any, capture_stream: torch.cuda.Stream) -> Launchable:
    from cuda.bindings import driver

    nodes = int(_check(driver.cuGraphGetNodes(graph, 0))[1])
    _require(nodes > 0, "a capture with nodes in it")
    params = driver.CUDA_GRAPH_INSTANTIATE_PARAMS()
    params.flags = int(driver.CUgraphInstantiate_flags.CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD)
    params.hUploadStream = driver.CUstream(capture_stream.cuda_stream)
    executable = _check(driver.cuGraphInstantiateWithParams(graph, params))
    capture_stream.synchronize()
    stream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
    # Timed launches are not checked one by one; this one stands for them, and their answers are compared.
    _check(driver.cuGraphLaunch(executable, stream))
    torch.cuda.synchronize()
    return Launchable(
        partial(driver.cuGraphLaunch, executable, stream), nodes, partial(driver.cuGraphExecDestroy, executable)
    )


def torch_graph(call: Recorded) -> Callable[[], object]:
    """Capture a call with PyTorch; the function returned is ``torch.cuda.CUDAGraph.replay``."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=call.stream, capture_error_mode="thread_local"):
        call.enqueue()
    return graph.replay


def _require(done: object, what: str) -> None:
    if not done:
        raise RuntimeError(f"TensorRT or the driver refused {what}")


def _check(result: Any) -> Any:
    code, *values = result
    if int(code) != 0:
        raise RuntimeError(f"the CUDA driver failed with {code.name}")
    return values[0] if len(values) == 1 else tuple(values)
