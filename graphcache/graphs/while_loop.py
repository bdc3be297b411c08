"""A loop on the device: a WHILE node around a captured graph, so that one launch runs many steps."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphcache.errors import CudaError
from graphcache.graphs import driver
from graphcache.graphs.buffers import extent_of
from graphcache.graphs.cuda import CudaGraph
from graphcache.graphs.param_patching import nodes_of

_SOURCE = rb"""
extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional(cudaGraphConditionalHandle, unsigned int);

struct Moves {
  struct {
    const char *source;
    char *target;
    unsigned long long bytes, stride;  // the stride is how far apart the targets of two steps are
  } at[MOST_MOVES];
};

// Runs after a step, or after several that move nothing: copies what is fed back and what is collected. The block that
// ends last counts the steps, and says whether there are more.
extern "C" __global__ void advance(cudaGraphConditionalHandle loop, Moves moves, unsigned int count, const char *until,
                                   unsigned int until_bytes, unsigned int *state, unsigned int ran,
                                   unsigned int steps) {
  const unsigned int step = state[0];
  const size_t first = blockIdx.x * (size_t)blockDim.x + threadIdx.x, threads = gridDim.x * (size_t)blockDim.x;
  int ends = step + ran >= steps;
  if (threadIdx.x == 0)
    for (unsigned int i = 0; i < until_bytes; ++i) ends |= until[i];
  for (unsigned int i = 0; i < count; ++i) {
    const char *source = moves.at[i].source;
    char *target = moves.at[i].target + step * moves.at[i].stride;
    const size_t bytes = moves.at[i].bytes;
    if ((((size_t)source | (size_t)target | bytes) & 15) == 0)
      for (size_t at = first; at < bytes / 16; at += threads) ((uint4 *)target)[at] = ((const uint4 *)source)[at];
    else
      for (size_t at = first; at < bytes; at += threads) target[at] = source[at];
  }
  if (gridDim.x > 1) {
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence();
    if (atomicAdd(state + 1, 1) + 1 < gridDim.x) return;
    state[1] = 0;
  } else {
    __syncthreads();
    if (threadIdx.x != 0) return;
  }
  state[0] = step + ran;
  cudaGraphSetConditional(loop, ends == 0);
}
"""
_THREADS, _MOST_BLOCKS, _MOST_MOVES = 256, 64, 32
_MOST_UNROLLED, _MOST_NODES = 8, 512
"""Steps in one iteration of the WHILE node, and their nodes: an iteration costs the device a few µs of its own."""


class Move(NamedTuple):
    """A copy after each step, byte by byte, of tensors whose elements fill one block of memory in the same way."""

    source: Tensor
    target: Tensor
    by_step: bool
    """Whether the target has a row for each step, and not one place for all."""


def while_loop(step: CudaGraph, moves: Sequence[Move], until: Tensor | None, steps: int) -> tuple[CudaGraph, Tensor]:
    """A graph that runs ``step`` on its static buffers ``steps`` times, or until a byte of ``until`` is not 0.

    The second result is a tensor on the device with the number of steps that were run. :class:`CudaError` says why
    there is no such graph; ``step`` must be closed after it.
    """
    index, api = step.index, driver.binding()
    allowed = {"KERNEL", "MEMCPY", "MEMSET", "GRAPH", "CONDITIONAL", "EMPTY"}
    pinned = step.as_pinned()
    for _, kind in nodes_of(pinned):
        if (name := kind.name.removeprefix("CU_GRAPH_NODE_TYPE_")) not in allowed:
            raise CudaError(f"a loop on the device cannot hold a node of kind {name}")
    if len(moves) > _MOST_MOVES:
        raise CudaError(f"a loop on the device copies at most {_MOST_MOVES} tensors after a step, not {len(moves)}")
    # The steps that were run, and how many blocks have ended in this one.
    state = torch.zeros(2, dtype=torch.int32, device=torch.device("cuda", index))
    # The graph may be launched on a stream that does not follow the current one.
    torch.cuda.synchronize(index)
    with ExitStack() as undo, driver.on_device(index):
        context = driver.primary_context(index)
        graph = driver.call("cuGraphCreate", 0)
        undo.callback(driver.call, "cuGraphDestroy", graph)
        begin = api.CUDA_MEMSET_NODE_PARAMS()
        begin.dst, begin.value, begin.elementSize, begin.width, begin.height = state.data_ptr(), 0, 4, 2, 1
        first = driver.call("cuGraphAddMemsetNode", graph, [], 0, begin, context)
        handle = driver.call("cuGraphConditionalHandleCreate", graph, context, 1, int(api.CU_GRAPH_COND_ASSIGN_DEFAULT))
        loop = api.CUgraphNodeParams()
        loop.type = api.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        loop.conditional.handle, loop.conditional.size, loop.conditional.ctx = handle, 1, context
        loop.conditional.type = api.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE
        # cuda-python 12 gives the function with edge data a name of its own.
        add = "cuGraphAddNode_v2" if hasattr(api, "cuGraphAddNode_v2") else "cuGraphAddNode"
        driver.call(add, graph, [first], None, 1, loop)
        body = loop.conditional.phGraph_out[0]
        unrolled = 1 if until is not None else _unrolled(steps, step.nodes)
        kernel, arguments = _advance(index, int(handle), moves, until, state, 1 if moves else unrolled, steps)
        last: list[Any] = []
        for number in range(1, unrolled + 1):
            last = [driver.call("cuGraphAddChildGraphNode", body, last, len(last), pinned)]
            if moves or number == unrolled:
                last = [driver.call("cuGraphAddKernelNode", body, last, 1, kernel)]
        # The nodes have copies of them.
        del arguments
        undo.pop_all()
    keep = (step, state, until, *moves)
    made = CudaGraph(graph, inputs=(), outputs=(), order=step.order, keep=keep, release=lambda: None)
    return made, state[0]


def _unrolled(steps: int, nodes: int) -> int:
    """How many steps one iteration of the WHILE node has, which divide all steps."""
    most = max(1, min(_MOST_UNROLLED, _MOST_NODES // nodes))
    return max(many for many in range(1, most + 1) if steps % many == 0)


def _advance(
    index: int, loop: int, moves: Sequence[Move], until: Tensor | None, state: Tensor, ran: int, steps: int
) -> tuple[Any, Any]:
    """The parameters of a node of the kernel, and what they refer to."""
    sizes = [extent_of(move.source) for move in moves]
    table = (ctypes.c_uint64 * (4 * _MOST_MOVES))()
    for place, (move, nbytes) in enumerate(zip(moves, sizes, strict=True)):
        row = move.source.data_ptr(), move.target.data_ptr(), nbytes, nbytes * move.by_step
        for column, word in enumerate(row):
            table[4 * place + column] = word
    arguments = (
        *(ctypes.c_uint64(loop), table, ctypes.c_uint32(len(moves))),
        ctypes.c_uint64(0 if until is None else until.data_ptr()),
        ctypes.c_uint32(0 if until is None else extent_of(until)),
        *(ctypes.c_uint64(state.data_ptr()), ctypes.c_uint32(ran), ctypes.c_uint32(steps)),
    )
    addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
    kernel = driver.binding().CUDA_KERNEL_NODE_PARAMS()
    kernel.func, kernel.kernelParams = _kernel(index), ctypes.addressof(addresses)
    blocks = min(max(1, -(-max(sizes, default=0) // (16 * _THREADS))), _MOST_BLOCKS)
    kernel.gridDimX, kernel.blockDimX = blocks, _THREADS
    kernel.gridDimY = kernel.gridDimZ = kernel.blockDimY = kernel.blockDimZ = 1
    return kernel, (arguments, addresses)


@cache
def _kernel(index: int) -> Any:
    """The kernel after each step, compiled for a device: some 30 ms in a process."""
    module = driver.call("cuModuleLoadData", _compiled(*torch.cuda.get_device_capability(index)))
    return driver.call("cuModuleGetFunction", module, b"advance")


def _compiled(major: int, minor: int) -> bytes:
    """The kernel in machine code; :class:`CudaError` says why NVRTC makes none."""
    try:
        from cuda.bindings import nvrtc

        _, program = nvrtc.nvrtcCreateProgram(_SOURCE, b"advance.cu", 0, [], [])
        options = [f"--gpu-architecture=sm_{major}{minor}".encode(), f"-DMOST_MOVES={_MOST_MOVES}".encode()]
        (code,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        text = b" " * size
        nvrtc.nvrtcGetProgramLog(program, text)
    except (ImportError, RuntimeError) as error:
        raise CudaError(f"a loop on the device needs NVRTC ({error}); pip install nvidia-cuda-nvrtc") from error
    if int(code):
        raise CudaError(f"NVRTC does not compile the kernel of a loop: {text.decode(errors='replace').strip()}")
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    found: bytes = b" " * size
    nvrtc.nvrtcGetCUBIN(program, found)
    return found
