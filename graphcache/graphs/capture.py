"""Capturing operations of PyTorch, copies around captured work, what holds meanwhile, and what a failure says."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops import utils as higher_order
from torch.cuda import graphs as torch_graphs

from graphcache.errors import CudaError, Reason, Refusal
from graphcache.graphs import driver
from graphcache.graphs.buffers import is_dense
from graphcache.graphs.cuda import IoSlot
from graphcache.graphs.param_patching import CannotBind, find_copies
from graphcache.graphs.stream_order import Enqueue, ProcessWide, StreamOrder, capture_enqueue


def capture_copying(
    capture: Callable[[Enqueue], Any],
    work: Callable[[int], Sequence[Tensor] | None],
    inputs: Sequence[Tensor],
    direct: Sequence[bool],
    expected: Sequence[Tensor],
    where: str,
    full_edges: bool,
) -> tuple[Any, list[IoSlot]]:
    """Capture work between nodes that copy its inputs and outputs, which can be pointed at the caller's tensors.

    ``work`` enqueues on a stream and returns its outputs, or ``None`` if that was refused; ``expected`` are those of an
    earlier run. An input is ``direct`` where the caller's tensor has the same layout, so that one plain copy moves it.
    With ``full_edges`` every kernel waits for the ones before it, however it was launched.
    """
    # What no plain copy moves is copied by an operation of its own, before or after the launch.
    pairs: list[tuple[Tensor, Tensor | None]] = [
        (static, torch.empty_like(static) if plain and is_dense(static) else None)
        for static, plain in zip(inputs, direct, strict=True)
    ]
    targets = [torch.empty_like(each) for each in expected]

    def enqueue(stream: int) -> bool:
        for static, source in pairs:
            if source is not None:
                _copy(static, source, stream)
        outputs = work(stream)
        if outputs is None:
            return False
        for own, target in zip(outputs, targets, strict=True):
            is_copied = is_dense(own) and own.stride() == target.stride()
            if is_copied:
                _copy(target, own, stream)
            pairs.append((own, target if is_copied else None))
        return True

    captured = capture(enqueue)
    with ExitStack() as undo:
        undo.callback(driver.call, "cuGraphDestroy", captured)
        if full_edges:
            make_all_full(captured)
        try:
            found = iter(find_copies(captured, [other for _, other in pairs if other is not None]))
        except CannotBind as why:
            raise Refusal(Reason.CAPTURE_FAILED, where, str(why)) from why
        slots = [IoSlot(own, next(found) if other is not None else [], 1) for own, other in pairs]
        undo.pop_all()
    return captured, slots


def _copy(target: Tensor, source: Tensor, stream: int) -> None:
    nbytes = target.numel() * target.element_size()
    driver.call("cuMemcpyDtoDAsync", target.data_ptr(), source.data_ptr(), nbytes, stream)


def record_torch(
    body: Callable[[], Sequence[Tensor]],
    inputs: Sequence[Tensor],
    direct: Sequence[bool],
    expected: Sequence[Tensor],
    order: StreamOrder,
    where: str,
    full_edges: bool,
) -> tuple[Any, list[IoSlot]]:
    """:func:`capture_copying` of PyTorch operations, and engines between them, which allocate in the order's pool."""
    # The capture is the driver's: one of torch.cuda.CUDAGraph that fails leaves the allocator and the random number
    # generator half way through (pytorch/pytorch#92684, #190348).

    def capture(enqueue: Enqueue) -> Any:
        # cuBLAS keeps a workspace per stream, which the next capture on this stream would find, in this order or
        # another, and lose when this order is closed (pytorch/pytorch#193402). So each capture starts and ends without
        # (the next product takes one again, 32 MiB on an H100), and finds it in the pool of its own order, for good.
        forget_workspaces()
        try:
            with torch.inference_mode(False), torch.no_grad(), order.pool().allocating():
                return capture_enqueue(enqueue, order, where)
        finally:
            forget_workspaces()

    return capture_copying(capture, lambda stream: body(), inputs, direct, expected, where, full_edges)


def forget_workspaces() -> None:
    """Give back the memory that cuBLAS works in; the next product on a stream takes it again (32 MiB on an H100)."""
    torch._C._cuda_clearCublasWorkspaces()


