"""The compiled short way of a hit: used where it may be, silent where it may not, and counted like the other one."""

from __future__ import annotations

import contextvars
import ctypes
import gc
import subprocess
import sys
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from graphcache import CachedModule, native
from graphcache.config import Modes, modes
from graphcache.dispatch import fast_path
from graphcache.errors import CudaError
from graphcache.graphs import driver
from graphcache.graphs.cuda import IoSlot
from graphcache.keys.guards import ModuleGuard
from graphcache.native.recipe import compiler
from tests.engine_modules import MODULES, load, numbers, prepare, rows
from tests.graphs import compiled as compiled_way
from tests.graphs.fake_driver import Torch, installed
from tests.helpers import dispatcher_of, graphs_of, in_threads, wrap_recorded

KERNEL = "cuGraphExecKernelNodeSetParams"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, compiled: Any) -> Iterator[Torch]:
    with installed(*MODULES, patch=monkeypatch) as fake:
        prepare(fake, monkeypatch)
        functions = compiled_way.use(compiled, fake, monkeypatch)
        yield fake
        assert functions.raised == []


class Warm:
    """A wrapped engine that has answered some inputs before, and its compiled way."""

    def __init__(self, fake: Torch, network: str = "affine", **options: Any) -> None:
        self.fake = fake
        self.stream = fake.new_stream()
        self.module = load(network)
        self.fast: CachedModule = wrap_recorded(self.module, **options)

    def up(self, *args: Tensor) -> Warm:
        with torch.no_grad(), self.fake.on(self.stream):
            for _ in range(4):
                self.fast(*args)
        return self

    def call(self, *args: Any) -> Any:
        return self.fast._graphcache_table.call(args)

    def into(self, out: Any, *args: Any) -> Any:
        return self.fast._graphcache_table.into(out, args)

    def state(self) -> Any:
        """All that the two ways have in common."""
        entries = list(graphs_of(self.fast).entries.values())
        graphs = [entry.graph.graph for entry in entries]
        orders = [(graph.executable, graph.pointed.tolist(), graph.order.stream) for graph in graphs]
        return [(entry.hits, entry.used) for entry in entries], orders


@pytest.fixture
def warm(fake: Torch) -> Warm:
    return Warm(fake).up(rows(fake, 2))


# ---- where it is used


