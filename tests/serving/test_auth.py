import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.errors import ConfigError
from graphcache.serving import auth
from graphcache.serving.auth import check_configured, check_token
from graphcache.serving.protocol.problems import RequestError


@pytest.mark.parametrize("given", ["Bearer a.token", "bearer a.token", "BEARER  a.token "])
def test_the_right_one(given):
    check_token(given, "a.token")


@pytest.mark.parametrize("given", [None, "", "Basic abc", "a.token"])
def test_none_at_all(given):
    with pytest.raises(RequestError, match="this server wants a token") as raised:
        check_token(given, "a.token")
    assert (raised.value.status, raised.value.headers) == (401, {"WWW-Authenticate": 'Bearer realm="graphcache"'})


@given(st.text())
def test_any_other(text):
    if text.strip() == "a.token":
        return
    with pytest.raises(RequestError, match="the token is not the right one") as raised:
        check_token(f"Bearer {text}", "a.token")
    assert raised.value.status == 401
    assert raised.value.headers["WWW-Authenticate"].endswith('error="invalid_token"')


def test_they_are_compared_in_constant_time(monkeypatch):
    compared = []

    class Watched:
        @staticmethod
        def compare_digest(left, right):
            compared.append((left, right))
            return hmac.compare_digest(left, right)

    monkeypatch.setattr(auth, "hmac", Watched)
    with pytest.raises(RequestError):
        check_token("Bearer b", "a.token")
    assert compared == [(b"b", b"a.token")]


@pytest.mark.parametrize("token", ["", "two words", "ümlaut", "a\n", 7, b"abc", True])
def test_tokens_that_no_client_could_send(token):
    with pytest.raises(ConfigError, match="not as RFC 6750 has it") as raised:
        check_configured(token)
    assert "two words" not in str(raised.value)


@pytest.mark.parametrize("token", [None, "abc", "a-._~+/9=="])
def test_tokens(token):
    check_configured(token)
