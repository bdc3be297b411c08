"""The front of an application: a protocol over HTTP, and behind it the handles of the models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graphcache.errors import ConfigError
from graphcache.extras import optional
from graphcache.serving.app import make_app
from graphcache.serving.backend import ModelSpec
from graphcache.serving.limits import Limits
from graphcache.serving.ray_backend import RayBackend
from graphcache.serving.transport import pack, unpack

ADMIN = ("reload", "stats")
"""Methods of replicas that may be called from outside, over a handle."""


@dataclass(frozen=True)
class Settled:
    """What the application's protocol is made with.

    Args:
        token: What clients must bring.
        limits: Of requests; ``None`` is the default ones.
        asgi: What makes the ASGI application of a backend; ``None`` is the Open Inference Protocol.
    """

    token: str | None = None
    limits: Limits | None = None
    asgi: Callable[[Any], Any] | None = None


class Ingress:
    """Speaks HTTP, and hands tensors to replicas."""

    def __init__(self, handles: Mapping[str, Any], settled: Settled) -> None:
        self.backend = RayBackend(handles)
        self.protocol = _application(self.backend, settled)

    async def admin(self, name: str, method: str, *args: Any) -> list[Any]:
        """Call a method of every replica of a model."""
        if method not in ADMIN:
            raise ConfigError(f"{method!r} is no method for this; expected one of {', '.join(ADMIN)}")
        return await self.backend.broadcast(name, method, *args)

    async def specs(self) -> list[ModelSpec]:
        """What all models take and give."""
        return [await self.backend.describe(name) for name in self.backend.names()]

    async def infer(self, name: str, packed: Any) -> Any:
        """Answer a request that comes over a handle, and not over HTTP."""
        return pack(await self.backend.infer(name, None, unpack(packed)))

    async def own_stats(self) -> dict[str, Any]:
        """Counters of the front."""
        backend = self.backend
        return {"retried": backend.retried, "under_way": backend.under_way, "seconds": backend.seconds}

    async def drain(self, timeout_s: float) -> int:
        """Refuse what comes from now on, and wait for what is under way; how many were given up."""
        return await self.backend.drain(timeout_s)


class Forward:
    """The ASGI application of whichever replica of the front this is: no function, which Ray would call for one."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        front = optional("ray.serve", "serving on Ray").get_replica_context().servable_object
        await front.protocol(scope, receive, send)


def _application(backend: RayBackend, settled: Settled) -> Any:
    if settled.asgi is not None:
        return settled.asgi(backend)
    return make_app(backend, limits=settled.limits, token=settled.token)


async def _lifespan(receive: Any, send: Any) -> None:
    message = {"type": ""}
    while message["type"] != "lifespan.shutdown":
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
