"""A bearer token, as RFC 6750 has it."""

from __future__ import annotations

import hmac
import re

from graphcache.errors import ConfigError
from graphcache.serving.protocol.problems import RequestError

_TOKEN = re.compile(r"[A-Za-z0-9\-._~+/]+=*")
"""RFC 6750, section 2.1."""


def check_configured(token: object) -> None:
    """Refuse a token that no client could send, at the start."""
    if token is not None and not (isinstance(token, str) and _TOKEN.fullmatch(token)):
        raise ConfigError(
            f"token is of type {type(token).__name__} and not as RFC 6750 has it; expected letters, digits and any of "
            f"-._~+/ with = at the end"
        )


def check_token(given: str | None, token: str) -> None:
    """Hold a request's ``Authorization`` against the token, in a time that does not depend on where they differ."""
    scheme, _, value = (given or "").partition(" ")
    if scheme.lower() != "bearer":
        raise RequestError(
            "this server wants a token: Authorization: Bearer TOKEN",
            401,
            {"WWW-Authenticate": 'Bearer realm="graphcache"'},
        )
    if not hmac.compare_digest(value.strip().encode("utf-8", "replace"), token.encode()):
        raise RequestError(
            "the token is not the right one",
            401,
            {"WWW-Authenticate": 'Bearer realm="graphcache", error="invalid_token"'},
        )
