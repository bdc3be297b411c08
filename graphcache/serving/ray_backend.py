"""Models behind Ray's deployment handles, as a protocol sees them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from graphcache.errors import UnavailableError, UnknownModelError
from graphcache.extras import optional
from graphcache.serving.backend import ModelSpec
from graphcache.serving.batching import Batcher
from graphcache.serving.kinds import written_kind
from graphcache.serving.replica import Described
from graphcache.serving.transport import pack, told, unpack

_MOST_ROUTES = 1024
_FRESH_S = 2.0
"""How long an ingress goes on with what a replica said of its model; a reload that it made itself it knows of."""


@dataclass(frozen=True)
class _Known:
    """What a replica said of its model, and when."""

    spec: ModelSpec
    batcher: Batcher
    since: float


class RayBackend:
    """Routes requests to the replicas that hold their kind. Which one that is, Ray decides.

    A replica that dies takes its requests with it. Inference changes nothing, so they are asked again, of another one.
    """

    def __init__(self, handles: Mapping[str, Any], *, retries: int = 5, timeout_s: float = 60.0) -> None:
        self._handles = dict(handles)
        self._retries = retries
        self._timeout = timeout_s
        self._known: dict[str, _Known] = {}
        self._routes: dict[tuple[str, str], Any] = {}
        errors = optional("ray.exceptions", "serving on Ray")
        served = optional("ray.serve.exceptions", "serving on Ray")
        self._died = (errors.RayActorError, errors.WorkerCrashedError, errors.ObjectLostError, errors.NodeDiedError)
        self._busy = served.BackPressureError
        self._away = served.DeploymentUnavailableError
        self._raised = errors.RayError
        self._closing = False
        self._idle = asyncio.Event()
        self.retried = 0
        """Requests that were asked again."""
        self.under_way = 0
        """Requests that have no answer as yet."""
        self.seconds = 0.0
        """Spent in requests, those of several at once added up."""

    def names(self) -> Sequence[str]:
        """The models that are served."""
        return tuple(self._handles)

    async def is_ready(self, name: str, version: str | None = None) -> bool:
        """Whether a replica of it answers now."""
        try:
            await self.describe(name, version)
        except UnavailableError:
            return False
        return True

    async def describe(self, name: str, version: str | None = None) -> ModelSpec:
        """What a model takes and gives, asked of one of its replicas."""
        return (await self._known_of(name, version)).spec

    async def infer(self, name: str, version: str | None, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run a model once, on a replica that holds the kind of these inputs if there is one."""
        if self._closing:
            raise UnavailableError(f"{name} is being shut down; ask another server", 5.0)
        start = time.monotonic()
        self.under_way += 1
        try:
            known = await self._known_of(name, version)
            kind = written_kind(known.batcher.request(inputs).kind)
            return unpack(await self._asked(name, self._route(name, kind), pack(inputs)))
        finally:
            self.under_way -= 1
            self.seconds += time.monotonic() - start
            if self._closing and not self.under_way:
                self._idle.set()

    async def drain(self, timeout_s: float) -> int:
        """Refuse what comes from now on, and wait for what is under way."""
        self._closing = True
        if self.under_way:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout_s)
        return self.under_way

    async def broadcast(self, name: str, method: str, *args: Any) -> list[Any]:
        """Call a method of every replica of a model."""
        try:
            found: list[Any] = await self._handle(name).broadcast(method, *args).results_async()
        except Exception as error:
            raise told(error) from error
        finally:
            self._known.pop(name, None)
        return found

    def _handle(self, name: str) -> Any:
        if name not in self._handles:
            raise UnknownModelError(f"no model {name!r} is served; there are {', '.join(self._handles) or 'none'}")
        return self._handles[name]

    def _route(self, name: str, kind: str) -> Any:
        """The method of whichever replica holds a kind; what Ray makes for it is made once."""
        route = self._routes.get((name, kind))
        if route is None:
            if len(self._routes) >= _MOST_ROUTES:
                self._routes.clear()
            route = self._routes[name, kind] = self._handles[name].options(multiplexed_model_id=kind).infer
        return route

    async def _known_of(self, name: str, version: str | None) -> _Known:
        known = self._known.get(name)
        if known is not None and time.monotonic() - known.since > _FRESH_S:
            # Whoever comes meanwhile goes on with what was known.
            self._known[name] = replace(known, since=time.monotonic())
            known = None
        if known is None or (version is not None and version not in known.spec.versions):
            known = await self._asked_now(name)
        if version is not None and version not in known.spec.versions:
            raise UnknownModelError(f"{name} has no version {version!r}; it has {', '.join(known.spec.versions)}")
        return known

    async def _asked_now(self, name: str) -> _Known:
        found: Described = await self._asked(name, self._handle(name).describe)
        # A mask that is made where it is left out is no input of the spec.
        names = dict.fromkeys([each.name for each in found.spec.inputs] + list(found.buckets.masks))
        batcher = Batcher(found.buckets, list(names))
        known = self._known[name] = _Known(found.spec, batcher, time.monotonic())
        return known

    async def _asked(self, name: str, method: Any, *args: Any) -> Any:
        """Call one replica, and another one if it dies."""
        deadline = time.monotonic() + self._timeout
        attempt = 0
        while True:
            try:
                return await asyncio.wait_for(method.remote(*args), deadline - time.monotonic())
            except TimeoutError as error:
                raise UnavailableError(
                    f"{name} has not answered within {self._timeout:g} s, where requests are given up"
                ) from error
            except self._busy as error:
                raise UnavailableError(f"{name} has too many requests waiting; ask again later") from error
            except self._away as error:
                raise UnavailableError(f"{name} has no replica that could answer; ask again later", 5.0) from error
            except self._died as error:
                attempt += 1
                if attempt > self._retries:
                    raise UnavailableError(f"{attempt} replicas of {name} died over this request") from error
                self.retried += 1
                # Not at once: it takes the router a moment to hear of a death.
                await asyncio.sleep(0.02 * 2**attempt)
            except self._raised as error:
                raise told(error) from error
