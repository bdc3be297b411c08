"""How long calls take, and whether two answers are the same."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

RELATIVE = 1e-3
"""The largest difference on CUDA, as a share of an output's largest magnitude, between two runs of one network: kernels
may add in another order, or in TF32."""


def spread(nanoseconds: Sequence[int], percentiles: Sequence[float] = (50, 90, 99)) -> dict[str, float] | None:
    """How times lie, in microseconds; ``None`` of none."""
    if not nanoseconds:
        return None
    ordered = sorted(nanoseconds)
    found: dict[str, float] = {"calls": len(ordered)}
    for name, value in (("min", ordered[0]), ("mean", sum(ordered) / len(ordered)), ("max", ordered[-1])):
        found[name] = round(value / 1000, 1)
    for share in dict.fromkeys([50, *percentiles]):
        found[f"p{share:g}"] = round(ordered[math.ceil(share / 100 * len(ordered)) - 1] / 1000, 1)
    return found


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """Make a call and wait until the device has finished."""
    answer, nanoseconds, _ = timed_apart(call, device)
    return answer, nanoseconds


def timed_apart(call: Callable[[], Any], device: torch.device) -> tuple[Any, int, int]:
    """The same, with what it took the host to enqueue the call as the last."""
    _wait(device)
    start = time.perf_counter_ns()
    answer = call()
    enqueued = time.perf_counter_ns()
    _wait(device)
    return answer, time.perf_counter_ns() - start, enqueued - start


def difference(got: Any, expected: Any) -> str | None:
    """How an answer differs from the expected one, in one line; ``None`` if it doesn't.

    On the CPU all values must be equal, on CUDA floating ones must agree to :data:`RELATIVE`. ``nan`` equals itself.
    """
    left, left_tree = pytree.tree_flatten(got)
    right, right_tree = pytree.tree_flatten(expected)
    if left_tree != right_tree:
        return f"its structure is {left_tree}, expected {right_tree}"
    for index, (one, other) in enumerate(zip(left, right, strict=True)):
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            if type(one) is not type(other) or one != other:
                return f"value {index} is {one!r}, expected {other!r}"
            continue
        try:
            torch.testing.assert_close(one, other, rtol=0, atol=_tolerance(other), equal_nan=True, check_stride=False)
        except AssertionError as error:
            return f"output {index}: {' '.join(str(error).split())}"
    return None


def _tolerance(tensor: Tensor) -> float:
    if not tensor.is_cuda or not tensor.is_floating_point() or tensor.numel() == 0:
        return 0.0
    return RELATIVE * float(tensor.double().nan_to_num(posinf=0.0, neginf=0.0).abs().max())


def _wait(device: torch.device) -> None:
    """Wait until a device is idle. The current device may be another one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
