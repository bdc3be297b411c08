"""The replay of a graph with one input and one output, in a single function: what most hits go through."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphcache.errors import CudaError
from graphcache.graphs import driver

if TYPE_CHECKING:
    from graphcache.graphs.cuda import CudaGraph

Fire = Callable[[Tensor, int], Tensor | None]
"""Replays a graph on a tensor and a stream (a raw handle); ``None``, having done nothing, for what it leaves alone."""

Again = Callable[[int, int, int], bool]
"""Launches a graph once more on a stream, if it reads and writes at these addresses; whether it did."""

_is_inference_mode = torch.is_inference_mode_enabled
_empty_like: Callable[[Tensor], Tensor] = torch.empty_like


def single(graph: CudaGraph) -> tuple[Fire, Again] | None:
    """Shorter ways to :meth:`~graphcache.graphs.cuda.CudaGraph.replay`.

    They do the same on the stream of the replay before, if that is not the legacy default stream: the first for an
    aligned tensor, into a fresh one; the second where not even the addresses are others. A call of a Python function
    costs 0.1 to 0.3 µs, and the general way makes six.

    Returns:
        ``None`` if the graph has not exactly one input and one output, pointed at in one place each.
    """
    places = [slot.place for slot in (*graph.inputs, *graph.outputs)]
    if len(graph.inputs) != 1 or len(graph.outputs) != 1 or None in places:
        return None
    source, target = graph.inputs[0], graph.outputs[0]
    (in_setter, in_word, in_offset, in_arguments), (out_setter, out_word, out_offset, out_arguments) = places  # type: ignore[misc]
    executable, lane, mask = graph.executable, graph.lane, source.mask | target.mask
    point_in, point_out = partial(in_setter, executable, *in_arguments), partial(out_setter, executable, *out_arguments)
    launch, lock = graph.launcher, lane.lock
    empty = _allocator(target.buffer)

    def fire(x: Tensor, stream: int) -> Tensor | None:
        with lock:
            answer = graph.ready
            if (
                answer is None
                or not stream
                or lane.stream != stream
                or graph.ready_stream != stream
                or graph.ready_inference is not _is_inference_mode()
            ):
                return None
            address = x.data_ptr()
            if address != source.address:
                if address & mask or not address:
                    return None
                # Not what the graph has, until the driver has taken it.
                source.address = -1
                in_word.value = address + in_offset
                code = point_in()[0]
                if code:
                    raise driver.failure(in_setter.__name__, code)
                source.address = address
            code = launch(executable, lane.handle)[0]
            if code:
                raise driver.failure("cuGraphLaunch", code)
            # What remains is done while the device works.
            graph.ready = None
            try:
                fresh = empty()
                address = fresh.data_ptr()
                if address & mask or not address:
                    return answer[0]
                target.address = -1
                out_word.value = address + out_offset
                code = point_out()[0]
                if code:
                    raise driver.failure(out_setter.__name__, code)
                target.address = address
                graph.ready = [fresh]
            except (torch.cuda.OutOfMemoryError, CudaError):
                # This call has its answer; the next one will say what is wrong, if it still is.
                pass
            return answer[0]

    def again(stream: int, read: int, written: int) -> bool:
        with lock:
            if (
                not stream
                or lane.stream != stream
                or source.address != read
                or target.address != written
                or graph.executable is None
                or graph.ready is not None
            ):
                return False
            code = launch(executable, lane.handle)[0]
            if code:
                raise driver.failure("cuGraphLaunch", code)
            return True

    return fire, again


def _allocator(buffer: Tensor) -> Callable[[], Tensor]:
    """Allocates tensors like one on a device, from torch's caching allocator, for the current stream."""
    direct = _direct_allocator()
    if direct is None or torch.cuda.device_count() != 1:
        return partial(_empty_like, buffer)
    return partial(direct, tuple(buffer.shape), tuple(buffer.stride()), buffer.dtype)


@cache
def _direct_allocator() -> Callable[..., Tensor] | None:
    """What ``torch.compile`` allocates with: the allocator without the dispatcher, 1.6 µs less; on the current device.

    It is no public interface, so it has to show first that it makes what is asked of it; otherwise ``None``.
    """
    try:
        function: Callable[..., Tensor] = getattr(torch._C._dynamo.guards, "_empty_strided_cuda")  # noqa: B009
        for inference in (False, True):
            with torch.inference_mode(inference):
                made: Any = function((2, 3), (3, 1), torch.float16)
                wanted = (torch.Size((2, 3)), (3, 1), torch.float16, "cuda", inference, False)
                found = (
                    made.shape,
                    made.stride(),
                    made.dtype,
                    made.device.type,
                    made.is_inference(),
                    made.requires_grad,
                )
                if found != wanted or type(made) is not Tensor or made.data_ptr() % 256:
                    return None
    except Exception:
        return None
    return function
