"""The body of a request, received within its limits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from graphcache.errors import shown
from graphcache.serving.encodings import Unpacker
from graphcache.serving.limits import Limits
from graphcache.serving.protocol.problems import RequestError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
"""What ASGI gives an application to receive with."""

ALIGNMENT = 64


class ClientGone(Exception):
    """The client left before its request was complete; there is nobody to answer."""


async def read_body(receive: Receive, headers: Mapping[str, str], limits: Limits, first: int = 0) -> memoryview:
    """Receive and unpack a body whose binary data, ``first`` bytes from its start, is aligned to be used in place.

    Nothing is kept of a body that breaks a limit, and no more is ever held than the limit and one piece.
    """
    most = limits.max_request_bytes
    unpacker = Unpacker(headers.get("content-encoding"))
    _check_length(headers.get("content-length"), most)
    start = -first % ALIGNMENT
    found = bytearray(start)
    received = 0
    try:
        async with asyncio.timeout(limits.body_seconds) as time:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                data = message.get("body", b"")
                more = message.get("more_body", False)
                received += len(data)
                if received > most:
                    raise too_large(most)
                for piece in unpacker.feed(data):
                    if len(found) - start + len(piece) > most:
                        raise too_large(most)
                    found += piece
                    # Others have their turn while one body unpacks to a thousand times its size.
                    await asyncio.sleep(0)
    except TimeoutError as error:
        if not time.expired():
            raise
        raise RequestError(
            f"the body was not complete after {limits.body_seconds:g} s; {received} bytes of it came", 408
        ) from error
    unpacker.finish()
    return memoryview(found)[start:]


def too_large(most: int) -> RequestError:
    """What a body of too many bytes is answered with."""
    return RequestError(f"the body has more than {most} bytes, which is the limit; send less at once", 413)


def _check_length(text: str | None, most: int) -> None:
    if text is None:
        return
    if not (text.isascii() and text.isdecimal()):
        raise RequestError(f"Content-Length: {shown(text)}; expected a whole number")
    if len(text) > 18 or int(text) > most:
        raise too_large(most)
