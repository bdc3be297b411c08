"""State of PyTorch around a call that changes what the call does: part of every key, and the condition of every hit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from operator import call
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

State = tuple[Hashable, ...]

_NAMES = (
    *("float32_matmul_precision", "deterministic_algorithms", "deterministic_algorithms_warn_only"),
    *("deterministic_fill_uninitialized_memory", "cublas_allow_tf32", "cublas_allow_fp16_accumulation"),
    *("cublas_allow_fp16_reduced_precision_reduction", "cublas_allow_bf16_reduced_precision_reduction"),
    *("cpu_allow_fp16_reduced_precision_reduction", "cudnn_allow_tf32", "cudnn_enabled", "cudnn_benchmark"),
    *("cudnn_deterministic", "mkldnn_enabled", "mkldnn_deterministic", "onednn_allow_tf32", "flash_sdp_enabled"),
    *("mem_efficient_sdp_enabled", "math_sdp_enabled", "cudnn_sdp_enabled", "overrideable_sdp_enabled"),
    "math_sdp_allow_fp16_bf16_reduction",
)
"""What of PyTorch is asked, as far as this version has it, by the end of the function's name."""
_GETTERS: tuple[Callable[[], Hashable], ...] = (
    torch.get_default_dtype,
    lambda: forward_ad._current_level,
    *[getattr(torch._C, f"_get_{name}") for name in _NAMES if hasattr(torch._C, f"_get_{name}")],
)
_stack_length: Callable[[], int] = torch._C._len_torch_function_stack
_stack_at: Callable[[int], Any] = torch._C._get_function_stack_at

_numbers: dict[State, int] = {}
_last: tuple[State, int] | None = None
_lock = threading.Lock()


def ambient_state() -> State:
    """What PyTorch is set to, as far as it changes results: flags of the process, and the function modes of the thread.

    Not in it are the modes of a key (gradients, inference, autocast), what forbids graphs (dispatch modes, transforms),
    and the number of threads: it differs from thread to thread, and a graph of the CPU runs with that of the replay.

    Example:
        >>> before = ambient_state()
        >>> with torch.device("meta"):
        ...     ambient_state() == before
        False
    """
    modes = map(_stack_at, range(_stack_length()))
    # Any other mode than that of a device forbids graphs, so it is enough that it shows.
    return (*map(call, _GETTERS), *(mode.device if type(mode) is DeviceContext else "mode" for mode in modes))


def ambient_number() -> int:
    """A number that stands for :func:`ambient_state` in this process: 0 for the state that was asked for first."""
    global _last
    state = ambient_state()
    last = _last
    if last is not None and last[0] == state:
        return last[1]
    with _lock:
        number = _numbers.setdefault(state, len(_numbers))
    _last = state, number
    return number


def is_forward_mode() -> bool:
    """Whether derivatives are computed in forward mode, which a replay would leave out."""
    return bool(forward_ad._current_level >= 0)


def has_modes() -> bool:
    """Whether any function mode is active in this thread, that of a default device too; no other thread has it."""
    return _stack_length() > 0


def has_function_modes() -> bool:
    """Whether a ``TorchFunctionMode`` may change what any function of PyTorch does here.

    The mode of ``torch.set_default_device`` and ``with torch.device(...)`` does not count: its device is part of
    :func:`ambient_state`.
    """
    length = _stack_length()
    return length > 0 and any(type(_stack_at(index)) is not DeviceContext for index in range(length))
