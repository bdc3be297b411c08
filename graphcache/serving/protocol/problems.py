"""A request that cannot be answered as it is."""

from __future__ import annotations

from collections.abc import Mapping

from graphcache.errors import ServingError


class RequestError(ServingError, ValueError):
    """A request breaks the protocol or a limit; its sender gets the message and the HTTP status."""

    def __init__(self, message: str, status: int = 400, headers: Mapping[str, str] | None = None) -> None:
        """Keep how to answer."""
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})

    def __reduce__(self) -> tuple[type[RequestError], tuple[str, int, dict[str, str]]]:
        return type(self), (str(self), self.status, self.headers)
