"""The cures against silent wrong answers, taken out one by one: each is missed at once, and by a test that guards it.

Every row of the table takes one function or attribute out, as if somebody had found it superfluous, and runs a small
scenario. With the cure nothing is wrong; without it an answer is, or memory leaks, or a budget is overrun. Then the
test that guards the cure is run without it, and has to fail. What only a device shows is not here.
"""

from __future__ import annotations

import ast
import contextvars
import ctypes
import dataclasses
import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

import graphcache
from graphcache import CachedModule
from graphcache.cache import graph_cache
from graphcache.capture import effects, host_activity, persistent_state, trial_call
from graphcache.capture import recording as record
from graphcache.capture import torch_recorder as record_torch
from graphcache.dispatch import dispatcher
from graphcache.graphs import buffers, cpu_tape, operations
from graphcache.graphs import verify as judge
from graphcache.keys import call_key, guards, state_nodes, state_walk, value_nodes
from graphcache.modules import forward_patch
from tests.capture.test_what_code_reaches import PROGRAMS, series
from tests.helpers import Fn, dispatcher_of, frozen, graphs_of, mlp, replays, same

ROOT = Path(__file__).parent.parent
X = torch.linspace(-1, 1, 8).reshape(2, 4)

TakeOut = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Cure:
    """Args:
    take_out: Removes the cure for the length of a test.
    harmed: Whether something goes wrong; an exception counts as well.
    guard: The test that has to fail without the cure; empty where there is none but the scenario.
    certain: Whether the guard fails every time; where threads have to meet by chance it need not.
    """

    take_out: TakeOut
    harmed: Callable[[], bool]
    guard: str
    certain: bool = True


# ---- ways to take something out


def replace(owner: Any, name: str, value: Any) -> TakeOut:
    """Put ``value`` in the place of an attribute that exists."""
    return lambda patch: patch.setattr(owner, name, value)


def around(owner: Any, name: str, change: Callable[..., Any]) -> TakeOut:
    """Call ``change`` with the original function before the arguments."""

    def take_out(patch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))

    return take_out


def both(*each: TakeOut) -> TakeOut:
    """Several places that hold one cure."""

    def take_out(patch: pytest.MonkeyPatch) -> None:
        for one in each:
            one(patch)

    return take_out


class Instead:
    """Something with a few attributes exchanged; a room that looks them up finds these."""

    def __init__(self, whole: Any, **instead: Any) -> None:
        self.__dict__.update(instead, _whole=whole)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_whole"], name)


def edited(**fields: Any) -> TakeOut:
    """Keys with other fields."""
    make = call_key.CallKey
    return replace(call_key, "CallKey", lambda **given: make(**(given | fields)))