def test_hits_are_answered_by_it(fake: Torch, warm: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("the Python way was taken")

    monkeypatch.setattr(CachedModule, "forward", refuse)
    hits = warm.fast.cache_info().hits
    kept = []
    with torch.no_grad(), fake.on(warm.stream):
        for start in range(5):
            x = rows(fake, 2, start)
            kept.append((warm.fast(x), x * 3 + 1))
        out = fake.driver.heap.tensor(x * 0)
        assert warm.fast.forward_into(out, x) is out
    assert torch.equal(out, x * 3 + 1)
    assert all(torch.equal(*each) for each in kept)
    assert warm.fast.cache_info().hits == hits + 6


def test_on_the_legacy_default_stream_too(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is that of the current context: a thread that has none takes the way in Python, which finds it."""
    fast, x = wrap_recorded(load("affine")), rows(fake, 2)
    with torch.no_grad():
        for _ in range(4):
            fast(x)
        assert torch.equal(fast._graphcache_table.call((x,)), x * 3 + 1)

        def elsewhere(_: int) -> None:
            with torch.no_grad():
                fake.driver.strangers.add(threading.get_ident())
                assert fast._graphcache_table.call((x,)) is None
                assert torch.equal(fast(x), x * 3 + 1)

        in_threads(elsewhere, 1)
        with fast.session(x) as session:
            session.run()
            fake.driver.calls.clear()
            session.run()
            assert fake.driver.calls == ["cuCtxGetCurrent", "cuGraphLaunch"]
            assert torch.equal(session.outputs, x * 3 + 1)


def test_the_driver_is_asked_for_what_the_python_way_asks_for(fake: Torch, warm: Warm) -> None:
    x, out = rows(fake, 2, 5), rows(fake, 2)
    calls = fake.driver.calls
    with torch.no_grad(), fake.on(warm.stream):
        calls.clear()
        warm.call(x)
        assert calls == [KERNEL, "cuGraphLaunch", KERNEL]
        calls.clear()
        warm.call(x)
        assert calls == ["cuGraphLaunch", KERNEL]
        warm.into(out, x)
        calls.clear()
        warm.into(out, x)
        assert calls == ["cuGraphLaunch"]


@pytest.mark.parametrize("io", ["bind", "copy"])
def test_several_inputs_and_outputs(fake: Torch, io: str) -> None:
    pair, scalar = Warm(fake, "pair", io=io), Warm(fake, "scalar", io=io)
    heap = fake.driver.heap
    pair.up(heap.tensor([[1.0, 2.0]]), heap.tensor([[3.0, 4.0]]))
    scalar.up(numbers(fake, 1, 2), heap.tensor(2.0))
    kept = []
    with torch.no_grad():
        for start in range(4):
            a, b, s = heap.tensor([[start, 2.0]]), heap.tensor([[3.0, start]]), heap.tensor(start + 0.5)
            with fake.on(pair.stream):
                answer = pair.call(a, b)
            assert type(answer) is tuple
            kept += [(answer[0], a + b), (answer[1], a * b)]
            with fake.on(scalar.stream):
                x, out = numbers(fake, start, 9), numbers(fake, 0, 0)
                kept.append((scalar.call(x, s), x * s))
                assert scalar.into(out, x, s)
                assert torch.equal(out, x * s)
                assert not scalar.into(x, x, s)
                assert not scalar.into(s, x, s)
                kept.append((scalar.call(x, s), x * s))
        assert pair.into((a, b), a, b) is False
        assert pair.call(a, a) is None
        assert pair.call(a) is None
    assert all(torch.equal(*each) for each in kept)


def test_hits_and_uses_are_counted_as_on_the_python_way(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the cache knows which graph is cold."""
    seen = []
    for way in ("compiled", "python"):
        if way == "python":
            monkeypatch.setattr(native, "loaded", lambda *_, **__: None)
        warm = Warm(fake, max_graphs=3)
        inputs = [rows(fake, count) for count in (1, 2, 3, 4)]
        for x in inputs[:3]:
            warm.up(x)
        with torch.no_grad(), fake.on(warm.stream):
            for which in (0, 1, 2, 1, 0, 0, 2):
                warm.fast(inputs[which])
            order = [entry.used for entry in graphs_of(warm.fast).entries.values()]
            hits = [entry.hits for entry in graphs_of(warm.fast).entries.values()]
            warm.fast(inputs[3])
        assert (warm.fast._graphcache_table is not None) is (way == "compiled")
        seen.append((sorted(range(3), key=order.__getitem__), hits, [key[4] for key in graphs_of(warm.fast).entries]))
    assert seen[0] == seen[1]
    assert torch.Size([2, 4]) not in seen[0][2], "the least recently used one has gone"


def test_modules_of_torch_are_asked_whether_they_changed(fake: Torch) -> None:
    """Of an engine the epoch is looked at; of anything else the guard is asked, after the launch."""
    asked = []

    class Asked(ModuleGuard):
        def is_stale(self, grad: bool) -> bool:
            asked.append(grad)
            return len(asked) == 2

    warm = Warm(fake).up(rows(fake, 2))
    entry = next(iter(graphs_of(warm.fast).entries.values()))
    guard, table, x = Asked(nn.ReLU()), fast_path.new_table(), rows(fake, 2)
    with torch.no_grad(), fake.on(warm.stream):
        fast_path.put(table, (x,), entry, epoch=guard.version, guard=guard)
        hits = entry.hits
        assert torch.equal(table.call((x,)), x * 3 + 1)
        assert table.call((x,)) is None
        assert torch.equal(table.call((x,)), x * 3 + 1)
    assert asked == [False, False, False]
    assert entry.hits == hits + 2
    guard.version += 1
    with torch.no_grad(), fake.on(warm.stream):
        assert table.call((x,)) is None, "something has changed since it was remembered"


def test_what_cannot_be_taken_back_is_asked_for_before(fake: Torch) -> None:
    """A stale graph writes nothing into a caller's tensor, which the module itself may read."""

    class Unchanged(ModuleGuard):
        def is_stale(self, grad: bool) -> bool:
            return False

    warm = Warm(fake).up(rows(fake, 2))
    entry = next(iter(graphs_of(warm.fast).entries.values()))
    guard, table, x = Unchanged(nn.ReLU()), fast_path.new_table(), rows(fake, 2)
    out = fake.driver.heap.tensor(x * 0)
    with torch.no_grad(), fake.on(warm.stream):
        fast_path.put(table, (x,), entry, epoch=guard.version, guard=guard)
        assert table.into(out, (x,))
        assert torch.equal(out, x * 3 + 1)
        guard.version += 1
        out.zero_()
        hits = entry.hits
        fake.driver.calls.clear()
        assert not table.into(out, (x,))
    assert "cuGraphLaunch" not in fake.driver.calls
    assert not out.any()
    assert entry.hits == hits
    table.clear()
    start = x.data_ptr()
    for updates in ((0, start), (start + x.nbytes, start + 2 * x.nbytes)):
        entry.graph.updates = updates
        with torch.no_grad(), fake.on(warm.stream):
            fast_path.put(table, (x,), entry, epoch=guard.version, guard=guard)
            assert torch.equal(table.call((x,)), x * 3 + 1)
    for updates in ((start, start + 1), (start - 1, start + 1), (start + x.nbytes - 1, start + x.nbytes)):
        entry.graph.updates = (0, 1, *updates)
        with torch.no_grad(), fake.on(warm.stream):
            fast_path.put(table, (x,), entry, epoch=guard.version, guard=guard)
            assert table.call((x,)) is None, "an input that is copied lies in what the graph updates"
    entry.graph.updates = (0, 1)
    with torch.no_grad(), fake.on(warm.stream):
        fast_path.put(table, (x,), entry, epoch=guard.version, guard=guard)
        assert torch.equal(table.call((x,)), x * 3 + 1)
        assert "cuGraphLaunch" in fake.driver.calls
        guard.version += 1
        fake.driver.calls.clear()
        assert table.call((x,)) is None
    assert "cuGraphLaunch" not in fake.driver.calls


CURRENT_STREAM = """
struct stream { signed char device_type, device_index; long long id; };
long long current = 0;
struct stream get(signed char index) { return (struct stream){1, index, current}; }
"""


def test_the_current_stream_is_asked_for_when_torch_has_another_one(
    fake: Torch, monkeypatch: pytest.MonkeyPatch, compiled: Any, tmp_path: Path
) -> None:
    """To torch a stream is a number, which a function in C tells without a call of Python's."""
    source, target, asked = tmp_path / "stream.c", tmp_path / "stream.so", list[int]()
    source.write_text(CURRENT_STREAM)
    subprocess.run([*compiler(), "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    torchs = ctypes.CDLL(str(target))
    current = ctypes.c_longlong.in_dll(torchs, "current")
    address = ctypes.cast(torchs.get, ctypes.c_void_p).value

    def raw_stream(index: int) -> int:
        asked.append(index)
        return fake.raw_stream(index)

    monkeypatch.setattr(fast_path, "raw_stream", raw_stream)
    monkeypatch.setattr(fast_path, "_stream_function", lambda library: address)
    current.value = 7
    assert compiled.stream_id(address, 3) == (1, 3, 7)
    warm, x = Warm(fake).up(rows(fake, 2)), rows(fake, 2)
    entry = next(iter(graphs_of(warm.fast).entries.values()))
    entry.graph.graph.index = 0
    table = fast_path.new_table()
    with torch.no_grad(), fake.on(warm.stream):
        fast_path.put(table, (x,), entry)
        asked.clear()
        for _ in range(3):
            assert torch.equal(table.call((x,)), x * 3 + 1)
        assert asked == [0], "afterwards it is the one of before"
    with torch.no_grad(), fake.on(fake.new_stream()):
        current.value = 8
        assert table.call((x,)) is None, "on another stream"
        assert asked == [0, 0]
    with torch.no_grad(), fake.on(warm.stream):
        current.value = 7
        assert torch.equal(table.call((x,)), x * 3 + 1)
        assert asked == [0, 0, 0]


# ---- where it is not


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "gradients": torch.enable_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast of another device": lambda: torch.autocast("cuda", torch.bfloat16),
    "dispatch mode": Mode,
}


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_contexts_in_which_nothing_is_done(fake: Torch, warm: Warm, name: str) -> None:
    x, out, before = rows(fake, 2), rows(fake, 2), warm.state()
    fake.driver.calls.clear()
    if name == "autocast of another device":
        context: AbstractContextManager[Any] = nullcontext()
        torch.set_autocast_enabled("cuda", True)
    else:
        context = CONTEXTS[name]()
    try:
        with torch.no_grad(), fake.on(warm.stream), context:
            assert warm.call(x) is None
            assert warm.into(out, x) is False
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert fake.driver.calls == []
    assert warm.state() == before


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_modes_transforms_tracing_and_captures(fake: Torch, warm: Warm) -> None:
    x, out, before = rows(fake, 2), rows(fake, 2), warm.state()
    seen: list[bool] = []

    def look(value: Tensor) -> Tensor:
        seen.append(warm.call(x) is None and warm.into(out, x) is False and warm.call(value) is None)
        return value

    def off() -> None:
        modes.set(Modes(graphs="off"))
        look(x)

    with torch.no_grad(), fake.on(warm.stream):
        contextvars.copy_context().run(off)
        torch.func.vmap(look)(x)
        torch.jit.trace(look, x, check_trace=False)
        fake.driver.calls.clear()
        fake.driver.cuStreamBeginCapture(warm.stream.cuda_stream, 1)
        look(x)
        fake.driver.cuStreamEndCapture(warm.stream.cuda_stream)
    for stream in (fake.new_stream(), type(warm.stream)(fake.driver, 0)):
        with torch.no_grad(), fake.on(stream):
            look(x)
    assert seen == [True] * len(seen)
    assert len(seen) == 6
    assert "cuGraphLaunch" not in fake.driver.calls
    assert warm.state() == before


def odd(fake: Torch) -> list[Any]:
    x = rows(fake, 2)
    return [
        *(None, 1, "x", [x], (x,), {}, object(), Tensor, torch.float32, torch.device("cpu")),
        *(nn.Parameter(x), x.as_subclass(Subclass), x.to_sparse(), x.to("meta"), x.double(), x.t(), x[:1], x[0]),
        *(torch._neg_view(x), x.to(torch.complex64).conj(), fake.driver.heap.empty(2, 4, offset=4), x[..., :0]),
        *(torch._efficientzerotensor((2, 4)), torch.nested.nested_tensor([x[0]])),
        torch.quantize_per_tensor(x, 1, 0, torch.qint8),
    ]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*quantiz.*")
def test_arguments_that_are_left_alone(fake: Torch, warm: Warm) -> None:
    x = rows(fake, 2)
    fake.driver.calls.clear()
    with torch.no_grad(), fake.on(warm.stream):
        for bad in odd(fake):
            assert warm.call(bad) is None
            assert warm.call(x, bad) is None
            assert warm.into(bad, x) is False
            assert warm.into(x, bad) is False
            assert warm.fast._graphcache_table.call(bad) is None or type(bad) is tuple
            assert warm.fast._graphcache_table.into(rows(fake, 2), bad) is False or type(bad) is tuple
        assert warm.call() is None
        assert warm.call(*(rows(fake, 2) for _ in range(9))) is None
        assert warm.into(x.clone().requires_grad_(), x) is False
        assert warm.into(x, x) is False
    assert fake.driver.calls.count("cuGraphLaunch") == 2, "of the tuples, which are calls"
    with pytest.raises(TypeError):
        warm.fast._graphcache_table.into(x)
    with pytest.raises(TypeError):
        warm.fast._graphcache_table.into(x, (x,), 3)


def test_a_replaced_engine_a_closed_graph_and_a_busy_lane(fake: Torch, warm: Warm) -> None:
    x, out = rows(fake, 2), rows(fake, 2)
    lock, taken, done = warm.module.order.lock, threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait()
    before = warm.state()
    with torch.no_grad(), fake.on(warm.stream):
        try:
            assert warm.call(x) is None
            assert warm.into(out, x) is False
        finally:
            done.set()
            holder.join()
        assert warm.state() == before
        with lock:
            assert torch.equal(warm.call(x), x * 3 + 1), "its own thread's lock is no hindrance"
        warm.module.epoch += 1
        before = warm.state()
        assert warm.call(x) is None
        assert warm.into(out, x) is False
        assert warm.state() == before
        warm.module.epoch -= 1
        assert warm.call(x) is not None
        entry = next(iter(graphs_of(warm.fast).entries.values()))
        entry.graph.close()
        assert warm.call(x) is None
        assert warm.into(out, x) is False
        assert torch.equal(warm.fast(x), x * 3 + 1)


def test_a_setting_that_another_thread_changes_during_a_hit(
    fake: Torch, warm: Warm, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, x = dispatcher_of(warm.fast).fast_path, rows(fake, 2)
    known.clear()
    with torch.no_grad(), fake.on(warm.stream):
        with monkeypatch.context() as patch:
            patch.setattr(fast_path, "ambient_state", lambda: ("another",))
            warm.fast.forward(x)
        assert len(known.table()) == 0, "the graph is not of the setting of now"
        warm.fast.forward(x)
        assert len(known.table()) == 1


def test_staged_graphs_have_no_compiled_way(fake: Torch) -> None:
    strided = rows(fake, 4)[::2]
    staged = Warm(fake).up(strided)
    assert len(dispatcher_of(staged.fast).fast_path.table()) == 0
    with torch.no_grad(), fake.on(staged.stream):
        assert torch.equal(staged.fast(strided), strided * 3 + 1)


def test_without_a_library_or_a_driver_for_it(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_function(*names: str) -> Any:
        raise CudaError(f"the driver has no function {names[0]}")

    monkeypatch.setattr(driver, "addresses", no_function)
    warm = Warm(fake).up(rows(fake, 2))
    assert warm.fast._graphcache_table is None
    monkeypatch.setattr(native, "loaded", lambda *_, **__: None)
    assert Warm(fake).up(rows(fake, 2)).fast._graphcache_table is None


def test_a_library_that_comes_later_answers_what_was_loaded_before(
    fake: Torch, monkeypatch: pytest.MonkeyPatch, compiled: Any
) -> None:
    """As while it is being compiled. The order of the engine has a lock of Python's, which native code takes then."""
    monkeypatch.setattr(native, "loaded", lambda wait=False: None)
    monkeypatch.setattr(native, "is_pending", lambda: True)
    warm, x = Warm(fake).up(rows(fake, 2)), rows(fake, 2)
    order = warm.module.order
    assert warm.fast._graphcache_table is None
    assert type(order.lock) is not compiled.Lock
    monkeypatch.setattr(native, "loaded", lambda wait=False: compiled)
    monkeypatch.setattr(native, "is_pending", lambda: False)
    warm.up(x)
    held = fast_path.lock_of(order)
    assert type(held) is compiled.Lock
    assert held is fast_path.lock_of(order)
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with order.lock:
            taken.set()
            done.wait()

    with torch.no_grad(), fake.on(warm.stream):
        for start in range(5):
            other = rows(fake, 2, start)
            assert torch.equal(warm.call(other), other * 3 + 1)
        with warm.fast.session(x) as session:
            assert type(session.run) is BuiltinFunctionType
            session.run()
            assert torch.equal(session.outputs, x * 3 + 1)
            holder = threading.Thread(target=hold)
            holder.start()
            taken.wait()
            assert warm.call(x) is None
            done.set()
            holder.join()
        with order.lock:
            assert torch.equal(warm.call(x), x * 3 + 1), "its own thread's lock is no hindrance"
        assert in_another_thread(lambda: order.lock.acquire(False) and (order.lock.release() or True)), "given back"


def in_another_thread(work: Callable[[], Any]) -> Any:
    said: list[Any] = []
    in_threads(lambda _: said.append(work()), 1)
    return said[0]


# ---- what goes wrong


@given(
    io=st.sampled_from(["bind", "copy"]),
    name=st.sampled_from(["set", "cuGraphLaunch"]),
    after=st.integers(0, 5),
    steps=st.lists(st.sampled_from(["call", "into", "other into"]), min_size=3, max_size=6),
)
def test_wherever_the_driver_fails_both_ways_answer_rightly_or_say_so(
    compiled: Any, io: str, name: str, after: int, steps: list[str]
) -> None:
    for way in ("python", "compiled"):
        with pytest.MonkeyPatch.context() as patch, installed(*MODULES, patch=patch) as fake, torch.no_grad():
            prepare(fake, patch)
            if way == "compiled":
                compiled_way.use(compiled, fake, patch)
            warm = Warm(fake, io=io).up(rows(fake, 2))
            outs = {"into": rows(fake, 2), "other into": rows(fake, 2)}
            setter = f"cuGraphExec{'Kernel' if io == 'bind' else 'Memcpy'}NodeSetParams"
            fake.driver.fail(setter if name == "set" else name, "OUT_OF_MEMORY", after=after)
            fake.driver.calls.clear()
            said: list[Any] = []
            with fake.on(warm.stream):
                for number, step in enumerate(steps):
                    x = rows(fake, 2, number)
                    try:
                        answer = warm.fast(x) if step == "call" else warm.fast.forward_into(outs[step], x)
                        said.append(torch.equal(answer, x * 3 + 1))
                    except CudaError as error:
                        said.append(str(error))
            failed = setter if name == "set" else name
            wrong = [each for each in said if each is not True]
            assert wrong in ([], [str(driver.failure(failed, 2))])
            assert warm.fast.cache_info().hits == 3 + said.count(True)
            warm.fast.close()
            warm.module.close()


def test_no_memory_for_the_next_answer(fake: Torch, warm: Warm) -> None:
    x = rows(fake, 2)
    with torch.no_grad(), fake.on(warm.stream):
        fake.driver.heap.refuse_after = 0
        kept = [warm.call(x)]
        for call in (warm.call, warm.fast):
            with pytest.raises(torch.cuda.OutOfMemoryError):
                call(x)
        fake.driver.heap.refuse_after = None
        kept += [warm.fast(x), warm.call(x)]
    assert all(torch.equal(answer, x * 3 + 1) for answer in kept)


def test_what_the_callables_raise_is_raised(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(index: Any) -> int:
        raise KeyError("no stream")

    monkeypatch.setattr(fast_path, "raw_stream", broken)
    x = rows(fake, 2)
    warm = Warm(fake)
    with pytest.raises(KeyError, match="no stream"):
        warm.up(x)
    monkeypatch.setattr(fast_path, "raw_stream", lambda index: "seven")
    with pytest.raises(TypeError):
        Warm(fake).up(x)


def test_forgetting_in_the_middle_of_a_call(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Allocating may run any code, such as finalizers; the call goes on with what it has found."""
    warm = Warm(fake)

    def fresh(slot: IoSlot) -> Tensor:
        dispatcher_of(warm.fast).fast_path.clear()
        gc.collect()
        return fake.empty_like(slot.buffer)

    monkeypatch.setattr(IoSlot, "fresh", fresh)
    x = rows(fake, 2)
    warm.up(x)
    with torch.no_grad(), fake.on(warm.stream):
        for _ in range(4):
            warm.fast.forward(x)
            assert torch.equal(warm.call(x), x * 3 + 1)
            assert warm.call(x) is None


@pytest.mark.parametrize(
    "args", [(), (1,), ((), 1, 2, 3, 4, 5, 6), tuple(range(12)), ((int,) * 5, *range(6), (1, 2, 3, 4))]
)
def test_a_driver_of_anything_else_is_refused(compiled: Any, args: tuple[Any, ...]) -> None:
    with pytest.raises((TypeError, AttributeError)):
        compiled.connect(*args)
    for wrong in ({"x": 1}, {}):
        with pytest.raises(TypeError):
            compiled.Table(*(() if wrong else (1,)), **wrong)


def test_putting_anything_else_is_refused(fake: Torch, warm: Warm) -> None:
    table, x = dispatcher_of(warm.fast).fast_path.table(), rows(fake, 2)
    good: list[Any] = []
    patch: Any = type("Table", (), {"put": lambda self, *args: good.extend(args)})()
    entry = next(iter(graphs_of(warm.fast).entries.values()))
    fast_path.put(patch, (x,), entry, engine=warm.module, epoch=warm.module.epoch)
    with torch.no_grad():
        assert table.put(*good) is True
        for place in range(len(good)):
            for bad in (None, 1, "x", (), (None,), ((),), [x], x, 2**70, -1, object()):
                try:
                    table.put(*good[:place], bad, *good[place + 1 :])
                except (TypeError, ValueError, OverflowError, AttributeError):
                    continue
        with pytest.raises(TypeError):
            table.put(*good[:-1])
    table.clear()
    assert len(table) == 0


# ---- threads and memory


def test_threads(fake: Torch) -> None:
    warm = Warm(fake).up(rows(fake, 2))
    streams = [fake.new_stream() for _ in range(3)]

    def work(index: int) -> None:
        with torch.no_grad(), fake.on(warm.stream if index < 2 else streams[index]):
            for step in range(20):
                x = rows(fake, 2, 100 * index + step)
                assert torch.equal(warm.fast(x), x * 3 + 1)
                out = rows(fake, 2)
                assert torch.equal(warm.fast.forward_into(out, x), x * 3 + 1)

    in_threads(work, 3)
    assert warm.fast.cache_info().hits == 3 + 3 * 40


def test_nothing_is_kept_of_a_call(fake: Torch, warm: Warm) -> None:
    x, out = rows(fake, 2), rows(fake, 2)
    entry = next(iter(graphs_of(warm.fast).entries.values()))
    graph = entry.graph.graph
    objects = [x, out, None, True, entry, graph, graph.order, warm.module, *graph.inputs, *graph.outputs]

    def forget() -> None:
        """What the stand-in itself writes down of every call."""
        fake.driver.calls.clear()
        for block in fake.driver.heap.blocks.values():
            block.accesses.clear()
        gc.collect()

    def hits(count: int) -> None:
        for _ in range(count):
            warm.call(x)
            warm.into(out, x)
            warm.fast(x)

    def refuse(count: int) -> None:
        for _ in range(count):
            warm.call(x, None)
            warm.into(None, x)
            warm.call(out[0])

    def held() -> int:
        """Bytes of what C code has allocated for the lines of this file, and not given back."""
        forget()
        mine = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, __file__)])
        return sum(each.size for each in mine.statistics("filename"))

    with torch.no_grad(), fake.on(warm.stream):
        for work in (hits, refuse):
            work(20)
            forget()
            before = [sys.getrefcount(each) for each in objects]
            blocks = len(fake.driver.heap.blocks)
            tracemalloc.start()
            work(20)
            start = held()
            work(300)
            end = held()
            tracemalloc.stop()
            after = [sys.getrefcount(each) for each in objects]
            # Other threads of the process use None and True too; one reference per call would be 320.
            bounds = [100 if each is None or each is True else 5 for each in objects]
            changes = [now - then for now, then in zip(after, before, strict=True)]
            assert [found for found, bound in zip(changes, bounds, strict=True) if abs(found) > bound] == []
            assert len(fake.driver.heap.blocks) <= blocks + 1
            assert end - start < 300 * 16, "the smallest object has 16 bytes"


def test_it_goes_with_its_module(fake: Torch) -> None:
    warm = Warm(fake).up(rows(fake, 2))
    entry = next(iter(graphs_of(warm.fast).entries.values()))
    gone, graph = weakref.ref(warm.fast), weakref.ref(entry.graph.graph)
    table = dispatcher_of(warm.fast).fast_path.table()
    assert len(table) == 1
    del entry
    warm.fast.clear()
    assert len(table) == 0
    assert graph() is None, "nothing is left that only a collection would find"
    warm.up(rows(fake, 2))
    del warm.fast
    assert gone() is None
    holder = Warm(fake).up(rows(fake, 2))
    holder.module.__dict__["itself"] = holder.fast
    gone = weakref.ref(holder.fast)
    del holder
    gc.collect()
    assert gone() is None, "a circle through the table is found"
