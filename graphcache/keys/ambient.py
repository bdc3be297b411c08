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
    "_get_float32_matmul_precision",
    "_get_cublas_allow_tf32",
    "_get_cublas_allow_fp16_accumulation",
    "_get_cublas_allow_fp16_reduced_precision_reduction",
    "_get_cublas_allow_bf16_reduced_precision_reduction",
    "_get_cpu_allow_fp16_reduced_precision_reduction",
    "_get_cudnn_allow_tf32",
    "_get_cudnn_enabled",
    "_get_cudnn_benchmark",
    "_get_cudnn_deterministic",
    "_get_mkldnn_enabled",
    "_get_mkldnn_deterministic",
    "_get_onednn_allow_tf32",
    "_get_flash_sdp_enabled",
    "_get_mem_efficient_sdp_enabled",
    "_get_math_sdp_enabled",
    "_get_cudnn_sdp_enabled",
    "_get_overrideable_sdp_enabled",
    "_get_math_sdp_allow_fp16_bf16_reduction",
    "_get_deterministic_algorithms",
    "_get_deterministic_algorithms_warn_only",
    "_get_deterministic_fill_uninitialized_memory",
)
_GETTERS: tuple[Callable[[], Hashable], ...] = (
    torch.get_default_dtype,
    lambda: forward_ad._current_level,
    *[getattr(torch._C, name) for name in _NAMES if hasattr(torch._C, name)],
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
    return (*map(call, _GETTERS), *(_modes() if _stack_length() else ()))


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


def _modes() -> list[Hashable]:
    modes = [_stack_at(index) for index in range(_stack_length())]
    # Any other mode forbids graphs, so it is enough that it shows.
    return [mode.device if type(mode) is DeviceContext else "mode" for mode in modes]