def tensors_read(change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> TakeOut:
    """Keys with other parts of tensors."""
    return around(call_key._Reader, "_tensor", lambda original, *given: change(original(*given)))


def nothing(*args: Any, **kwargs: Any) -> Any:
    """Does nothing and finds nothing."""
    return []


def fails_without(take_out: TakeOut, guard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test without a cure; it has to fail."""
    # What the outer run was told (where its cache lies, say) is not for the one inside.
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    with monkeypatch.context() as patch, redirect_stdout(StringIO()) as said:
        take_out(patch)
        quietly = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore::pytest.PytestWarning"]
        code = pytest.main([str(ROOT / guard), *quietly])
    assert code == pytest.ExitCode.TESTS_FAILED, said.getvalue()


def list_of_guards(guards: dict[str, str]) -> str:
    """A docstring that names, for each cure, the test that fails without it."""
    lines = (f"- {cure}: {guard or 'its scenario in this file'}" for cure, guard in guards.items())
    return "\n".join(["Each cure, and the test that fails when it is taken out:", "", *lines])


# ---- what can be wrong


def wrong(function: Any, *calls: Any, again: int = 1, **options: Any) -> bool:
    """Whether the wrapped function answers one of the calls otherwise than the function does."""
    module = function if isinstance(function, nn.Module) else Fn(function)
    fast = graphcache.wrap(module, **options)
    return any(differs(fast, call) for _ in range(again + 1) for call in calls)


def differs(fast: CachedModule, call: Any) -> bool:
    args = call if isinstance(call, tuple) else (call,)
    return not same(fast(*args), fast.module(*args))


def unseen(x: Tensor) -> float:
    """The first element, read in a way that nobody notices."""

    class Capsule:
        def __dlpack__(self, **_: Any) -> Any:
            return torch._C._to_dlpack(x.detach())

        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

    return float(np.from_dlpack(Capsule()).flat[0])


def modes_in_turn(function: Any, *modes: Any, **options: Any) -> bool:
    """Whether one of the modes gets the answer of another."""
    fast = graphcache.wrap(function if isinstance(function, nn.Module) else Fn(function), **options)
    for mode in (*modes, *modes):
        with mode():
            answer, eager = fast(X), fast.module(X)
            if not same(answer, eager) or answer.requires_grad != eager.requires_grad:
                return True
    return False


def changed_otherwise(step: Callable[[Any], Any], **attributes: Any) -> bool:
    """Whether calls change a module's state otherwise than the same number of eager ones."""

    def make() -> Any:
        made = Fn(lambda self, x: (step(self), x * 2)[1], **{name: new() for name, new in attributes.items()})
        return frozen(made)

    module, twin = make(), make()
    fast = graphcache.wrap(module)
    for _ in range(4):
        fast(X)
        twin(X)
    return any(not same(getattr(module, name), getattr(twin, name)) for name in attributes)


def _memory_is_written_past_pytorch_otherwise() -> bool:
    def make() -> Any:
        made = Fn(
            lambda self, x: (ctypes.memset(self.address, ctypes.string_at(self.address, 1)[0] + 1, 1), x * 2)[1],
            buffer=nn.Buffer(torch.zeros(1, dtype=torch.uint8)),
        )
        made.address = made.buffer.data_ptr()
        return frozen(made)

    module, twin = make(), make()
    fast = graphcache.wrap(module)
    for _ in range(4):
        fast(X)
        twin(X)
    return not same(module.buffer, twin.buffer)


def stale(change: Callable[[Any], Any], make: Callable[[], nn.Module] = mlp) -> bool:
    """Whether a graph of before the change answers after it."""
    module = make()
    fast = graphcache.wrap(module)
    fast(X)
    fast(X)
    change(module)
    return any(not same(fast(X), module(X)) for _ in range(2))


class Memory:
    """Something for a cache to own."""

    def __init__(self, nbytes: int = 1) -> None:
        self.nbytes = nbytes
        self.closed = 0

    def close(self, *, wait: bool = True) -> None:
        self.closed += 1


# ---- what goes wrong


def _a_constant_is_taken_for_another() -> bool:
    return wrong(lambda _, x, n: x * (2 if n is True else 3), (X, 1), (X, True))


def _a_zero_is_taken_for_the_other() -> bool:
    return wrong(lambda _, x, n: x * (2 if str(n) == "-0.0" else 3), (X, 0.0), (X, -0.0))


def _two_tensors_are_taken_for_one() -> bool:
    return wrong(lambda _, x, y: x * (2 if x is y else 3), (X, X.clone()), (X, X))


def _gradients_are_lost() -> bool:
    fast = graphcache.wrap(Fn(lambda _, x: x * 2))
    fast(torch.ones(2))
    return not fast(torch.ones(2, requires_grad=True)).requires_grad


def _the_other_autocast_answers() -> bool:
    return modes_in_turn(frozen(nn.Linear(4, 4)), nullcontext, lambda: torch.autocast("cpu", torch.bfloat16))


def _the_other_dtype_of_autocast_answers() -> bool:
    half, brain = (lambda dtype=dtype: torch.autocast("cpu", dtype) for dtype in (torch.float16, torch.bfloat16))
    return modes_in_turn(frozen(nn.Linear(4, 4)), half, brain)


def _inference_mode_is_taken_for_no_grad() -> bool:
    def asks(_: Any, x: Tensor) -> Tensor:
        return x * (2 if torch.is_inference_mode_enabled() else 3)

    return modes_in_turn(asks, torch.no_grad, torch.inference_mode)


def _a_conjugate_is_taken_for_what_it_conjugates() -> bool:
    z = torch.tensor([1 + 2j, 3 - 1j])
    return wrong(lambda _, x, n: x * (2 if x.is_conj() else n), (z, 3), (z.conj(), 3))


def _a_weight_changes_unseen_under_autocast() -> bool:
    module = nn.Linear(4, 4)
    fast = graphcache.wrap(module)
    for _ in range(3):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            if not same(fast(X), module(X)):
                return True
        with torch.no_grad():
            module.weight.add_(1)
    return False


def _autocast_is_applied_to_a_part_that_switched_it_off() -> bool:
    def full(_: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return x @ x.t()

    # A capture is made under the caller's autocast too, so that verification would find it.
    return modes_in_turn(full, lambda: torch.autocast("cpu", torch.bfloat16), verify=False)


def _the_other_default_dtype_answers() -> bool:
    fast = graphcache.wrap(Fn(lambda _, x: x * torch.get_default_dtype().itemsize))
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.float64) * 2:
            torch.set_default_dtype(dtype)
            if differs(fast, X):
                return True
        return False
    finally:
        torch.set_default_dtype(before)


class _Doubling(TorchFunctionMode):
    """Doubles every sum."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return found * 2 if func is torch.add else found


def _a_function_mode_sees_nothing() -> bool:
    fast = graphcache.wrap(Fn(lambda _, x: torch.add(x, 1)))
    fast(X)
    with _Doubling():
        return any(differs(fast, X) for _ in range(2))


def _an_attribute_of_a_tensor_is_frozen() -> bool:
    one, other = X.clone(), X.clone()
    one.scale, other.scale = 2, 3  # type: ignore[attr-defined]
    return wrong(lambda _, x: x * x.scale, one, other)


def _a_hook_of_all_modules_does_not_run() -> bool:
    handles: list[Any] = []

    def double(module: nn.Module, args: Any, y: Tensor) -> Tensor | None:
        return y * 2 if isinstance(module, nn.Linear) else None

    try:
        return stale(lambda _: handles.append(register_module_forward_hook(double)))
    finally:
        for handle in handles:
            handle.remove()


def _reached(name: str) -> Callable[[], bool]:
    """Whether a program with state that code reaches answers otherwise when it is wrapped."""

    def harmed() -> bool:
        wanted = series(PROGRAMS[name](), wrapped=False)
        return series(PROGRAMS[name](), wrapped=True) != wanted

    return harmed


def _without_grad(request: Any) -> Any:
    """A request as if gradients were off."""
    return dataclasses.replace(request, call=request.call._replace(key=request.call.key._replace(grad=False)))


FACTOR = [2]


def _by_factor(x: Tensor) -> Tensor:
    return x * FACTOR[0]


def _a_global_that_nobody_found_is_frozen() -> bool:
    def triple(_: Any) -> None:
        FACTOR[0] = 3

    try:
        return stale(triple, lambda: Fn(lambda _, x: globals()["".join(["_by", "_factor"])](x)))
    finally:
        FACTOR[0] = 2


def _another_graph_of_before_answers() -> bool:
    module: Any = mlp()
    fast = graphcache.wrap(module)
    for _ in range(2):
        fast(X)
        fast(X[:1])
    _new_weight(module)
    return any(differs(fast, x) for x in (X, X[:1]))


def _a_parameter_without_a_version_is_written_twice() -> bool:
    with torch.inference_mode():
        module, twin = (
            Fn(lambda self, x: (self.parameter.add_(1), x * 2)[1], parameter=nn.Parameter(torch.zeros(1), False))
            for _ in range(2)
        )
        graphcache.wrap(module)(X)
        twin(X)
        return not same(module.parameter, twin.parameter)


def _a_context_variable_is_set_for_nobody() -> bool:
    count = contextvars.ContextVar("count", default=0)
    fast = graphcache.wrap(Fn(lambda _, x: (count.set(count.get() + 1), x * 2)[1]))
    for _ in range(3):
        fast(X)
    return count.get() != 3


def _a_clock_stands_still() -> bool:
    # In float64, so that the times of two runs of the capture are within its tolerance.
    fast = graphcache.wrap(Fn(lambda _, x: x + time.time()))
    zero = torch.zeros(1, dtype=torch.float64)
    fast(zero)
    now = time.time()
    return float(fast(zero)) < now


def _a_path_that_another_thread_chose_is_frozen() -> bool:
    def choose(_: Any, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            positive = pool.submit(lambda: bool(x.sum() > 0)).result()
        return x * 2 if positive else x * 3

    return wrong(choose, X + 5, X - 5, verify=False)


def _a_profiler_is_switched_off() -> bool:
    def mine(*_: Any) -> None:
        """Listens."""

    before = sys.getprofile()
    sys.setprofile(mine)
    try:
        graphcache.wrap(mlp())(X)
        return sys.getprofile() is not mine
    finally:
        sys.setprofile(before)


def _a_write_of_the_tape_happens() -> bool:
    kept = torch.zeros(3)
    static = [torch.ones(3)]
    with suppress(graphcache.errors.Refusal):
        cpu_tape.CpuTape.record(lambda: [kept.add_(1), static[0] * 2][1:], static, threading.RLock())
    return bool(kept.any())


def _random_numbers_are_drawn_for_nobody() -> bool:
    fast = graphcache.wrap(nn.Dropout(0.5))
    torch.manual_seed(7)
    found = [fast(X) for _ in range(3)]
    torch.manual_seed(7)
    return not same(found, [fast.module(X) for _ in range(3)])


def _a_generator_of_its_own_runs_ahead() -> bool:
    def make() -> nn.Module:
        return Fn(lambda self, x: x + torch.rand(4, generator=self.own), own=torch.Generator().manual_seed(1))

    fast, twin = graphcache.wrap(make()), make()
    return any(not same(fast(X), twin(X)) for _ in range(3))


def _a_path_is_frozen(read: Callable[[Tensor], Any]) -> Callable[[], bool]:
    # All inputs that verification tries take the same path as the first call's.
    return lambda: wrong(lambda _, x: x * 2 if abs(read(x)) > 2 else x * 3, X + 5, X)


def _a_swallowed_refusal_freezes_a_path() -> bool:
    def careful(_: Any, x: Tensor) -> Tensor:
        try:
            far = bool(x.sum().abs() > 2)
        except Exception:
            far = True
        return x * 2 if far else x * 3

    return wrong(careful, X + 5, X)


def _a_value_read_unseen_is_frozen() -> bool:
    return wrong(lambda _, x: x * unseen(x), X, X + 3)


def _a_small_value_read_unseen_is_frozen() -> bool:
    return wrong(lambda _, x: (x + 1e3).double() + 1e-6 * unseen(x), X, X + 3)


def _a_plain_value_is_frozen() -> bool:
    return wrong(lambda _, x: (x * 2, unseen(x) > 0), X, X + 3)


def _an_answer_of_chance_is_repeated() -> bool:
    # How far a file was read is seen by nobody.
    read, write = os.pipe()
    os.write(write, bytes(range(100)))
    fast = graphcache.wrap(Fn(lambda _, x: x + os.read(read, 1)[0]), verify=False, ignore=["read"])
    try:
        return len({fast(X)[0, 0].item() for _ in range(4)}) < 4
    finally:
        os.close(read)
        os.close(write)


def _a_graph_that_writes_nothing_passes() -> bool:
    class Idle:
        """Answers once, and leaves what is there from then on."""

        def __init__(self) -> None:
            self.last = X * 2

        def replay(self, inputs: Any, out: list[Tensor]) -> list[Tensor]:
            out[0].copy_(self.last)
            return out

        def poison(self, out: Any) -> None:
            buffers.poison([self.last, *out])

        def close(self) -> None:
            """It owns nothing."""

    try:
        judge.verify(Idle(), [judge.Round("", [X], [X * 2])], lambda inputs: [X * 2])  # type: ignore[arg-type]
    except graphcache.errors.Refusal:
        return False
    return True


def _a_replay_answers_for_the_inputs_of_the_capture() -> bool:
    return wrong(lambda _, x: x * 2, X, X + 1, verify=False)


def _a_returned_view_is_a_copy() -> bool:
    fast = graphcache.wrap(Fn(lambda _, x: (x[0], x * 2)))
    for _ in range(2):
        x = X.clone()
        fast(x)[0].zero_()
        if x[0].any():
            return True
    return False


def _gradients_of_an_insistent_module_are_lost() -> bool:
    def insistent(self: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.inner(x)

    fast = graphcache.wrap(Fn(insistent, inner=nn.Linear(4, 2)))
    with torch.no_grad():
        return not all(fast(X).requires_grad for _ in range(3))


def _a_parameter_gets_no_gradient() -> bool:
    module = frozen(nn.Linear(4, 4))
    fast = graphcache.wrap(module)
    fast(X)
    module.requires_grad_(True)
    return not all(fast(X).requires_grad for _ in range(3))


def _a_tracer_sees_the_cache_at_work() -> bool:
    fast = graphcache.wrap(Fn(lambda _, x: x * 2 + 1))
    fast(X)
    return "copy_" in make_fx(fast)(X).code


class _Sums(nn.Module):
    """Adds its inputs up in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x)
        return self.total * 1


def _state_is_lost() -> bool:
    module = _Sums()
    fast = graphcache.wrap(module)
    answers = [fast(X) for _ in range(3)]
    right = all(same(each, X * (step + 1)) for step, each in enumerate(answers))
    return not (right and same(module.total, X * 3) and fast.cache_info().hits == 2)


def _a_failure_loses_state() -> bool:
    def fails(*_: Any, **__: Any) -> Any:
        raise ValueError("made up")

    module = _Sums()
    fast = graphcache.wrap(module)
    with pytest.MonkeyPatch.context() as patch:
        # After the state was put back to where it was before the call.
        patch.setattr(trial_call.TrialCall, "repeat", fails)
        fast(X)
    return not same(module.total, X)


def _a_wrong_update_is_kept() -> bool:
    """A graph leaves other state than the call does, with the right answer."""
    module = _Sums()
    fast = graphcache.wrap(module)
    replay = cpu_tape.CpuTape.replay

    def wrong(self: Any, inputs: Any, out: Any = None) -> Any:
        answer = replay(self, inputs, out)
        module.total[0] += 1
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_tape.CpuTape, "replay", wrong)
        fast(X)
    return bool(fast.cache_info().captures)


