"""What the Python code of a call does past the dispatcher is noticed, and what does no harm is not."""

from __future__ import annotations

import asyncio
import colorsys
import contextlib
import datetime
import functools
import gc
import importlib
import io
import logging
import multiprocessing.pool
import os
import queue
import random
import socket
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import graphcache
from graphcache import Reason
from graphcache.capture.host_activity import HostActivity, is_available
from graphcache.errors import Cause
from tests.helpers import Fn, outcomes, replays

X = torch.ones(2, 4)


def cause_of(function: Callable[[], object], *, reads: bool = True) -> Cause | None:
    host = HostActivity(lambda: "")
    host.reads = reads
    with host:
        function()
    return host.cause


def started() -> None:
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()


def logged_in_memory() -> None:
    IN_MEMORY.info("x")


printing = functools.partial(print, end="")


def printed() -> None:
    printing()


def printed_in_memory() -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        sys.stdout.write("x")


async def with_a_task() -> Cause | None:
    tasks = []
    cause = cause_of(lambda: tasks.append(asyncio.get_running_loop().create_task(nothing())))
    await asyncio.gather(*tasks)
    return cause


async def nothing() -> None:
    pass


def handed_on() -> None:
    """Lets another thread go on that waits for a lock."""
    lock = threading.Lock()
    lock.acquire()
    other = LOCKED
    other.release()


LOCKED = threading.Lock()
IN_MEMORY = logging.Logger("in memory", logging.INFO)
IN_MEMORY.addHandler(logging.StreamHandler(io.StringIO()))


@pytest.fixture(autouse=True)
def no_callbacks() -> Iterator[None]:
    """What Hypothesis has the collector call reads clocks."""
    kept = gc.callbacks[:]
    gc.callbacks.clear()
    yield
    gc.callbacks[:] = kept


@pytest.fixture(autouse=True)
def locked() -> Iterator[None]:
    """A lock that was acquired before."""
    LOCKED.acquire()
    yield
    if LOCKED.locked():
        LOCKED.release()


@pytest.fixture(scope="module")
def pools() -> Iterator[tuple[ThreadPoolExecutor, multiprocessing.pool.ThreadPool]]:
    with ThreadPoolExecutor(1) as executor, multiprocessing.pool.ThreadPool(1) as pool:
        executor.submit(int).result()
        yield executor, pool


def full() -> queue.Queue[int]:
    waiting: queue.Queue[int] = queue.Queue()
    waiting.put(1)
    return waiting


QUEUE = full()
EVENT = threading.Event()
EVENT.set()
STREAM: Any = None
SINK: Any = None
RAW: Any = None
SOCKETS: Any = ()


@pytest.fixture(scope="module", autouse=True)
def files() -> Iterator[None]:
    global STREAM, SINK, RAW, SOCKETS
    with open(os.devnull) as STREAM, open(os.devnull, "w") as SINK, open(os.devnull, "wb", buffering=0) as RAW:
        SOCKETS = socket.socketpair()
        yield
        for each in SOCKETS:
            each.close()


SIMPLE: queue.SimpleQueue[int] = queue.SimpleQueue()

