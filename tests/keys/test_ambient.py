"""Whatever PyTorch is set to between two calls, an answer is what eager execution gives at that moment."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import graphcache
from graphcache import Reason
from graphcache.keys.call_key import ambient_state, describe, has_function_modes, unusual_settings
from graphcache.keys.call_spec import CallSpec
from tests.helpers import Fn, frozen, outcomes, reason, same

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Doubling(TorchFunctionMode):
    """Doubles what linear layers answer."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is nn.functional.linear else result


def setting(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> Callable[[], Any]:
    @contextmanager
    def within() -> Iterator[None]:
        before = read()
        write(value)
        try:
            yield
        finally:
            write(before)

    return within


def attribute(owner: Any, name: str, value: Any) -> Callable[[], Any]:
    return setting(lambda: getattr(owner, name), lambda new: setattr(owner, name, new), value)


def deterministic(value: bool, **options: bool) -> Callable[[], Any]:
    return setting(
        torch.are_deterministic_algorithms_enabled,
        lambda new: torch.use_deterministic_algorithms(new, **(options if new is value else {})),
        value,
    )


CUDA, CUDNN = torch.backends.cuda, torch.backends.cudnn
SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default dtype": setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default device": lambda: torch.device("meta"),
    "matmul precision": setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "TF32 in cuDNN": attribute(CUDNN, "allow_tf32", not CUDNN.allow_tf32),
    "cuDNN": attribute(CUDNN, "enabled", not CUDNN.enabled),
    "cuDNN's benchmark": attribute(CUDNN, "benchmark", not CUDNN.benchmark),
    "deterministic cuDNN": attribute(CUDNN, "deterministic", not CUDNN.deterministic),
    "reductions in float16": attribute(CUDA.matmul, "allow_fp16_reduced_precision_reduction", False),
    "reductions in bfloat16": attribute(CUDA.matmul, "allow_bf16_reduced_precision_reduction", False),
    "flash attention": setting(CUDA.flash_sdp_enabled, CUDA.enable_flash_sdp, False),
    "attention by formula": setting(CUDA.math_sdp_enabled, CUDA.enable_math_sdp, False),
    "memory-efficient attention": setting(CUDA.mem_efficient_sdp_enabled, CUDA.enable_mem_efficient_sdp, False),
    "determinism": deterministic(True),
    "determinism as a warning": deterministic(True, warn_only=True),
    "precision of matmul": attribute(CUDA.matmul, "fp32_precision", "tf32"),
    "precision of convolutions": attribute(CUDNN.conv, "fp32_precision", "ieee"),
    "fast path of attention": setting(
        torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False
    ),
    "MKLDNN": attribute(torch.backends.mkldnn, "enabled", False),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_another_state_and_the_state_comes_back(name: str) -> None:
    before, usual = ambient_state(), CallSpec.of((), {})
    with SETTINGS[name]():
        state = ambient_state()
        assert state != before
        assert describe((), {}).key.settings == state
        # What differs is named.
        assert CallSpec.of((), {}).diff(usual) == [f"settings of PyTorch: {unusual_settings(state)} → off"]
        assert not has_function_modes()
    assert (ambient_state(), describe((), {}).key.settings) == (before, None)


@pytest.mark.parametrize("name", SETTINGS)
def test_graphs_of_another_state_do_not_answer_and_come_back_with_theirs(name: str) -> None:
    fast = graphcache.wrap(frozen(nn.ReLU()))
    fast(X), fast(X)
    with SETTINGS[name]():
        assert same(fast(X), fast.module(X))
        assert outcomes(fast) == (1, 2, {})
        fast(X)
        assert outcomes(fast) == (2, 2, {})
    fast(X)
    assert outcomes(fast) == (3, 2, {})


def made(_: Any, x: Tensor) -> tuple[Tensor, ...]:
    """What depends on the default dtype, the default device, and what matmul may do."""
    return x @ x.t(), torch.ones(2) * 0.1, nn.functional.linear(x, torch.eye(4, dtype=x.dtype, device=x.device))


STEPS = [*SETTINGS, "mode", "inference", "autocast", ""]


@given(st.lists(st.lists(st.sampled_from(STEPS), max_size=2, unique=True), min_size=2, max_size=12))
def test_any_change_between_calls_gives_the_eager_answer_of_that_moment(steps: list[list[str]]) -> None:
    others: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "mode": Doubling,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "": nullcontext,
    }
    module = Fn(made)
    fast = graphcache.wrap(module)
    for step in steps:
        with ExitStack() as stack:
            for name in step:
                # PyTorch refuses to tell of one setting in its old way once it was set in the new one.
                with suppress(RuntimeError):
                    stack.enter_context((SETTINGS | others)[name]())
            expected, answer = module(X), fast(X)
        for left, right in zip(answer, expected, strict=True):
            assert (left.dtype, left.device) == (right.dtype, right.device)
            assert right.is_meta or same(left, right)


def test_a_call_inside_a_function_mode_runs_eagerly() -> None:
    module = frozen(nn.Linear(4, 4))
    fast = graphcache.wrap(module)
    fast(X), fast(X)
    with Doubling():
        assert reason(fast, X) is Reason.TRACING
        assert same(fast(X), module(X))
        assert has_function_modes()
    assert same(fast(X), module(X))
    assert fast.cache_info().captures == 1


def test_a_default_device_of_a_thread_is_not_lost_in_the_background() -> None:
    module = Fn(lambda _, x: (x * 2, torch.ones(2)))
    fast = graphcache.wrap(module, capture_in="background")
    for _ in range(3):
        with torch.device("meta"):
            assert fast(X)[1].is_meta
    assert not fast(X)[1].is_meta


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_derivatives_in_forward_mode_are_computed_eagerly() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).requires_grad_(False)
    fast, x = graphcache.wrap(module), torch.randn(2, 4)
    fast(x)
    fast(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        wanted, got = (forward_ad.unpack_dual(each(dual)).tangent for each in (module, fast))
    assert wanted is not None
    assert torch.equal(got, wanted)
    assert fast.cache_info().eager == {graphcache.Reason.GRAD: 1}
    assert torch.equal(fast(x), module(x))
    assert fast.cache_info().hits == 2


def test_the_number_of_threads_is_no_part_of_a_key() -> None:
    module = nn.Linear(4, 2).requires_grad_(False)
    fast, x, answers = graphcache.wrap(module), torch.ones(3, 4), []
    with torch.no_grad():
        fast(x)

    def call() -> None:
        with torch.no_grad():
            for count in (2, 3):
                torch.set_num_threads(count)
                answers.append(torch.equal(fast(x), module(x)))

    threads = torch.get_num_threads()
    other = threading.Thread(target=call)
    other.start()
    other.join()
    torch.set_num_threads(threads)
    assert answers == [True, True]
    assert outcomes(fast) == (2, 1, {})
