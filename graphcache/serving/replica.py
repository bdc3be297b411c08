"""One replica of a model: the module and its graphs in a process of Ray's, on a device of its own."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from graphcache.buckets.spec import Buckets
from graphcache.errors import ConfigError, CudaError, UnavailableError, shown
from graphcache.events import log
from graphcache.extras import optional
from graphcache.serving.backend import ModelSpec
from graphcache.serving.kinds import Kind, read_kind
from graphcache.serving.runner import Runner
from graphcache.serving.settings import Settings
from graphcache.serving.transport import Packed, pack, unpack


@dataclass(frozen=True)
class Described:
    """What an ingress must know of a model to route its requests."""

    spec: ModelSpec
    buckets: Buckets


@dataclass
class _Routed:
    """Requests by whether their kind was held when they came."""

    hits: int = 0
    misses: int = 0
    kinds: set[str] = field(default_factory=set)


class Replica:
    """Answers requests with graphs that were captured before the first of them.

    The constructor loads, captures and tries the model, so that Ray takes the replica for healthy only then. Batches
    are run by one thread, one after another; another one prepares the next version of the model beside them.
    """

    def __init__(self, settings: Settings) -> None:
        _one_thread_each()
        start = time.monotonic()
        self._settings = settings
        self._runner = Runner(settings)
        self._version = settings.version
        self._seconds = time.monotonic() - start
        self._routed = _Routed()
        self._configured: dict[str, Any] | None = None
        self._broken = ""
        self._lane = ThreadPoolExecutor(1, "graphcache-batches")
        self._beside = ThreadPoolExecutor(1, "graphcache-reload")
        self._reloading = threading.Lock()
        self._gather_up_to(self._runner.batcher.largest)

    async def infer(self, packed: Packed) -> Packed:
        """Answer one request, together with others that are here."""
        inputs = unpack(packed)
        # Nothing that would be refused waits for others, or keeps them waiting.
        self._runner.check(inputs)
        if kind := _model_id():
            before = kind in self._routed.kinds
            self._routed.hits += before
            self._routed.misses += not before
            await self.hold(kind)
        answer = await self.answer_all(inputs)
        if isinstance(answer, Exception):
            raise answer
        return pack(answer)

    async def hold(self, kind: str) -> Any:
        """Capture all sizes of a kind of requests; what ``serve.multiplexed`` calls for one that is not held."""
        wanted = read_kind(kind)
        await asyncio.get_running_loop().run_in_executor(self._lane, self._hold, wanted)
        self._routed.kinds.add(kind)
        return _Held(kind, self._routed.kinds)

    async def answer_all(self, requests: Any) -> Any:
        """Answer a list of requests; what ``serve.batch`` calls."""
        return await asyncio.get_running_loop().run_in_executor(self._lane, self._answer, requests)

    async def describe(self) -> Described:
        """What the model takes and gives, and how its requests are put together."""
        spec = replace(self._runner.spec, versions=(str(self._version),))
        return Described(spec, self._runner.batcher.buckets)

    async def stats(self) -> dict[str, Any]:
        """Counters of this replica since its model was loaded."""
        runner = self._runner
        counts, info = runner.counts, runner.info()
        return {
            "replica": _replica_id(),
            "pid": os.getpid(),
            "version": self._version,
            "prepare_seconds": self._seconds,
            "requests": counts.requests,
            "failed": counts.failed,
            "apart": counts.apart,
            "batches": dict(counts.batches),
            "padding_share": counts.padding_share,
            "answer_seconds": counts.seconds,
            "graph_hits": info.hits,
            "captures": info.captures,
            "eager": {reason.value: count for reason, count in info.eager.items()},
            "kind_hits": self._routed.hits,
            "kind_misses": self._routed.misses,
            "kinds": sorted(self._routed.kinds),
        }

    async def reload(self, source: Any = None) -> int:
        """Load the model anew beside the one that answers, prepare it, and let it answer from then on.

        Whoever is being answered is answered by the old one, which is closed after its last call. Where the new one
        cannot be prepared, nothing has changed.
        """
        return await asyncio.get_running_loop().run_in_executor(self._beside, self._reload, source)

    async def reconfigure(self, user_config: Any) -> None:
        """Take ``{"source": ...}``, and ``{"version": ...}`` to load the same place anew, from a Serve config file."""
        if not isinstance(user_config, Mapping) or not set(user_config) <= {"source", "version"}:
            raise ConfigError(f"user_config={shown(user_config)}: expected 'source', and maybe 'version'")
        wanted = dict(user_config)
        # The first one comes with the replica, which has just been made.
        same = wanted == self._configured or (
            self._configured is None and wanted.get("source", self._settings.source) == self._settings.source
        )
        if not same:
            await self.reload(wanted.get("source"))
        self._configured = wanted

    def check_health(self) -> None:
        """Tell Ray to replace this replica once its device is lost."""
        if self._broken:
            raise UnavailableError(self._broken)

    def _gather_up_to(self, rows: int) -> None:
        """Tell ``serve.batch`` what goes together, which is known where the model is."""
        if (limit := getattr(type(self).answer_all, "set_max_batch_size", None)) is not None:
            limit(rows)

    def _answer(self, requests: list[dict[str, Tensor]]) -> list[Any]:
        # Which version answers is decided here, once for all of a batch.
        answers = self._runner.answer(requests)
        for answer in answers:
            if isinstance(answer, Exception):
                self._note(answer)
        return answers

    def _hold(self, kind: Kind) -> None:
        try:
            self._runner.hold(kind)
        except Exception as error:
            self._note(error)
            raise

    def _note(self, error: Exception) -> None:
        if loses_device(error):
            self._broken = f"the device is lost: {' '.join(str(error).split())[:500]}"

    def _reload(self, source: Any) -> int:
        if not self._reloading.acquire(blocking=False):
            raise UnavailableError(f"{self._runner.name} is being reloaded; ask again when that is done")
        try:
            settings = self._settings if source is None else replace(self._settings, source=source)
            old, new = self._runner, Runner(settings)
            try:
                for kind in list(old.held):
                    new.hold(kind)
            except BaseException:
                new.close()
                raise
            # No less than before, since requests of the old size may be waiting.
            self._gather_up_to(max(old.batcher.largest, new.batcher.largest))
            self._settings, self._runner = settings, new
            self._version += 1
            # Behind the batches that may have taken the old one.
            self._lane.submit(old.close).result()
            log.info("%s: version %d answers now", new.name, self._version)
            return self._version
        finally:
            self._reloading.release()


class _Held:
    """Stands for the graphs of a kind, in Serve's list of what a replica holds."""

    def __init__(self, kind: str, kinds: set[str]) -> None:
        self._kind = kind
        self._kinds = kinds

    def __del__(self) -> None:
        self._kinds.discard(self._kind)