NOTICED: dict[str, tuple[Callable[[], object], Reason, str]] = {
    "numpy()": (lambda: X.numpy(), Reason.HOST_READ, "Tensor.numpy"),
    "tolist()": (lambda: X.tolist(), Reason.HOST_READ, "Tensor.tolist"),
    "data_ptr()": (lambda: X.data_ptr(), Reason.HOST_READ, "Tensor.data_ptr"),
    "asarray": (lambda: np.asarray(X), Reason.HOST_READ, "Tensor.numpy"),
    "time": (lambda: time.time(), Reason.RANDOM, "time.time"),
    "now": (lambda: datetime.datetime.now(), Reason.RANDOM, "datetime.now"),
    "today": (lambda: datetime.date.today(), Reason.RANDOM, "date.today"),
    "perf_counter": (lambda: time.perf_counter(), Reason.RANDOM, "time.perf_counter"),
    "monotonic_ns": (lambda: time.monotonic_ns(), Reason.RANDOM, "time.monotonic_ns"),
    "localtime": (lambda: time.localtime(), Reason.RANDOM, "time.localtime"),
    "urandom": (lambda: os.urandom(1), Reason.RANDOM, "os.urandom"),
    "a generator of Python's": (lambda: random.Random(1).random(), Reason.RANDOM, "Random.random"),
    "the generator of Python's": (lambda: random.random(), Reason.RANDOM, "Random.random"),
    "randint": (lambda: random.randint(1, 2), Reason.RANDOM, "Random.getrandbits"),
    "a thread": (started, Reason.HOST_READ, "Thread.start"),
    "an event that is set": (lambda: EVENT.set(), Reason.HOST_READ, "Event.set"),
    "an event that is waited for": (lambda: EVENT.wait(), Reason.HOST_READ, "Event.wait"),
    "a queue, put": (lambda: QUEUE.put(1), Reason.HOST_READ, "Queue.put"),
    "a queue, get": (lambda: QUEUE.get(), Reason.HOST_READ, "Queue.get"),
    "a simple queue": (lambda: SIMPLE.put(1), Reason.HOST_READ, "SimpleQueue.put"),
    "who holds a lock": (lambda: LOCKED.locked(), Reason.HOST_READ, "lock.locked"),
    "which thread runs it": (lambda: threading.get_ident(), Reason.HOST_READ, "get_ident"),
    "how many threads there are": (lambda: torch.get_num_threads(), Reason.HOST_READ, "get_num_threads"),
    "which thread it is": (lambda: threading.current_thread(), Reason.HOST_READ, "current_thread"),
    "all threads": (lambda: threading.enumerate(), Reason.HOST_READ, "enumerate"),
    "a seed of Python's": (lambda: random.seed(1), Reason.RANDOM, "Random.seed"),
    "a seed of PyTorch's": (lambda: torch.seed(), Reason.RANDOM, "Generator.seed"),
    "a clock as text": (lambda: time.ctime(), Reason.RANDOM, "time.ctime"),
    "a lock of others": (handed_on, Reason.HOST_READ, "lock.release"),
    "print": (lambda: print(end=""), Reason.UNOBSERVED, "print"),
    "print with an option": (printed, Reason.UNOBSERVED, "print"),
    "a file that is opened": (lambda: open(os.devnull).close(), Reason.UNOBSERVED, "open"),
    "a file that is read": (lambda: STREAM.read(1), Reason.UNOBSERVED, "TextIOWrapper.read"),
    "a file that is written": (lambda: RAW.write(b""), Reason.UNOBSERVED, "FileIO.write"),
    "a file by its path": (lambda: Path(os.devnull).read_text(), Reason.UNOBSERVED, "pathlib.Path.read_text"),
    "whether a file is there": (lambda: os.path.exists(os.devnull), Reason.UNOBSERVED, "genericpath.exists"),
    "a folder": (lambda: os.listdir("."), Reason.UNOBSERVED, "listdir"),
    "a socket": (lambda: SOCKETS[0].send(b"x"), Reason.UNOBSERVED, "socket.send"),
    "a record of the log": (lambda: logged(), Reason.UNOBSERVED, "logging.Logger.warning"),
    "a record for a handler in memory": (logged_in_memory, Reason.UNOBSERVED, "logging.Logger.info"),
    "standard output in memory": (printed_in_memory, Reason.UNOBSERVED, "StringIO.write"),
    "a file that is removed": (lambda: Path("gone").unlink(missing_ok=True), Reason.UNOBSERVED, "pathlib.Path.unlink"),
    "tensors that are saved": (lambda: torch.save({}, io.BytesIO()), Reason.UNOBSERVED, "save"),
    "fork of TorchScript": (lambda: torch._C.wait(torch._C.fork(torch.neg, X)), Reason.HOST_READ, "fork"),
}


@pytest.mark.parametrize("name", NOTICED)
def test_what_no_graph_repeats_is_noticed_and_named(name: str) -> None:
    function, reason, where = NOTICED[name]
    QUEUE.put(1)
    cause = cause_of(function)
    assert cause is not None
    assert (cause.reason, cause.where) == (reason, where)
    assert is_available()


def test_work_for_pools_is_noticed(pools: tuple[ThreadPoolExecutor, multiprocessing.pool.ThreadPool]) -> None:
    executor, pool = pools
    done = executor.submit(int)
    done.result()
    expected = {
        "ThreadPoolExecutor.submit": lambda: executor.submit(int),
        "Future.result": lambda: done.result(),
        "Future.exception": lambda: done.exception(),
        "Pool.apply": lambda: pool.apply(int),
        "Pool.map": lambda: pool.map(int, [1]),
    }
    for where, function in expected.items():
        cause = cause_of(function)
        assert cause is not None
        assert (cause.reason, cause.where) == (Reason.HOST_READ, where)


def own_lock() -> None:
    """Locks of the module's own."""
    with LOCK, RLOCK, RLOCK:
        pass
    LOCK.acquire()
    LOCK.release()
    RLOCK.acquire()
    RLOCK.release()
    with threading.Lock():
        pass


LOCK = threading.Lock()
RLOCK = threading.RLock()
LOG = logging.getLogger("tests.capture.host_activity")


