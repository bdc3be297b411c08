"""One request for inference, from its first byte to its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from torch import Tensor

from graphcache.errors import ServingError, UnavailableError
from graphcache.serving.answers import JSON, Answer, refused
from graphcache.serving.backend import Backend, ModelSpec
from graphcache.serving.body import ClientGone, Receive, read_body
from graphcache.serving.encodings import chosen, pack
from graphcache.serving.limits import Gate, Limits
from graphcache.serving.metrics import ServerMetrics, outcome_of
from graphcache.serving.protocol.metadata import check_request
from graphcache.serving.protocol.problems import RequestError
from graphcache.serving.protocol.request import InferenceRequest, read_header_length, read_request
from graphcache.serving.protocol.response import write_response

_HEADER_LENGTH = "Inference-Header-Content-Length"


class Inference:
    """Answers requests for inference.

    A request is counted in before its body is received, so that waiting bodies have a bound.
    """

    def __init__(self, backend: Backend, limits: Limits) -> None:
        self._backend = backend
        self._limits = limits
        self._gate = Gate(limits)
        self.metrics = ServerMetrics(backend.names, self._gate)

    async def answer(self, name: str, version: str | None, headers: Mapping[str, str], receive: Receive) -> Answer:
        """Answer a request, whatever it is; it is counted."""
        one = _Request(self._backend, self._limits, self._gate, name, version)
        start = time.perf_counter()
        try:
            answer = await one.answer(headers, receive)
        except ClientGone:
            # Nobody receives it; 499 is what proxies call it.
            answer = Answer(499, b"")
        except Exception as error:
            answer = refused(error)
        seconds = time.perf_counter() - start
        outcome = "gone" if answer.status == 499 else outcome_of(answer.status)
        self.metrics.count(name, outcome, seconds=seconds, queued=one.queued, model_seconds=one.model_seconds)
        return one.timed(answer, seconds) if outcome == "ok" else answer


class _Request:
    """One of them, with what of its time was spent where, in seconds."""

    def __init__(self, backend: Backend, limits: Limits, gate: Gate, name: str, version: str | None) -> None:
        self._backend = backend
        self._limits = limits
        self._gate = gate
        self._name = name
        self._version = version
        self._runs = False
        self._receive: Receive
        self.queued = 0.0
        self.model_seconds = 0.0

    async def answer(self, headers: Mapping[str, str], receive: Receive) -> Answer:
        with self._gate.admitted():
            self._receive = receive
            length = read_header_length(headers.get(_HEADER_LENGTH.lower()))
            spec = await self._described()
            request = read_request(await read_body(receive, headers, self._limits, length or 0), length)
            check_request(spec, request)
            outputs = await self._in_time(request)
            return await self._written(spec, outputs, request, headers.get("accept-encoding"))

    async def _described(self) -> ModelSpec:
        seconds = self._limits.request_seconds
        try:
            async with asyncio.timeout(seconds):
                return await self._backend.describe(self._name, self._version)
        except TimeoutError as error:
            raise UnavailableError(f"{self._name} did not tell within {seconds:g} s what it takes") from error

    async def _in_time(self, request: InferenceRequest) -> Mapping[str, Tensor]:
        seconds = self._limits.request_seconds
        try:
            async with asyncio.timeout(seconds) as limit:
                return await self._run(request)
        except TimeoutError as error:
            if not limit.expired():
                raise ServingError("the backend ran out of time by itself") from error
            if self._runs:
                raise RequestError(f"{self._name} did not answer within {seconds:g} s", 504) from error
            raise UnavailableError(
                f"the request waited {seconds:g} s for its turn and was not run; ask again later"
            ) from error

    async def _run(self, request: InferenceRequest) -> Mapping[str, Tensor]:
        start = time.perf_counter()
        try:
            async with self._turn():
                self._runs = True
                started = time.perf_counter()
                self.queued = started - start
                try:
                    return await self._backend.infer(self._name, self._version, request.inputs)
                finally:
                    self.model_seconds = time.perf_counter() - started
        finally:
            if not self._runs:
                self.queued = time.perf_counter() - start

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """A turn, unless whoever asked has left when it comes."""
        # Nothing but that can come after the body.
        gone = asyncio.ensure_future(self._receive()) if self._gate.full else None
        try:
            async with self._gate.turn():
                if gone is not None and _has_left(gone):
                    raise ClientGone
                yield
        finally:
            if gone is not None:
                # Or the loop would complain that nobody asked how it ended.
                gone.add_done_callback(lambda task: task.cancelled() or task.exception())
                gone.cancel()

    async def _written(
        self, spec: ModelSpec, outputs: Mapping[str, Tensor], request: InferenceRequest, accepted: str | None
    ) -> Answer:
        version = spec.versions[-1] if self._version is None else self._version
        ordered = {each.name: outputs[each.name] for each in spec.outputs if each.name in outputs}
        response = write_response(self._name, version, ordered, request)
        headers = {"Content-Type": JSON}
        if response.header_length is not None:
            headers = {"Content-Type": "application/octet-stream", _HEADER_LENGTH: str(response.header_length)}
        body = response.body
        if chosen(accepted) is not None:
            # zlib lets the other threads run, and takes milliseconds for a megabyte.
            body, encoding = await asyncio.to_thread(pack, body, accepted)
            headers |= {"Vary": "Accept-Encoding"} | ({} if encoding is None else {"Content-Encoding": encoding})
        return Answer(200, body, headers)

    def timed(self, answer: Answer, seconds: float) -> Answer:
        """The answer, with where its time went (https://www.w3.org/TR/server-timing/, in milliseconds)."""
        spent = (("queue", self.queued), ("model", self.model_seconds), ("total", seconds))
        timing = ", ".join(f"{what};dur={1e3 * each:.3f}" for what, each in spent)
        return Answer(answer.status, answer.body, {**answer.headers, "Server-Timing": timing})


def _has_left(coming: asyncio.Future[MutableMapping[str, Any]]) -> bool:
    """Whether the next message is there, and is that of somebody who left."""
    if not coming.done():
        return False
    return coming.exception() is not None or coming.result().get("type") == "http.disconnect"
