"""Requests to an application of ASGI without a network, and the same application behind a real server."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def tree(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        tree = self.tree
        assert list(tree) == ["error"], tree
        assert self.headers["content-type"] == "application/json"
        return tree["error"]


async def request(app: Any, method: str, path: str, body: Any = b"", headers: dict[str, str] | None = None) -> Reply:
    """One request.

    Args:
        app: Of ASGI.
        method: Of HTTP.
        path: Without a query.
        body: Bytes, pieces of them, what becomes JSON, or a function to receive with.
        headers: Of the request.
    """
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    pieces = iter([body] if isinstance(body, bytes) else body if isinstance(body, list) else ())
    left = [len(body)] if isinstance(body, list) else [1]

    async def receive():
        piece = next(pieces, None)
        if piece is None:
            # As a server does: there is nothing more to tell until the client leaves.
            await asyncio.Event().wait()
        left[0] -= 1
        return {"type": "http.request", "body": piece, "more_body": left[0] > 0}

    sent = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, body if callable(body) else receive, send)
    start, *rest = sent
    given = {name.decode(): value.decode() for name, value in start["headers"]}
    return Reply(start["status"], given, b"".join(each.get("body", b"") for each in rest))


def ask(app: Any, method: str, path: str, body: Any = b"", headers: dict[str, str] | None = None) -> Reply:
    """One request, in an event loop of its own."""
    return asyncio.run(request(app, method, path, body, headers))


@contextmanager
def served(app: Any) -> Iterator[tuple[str, int]]:
    """Host and port of a real server, in a thread."""
    uvicorn = pytest.importorskip("uvicorn")
    config = uvicorn.Config(
        app, lifespan="off", ws="none", loop="asyncio", log_config=None, access_log=False, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    # asyncio switches Nagle's algorithm off only where the protocol is named; else each answer takes 40 ms.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.bind(("127.0.0.1", 0))
        # It listens from here on, so that nobody has to wait until the server has started.
        listening.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()
        finally:
            server.should_exit = True
            thread.join()
