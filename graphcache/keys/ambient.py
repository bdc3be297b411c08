"""State of PyTorch around a call that changes what the call does, or forbids graphs."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from operator import call
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from graphcache.config import modes
from graphcache.errors import CudaError, Reason

State = tuple[Hashable, ...]

_FLAGS = (
    *("float32_matmul_precision", "cublas_allow_tf32", "cublas_allow_fp16_accumulation"),
    *("cublas_allow_fp16_reduced_precision_reduction", "cublas_allow_bf16_reduced_precision_reduction"),
    *("cpu_allow_fp16_reduced_precision_reduction", "cudnn_allow_tf32", "cudnn_enabled", "cudnn_benchmark"),
    *("cudnn_deterministic", "mkldnn_enabled", "mkldnn_deterministic", "onednn_allow_tf32", "flash_sdp_enabled"),
    *("mem_efficient_sdp_enabled", "math_sdp_enabled", "cudnn_sdp_enabled", "overrideable_sdp_enabled"),
    *("math_sdp_allow_fp16_bf16_reduction", "deterministic_algorithms", "deterministic_algorithms_warn_only"),
    "deterministic_fill_uninitialized_memory",
)
"""``torch._C`` has a function for each, but for some in some versions."""
_PRECISIONS = tuple((backend, kind) for backend in ("cuda", "mkldnn") for kind in ("matmul", "conv", "rnn"))
_GETTERS: dict[str, Callable[[], Hashable]] = {
    "default_dtype": torch.get_default_dtype,
    "mha_fastpath": torch.backends.mha.get_fastpath_enabled,
    "forward_ad_level": lambda: forward_ad._current_level,
    **{name: getattr(torch._C, f"_get_{name}") for name in _FLAGS if hasattr(torch._C, f"_get_{name}")},
}
_stack_length: Callable[[], int] = torch._C._len_torch_function_stack
_stack_at: Callable[[int], Any] = torch._C._get_function_stack_at
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
is_tracing: Callable[[], bool] = torch._C._is_tracing
is_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", bool)
_transforms: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack


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
    try:
        flags: State = tuple(map(call, _GETTERS.values()))
    except RuntimeError:
        flags = tuple(map(_flag, _GETTERS.values()))
    return (*flags, *(_modes() if _stack_length() else ()))


def _flag(getter: Callable[[], Hashable]) -> Hashable:
    """A flag; how precise products of float32 are if it cannot tell, as that was set in the newer way of PyTorch."""
    try:
        return getter()
    except RuntimeError:
        return tuple(torch._C._get_fp32_precision_getter(*each) for each in _PRECISIONS)


def unusual_settings(state: State) -> str:
    """In what a state differs from the usual one, in words.

    Example:
        >>> with torch.device("meta"):
        ...     unusual_settings(ambient_state())
        'mode meta'
    """
    count = len(_GETTERS)
    found = [f"{name} {now}" for name, now, usual in zip(_GETTERS, state, USUAL, strict=False) if now != usual]
    modes = [f"mode {mode}" for mode in state[count:]] if state[count:] != USUAL[count:] else []
    return ", ".join(found + modes) or "no mode"


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
    return [mode.device if type(mode) is DeviceContext else "other" for mode in modes]


def forbidden(*, cuda: bool) -> Reason | None:
    """What forbids graphs at this moment, in this context, whatever the arguments; ``cuda`` if it is a device's."""
    if modes.get().off:
        return Reason.DISABLED
    if dispatch_modes() or (_stack_length() and has_function_modes()) or _transforms() is not None or is_tracing():
        return Reason.TRACING
    if forward_ad._current_level >= 0:
        # A replay would leave out derivatives that are computed in forward mode.
        return Reason.GRAD
    try:
        return Reason.OUTER_CAPTURE if cuda and is_capturing() else None
    except RuntimeError as error:
        if "initialization error" in str(error):
            raise CudaError(
                "CUDA does not work in this process, which was forked after CUDA had been used; start processes with "
                "multiprocessing's 'spawn' method"
            ) from error
        raise


USUAL = ambient_state()
"""The state when graphcache was imported, which keys leave out."""
