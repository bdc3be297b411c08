"""A fault at every step of a capture, one step after the other: the call is answered, and nothing is left behind."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import Reason
from graphcache.cache.graph_cache import GraphCache
from graphcache.capture import engine_recorder as record_engine
from graphcache.capture import torch_recorder as record_torch
from graphcache.engines.context import Context, ContextPool
from graphcache.errors import CudaError, Refusal
from graphcache.graphs import capture, cuda, driver, verify
from graphcache.graphs.cuda import CudaGraph
from graphcache.graphs.stream_order import StreamOrder, own_stream
from tests.helpers import wrap_recorded

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
networks = pytest.importorskip("tests.gpu.networks")

DEVICE = "cuda"
SLACK = 0
"""How many bytes more than before torch may hold after a fault. Its account is exact, to the block."""

MOST_STEPS = 2_000

Target = tuple[Any, str]

DRIVER: list[Target] = [
    (driver, "call"),
    (driver, "end_capture"),
    (CudaGraph, "__init__"),
    (GraphCache, "put"),
]
ENGINE: list[Target] = [
    *DRIVER,
    (ContextPool, "take"),
    (Context, "set_inputs"),
    (Context, "set_outputs"),
    (Context, "enqueue"),
    (StreamOrder, "scratch"),
    (verify, "perturb"),
    (record_engine, "verify"),
]
TORCH: list[Target] = [
    *DRIVER,
    (StreamOrder, "pool"),
    (capture, "find_copies"),
    (record_torch, "static_copy"),
    (verify, "perturb"),
    (record_torch, "record_torch"),
    (record_torch, "verify"),
]

CASES: dict[str, tuple[dict[str, Any], list[Target]]] = {
    "engine, bound": ({}, [*ENGINE, (record_engine, "find_pointers")]),
    "engine, copied": ({"io": "copy"}, [*ENGINE, (capture, "find_copies")]),
    "engine, shared context": ({"contexts": "shared"}, [*ENGINE, (record_engine, "find_pointers")]),
    "engine, full edges": ({"io": "copy", "edges": "full"}, [*ENGINE, (capture, "make_all_full")]),
    "torch": ({}, TORCH),
}

AFTER = {"end_capture", "__init__ of CudaGraph", "record_torch"}
"""Where a fault comes after the work: a capture must not be left open by the fault itself, nor what a constructor owns
by never having been made."""

GIVING_BACK = {"cuGraphDestroy", "cuGraphExecDestroy", "cuEventDestroy", "cuStreamDestroy"}
"""Driver calls that only a lost context makes fail, after which there is nothing to be given back."""

FAULTS: dict[str, tuple[Callable[[str], Exception], Reason]] = {
    "CudaError": (CudaError, Reason.CAPTURE_FAILED),
    "RuntimeError": (RuntimeError, Reason.CAPTURE_FAILED),
    "OutOfMemoryError": (torch.cuda.OutOfMemoryError, Reason.OUT_OF_MEMORY),
    "Refusal": (lambda said: Refusal(Reason.CAPTURE_FAILED, "here", said), Reason.CAPTURE_FAILED),
}


class Net(nn.Module):
    """Layers whose products take a cuBLAS workspace, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layers(x)
        return y, y.sum(-1)


class Injector:
    """Counts the calls of some functions, and lets one of them fail; keeps account of what the driver made.

    Args:
        monkeypatch: Puts the functions back after the test.
        targets: Owner and name of each function.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, targets: list[Target]) -> None:
        self.seen: set[str] = set()
        self.graphs: set[int] = set()
        self.executables: set[int] = set()
        self.thrown = ""
        self._armed = False
        self._left = 0
        self._fault: Callable[[str], Exception] = RuntimeError
        # The account is nearest to the driver, so that it sees only what really happened.
        monkeypatch.setattr(driver, "call", self._counted_call(driver.call))
        monkeypatch.setattr(driver, "end_capture", self._counted_end(driver.end_capture))
        for owner, name in targets:
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name), label(owner, name)))

    @contextmanager
    def failing(self, step: int, fault: Callable[[str], Exception]) -> Iterator[None]:
        """Inside, the ``step``-th call fails, once."""
        self._armed, self._left, self._fault, self.thrown = True, step, fault, ""
        try:
            yield
        finally:
            self._armed = False

    def _wrapped(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            what = f"{name}({args[0]})" if name == "call" else name
            if not self._armed or (name == "call" and args[0] in GIVING_BACK):
                return function(*args, **kwargs)
            self.seen.add(name)
            self._left -= 1
            if self._left:
                return function(*args, **kwargs)
            if name in AFTER:
                made = function(*args, **kwargs)
                if name == "end_capture" and made is not None:
                    driver.call("cuGraphDestroy", made)
                elif name == "record_torch":
                    driver.call("cuGraphDestroy", made[0])
            self.thrown, self._armed = what, False
            raise self._fault(f"made up, at {what}")

        return wrapped

    def _counted_call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(name: str, *args: Any) -> Any:
            made = function(name, *args)
            if name == "cuGraphInstantiateWithParams":
                self.executables.add(int(made))
            elif name == "cuGraphExecDestroy":
                self.executables.discard(int(args[0]))
            elif name == "cuGraphDestroy":
                self.graphs.discard(int(args[0]))
            return made

        return counted

    def _counted_end(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(stream: Any) -> Any:
            made = function(stream)
            if made is not None:
                self.graphs.add(int(made))
            return made

        return counted


def label(owner: Any, name: str) -> str:
    return f"{name} of {owner.__name__}" if isinstance(owner, type) else name


def torch_bytes() -> int:
    """What torch holds for living tensors, without the workspaces that cuBLAS takes when it needs them."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def random_numbers() -> Tensor:
    torch.cuda.manual_seed(7)
    return torch.randn(8, device=DEVICE)