def make_all_full(graph: Any) -> None:
    """Let every node wait for the end of the nodes before it."""
    # Some kernels do not wait where they should: those of TensorRT-RTX on GPUs that it was not made for.
    *_, count = _call_with_edges("cuGraphGetEdges", graph, 0)
    if not count:
        return
    starts, ends, data, _ = _call_with_edges("cuGraphGetEdges", graph, count)
    # The end of a programmatic edge may begin before its start has ended (dependent launch).
    kind = int(driver.binding().CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC)
    every = zip(starts[:count], ends[:count], data[:count], strict=True)
    edges = [edge for edge in every if int(edge[2].type) == kind]
    for start, end, data in edges:
        _call_with_edges("cuGraphRemoveDependencies", graph, [start], [end], [data], 1)
    for start, end, _ in edges:
        _call_with_edges("cuGraphAddDependencies", graph, [start], [end], None, 1)


def _call_with_edges(name: str, *args: Any) -> Any:
    """Call the function that takes edge data, which cuda-python 12 names ``_v2``."""
    return driver.call(f"{name}_v2" if hasattr(driver.binding(), f"{name}_v2") else name, *args)


def refusal_of(error: BaseException, where: str) -> Refusal:
    """Why a capture failed, read from what CUDA and PyTorch say of it; a refusal says so itself."""
    if isinstance(error, Refusal):
        return error
    text = str(error).strip().split("\n")[0]
    if isinstance(error, torch.cuda.OutOfMemoryError) or (isinstance(error, CudaError) and "OUT_OF_MEMORY" in text):
        return Refusal(Reason.OUT_OF_MEMORY, where, text)
    if "captur" in text and any(word in text for word in ("unsupported", "not permitted", "Cannot copy between")):
        return Refusal(Reason.HOST_READ, where, text)
    return Refusal(Reason.CAPTURE_FAILED, where, f"{type(error).__name__}: {text}")


_pretends: ContextVar[bool] = ContextVar("graphcache_pretends_to_capture", default=False)
_ask_driver: Callable[[], bool] = torch_graphs._cuda_isCurrentStreamCapturing  # type: ignore[attr-defined]


@contextmanager
def as_if_capturing() -> Iterator[None]:
    """Inside, modules that ask PyTorch whether this thread captures are told that it does, though it runs eagerly."""
    # Some take another path then, whose answers the graph gives: Transformers do not look into attention masks.
    token = _pretends.set(True)
    try:
        with _pretending:
            yield
    finally:
        _pretends.reset(token)


@ProcessWide
def _pretending() -> Callable[[], object]:
    def put(ask: Callable[[], bool]) -> None:
        torch_graphs._cuda_isCurrentStreamCapturing = ask  # type: ignore[attr-defined]

    put(lambda: _pretends.get() or _ask_driver())
    return lambda: put(_ask_driver)


@ProcessWide
def _eager_stance() -> Callable[[], object]:
    """The stance of ``torch.compile`` in which nothing is compiled."""
    stance = ExitStack()
    stance.enter_context(torch.compiler.set_stance("force_eager"))
    return stance.close


@contextmanager
def compiled_runs_eagerly() -> Iterator[None]:
    """Inside, functions that ``torch.compile`` made run as they were written, and higher-order operators as well."""

    # torch.cond and flex_attention compile themselves in eager mode, and raise if Dynamo traces a function mode. The
    # setting that prevents it imports Dynamo, so it is made when the first such operator is called.
    def event(frame: FrameType, kind: str, _: Any) -> None:
        if frame.f_code is _COMPILES_ITSELF:
            sys.setprofile(None)
            stance.enter_context(_eager_stance)

    with ExitStack() as stance:
        if "torch._dynamo" in sys.modules or sys.getprofile() is not None or _COMPILES_ITSELF is None:
            stance.enter_context(_eager_stance)
        else:
            stance.callback(sys.setprofile, None)
            sys.setprofile(event)
        yield


_COMPILES_ITSELF: CodeType | None = getattr(
    getattr(getattr(higher_order, "setup_compilation_env", None), "__wrapped__", None), "__code__", None
)
"""The code that every higher-order operator runs before it compiles itself."""