class Clocked(logging.StreamHandler):  # type: ignore[type-arg]
    """A handler of somebody's that reads a clock."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{time.time_ns()} {super().format(record)}"


def logged() -> None:
    """A record that reaches a handler: with a clock and locks of its own."""
    handler = Clocked(SINK)
    LOG.addHandler(handler)
    try:
        LOG.warning("%s", X.shape)
    finally:
        LOG.removeHandler(handler)


class Cycle:
    """Is found by the collector only."""

    def __init__(self) -> None:
        self.me = self


def collected() -> None:
    Cycle()
    gc.collect()


def test_a_task_for_the_event_loop_is_noticed() -> None:
    cause = asyncio.run(with_a_task())
    assert cause is not None
    assert (cause.reason, cause.where) == (Reason.HOST_READ, "BaseEventLoop.create_task")


UNNOTICED: dict[str, Callable[[], object]] = {
    "locks of its own": own_lock,
    "a module that is imported": lambda: importlib.reload(colorsys),
    "lines of source": lambda: traceback.extract_stack(),
    "text in memory": lambda: io.StringIO().write("x"),
    "a record for nobody": lambda: LOG.debug("x"),
    "the collector": collected,
    "operations": lambda: (X @ X.t()).relu().sum(),
    "views and shapes": lambda: (X.shape, X.stride(), X.t(), X.size(0), X.dtype, X.numel()),
    "the state of a generator": lambda: random.getstate(),
    "a sleep that is none": lambda: time.sleep(0),
    "an exception": lambda: contextlib.suppress(KeyError).__enter__(),
    "numbers of NumPy": lambda: np.arange(3).sum(),
    "strings": lambda: "-".join(sorted({"b", "a"})),
}


@pytest.mark.parametrize("name", UNNOTICED)
def test_what_does_no_harm_is_not_noticed(name: str) -> None:
    assert cause_of(UNNOTICED[name]) is None


@pytest.mark.parametrize("name", ["locks of its own", "the collector"])
def test_behind_wrap_it_is_captured(name: str) -> None:
    def forward(_: Any, x: Tensor) -> Tensor:
        UNNOTICED[name]()
        return x * 2

    fast = graphcache.wrap(Fn(forward))
    fast(X)
    assert replays(fast, X)


def test_files_and_clocks_can_be_ignored() -> None:
    def forward(_: Any, x: Tensor) -> Tensor:
        logged()
        start = time.perf_counter()
        print(time.perf_counter() - start)
        return x * 2

    fast = graphcache.wrap(Fn(forward))
    assert torch.equal(fast(X), X * 2)
    assert outcomes(fast) == (0, 0, {Reason.UNOBSERVED: 1})
    fast = graphcache.wrap(Fn(forward), ignore=["LOG", "logger *", "*SINK", "logging.*", "print", "time.*"])
    # Twice: somebody may have set a factory of log records, which is followed from the second call on.
    for _ in range(2):
        fast(X)
    assert replays(fast, X)


def test_a_file_that_only_the_first_call_reads_forbids_no_graph() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = len(Path(os.devnull).read_bytes()) + 2
        return x * self.scale

    fast = graphcache.wrap(Fn(forward, scale=None))
    assert torch.equal(fast(X), X * 2)
    fast(X)
    assert replays(fast, X)


@pytest.mark.parametrize("name", ["tolist()", "time", "urandom", "a thread", "a simple queue", "a lock of others"])
def test_behind_wrap_it_runs_eagerly(name: str) -> None:
    function, reason, _ = NOTICED[name]

    def forward(_: Any, x: Tensor) -> Tensor:
        function()
        return x * 2

    fast = graphcache.wrap(Fn(forward))
    assert torch.equal(fast(X), X * 2)
    assert outcomes(fast) == (0, 0, {reason: 1})


def test_the_first_thing_counts() -> None:
    cause = cause_of(lambda: (time.time(), X.tolist()))
    assert cause is not None
    assert cause.where == "time.time"


def test_the_submodule_at_work_is_told() -> None:
    host = HostActivity(lambda: "head.nms")
    with host:
        X.tolist()
    assert host.cause is not None
    assert host.cause.where == "head.nms: Tensor.tolist"


def test_reads_of_memory_on_cuda_are_left_to_the_capture() -> None:
    class OnDevice(Tensor):
        is_cuda = True

    assert cause_of(lambda: X.as_subclass(OnDevice).tolist(), reads=False) is None
    # Nothing else would notice those of the CPU's.
    assert cause_of(lambda: X.tolist(), reads=False) is not None
    assert cause_of(lambda: time.time(), reads=False) is not None


def test_while_paused_nothing_is_noticed() -> None:
    host = HostActivity(lambda: "")
    with host:
        host.paused = True
        X.tolist()
        host.paused = False
    assert host.cause is None


def test_a_clock_that_a_library_reads_is_the_librarys() -> None:
    library = types.ModuleType("torch.clocks")
    exec("import time\ndef now():\n    return time.time()", vars(library))
    library.now.__globals__["__name__"] = "torch.clocks"
    assert cause_of(library.now) is None


def test_functions_of_the_users_that_ran_are_told_with_their_globals() -> None:
    host = HostActivity(lambda: "")
    with host:
        own_lock()
        torch.nn.functional.relu(X)
    assert set(host.functions) == {own_lock.__code__}
    assert host.functions[own_lock.__code__] is globals()


def test_who_profiles_already_is_not_disturbed() -> None:
    assert is_available()
    sys.setprofile(lambda *_: None)
    try:
        assert not is_available()
    finally:
        sys.setprofile(None)
    assert is_available()
