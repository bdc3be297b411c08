"""Requests gathered in one process, without Ray: whoever comes while a batch runs goes with the next one."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from graphcache.errors import ClosedError
from graphcache.events import log
from graphcache.serving.batching import Request
from graphcache.serving.kinds import Kind
from graphcache.serving.runner import Runner
from graphcache.serving.settings import checked_wait

Answer = dict[str, Tensor]


class Gather:
    """Puts the requests of many callers together, for one model and one thread that runs it.

    It is what ``serve.batch`` does in a replica of Ray's, and answers through the same :class:`Runner`.

    Args:
        runner: Answers; it stays open when this is closed.
        wait_s: How long the first request of a batch waits for others, in seconds. While a batch runs, requests wait
            for its end in any case.

    Raises:
        ConfigError: For a wait that is no such number.

    Example:
        >>> import torch
        >>> from graphcache.serving.settings import Settings
        >>> runner = Runner(Settings(torch.nn.ReLU, buckets=[1, 4], prepare=({"input": torch.zeros(1, 2)},)))
        >>> with Gather(runner, wait_s=0.01) as gather:
        ...     answers = [gather.submit({"input": torch.full((1, 2), float(each))}) for each in (-1, 1, 2)]
        ...     [answer.result()["output_0"].tolist() for answer in answers]
        [[[0.0, 0.0]], [[1.0, 1.0]], [[2.0, 2.0]]]
    """

    def __init__(self, runner: Runner, *, wait_s: float = 0.002) -> None:
        self._wait = checked_wait(wait_s, "wait_s")
        self._runner = runner
        self._came: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"graphcache-gather-{runner.name}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Gather:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def submit(self, inputs: Mapping[str, Tensor]) -> Future[Answer]:
        """Ask for an answer. A future that is cancelled before its batch begins is not run.

        Args:
            inputs: Tensors by name, in host memory; they must stay as they are until the answer is there.

        Raises:
            InputError: One of its kinds, at once, if the model does not take them.
            ClosedError: After :meth:`close`.
        """
        request = self._runner.check(inputs)
        item = _Item(request, Future())
        with self._lock:
            if self._closed:
                raise ClosedError(f"requests of {self._runner.name} are gathered no more; make another Gather")
            self._came.put(item)
        return item.future

    def close(self) -> None:
        """Answer what was asked, refuse what comes. Again, it does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._came.put(None)
        self._thread.join()

    def _work(self) -> None:
        waiting: dict[Kind, _Waiting] = {}
        is_open = True
        while is_open or waiting:
            is_open = self._collect(waiting) and is_open
            now = time.monotonic()
            due = [kind for kind, each in waiting.items() if not is_open or each.is_due(now, self._runner)]
            # Whoever waits longest goes first.
            for kind in sorted(due, key=lambda each: waiting[each].until):
                self._run(waiting.pop(kind).items)

    def _collect(self, waiting: dict[Kind, _Waiting]) -> bool:
        """Take in what has come; wait for it as long as nothing is due. False once nothing more will come."""
        now = time.monotonic()
        ready = any(each.is_due(now, self._runner) for each in waiting.values())
        until = min((each.until for each in waiting.values()), default=None)
        timeout = 0.0 if ready else None if until is None else max(until - now, 0.0)
        try:
            item = self._came.get(timeout=timeout) if timeout != 0.0 else self._came.get_nowait()
            while item is not None:
                kind = item.request.kind
                group = waiting.setdefault(kind, _Waiting(time.monotonic() + self._wait))
                group.items.append(item)
                group.rows += item.request.rows
                item = self._came.get_nowait()
        except queue.Empty:
            return True
        return False

    def _run(self, items: list[_Item]) -> None:
        live = [item for item in items if item.future.set_running_or_notify_cancel()]
        try:
            answers: list[Any] = self._runner.answer([item.request.inputs for item in live]) if live else []
        except Exception as error:
            log.debug("requests were gathered in vain: %s", error)
            answers = [error] * len(live)
        for item, answer in zip(live, answers, strict=True):
            if isinstance(answer, Exception):
                item.future.set_exception(answer)
            else:
                item.future.set_result(answer)


@dataclass(eq=False)
class _Item:
    request: Request
    future: Future[Answer]


@dataclass
class _Waiting:
    """Requests of one kind, and when the first of them has waited long enough."""

    until: float
    items: list[_Item] = field(default_factory=list)
    rows: int = 0

    def is_due(self, now: float, runner: Runner) -> bool:
        return now >= self.until or self.rows >= runner.batcher.largest
