"""Thousands of steps over real engines and a torch module: whatever happens in between, every answer is right."""

from __future__ import annotations

import contextvars
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

import graphcache
from graphcache import CachedModule, Reason, Session
from graphcache.errors import CaptureError, ClosedError, ProfileRangeError
from tests.helpers import graphs_of, wrap_recorded

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
networks = pytest.importorskip("tests.gpu.networks")

DEVICE = "cuda"
MAX_GRAPHS = 3
GRAD_MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}

Call = tuple[str, int, str, str]
"""Name of the module, number of the shape, layout of the inputs, grad mode."""


class Net(nn.Module):
    """Two layers, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.layers(x)
        return {"y": y, "sum": y.abs().sum(-1)}


@dataclass(frozen=True)
class Kind:
    """How a module is called and what it answers.

    Args:
        shapes: Of every input; one more than there is room for graphs.
        inputs: How many.
        reference: The right answer, on the device and without waiting; ``None`` for what the module says eagerly.
        bound: Largest relative error of a right answer.
        profiles: For each shape the optimisation profile that takes it.
    """

    shapes: tuple[tuple[int, int], ...]
    inputs: int
    reference: Callable[..., Sequence[Tensor]] | None
    bound: float
    profiles: tuple[int, ...] = (0, 0, 0, 0)


def kinds() -> dict[str, Kind]:
    size = networks.SIZE
    weights = [weight.double().to(DEVICE) for weight in networks._weights(8)]

    def mlp8(x: Tensor) -> list[Tensor]:
        y = x.double()
        for weight in weights:
            y = (y @ weight).relu().softmax(-1)
        return [y]

    return {
        # fp32 products run in TF32 inside the engines.
        "mlp8": Kind(((1, size), (3, size), (8, size), (64, size)), 1, mlp8, 5e-3),
        "two_outputs": Kind(((2, 3), (5, 8), (32, 32), (1, 1)), 2, lambda a, b: [a + b, a * b], 0.0),
        "conditional": Kind(
            ((1, 4), (3, 4), (8, 4), (16, 4)), 1, lambda x: [torch.where(x.sum() > 0, x.relu(), -x)], 0.0
        ),
        "two_profiles": Kind(
            ((2, size), (16, size), (4, size), (32, size)),
            1,
            lambda x: [(x.double() @ weights[0]).relu()],
            5e-3,
            (0, 1, 0, 1),
        ),
        "net": Kind(((1, 16), (4, 16), (16, 16), (64, 16)), 1, None, 1e-4),
    }


class Calls(RuleBasedStateMachine):
    """Engines and a torch module behind small caches, and the account that each should have."""

    engines: ClassVar[dict[str, Any]]
    kinds: ClassVar[dict[str, Kind]]
    streams: ClassVar[list[Any]]
    steps: ClassVar[int] = 0
    replaced = 0
    account: ClassVar[Counter[str]] = Counter()

    @initialize(
        io=st.sampled_from(["bind", "bind", "copy"]),
        contexts=st.sampled_from(["private", "private", "shared"]),
        edges=st.sampled_from(["captured", "captured", "full"]),
    )
    def start(self, io: str, contexts: str, edges: str) -> None:
        torch.manual_seed(0)
        self.options: dict[str, Any] = {"io": io, "contexts": contexts, "edges": edges, "max_graphs": MAX_GRAPHS}
        self.modules = {**self.engines, "net": Net().requires_grad_(False).eval().to(DEVICE)}
        self.wrapped: dict[str, CachedModule] = {}
        self.calls: Counter[str] = Counter()
        self.reused: dict[tuple[object, ...], list[Tensor]] = {}
        self.last: Call = ("two_outputs", 0, "fresh", "no_grad")
        self.recent = [self.last]
        self.profile: int | None = None
        self.session: tuple[str, Session, int] | None = None
        self.errors: list[tuple[str, Tensor, float]] = []
        self.held: list[tuple[str, list[Tensor], list[Tensor], float]] = []
        torch.cuda.synchronize()

    def teardown(self) -> None:
        if not hasattr(self, "wrapped"):
            return
        with ExitStack() as undo:
            undo.callback(self.engines["two_profiles"].set_optimization_profile, None)
            for fast in self.wrapped.values():
                undo.callback(fast.close)
            if self.session is not None:
                undo.callback(self.session[1].close)
            torch.cuda.synchronize()
            for fast in self.wrapped.values():
                self.retire(fast)
            self.settle()
            for label, answer, wanted, bound in self.held:
                for got, right in zip(answer, wanted, strict=True):
                    error = relative(got, right).item()
                    assert error <= bound, f"{label} was right, and changed later by {error:.3g}"

    # ---- calls

    @rule(
        name=st.sampled_from(["mlp8", "two_outputs", "two_outputs", "conditional", "two_profiles", "net", "net"]),
        shape=st.sampled_from([0, 0, 1, 1, 2, 3]),
        layout=st.sampled_from(["fresh", "fresh", "fresh", "reused", "reused", "unaligned", "strided", "expanded"]),
        mode=st.sampled_from(["no_grad"] * 6 + ["inference", "grad"]),
        stream=st.integers(0, 2),
        repeat=st.sampled_from([1, 2, 3, 6]),
        then=st.sampled_from(["look", "look later", "look later and hold"]),
    )
    def call(self, name: str, shape: int, layout: str, mode: str, stream: int, repeat: int, then: str) -> None:
        Calls.steps += 1
        self.last = (name, shape, layout, mode)
        self.recent = [self.last, *(each for each in self.recent if each != self.last)][:3]
        for _ in range(repeat):
            self.one(self.last, stream, then)

    @rule(
        which=st.lists(st.integers(0, 2), min_size=2, max_size=6),
        streams=st.lists(st.integers(0, 2), min_size=1, max_size=3),
        then=st.sampled_from(["look", "look later", "look later and hold"]),
    )
    def call_again(self, which: list[int], streams: list[int], then: str) -> None:
        Calls.steps += 1
        for turn, index in enumerate(which):
            self.one(self.recent[index % len(self.recent)], streams[turn % len(streams)], then)

    @rule(
        name=st.sampled_from(["mlp8", "two_outputs", "net", "net"]),
        shapes=st.lists(st.sampled_from([0, 1, 2]), min_size=2, max_size=4),
        layout=st.sampled_from(["fresh", "reused", "unaligned"]),
        stream=st.integers(0, 2),
        alternate=st.booleans(),
    )
    def call_in_a_loop(self, name: str, shapes: list[int], layout: str, stream: int, alternate: bool) -> None:
        Calls.steps += 1
        for turn, shape in enumerate(shapes * 2):
            self.one((name, shape, layout, "no_grad"), (stream + turn * alternate) % 3, "look later")

    @rule(stream=st.integers(0, 2), sure=st.integers(0, 2))
    def call_with_graphs_off(self, stream: int, sure: int) -> None:
        Calls.steps += 1
        if sure:
            return

        def body() -> None:
            graphcache.runtime.set_cudagraphs_mode(False)
            self.one(self.last, stream, "look")

        before = self.wrap(self.last[0]).ledger.eager[Reason.DISABLED]
        contextvars.copy_context().run(body)
        if self.accepts(self.last):
            assert self.wrap(self.last[0]).ledger.eager[Reason.DISABLED] == before + 1

    @precondition(lambda self: self.last[0] != "net")
    @rule(stream=st.integers(0, 2), sure=st.integers(0, 2))
    def call_with_an_output_allocator(self, stream: int, sure: int) -> None:
        Calls.steps += 1
        fast = self.wrap(self.last[0])
        if sure:
            return
        before = fast.ledger.eager[Reason.OUTPUT_ALLOCATOR]
        with graphcache.runtime.enable_output_allocator(fast):
            self.one(self.last, stream, "look later and hold")
            self.one(self.last, stream, "look")
        if self.accepts(self.last):
            assert fast.ledger.eager[Reason.OUTPUT_ALLOCATOR] == before + 2

    @rule()
    def look(self) -> None:
        Calls.steps += 1
        self.settle()

    # ---- what happens in between

    @rule(sure=st.integers(0, 3))
    def clear(self, sure: int) -> None:
        Calls.steps += 1
        if not sure:
            fast = self.wrap(self.last[0])
            fast.clear()
            assert fast.cache_info().graphs == 0

    @rule(name=st.sampled_from(["mlp8", "two_outputs", "net"]), which=st.integers(0, MAX_GRAPHS - 1))
    def evict(self, name: str, which: int) -> None:
        Calls.steps += 1
        fast = self.wrap(name)
        keys = list(graphs_of(fast).entries)
        if keys:
            assert graphs_of(fast).evict(keys[which % len(keys)])
            assert len(graphs_of(fast)) == len(keys) - 1

    @rule(profile=st.sampled_from([None, None, 0, 1]), sure=st.integers(0, 2))
    def set_profile(self, profile: int | None, sure: int) -> None:
        Calls.steps += 1
        if not sure:
            self.modules["two_profiles"].set_optimization_profile(profile)
            self.profile = profile

    @rule(how=st.sampled_from(["in place", "in place", "data", "parameter"]))
    def replace_a_weight(self, how: str) -> None:
        Calls.steps += 1
        self.settle()
        layer = self.modules["net"].layers[0]
        if how == "in place":
            layer.weight.mul_(-0.9).add_(0.01)
        elif how == "data":
            layer.weight.data = torch.randn_like(layer.weight)
        else:
            layer.weight = nn.Parameter(torch.randn_like(layer.weight), requires_grad=False)
        self.replaced += how != "in place"
        if how != "in place" and self.session is not None and self.session[0] == "net":
            # A session sees weights change in place, and says that it sees nothing else.
            self.end_session()
        torch.cuda.synchronize()

    @rule(sure=st.integers(0, 3))
    def close_and_wrap_again(self, sure: int) -> None:
        Calls.steps += 1
        if sure:
            return
        name = self.last[0]
        fast = self.wrap(name)
        fast.close()
        with pytest.raises(ClosedError):
            fast(*self.inputs(self.last, 0))
        self.retire(fast)
        del self.wrapped[name]
        self.calls[name] = 0
        self.one(self.last, 0, "look")

    # ---- sessions

    @precondition(lambda self: self.session is None)
    @rule(
        name=st.sampled_from(["mlp8", "two_outputs", "net", "conditional"]),
        shape=st.integers(0, 3),
        stream=st.integers(0, 2),
    )
    def make_session(self, name: str, shape: int, stream: int) -> None:
        Calls.steps += 1
        fast = self.wrap(name)
        with torch.cuda.stream(self.streams[stream]), torch.no_grad():
            inputs = self.inputs((name, shape, "fresh", "no_grad"), stream)
            if name == "conditional":
                with pytest.raises(CaptureError, match="not_capturable"):
                    fast.session(*inputs)
                return
            self.session = (name, fast.session(*inputs), stream)
            self.session[1].run()
            self.compare(f"a new session of {name}", self.session[1].outputs, self.right(name, inputs), name, "look")

    @precondition(lambda self: self.session is not None)
    @rule(then=st.sampled_from(["look", "look later"]))
    def run_session(self, then: str) -> None:
        Calls.steps += 1
        assert self.session is not None
        name, session, stream = self.session
        with torch.cuda.stream(self.streams[stream]), torch.no_grad():
            inputs = [torch.randn_like(static) for static in session.inputs]
            for static, value in zip(session.inputs, inputs, strict=True):
                static.copy_(value)
            session.run()
            self.compare(f"a session of {name}", session.outputs, self.right(name, inputs), name, then)

    @precondition(lambda self: self.session is not None)
    @rule()
    def end_session(self) -> None:
        Calls.steps += 1
        assert self.session is not None
        session = self.session[1]
        session.close()
        self.session = None
        with pytest.raises(ClosedError):
            session.run()

    # ---- what always holds

    @invariant()
    def the_budget_holds(self) -> None:
        for fast in getattr(self, "wrapped", {}).values():
            assert len(graphs_of(fast)) <= MAX_GRAPHS

    @invariant()
    def the_account_adds_up(self) -> None:
        for name, fast in getattr(self, "wrapped", {}).items():
            info = fast.cache_info()
            assert counted(fast) == self.calls[name], (name, info)
            assert info.captures - info.evictions == info.graphs
            allowed = {Reason.DISABLED, Reason.OUTPUT_ALLOCATOR}
            allowed |= {Reason.NOT_CAPTURABLE} if name == "conditional" else set()
            # The first eight changes cost no wait.
            allowed |= {Reason.UNSETTLED} if name == "net" and self.replaced > 8 else set()
            assert set(info.eager) <= allowed, (name, info)

    @invariant()
    def nothing_is_left_capturing(self) -> None:
        assert not torch.cuda.is_current_stream_capturing()

    # ---- the parts

    def wrap(self, name: str) -> CachedModule:
        if name not in self.wrapped:
            self.wrapped[name] = wrap_recorded(self.modules[name], **self.options)
        return self.wrapped[name]

    def retire(self, fast: CachedModule) -> None:
        info = fast.cache_info()
        Calls.account.update(hits=info.hits, captures=info.captures, eager=sum(info.eager.values()))

    def accepts(self, call: Call) -> bool:
        name, shape, *_ = call
        return name != "two_profiles" or self.profile in (None, self.kinds[name].profiles[shape])

    def one(self, call: Call, stream: int, then: str) -> None:
        """One call on one stream. Nothing here orders the streams: what the caller owns belongs to one of them."""
        name, _, layout, mode = call
        fast = self.wrap(name)
        with torch.cuda.stream(self.streams[stream]), GRAD_MODES[mode]():
            inputs = self.inputs(call, stream)
            if not self.accepts(call):
                with pytest.raises(ProfileRangeError):
                    fast(*inputs)
                # A call that is known to run eagerly is counted before it fails.
                assert counted(fast) - self.calls[name] in (0, 1)
                self.calls[name] = counted(fast)
                return
            answer = fast(*inputs)
            self.calls[name] += 1
            label = f"{name} {tuple(inputs[0].shape)}, {layout}, {mode}, stream {stream}"
            self.compare(label, answer, self.right(name, inputs), name, then)

    def inputs(self, call: Call, stream: int) -> list[Tensor]:
        name, shape, layout, _ = call
        kind = self.kinds[name]
        if layout != "reused":
            return [laid_out(kind.shapes[shape], layout) for _ in range(kind.inputs)]
        key = (name, shape, stream)
        if key not in self.reused:
            with torch.inference_mode(False):
                self.reused[key] = [laid_out(kind.shapes[shape], "fresh") for _ in range(kind.inputs)]
        for tensor in self.reused[key]:
            tensor.normal_()
        return self.reused[key]

    def right(self, name: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        reference = self.kinds[name].reference
        return leaves(self.modules[name](*inputs)) if reference is None else list(reference(*inputs))

    def compare(self, label: str, answer: Any, wanted: list[Tensor], name: str, then: str) -> None:
        bound = self.kinds[name].bound
        got = leaves(answer)
        self.errors += [(label, relative(*pair), bound) for pair in zip(got, wanted, strict=True)]
        if then == "look":
            # Of this call alone, so that the others stay in flight.
            for what, error, allowed in self.errors[-len(got) :]:
                assert error.item() <= allowed, f"{what}: relative error {error.item():.3g}"
        elif then == "look later and hold":
            self.held.append((label, got, wanted, bound))

    def settle(self) -> None:
        """Wait for everything, and look at what nobody has looked at."""
        torch.cuda.synchronize()
        if self.errors:
            found = torch.stack([error for _, error, _ in self.errors]).tolist()
            for error, (label, _, bound) in zip(found, self.errors, strict=True):
                assert error <= bound, f"{label}: relative error {error:.3g}"
            self.errors.clear()


def counted(fast: CachedModule) -> int:
    info = fast.cache_info()
    return info.hits + info.captures + sum(info.eager.values())


def laid_out(shape: tuple[int, int], layout: str) -> Tensor:
    rows, columns = shape
    if layout == "unaligned":
        return torch.randn(rows * columns + 1, device=DEVICE)[1:].view(shape)
    if layout == "strided":
        return torch.randn(rows, 2 * columns, device=DEVICE)[:, ::2]
    if layout == "expanded":
        return torch.randn(1, columns, device=DEVICE).expand(shape)
    return torch.randn(shape, device=DEVICE)


def leaves(answer: Any) -> list[Tensor]:
    if isinstance(answer, Tensor):
        return [answer]
    return list(answer.values() if isinstance(answer, dict) else answer)


def relative(got: Tensor, wanted: Tensor) -> Tensor:
    """Norm of the difference over norm of what is right, on the device; NaN if anything is."""
    assert got.shape == wanted.shape
    return (got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30)


def test_two_thousand_steps_over_real_engines(load):
    Calls.engines = {name: load(name) for name in ("mlp8", "two_outputs", "conditional", "two_profiles")}
    Calls.kinds = kinds()
    # Torch's own default stream, where TensorRT would wait for the device, and two others, kept alive.
    Calls.streams = [torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    Calls.steps, Calls.account = 0, Counter()
    torch.cuda.synchronize()
    run_state_machine_as_test(
        Calls,
        settings=settings(
            max_examples=40,
            stateful_step_count=100,
            deadline=None,
            derandomize=True,
            database=None,
            # Shrinking would run a failure hundreds of times, at 40 ms a capture.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        ),
    )
    print(f"{Calls.steps} steps: {dict(Calls.account)}")
    assert Calls.steps >= 2_000
    assert Calls.account["hits"] >= 1_000
    assert Calls.account["captures"] >= 100