def _a_transform_sees_something_else() -> bool:
    fast = graphcache.wrap(Fn(lambda _, x: x.sin() * 2))
    fast(X[0])
    return not same(torch.vmap(fast)(X), X.sin() * 2)


def _an_answer_is_no_inference_tensor() -> bool:
    fast = graphcache.wrap(Fn(torch.inference_mode()(lambda _, x: x * 2)))
    return not all(fast(X).is_inference() for _ in range(3))


def _threads_mix_their_inputs() -> bool:
    """While one thread is in the middle of a replay, another one replays the same graph if it may."""

    def other() -> None:
        lock = dispatcher_of(fast).target.recorder._host_lock
        if lock.acquire(blocking=False):
            lock.release()
            fast(X + 5)

    def pause() -> None:
        _pauses.action = None
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    fast = graphcache.wrap(Fn(lambda _, x: torch.ops.graphcache_tests.pause(x) * 0 + x))
    try:
        for _ in range(3):
            fast(X)
        assert replays(fast, X)
        _pauses.action = pause
        return not same(fast(X), X * 0 + X)
    finally:
        _pauses.action = None


class _Pauses:
    """What happens in the middle of an operation; no state of the module that calls it."""

    keeps_its_own_state = True
    action: Callable[[], None] | None = None


_pauses = _Pauses()


