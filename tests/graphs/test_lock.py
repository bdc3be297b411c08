"""The lock of a StreamOrder: what ``threading.RLock`` promises, of the library's lock as well."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from graphcache import native
from graphcache.graphs.stream_order import StreamOrder
from tests.helpers import in_threads


@pytest.fixture(params=["python", "compiled"])
def make(request: pytest.FixtureRequest, compiled: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    monkeypatch.setattr(native, "loaded", lambda *_, **__: compiled if request.param == "compiled" else None)
    return native.new_lock


def elsewhere(work: Callable[[], Any]) -> Any:
    """What some work says in a thread of its own."""
    said: list[Any] = []
    thread = threading.Thread(target=lambda: said.append(work()))
    thread.start()
    thread.join()
    return said[0]


def test_its_owner_may_take_it_again_and_nobody_else(make: Callable[[], Any]) -> None:
    lock = make()
    assert elsewhere(lambda: lock.acquire(False) and (lock.release() or True))
    with lock as taken:
        assert taken is True
        assert lock.acquire() is True
        assert lock.acquire(False) is True
        assert elsewhere(lambda: lock.acquire(False)) is False
        lock.release()
        lock.release()
        assert elsewhere(lambda: lock.acquire(False)) is False
    assert elsewhere(lambda: lock.acquire(False)) is True


def test_what_is_not_held_cannot_be_released(make: Callable[[], Any]) -> None:
    lock = make()
    with pytest.raises(RuntimeError):
        lock.release()

    def release() -> str:
        try:
            lock.release()
        except RuntimeError:
            return "refused"
        return "released"

    with lock:
        assert elsewhere(release) == "refused"
    with pytest.raises(RuntimeError):
        lock.release()


def test_it_is_given_back_whatever_is_raised(make: Callable[[], Any]) -> None:
    lock = make()
    with pytest.raises(KeyError, match="inside"), lock:
        raise KeyError("inside")
    assert elsewhere(lambda: lock.acquire(False)) is True


def test_who_waits_is_let_through_one_after_another(make: Callable[[], Any]) -> None:
    lock, waiting, order = make(), threading.Semaphore(0), []

    def wait(index: int) -> None:
        waiting.release()
        with lock:
            order.append(index)

    lock.acquire()
    threads = [threading.Thread(target=wait, args=(index,)) for index in range(5)]
    for thread in threads:
        thread.start()
    for _ in threads:
        waiting.acquire()
    assert order == []
    lock.release()
    for thread in threads:
        thread.join()
    assert sorted(order) == list(range(5))


def test_nothing_happens_twice_at_once(make: Callable[[], Any]) -> None:
    lock, seen = make(), {"inside": 0, "most": 0, "rounds": 0}
    switch = threading.Event()

    def work(_: int) -> None:
        for step in range(300):
            with lock:
                seen["inside"] += 1
                seen["most"] = max(seen["most"], seen["inside"])
                if step % 10 == 0:
                    # Lets the others run in the middle.
                    switch.wait(0)
                with lock:
                    seen["rounds"] += 1
                seen["inside"] -= 1

    in_threads(work, 6)
    assert seen == {"inside": 0, "most": 1, "rounds": 1800}


def test_one_that_is_dropped_while_it_is_held_takes_nothing_with_it(make: Callable[[], Any]) -> None:
    for _ in range(100):
        lock = make()
        lock.acquire()
        del lock
    gc.collect()


def test_the_librarys_takes_no_arguments_but_a_lock_of_pythons(compiled: Any) -> None:
    compiled.Lock(threading.RLock())
    for bad in ((1,), (None,), (threading.RLock(), 2)):
        with pytest.raises((TypeError, AttributeError)):
            compiled.Lock(*bad)
    with pytest.raises(TypeError):
        compiled.Lock(x=1)
    with pytest.raises(TypeError):
        compiled.Lock().acquire(1, 2)


def test_lanes_have_it(make: Callable[[], Any]) -> None:
    assert type(StreamOrder(0).lock) is type(make())


class Stopped(Exception):
    """What the handler of a signal raises."""


@contextmanager
def held_and_signalled(lock: Any, handle: Callable[[threading.Event], None]) -> Iterator[None]:
    """Another thread holds a lock, and sends signals to this one until an event is set, at the latest at the end.

    Args:
        lock: The lock.
        handle: What the first signal does in the main thread, once that has entered the block, given the event.
    """
    held, over, inside = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            while not over.wait(0.01):
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def hear(*_: object) -> None:
        # Once: the end of this block must not be interrupted.
        if inside.is_set():
            inside.clear()
            handle(over)

    before = signal.signal(signal.SIGUSR1, hear)
    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    try:
        inside.set()
        yield
    finally:
        inside.clear()
        over.set()
        holder.join()
        signal.signal(signal.SIGUSR1, before)


def test_who_waits_hears_of_a_signal(make: Callable[[], Any]) -> None:
    """As Ctrl-C is, in the main thread, while another one holds the lock."""
    lock = make()

    def stop(_: threading.Event) -> None:
        raise Stopped

    with pytest.raises(Stopped), held_and_signalled(lock, stop), lock:
        pytest.fail("it was held by another thread")
    with lock:
        assert elsewhere(lambda: lock.acquire(False)) is False
    assert elsewhere(lambda: lock.acquire() and (lock.release() or True))


def test_a_signal_whose_handler_returns_interrupts_nobody(make: Callable[[], Any]) -> None:
    lock, heard = make(), []

    def let_it_go(over: threading.Event) -> None:
        heard.append(True)
        over.set()

    with held_and_signalled(lock, let_it_go), lock:
        assert heard == [True]
