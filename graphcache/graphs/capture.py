"""Capturing operations of PyTorch into a CUDA graph, and what a failed capture says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.cuda import graphs as torch_graphs

from graphcache.errors import CudaError, Reason, Refusal
from graphcache.graphs import driver
from graphcache.graphs.buffers import is_dense
from graphcache.graphs.copies import find_copies, make_all_full, with_copies
from graphcache.graphs.cuda import CudaGraph, IoSlot
from graphcache.graphs.dispatch_mode import process_wide
from graphcache.graphs.graph import Body
from graphcache.graphs.param_patching import CannotBind
from graphcache.graphs.stream_order import StreamOrder, capture_enqueue, quiet_collector


@dataclass(frozen=True, slots=True)
class TorchCall:
    """PyTorch operations to be captured. They have run before, on the capture stream, outside of any capture."""

    body: Body
    _: KW_ONLY
    # Static inputs.
    inputs: Sequence[Tensor]
    # For each input whether the caller's tensor has the same layout, so that one plain copy moves it.
    direct: Sequence[bool]
    # What the body returned when it ran before.
    expected: Sequence[Tensor]
    order: StreamOrder
    # What the body refers to beyond its own closure.
    keep: object
    # Called once the graph is gone.
    release: Callable[[], object]
    # The module's name, for messages.
    where: str
    # Whether other graphs use the order's memory pool too, so that no graph is charged for it.
    shared: bool = False
    # Whether every kernel waits for the ones before it, however it was launched.
    full_edges: bool = False


def record_torch(call: TorchCall) -> CudaGraph:
    """Capture PyTorch operations, and engines between them; what they allocate comes from the order's memory pool.

    Inputs and outputs are copied by nodes of the graph, which are pointed at the caller's tensors. A :class:`Refusal`
    says that the body did something that cannot be captured.
    """
    sources = [torch.empty_like(each) for each in call.inputs]
    targets = [torch.empty_like(each) for each in call.expected]
    whole = [plain and is_dense(static) for plain, static in zip(call.direct, call.inputs, strict=True)]
    pool = call.order.pool()
    outputs: list[Tensor] = []
    before = [pair for pair, copied in zip(zip(call.inputs, sources, strict=True), whole, strict=True) if copied]
    after: list[tuple[Tensor, Tensor]] = []

    def enqueue(stream: int) -> bool:
        outputs.extend(call.body())
        for target, output in zip(targets, outputs, strict=True):
            # Whether one plain copy moves it.
            whole.append(is_dense(output) and output.stride() == target.stride())
            if whole[-1]:
                after.append((target, output))
        return True

    captured = _capture_torch(call, with_copies(enqueue, before, after))
    with ExitStack() as undo:
        undo.callback(driver.call, "cuGraphDestroy", captured)
        moved = [tensor for tensor, each in zip([*sources, *targets], whole, strict=True) if each]
        if call.full_edges:
            make_all_full(captured)
        try:
            found = iter(find_copies(captured, moved))
        except CannotBind as why:
            raise Refusal(Reason.CAPTURE_FAILED, call.where, str(why)) from why
        pointers = [next(found) if each else [] for each in whole]
        slots = [IoSlot(own, each, 1) for own, each in zip([*call.inputs, *outputs], pointers, strict=True)]
        undo.pop_all()

    return CudaGraph(
        captured,
        inputs=slots[: len(call.inputs)],
        outputs=slots[len(call.inputs) :],
        order=call.order,
        keep=(call.keep, call.body, pool),
        release=call.release,
        pool_bytes=0 if call.shared else pool.nbytes,
    )


def _capture_torch(call: TorchCall, enqueue: Callable[[int], bool]) -> Any:
    """Capture with PyTorch allocating in the order's pool.

    The capture is the driver's. A capture of ``torch.cuda.CUDAGraph`` that fails leaves the allocator and the random
    number generator half way through (pytorch/pytorch#92684, #190348).
    """
    # cuBLAS keeps a workspace per stream, which the next capture on this stream would find, in this order or another,
    # and lose when this order is closed (pytorch/pytorch#193402). So each capture starts and ends without, and finds
    # its workspace in the pool of its own order, where it stays.
    forget_workspaces()
    try:
        with torch.inference_mode(False), torch.no_grad(), quiet_collector(), call.order.pool().allocating():
            return capture_enqueue(enqueue, call.order, call.where)
    except Refusal:
        raise
    except Exception as error:
        raise refusal_of(error, call.where) from error
    finally:
        forget_workspaces()


def forget_workspaces() -> None:
    """Give back the memory that cuBLAS works in; the next product on a stream takes it again (32 MiB on an H100)."""
    torch._C._cuda_clearCublasWorkspaces()


def refusal_of(error: Exception, where: str) -> Refusal:
    """Why a capture failed, read from what CUDA and PyTorch say of it; a refusal says so itself."""
    if isinstance(error, Refusal):
        return error
    text = str(error).strip().split("\n")[0]
    if isinstance(error, torch.cuda.OutOfMemoryError) or (isinstance(error, CudaError) and "OUT_OF_MEMORY" in text):
        return Refusal(Reason.OUT_OF_MEMORY, where, text)
    if "captur" in text and any(word in text for word in ("unsupported", "not permitted", "Cannot copy between")):
        return Refusal(Reason.HOST_READ, where, text)
    return Refusal(Reason.CAPTURE_FAILED, where, f"{type(error).__name__}: {text}")


@contextmanager
def as_if_capturing() -> Iterator[None]:
    """Inside, modules that ask PyTorch whether this thread captures are told that it does, though it runs eagerly.

    Some take another path then: Transformers do not look into attention masks, since the host cannot read them. The
    graph gives the answers of that path, so it is verified against that path.
    """
    _pretending.depth = getattr(_pretending, "depth", 0) + 1
    try:
        with _patched_question():
            yield
    finally:
        _pretending.depth -= 1


_ask_driver: Callable[[], bool] = torch_graphs._cuda_isCurrentStreamCapturing  # type: ignore[attr-defined]
_pretending = threading.local()


@process_wide
@contextmanager
def _patched_question() -> Iterator[None]:
    """Inside, PyTorch asks :func:`_is_capturing`."""
    torch_graphs._cuda_isCurrentStreamCapturing = _is_capturing  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch_graphs._cuda_isCurrentStreamCapturing = _ask_driver  # type: ignore[attr-defined]


def _is_capturing() -> bool:
    """Whether this thread captures, or is inside of :func:`as_if_capturing`."""
    return bool(getattr(_pretending, "depth", 0)) or _ask_driver()
