"""What is sent back, and what becomes of an error."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graphcache.errors import InputError, UnavailableError, UnknownModelError
from graphcache.serving.protocol.problems import RequestError

log = logging.getLogger("graphcache.serving")

JSON = "application/json"


@dataclass(frozen=True)
class Answer:
    """One answer.

    Args:
        status: Of HTTP.
        body: All of it.
        headers: The type of the body among them.
    """

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": JSON})


def told(tree: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    """An answer in JSON."""
    return Answer(status, json.dumps(tree, separators=(",", ":")).encode(), {"Content-Type": JSON, **(headers or {})})


def refused(error: Exception) -> Answer:
    """The answer to a request that ended in an error, in the protocol's form.

    What is not the sender's doing is logged, and told without what is inside the server.
    """
    if isinstance(error, RequestError):
        return told({"error": str(error)}, error.status, error.headers)
    if isinstance(error, UnknownModelError):
        return told({"error": str(error)}, 404)
    if isinstance(error, UnavailableError):
        return told({"error": str(error)}, 503, {"Retry-After": _seconds(error.retry_after)})
    if isinstance(error, InputError):
        return told({"error": str(error)}, 400)
    log.error("a request failed", exc_info=error)
    return told({"error": "the server failed to answer; its log says why"}, 500)


def _seconds(wanted: float) -> str:
    """Whole ones, as HTTP wants them, and never 0, which would be no pause."""
    return str(math.ceil(wanted)) if 1 < wanted < 86_400 else "1" if wanted <= 1 else "86400"
