"""The Open Inference Protocol over HTTP, as an application of ASGI."""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from graphcache.errors import ConfigError, ExtraNotFoundError, UnknownModelError, shown
from graphcache.serving.answers import Answer, refused, told
from graphcache.serving.auth import check_configured, check_token
from graphcache.serving.backend import Backend
from graphcache.serving.body import Receive
from graphcache.serving.inference import Inference
from graphcache.serving.limits import Limits
from graphcache.serving.protocol.metadata import model_config, model_metadata, server_metadata
from graphcache.serving.protocol.problems import RequestError

ASGIApp = Callable[
    [MutableMapping[str, Any], Receive, Callable[[MutableMapping[str, Any]], Awaitable[None]]], Awaitable[None]
]
_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_Handler = Callable[[Any], Awaitable[Answer]]


def make_app(
    backend: Backend,
    *,
    limits: Limits | None = None,
    token: str | None = None,
    metrics: Callable[[], bytes] | None = None,
) -> ASGIApp:
    """A server of the Open Inference Protocol, version 2, with binary tensor data; run it with any server of ASGI.

    It is what clients written for KServe and Triton speak over HTTP. It neither starts a server nor loads a model. One
    application belongs to one event loop.

    Args:
        backend: Answers.
        limits: Of what is taken in; the defaults of :class:`Limits` if left out.
        token: What clients have to send as ``Authorization: Bearer TOKEN`` for all but ``/v2/health``.
        metrics: Gives what ``/metrics`` is to tell beside the server's own, in Prometheus' text form, such as
            ``lambda: prometheus_client.generate_latest(registry)``.

    Raises:
        ExtraNotFoundError: If Starlette is not installed, which Ray Serve brings.
        ConfigError: For a bad option.

    Example:
        >>> from torch import nn
        >>> from graphcache.serving.backend import ModelSpec, TensorMetadata
        >>> from graphcache.serving.local import LocalBackend
        >>> x, y = TensorMetadata("x", "float32", (-1,)), TensorMetadata("y", "float32", (-1,))
        >>> spec = ModelSpec("relu", ("1",), (x,), (y,), "pytorch")
        >>> app = make_app(LocalBackend({"relu": nn.ReLU()}, specs={"relu": spec}))
        >>> # uvicorn.run(app)
    """
    if limits is not None and not isinstance(limits, Limits):
        raise ConfigError(f"limits={shown(limits)}: expected a Limits")
    check_configured(token)
    if metrics is not None and not callable(metrics):
        raise ConfigError(f"metrics={shown(metrics)}: expected a function that gives bytes")
    server = _Server(backend, limits or Limits(), metrics)
    applications, routing, exceptions = (_starlette(name) for name in ("applications", "routing", "exceptions"))
    model = "/v2/models/{name}"
    routes = [
        routing.Route(path, _endpoint(handler, token if guarded else None), methods=[method])
        for path, method, handler, guarded in (
            ("/v2/health/live", "GET", server.live, False),
            ("/v2/health/ready", "GET", server.ready, False),
            ("/v2", "GET", server.metadata, True),
            ("/v2/repository/index", "POST", server.index, True),
            ("/metrics", "GET", server.scrape, True),
            *(
                (prefix + path, method, handler, True)
                for prefix in (model, model + "/versions/{version}")
                for path, method, handler in (
                    ("", "GET", server.model),
                    ("/ready", "GET", server.model_ready),
                    ("/config", "GET", server.config),
                    ("/stats", "GET", server.statistics),
                    ("/infer", "POST", server.infer),
                )
            ),
        )
    ]
    app = applications.Starlette(routes=routes, exception_handlers={exceptions.HTTPException: _no_route})
    # What has a slash too many is unknown, and not sent elsewhere with its body.
    app.router.redirect_slashes = False
    found: ASGIApp = app
    return found


class _Server:
    """The handlers."""

    def __init__(self, backend: Backend, limits: Limits, metrics: Callable[[], bytes] | None) -> None:
        self._backend = backend
        self._inference = Inference(backend, limits)
        self._metrics = metrics

    async def live(self, request: Any) -> Answer:
        return told({"live": True})

    async def ready(self, request: Any) -> Answer:
        ready = True
        for name in self._backend.names():
            # One that went between the two questions is nothing to wait for.
            with suppress(UnknownModelError):
                ready = await self._backend.is_ready(name) and ready
        return told({"ready": ready}, 200 if ready else 400)

    async def metadata(self, request: Any) -> Answer:
        return told(server_metadata())

    async def index(self, request: Any) -> Answer:
        found = []
        for name in self._backend.names():
            with suppress(UnknownModelError):
                for version in (await self._backend.describe(name)).versions:
                    ready = await self._backend.is_ready(name, version)
                    state = "READY" if ready else "UNAVAILABLE"
                    found.append({"name": name, "version": version, "state": state, "reason": ""})
        return told(found)

    async def model(self, request: Any) -> Answer:
        return told(model_metadata(await self._backend.describe(*_named(request))))

    async def model_ready(self, request: Any) -> Answer:
        ready = await self._backend.is_ready(*_named(request))
        return told({"name": _named(request)[0], "ready": ready}, 200 if ready else 400)

    async def config(self, request: Any) -> Answer:
        return told(model_config(await self._backend.describe(*_named(request))))

    async def statistics(self, request: Any) -> Answer:
        name, version = _named(request)
        newest = (await self._backend.describe(name, version)).versions[-1]
        found = {"name": name, "version": version or newest, **self._inference.metrics.statistics(name)}
        return told({"model_stats": [found]})

    async def infer(self, request: Any) -> Answer:
        return await self._inference.answer(*_named(request), request.headers, request.receive)

    async def scrape(self, request: Any) -> Answer:
        try:
            text = self._inference.metrics.text() + (b"" if self._metrics is None else self._metrics())
        except ExtraNotFoundError as error:
            raise RequestError(str(error), 501) from error
        return Answer(200, text, {"Content-Type": _TEXT})


def _named(request: Any) -> tuple[str, str | None]:
    return request.path_params["name"], request.path_params.get("version")


def _endpoint(handler: _Handler, token: str | None) -> Callable[[Any], Awaitable[Any]]:
    """A handler as Starlette calls it, behind the token."""

    async def respond(request: Any) -> Any:
        try:
            if token is not None:
                check_token(request.headers.get("authorization"), token)
            answer = await handler(request)
        except Exception as error:
            answer = refused(error)
        return _response(answer)

    return respond


async def _no_route(request: Any, error: Any) -> Any:
    """404 and 405 in the protocol's form."""
    what = f"{request.method} {request.url.path}: {error.detail}"
    return _response(refused(RequestError(what, error.status_code, error.headers)))


def _response(answer: Answer) -> Any:
    return _starlette("responses").Response(answer.body, answer.status, dict(answer.headers))


def _starlette(name: str) -> Any:
    try:
        return importlib.import_module(f"starlette.{name}")
    except ModuleNotFoundError as error:
        raise ExtraNotFoundError(
            f'serving over HTTP needs starlette ({error}); pip install "graphcache[ray]"', name="starlette"
        ) from error