def right(answer: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    pairs = zip(answer, wanted, strict=True)
    return all(bool((got - good).norm() <= 1e-4 * good.norm()) for got, good in pairs)


def walks() -> list[Any]:
    """Every kind of fault for the three ways to capture; the variants of an engine's with one."""
    usual = ("engine, bound", "engine, copied", "torch")
    found = [(case, fault) for case in CASES for fault in FAULTS if case in usual or fault == "CudaError"]
    return [pytest.param(*each, id="-".join(each).replace(", ", "-").replace(" ", "_")) for each in found]


@pytest.fixture(autouse=True)
def quick_collections() -> Iterator[None]:
    """What lives already is left out of every collection, so that hundreds of them cost little."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize(("case", "kind"), walks())
def test_a_fault_at_every_step_of_a_capture(case, kind, load, monkeypatch):
    options, targets = CASES[case]
    fault, expected = FAULTS[kind]
    # The graphs of the other modules make no more executables while those of this one are counted.
    monkeypatch.setattr(cuda, "SMALL", 0)
    net = Net().requires_grad_(False).eval().to(DEVICE)
    others = {
        "engine": (graphcache.wrap(load("mlp8")), torch.randn(5, networks.SIZE, device=DEVICE)),
        "torch": (graphcache.wrap(Net().requires_grad_(False).eval().to(DEVICE)), torch.randn(7, 64, device=DEVICE)),
    }
    if case == "torch":
        module, inputs = net, (torch.randn(16, 64, device=DEVICE),)
    else:
        module, inputs = load("two_outputs"), tuple(torch.randn(2, 5, 8, device=DEVICE).unbind())
    wanted = tuple(tensor.clone() for tensor in module(*inputs))
    others_wanted = {name: leaves(fast(x)) for name, (fast, x) in others.items()}
    for other, x in others.values():
        # From the first hit on, the outputs of the next one are allocated beforehand.
        other(x)
    expected_numbers = random_numbers()
    stream = torch.cuda.current_stream()
    injector = Injector(monkeypatch, targets)
    fast = wrap_recorded(module, **options)

    def capture_anew() -> None:
        before = fast.cache_info()
        assert right(fast(*inputs), wanted)
        assert right(fast(*inputs), wanted)
        after = fast.cache_info()
        assert (after.captures - before.captures, after.hits - before.hits, after.eager) == (1, 1, before.eager)
        fast.clear()

    def left_behind() -> dict[str, Any]:
        contexts = len(module.engine.contexts) - len(module.contexts) if case != "torch" else 0
        return {"contexts": contexts, "graphs": set(injector.graphs), "executables": set(injector.executables)}

    # Twice, so that what is made once and kept, such as the order's scratch memory, is there.
    for _ in range(2):
        capture_anew()
    baseline = torch_bytes()
    clean = left_behind()
    assert not clean["graphs"]
    assert not clean["executables"]

    for step in range(1, MOST_STEPS):
        before = fast.cache_info()
        with injector.failing(step, fault):
            answer = fast(*inputs)
        where = f"step {step}, {injector.thrown}"
        assert right(answer, wanted), where
        del answer
        after = fast.cache_info()
        eager = {reason: n - before.eager.get(reason, 0) for reason, n in after.eager.items()}
        eager = {reason: n for reason, n in eager.items() if n}
        if after.captures == before.captures:
            assert eager == {expected: 1}, where
        else:
            # Some faults are got over: what cannot be bound is copied.
            assert (after.captures, eager) == (before.captures + 1, {}), where

        assert not driver.is_capturing(own_stream(0, "capture").cuda_stream), where
        assert not torch.cuda.is_current_stream_capturing(), where
        assert torch.cuda.current_stream() == stream, where
        assert gc.isenabled(), where
        assert torch.equal(random_numbers(), expected_numbers), where

        fast.clear()
        assert torch_bytes() <= baseline + SLACK, f"{where}: {torch_bytes() - baseline} bytes are left behind"
        assert left_behind() == clean, where

        for name, (other, x) in others.items():
            hits = other.cache_info().hits
            assert right(leaves(other(x)), others_wanted[name]), where
            assert other.cache_info().hits == hits + 1, where
        capture_anew()
        assert torch_bytes() <= baseline + SLACK, where
        if not injector.thrown:
            break
    else:
        pytest.fail(f"a capture of more than {MOST_STEPS} steps")
    assert injector.seen == {label(*target) for target in targets}
    print(f"{case}, {kind}: {step - 1} steps")
    for other, _ in others.values():
        other.close()
    fast.close()


def leaves(answer: Any) -> tuple[Tensor, ...]:
    return (answer,) if isinstance(answer, Tensor) else tuple(answer)