@torch.library.custom_op("graphcache_tests::pause", mutates_args=())
def _pause(x: Tensor) -> Tensor:
    """An operation in the middle of which something else may happen."""
    if _pauses.action is not None:
        _pauses.action()
    return x.clone()


def _more_graphs_than_agreed() -> bool:
    fast = graphcache.wrap(mlp(), max_graphs=2)
    for size in (1, 2, 3):
        fast(torch.ones(size, 4))
    return fast.cache_info().graphs > 2


def _more_bytes_than_agreed() -> bool:
    fast = graphcache.wrap(mlp(), max_bytes=100)
    for size in (1, 2, 3, 4):
        fast(torch.ones(size, 4))
    return fast.cache_info().nbytes > 100


def _a_graph_that_was_dropped_stays_open() -> bool:
    cache: graph_cache.GraphCache[Memory] = graph_cache.GraphCache(max_graphs=1)
    owners = [Memory() for _ in range(3)]
    for index, owner in enumerate(owners):
        cache.put(index, owner)
    cache.clear()
    return [owner.closed for owner in owners] != [1, 1, 1]


def _a_graph_that_was_refused_stays_open() -> bool:
    cache: graph_cache.GraphCache[Memory] = graph_cache.GraphCache(max_graphs=1, max_bytes=1)
    owner = Memory(2)
    with pytest.raises(graphcache.errors.Refusal):
        cache.put("key", owner)
    return owner.closed != 1


def _a_closed_graph_keeps_its_memory() -> bool:
    fast = graphcache.wrap(mlp())
    fast(X)
    graph: Any = next(iter(graphs_of(fast).entries.values())).graph.graph
    static = weakref.ref(graph._inputs[0])
    fast.clear()
    gc.collect()
    return static() is not None


def _a_graph_closed_by_another_thread_is_an_error() -> bool:
    fast = graphcache.wrap(mlp())
    fast(X)
    next(iter(graphs_of(fast).entries.values())).graph.close()
    return any(differs(fast, X) for _ in range(2))


def _the_hottest_graph_goes() -> bool:
    fast = graphcache.wrap(mlp(), max_graphs=2)
    for size in (1, 2, 1, 1, 3):
        fast(torch.ones(size, 4))
    return not replays(fast, torch.ones(1, 4))