def replica_class(settings: Settings, batch_wait_timeout_s: float) -> type[Replica]:
    """The class to deploy: ``serve.batch`` gathers requests, ``serve.multiplexed`` holds kinds of them."""
    serve = optional("ray.serve", "serving on Ray")

    class GraphcacheReplica(Replica):
        answer_all = serve.batch(
            max_batch_size=settings.max_batch_size,
            batch_wait_timeout_s=batch_wait_timeout_s,
            batch_size_fn=_rows,
        )(Replica.answer_all)
        hold = serve.multiplexed(max_num_models_per_replica=settings.max_kinds)(Replica.hold)

    return GraphcacheReplica


def _rows(requests: list[dict[str, Tensor]]) -> int:
    """Rows of some requests, each of which has been checked."""
    return sum(next(iter(request.values())).shape[0] for request in requests)


def _model_id() -> str:
    return str(optional("ray.serve", "serving on Ray").get_multiplexed_model_id())


def _replica_id() -> str:
    return str(optional("ray.serve", "serving on Ray").get_replica_context().replica_tag)


def _one_thread_each() -> None:
    """On a host, replicas share the processors; Ray tells how many are theirs."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given) > 0:
        torch.set_num_threads(int(given))


def loses_device(error: Exception) -> bool:
    """Whether no call of this process can be answered after an error of the device's; lack of memory passes."""
    if isinstance(error, CudaError):
        return True
    return (
        isinstance(error, RuntimeError) and "CUDA error" in str(error) and not isinstance(error, torch.OutOfMemoryError)
    )