def _a_part_is_left_patched() -> bool:
    module = frozen(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    graphcache.wrap(module, strategy="per_submodule", include=["0"])(X)
    return "forward" in module[0].__dict__


def _a_patched_forward_is_not_called() -> bool:
    module = frozen(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    fast = graphcache.wrap(module, strategy="per_submodule", include=["0"])
    fast(X)
    original = module[0].forward
    module[0].forward = lambda x: original(x) * -2
    return any(differs(fast, X) for _ in range(2))


def _an_answer_shares_memory_with_the_next_one() -> bool:
    fast = graphcache.wrap(Fn(lambda _, x: x * 2))
    fast(X)
    first = fast(X)
    before = first.clone()
    fast(X + 1)
    return not same(first, before)


# ---- some of the replacements


def _take_bools_for_numbers(original: Any, reader: Any, value: Any, *rest: Any) -> Any:
    return original(reader, int(value) if type(value) is bool else value, *rest)


def _round_zeros(original: Any, reader: Any, value: Any, *rest: Any) -> Any:
    return original(reader, 0.0 if type(value) is float and value == 0 else value, *rest)


def _keep_no_numbers(original: Any, tape: Any, out: Any, func: Any) -> Any:
    return original(tape, out, func) if isinstance(out, (Tensor, list, tuple)) else None


def _without_copying_in(graph: Any, inputs: Any, out: Any = None) -> Any:
    with torch.no_grad():
        found = graph._run()
        return found if out is None else [target.copy_(tensor) for target, tensor in zip(out, found, strict=True)]


def _into_the_same_memory(original: Any, graph: Any, inputs: Any, out: Any = None) -> Any:
    kept = graph.__dict__.setdefault("kept", [tensor.clone() for tensor in original(graph, inputs)])
    found = original(graph, inputs, kept)
    return found if out is None else [target.copy_(tensor) for target, tensor in zip(out, found, strict=True)]


class _NoLock:
    """Never keeps anybody out."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def acquire(self, blocking: bool = True) -> bool:
        return True

    def release(self) -> None:
        pass


def _without_lock(original: Any, recorder: Any, *args: Any, **kwargs: Any) -> None:
    original(recorder, *args, **kwargs)
    recorder._host_lock = _NoLock()


_No = type("_No", (), {})
_never_refused = property(lambda tape: None, lambda tape, refusal: None)


def _scaled() -> nn.Module:
    return Fn(lambda self, x: x * self.factor, factor=2)


def _swap(change: Callable[[nn.Module], None]) -> Callable[[], bool]:
    return lambda: stale(change)


def _without_attributes(original: Any, reader: Any, value: Any, where: str, depth: int) -> Any:
    return None if where.startswith("an attribute of") else original(reader, value, where, depth)


def _never(*_: Any) -> bool:
    return False


def _moved(module: Any) -> None:
    module[0].weight.data = torch.full((4, 4), 0.5)


def _new_weight(module: Any) -> None:
    module[0].weight = nn.Parameter(torch.full((4, 4), 0.5), requires_grad=False)


def _transposed(module: Any) -> None:
    module[0].weight.data = module[0].weight.data.t()


def _new_activation(module: Any) -> None:
    module[1] = nn.Tanh()


def _new_hook(module: Any) -> None:
    module[0].register_forward_hook(lambda module, args, output: output * 2)


GUARDS = "tests/keys/test_guards.py::"
EFFECTS = "tests/capture/test_effects.py::"
REACHES = "tests/capture/test_what_code_reaches.py::test_answers_and_state_are_those_of_eager_calls"
PAST = "tests/capture/test_past_the_dispatcher.py::"
ACTIVITY = "tests/capture/test_host_activity.py::"
AMBIENT = "tests/keys/test_ambient.py::"
RECORD = "tests/capture/test_torch_recorder.py::"
CACHED = "tests/modules/test_cached_module.py::"
ANSWERS = "tests/capture/test_output_layout.py::"
SIGNATURE = "tests/keys/test_call_key.py::"
LRU = "tests/cache/test_graph_cache.py::"
HOST = "tests/graphs/test_cpu_tape.py::"
STRATEGY = "tests/modules/test_strategy.py::"
STATE = "tests/capture/test_persistent_state.py::"

CURES: dict[str, Cure] = {
    # keys
    "constants are tagged with their types": Cure(
        around(call_key._Reader, "part", _take_bools_for_numbers),
        _a_constant_is_taken_for_another,
        SIGNATURE + "test_constants_are_told_apart_by_type_and_by_bits",
    ),
    "floats are told apart by their bits": Cure(
        around(call_key._Reader, "part", _round_zeros),
        _a_zero_is_taken_for_the_other,
        SIGNATURE + "test_constants_are_told_apart_by_type_and_by_bits",
    ),
    "one tensor given twice is told from two": Cure(
        edited(repeats=()),
        _two_tensors_are_taken_for_one,
        ANSWERS + "test_the_same_tensor_given_twice_does_not_spoil_calls_with_two_tensors",
    ),
    "dtypes are part of a key": Cure(
        tensors_read(lambda part: (torch.float32, *part[1:])),
        lambda: wrong(lambda _, x: x * 2, X, X.double()),
        CACHED + "test_dtypes_strides_and_constants_have_graphs_of_their_own",
    ),
    "shapes are part of a key": Cure(
        tensors_read(lambda part: (part[0], None, *part[2:])),
        lambda: wrong(lambda _, x: x * 2, X, X[:1]),
        CACHED + "test_shapes_seen_before_are_not_captured_again",
    ),
    "strides are part of a key": Cure(
        tensors_read(lambda part: (*part[:2], None, *part[3:])),
        lambda: wrong(lambda _, x: x * 2, X[:, :2], X[:, :2].t()),
        SIGNATURE + "test_dtype_shape_strides_and_device_count",
    ),
    "a pending conjugation is part of a key": Cure(
        tensors_read(lambda part: part[:4]),
        _a_conjugate_is_taken_for_what_it_conjugates,
        "",
    ),
    "the grad mode is part of a key": Cure(
        edited(grad=False),
        _gradients_are_lost,
        CACHED + "test_an_input_that_requires_gradients_runs_eagerly",
    ),
    "inference mode is part of a key": Cure(
        edited(inference=False),
        _inference_mode_is_taken_for_no_grad,
        CACHED + "test_a_module_that_asks_for_inference_mode_gets_the_mode_of_the_call",
    ),
    "autocast is part of a key": Cure(
        edited(autocast=()),
        _the_other_autocast_answers,
        CACHED + "test_autocast_has_graphs_of_its_own",
    ),
    "the dtype of autocast is part of a key": Cure(
        replace(call_key, "_autocast", lambda: (("cpu", None),)),
        _the_other_dtype_of_autocast_answers,
        SIGNATURE + "test_autocast_counts_with_its_dtype",
    ),
    "the ambient state of PyTorch is part of a key": Cure(
        edited(settings=None),
        _the_other_default_dtype_answers,
        AMBIENT + "test_graphs_of_another_state_do_not_answer_and_come_back_with_theirs[default dtype]",
    ),
    "function modes see the module itself": Cure(
        both(replace(call_key, "has_function_modes", _never), edited(settings=None)),
        _a_function_mode_sees_nothing,
        AMBIENT + "test_a_call_inside_a_function_mode_runs_eagerly",
    ),
    "attributes of a tensor are part of a key": Cure(
        around(call_key._Reader, "_constant", _without_attributes),
        _an_attribute_of_a_tensor_is_frozen,
        RECORD + "test_attributes_of_a_tensor_are_part_of_the_key",
    ),
    # what makes a graph stale
    "a guard compares the weights": Cure(
        replace(state_nodes.TensorNode, "differs", _never),
        _swap(_moved),
        GUARDS + "test_a_graph_of_before_is_never_used_after[replace_data]",
    ),
    "a guard compares the layout of the weights": Cure(
        replace(state_nodes, "_place", lambda tensor: (tensor.data_ptr(), *[None] * 7)),
        _swap(_transposed),
        GUARDS + "test_a_graph_of_before_is_never_used_after[replace_data_by_its_transpose]",
    ),
    "a guard compares the tables of modules": Cure(
        replace(state_nodes.TableNode, "differs", _never),
        _swap(_new_weight),
        GUARDS + "test_a_graph_of_before_is_never_used_after[replace_parameter]",
    ),
    "a guard compares the submodules": Cure(
        replace(state_nodes.TableNode, "differs", _never),
        _swap(_new_activation),
        GUARDS + "test_a_graph_of_before_is_never_used_after[replace_submodule]",
    ),
    "a guard compares the hooks": Cure(
        replace(state_nodes.TableNode, "differs", _never),
        _swap(_new_hook),
        GUARDS + "test_a_graph_of_before_is_never_used_after[hook]",
    ),
    "a guard compares the training flags": Cure(
        replace(state_nodes.TableNode, "differs", _never),
        lambda: stale(lambda module: module.train(), lambda: frozen(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))),
        GUARDS + "test_training_and_evaluation_take_turns",
    ),
    "a guard compares the hooks of all modules": Cure(
        replace(guards, "_GLOBAL_HOOKS", ()),
        _a_hook_of_all_modules_does_not_run,
        GUARDS + "test_a_change_of_any_kind_is_noticed_and_named",
    ),
    "a guard compares attributes": Cure(
        replace(state_nodes.AttributesNode, "differs", _never),
        lambda: stale(lambda module: setattr(module, "factor", 3), _scaled),
        GUARDS + "test_a_change_of_any_kind_is_noticed_and_named",
    ),
    "globals of what came to run are followed": Cure(
        replace(guards.ModuleGuard, "unseen", lambda self, ran: {}),
        _a_global_that_nobody_found_is_frozen,
        EFFECTS + "test_functions_that_the_walk_did_not_find_are_observed_once_more",
    ),
    "closures and default values of what came to run are followed": Cure(
        replace(guards, "holds_state", _never), _reached("a_default_of_init"), f"{REACHES}[a_default_of_init-now]"
    ),
    "classes of arguments are guarded": Cure(
        replace(call_key.CallKey, "classes", lambda self: set()),
        _reached("the_class_of_a_member_of_an_enumeration"),
        f"{REACHES}[the_class_of_a_member_of_an_enumeration-now]",
    ),
    "gradients are guarded for code that looks at them": Cure(
        replace(value_nodes.GradientNode, "differs", _never),
        _reached("an_optimizer_without_gradients_yet"),
        f"{REACHES}[an_optimizer_without_gradients_yet-now]",
    ),
    "levels of loggers are guarded": Cure(
        replace(state_walk, "levels_of", lambda logger: []),
        _reached("the_level_of_a_logger"),
        f"{REACHES}[the_level_of_a_logger-now]",
    ),
    "a tensor that no operation made is no constant": Cure(
        replace(cpu_tape._Recorder, "_is_of_the_call", _never),
        lambda: wrong(
            lambda _, x, mask: x * mask.long().as_subclass(Tensor),
            (torch.ones(3), torch.ones(3, dtype=torch.bool)),
            (torch.ones(3), torch.tensor([True, False, True])),
        ),
        PAST + "test_a_tensor_that_no_operation_made_is_no_constant[as_subclass]",
    ),
    "tensors among numbers are read on the host": Cure(
        replace(operations, "_reads_on_the_host", _never),
        lambda: wrong(
            lambda _, x, mask: x * torch.tensor([each.long() for each in mask]),
            (torch.ones(3), torch.ones(3, dtype=torch.bool)),
            (torch.ones(3), torch.tensor([True, False, True])),
        ),
        PAST + "test_a_tensor_that_no_operation_made_is_no_constant[torch.tensor]",
    ),
    "a graph is recorded in the grad mode of the call": Cure(
        around(
            record_torch.TorchRecorder,
            "record",
            lambda original, self, request, *args: original(self, _without_grad(request), *args),
        ),
        torch.enable_grad()(
            lambda: wrong(lambda _, x: x * (2 if torch.is_grad_enabled() else 3), torch.zeros(2), torch.ones(2))
        ),
        PAST + "test_a_graph_is_recorded_in_the_modes_of_the_call_or_not_at_all[AsksForGradients-enable_grad]",
    ),
    "so is every other graph of before it": Cure(
        replace(guards.ModuleGuard, "forget", lambda self: setattr(self, "known", None)),
        _another_graph_of_before_answers,
        GUARDS + "test_the_version_goes_up_when_a_change_is_taken_note_of_and_not_before",
    ),
    "parameters that require gradients get them": Cure(
        both(replace(guards.ModuleGuard, "requires_grad", _never), replace(state_nodes.TensorNode, "differs", _never)),
        _a_parameter_gets_no_gradient,
        GUARDS + "test_a_parameter_that_comes_to_require_gradients_gets_them",
    ),
    "the cache of autocast is off in a capture": Cure(
        replace(record_torch, "_no_autocast_cache", nullcontext),
        _a_weight_changes_unseen_under_autocast,
        GUARDS + "test_under_autocast_a_change_in_place_is_seen_too",
    ),
    # what a call does besides answering
    "writes are noticed before anything runs twice": Cure(
        both(replace(effects, "written", nothing), replace(effects, "_written", lambda *_: iter(()))),
        lambda: changed_otherwise(
            lambda self: self.parameter.add_(1), parameter=lambda: nn.Parameter(torch.zeros(1), requires_grad=False)
        ),
        EFFECTS + "test_state_is_changed_exactly_once_per_call[False-parameter]",
    ),
    "writes to what has no version are noticed": Cure(
        replace(effects, "written", nothing),
        _a_parameter_without_a_version_is_written_twice,
        "",
    ),
    "writes past the dispatcher are noticed": Cure(
        replace(effects, "_contents", nothing),
        _memory_is_written_past_pytorch_otherwise,
        EFFECTS + "test_an_effect_is_noticed_and_named[a buffer past PyTorch]",
    ),
    "attributes that change are noticed": Cure(
        replace(effects, "_changed_objects", lambda *_: iter(())),
        lambda: changed_otherwise(lambda self: setattr(self, "count", self.count + 1), count=int),
        EFFECTS + "test_state_is_changed_exactly_once_per_call[False-number]",
    ),
    "random numbers are noticed": Cure(
        replace(effects, "_generators", nothing),
        _random_numbers_are_drawn_for_nobody,
        EFFECTS + "test_random_numbers_are_drawn_as_eager_draws_them",
    ),
    "generators are noticed": Cure(
        both(
            replace(effects, "torch", Instead(torch, Generator=_No)),
            replace(effects, "_changed_objects", lambda *_: iter(())),
            replace(cpu_tape, "torch", Instead(torch, Generator=_No)),
        ),
        _a_generator_of_its_own_runs_ahead,
        EFFECTS + "test_a_generator_of_the_modules_own_advances_as_in_eager",
    ),
    "context variables are noticed": Cure(
        both(
            replace(effects, "_changed_process_state", lambda *_: iter(())),
            replace(value_nodes.VariableNode, "differs", _never),
        ),
        _a_context_variable_is_set_for_nobody,
        EFFECTS + "test_an_effect_is_noticed_and_named[a context variable]",
    ),
    "clocks are noticed": Cure(
        replace(host_activity, "_CLOCKS", frozenset()),
        _a_clock_stands_still,
        ACTIVITY + "test_what_no_graph_repeats_is_noticed_and_named",
    ),
    "work for other threads is noticed": Cure(
        replace(host_activity.HostActivity, "_note", nothing),
        _a_path_that_another_thread_chose_is_frozen,
        ACTIVITY + "test_work_for_pools_is_noticed",
    ),
    "the profile hook of somebody else is left to him": Cure(
        replace(record_torch, "is_available", lambda: True),
        _a_profiler_is_switched_off,
        EFFECTS + "test_while_somebody_profiles_nothing_is_captured",
    ),
    "the tape refuses writes before they happen": Cure(
        replace(cpu_tape, "written", nothing),
        _a_write_of_the_tape_happens,
        HOST + "test_writes_into_memory_that_outlives_the_call_are_refused_before_they_happen",
    ),
    # what a graph would freeze
    "reads past the dispatcher are noticed": Cure(
        both(
            replace(host_activity, "_READS", frozenset()),
            replace(record_torch, "verify", nothing),
        ),
        _a_path_is_frozen(lambda x: x.tolist()[0][0]),
        RECORD + "test_a_path_chosen_by_a_value_is_never_frozen[tolist]",
    ),
    "reads through the dispatcher are refused": Cure(
        both(
            replace(cpu_tape, "refuse_by_tag", nothing),
            around(cpu_tape._Recorder, "_keep", _keep_no_numbers),
            replace(record_torch, "verify", nothing),
        ),
        _a_path_is_frozen(lambda x: x.sum().item()),
        RECORD + "test_a_path_chosen_by_a_value_is_never_frozen[item]",
    ),
    "a refusal that the module swallows counts": Cure(
        lambda patch: patch.setattr(cpu_tape._Recorder, "refused", _never_refused, raising=False),
        _a_swallowed_refusal_freezes_a_path,
        RECORD + "test_a_refusal_that_the_module_swallows_is_still_one",
    ),
    "a new graph is verified": Cure(
        replace(record_torch, "verify", nothing),
        _a_value_read_unseen_is_frozen,
        "",
    ),
    "verification uses other values": Cure(
        replace(judge, "perturb", lambda inputs, negative=False: [tensor.clone() for tensor in inputs]),
        _a_value_read_unseen_is_frozen,
        "",
    ),
    "verification on the host is exact": Cure(
        replace(judge, "same_bits", lambda left, right: all(map(partial(torch.allclose, rtol=1e-3), left, right))),
        _a_small_value_read_unseen_is_frozen,
        "",
    ),
    "outputs are poisoned before they are compared": Cure(
        replace(buffers, "poison", nothing),
        _a_graph_that_writes_nothing_passes,
        "",
    ),
    "plain values are compared": Cure(
        replace(trial_call.OutputLayout, "layout", None),
        _a_plain_value_is_frozen,
        ANSWERS + "test_layouts_tell_apart_what_a_graph_could_not_change",
    ),
    "eager execution has to repeat itself": Cure(
        replace(trial_call.TrialCall, "compare", nothing),
        _an_answer_of_chance_is_repeated,
        RECORD + "test_a_module_that_answers_differently_every_time_is_reported",
    ),
    # answers
    "inputs are copied in": Cure(
        replace(cpu_tape.CpuTape, "replay", _without_copying_in),
        _a_replay_answers_for_the_inputs_of_the_capture,
        HOST + "test_a_replay_equals_eager_bit_for_bit",
    ),
    "outputs are the caller's": Cure(
        around(cpu_tape.CpuTape, "replay", _into_the_same_memory),
        _an_answer_shares_memory_with_the_next_one,
        HOST + "test_outputs_are_fresh_and_intact_after_later_replays",
    ),
    "an answer is an inference tensor where eager ones are": Cure(
        around(
            record.Recording,
            "__init__",
            lambda original, self, *args, **options: original(self, *args, **(options | {"enters_inference": False})),
        ),
        _an_answer_is_no_inference_tensor,
        RECORD + "test_a_forward_in_inference_mode_of_its_own_answers_inference_tensors_always",
    ),
    "a view of an input is one of the caller's own": Cure(
        around(trial_call.TensorLeaf, "of", lambda original, *args: original(*args).clone()),
        _a_returned_view_is_a_copy,
        ANSWERS + "test_a_write_into_a_returned_view_reaches_the_callers_tensor",
    ),
    "replays are out of reach of the caller's autocast": Cure(
        replace(torch._C, "_DisableAutocast", nullcontext),
        _autocast_is_applied_to_a_part_that_switched_it_off,
        CACHED + "test_a_part_that_switches_autocast_off_stays_off",
    ),
    "tracers see the module itself": Cure(
        both(
            replace(call_key, "dispatch_modes", lambda: 0),
            replace(call_key, "has_function_modes", _never),
            edited(settings=None),
        ),
        _a_tracer_sees_the_cache_at_work,
        CACHED + "test_make_fx_sees_the_operations_of_the_module",
    ),
    "state is left as after one call": Cure(
        replace(persistent_state.PersistentState, "advance", nothing),
        _a_failure_loses_state,
        STATE + "test_a_recording_that_fails_leaves_the_state_as_after_one_call",
    ),
    "each run of a recording begins with the same state": Cure(
        replace(persistent_state.PersistentState, "rewind", nothing),
        _state_is_lost,
        STATE + "test_one_capture_then_hits_and_each_call_advances_the_state_once",
    ),
    "a graph is held to the state that it leaves": Cure(
        around(persistent_state.PersistentState, "now", lambda original, state: list(state.updated) or original(state)),
        _a_wrong_update_is_kept,
        STATE + "test_a_graph_that_updates_the_state_in_another_way_is_refused",
    ),
    "transforms see the module itself": Cure(
        replace(call_key, "_transforms", lambda: None),
        _a_transform_sees_something_else,
        CACHED + "test_vmap_and_grad_go_through",
    ),
    "replays of one graph follow one another": Cure(
        around(record_torch.TorchRecorder, "__init__", _without_lock),
        _threads_mix_their_inputs,
        CACHED + "test_threads_share_one_module",
        certain=False,
    ),
    # the cache
    "room is made for a new graph": Cure(
        replace(graph_cache.GraphCache, "victims", nothing),
        _more_graphs_than_agreed,
        LRU + "test_the_least_recently_used_goes_first",
    ),
    "bytes count": Cure(
        around(
            graph_cache.GraphCache,
            "victims",
            lambda original, self, *nbytes, **options: original(Instead(self, max_bytes=None), *nbytes, **options),
        ),
        _more_bytes_than_agreed,
        CACHED + "test_the_budget_in_bytes_holds_after_every_call",
    ),
    "what leaves the cache is closed": Cure(
        replace(graph_cache, "_close", nothing),
        _a_graph_that_was_dropped_stays_open,
        LRU + "test_the_least_recently_used_goes_first",
    ),
    "what the cache refuses is closed": Cure(
        around(
            graph_cache.GraphCache,
            "put",
            lambda original, self, key, graph, **options: original(self, key, Instead(graph, close=nothing), **options),
        ),
        _a_graph_that_was_refused_stays_open,
        LRU + "test_a_graph_larger_than_the_budget_is_refused_and_closed_and_nothing_else_changes",
    ),
    "a closed graph refuses": Cure(
        replace(cpu_tape.CpuTape, "_open_inputs", lambda self: self._inputs or []),
        _a_graph_closed_by_another_thread_is_an_error,
        HOST + "test_close_is_idempotent_and_later_replays_say_what_to_do",
    ),
    "a hit counts as a use": Cure(
        replace(dispatcher, "clock", lambda: 0),
        _the_hottest_graph_goes,
        CACHED + "test_the_least_recently_replayed_graph_goes_first",
    ),
    # parts
    "at rest a part is what it was": Cure(
        replace(forward_patch, "_remove", nothing),
        _a_part_is_left_patched,
        STRATEGY + "test_at_rest_the_parts_are_what_they_were_even_after_an_exception",
    ),
    "a part runs what the user put in its place": Cure(
        replace(forward_patch, "_follow", nothing),
        _a_patched_forward_is_not_called,
        STRATEGY + "test_a_forward_that_is_patched_after_wrapping_counts_too",
    ),
}


@pytest.mark.parametrize("name", CURES)
def test_without_a_cure_there_is_harm_and_with_it_there_is_none(name, monkeypatch):
    cure = CURES[name]
    assert not cure.harmed()
    with monkeypatch.context() as patch:
        cure.take_out(patch)
        try:
            harmed = cure.harmed()
        except Exception:
            harmed = True
    assert harmed
    assert not cure.harmed()


@pytest.mark.parametrize("name", [name for name, cure in CURES.items() if cure.certain and cure.guard])
def test_without_a_cure_its_guard_fails(name, monkeypatch):
    fails_without(CURES[name].take_out, CURES[name].guard, monkeypatch)


test_without_a_cure_its_guard_fails.__doc__ = list_of_guards({name: cure.guard for name, cure in CURES.items()})


@pytest.mark.parametrize("name", [name for name, cure in CURES.items() if cure.guard])
def test_a_guard_is_a_test_that_there_is(name):
    path, _, test = CURES[name].guard.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert test.partition("[")[0] in {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}
