import logging
import pickle

import pytest

from graphcache.errors import InputError, ProfileRangeError, ServingError, UnavailableError, UnknownModelError
from graphcache.serving.answers import refused, told
from graphcache.serving.protocol.problems import RequestError


@pytest.mark.parametrize(
    ("error", "status", "headers"),
    [
        (RequestError("what"), 400, {}),
        (RequestError("what", 401, {"WWW-Authenticate": "Bearer"}), 401, {"WWW-Authenticate": "Bearer"}),
        (UnknownModelError("what"), 404, {}),
        (UnavailableError("what", retry_after=2.1), 503, {"Retry-After": "3"}),
        (UnavailableError("what", retry_after=0), 503, {"Retry-After": "1"}),
        (UnavailableError("what", retry_after=float("nan")), 503, {"Retry-After": "86400"}),
        (UnavailableError("what", retry_after=float("inf")), 503, {"Retry-After": "86400"}),
        (InputError("what"), 400, {}),
        (ProfileRangeError("what"), 400, {}),
    ],
)
def test_what_the_sender_can_do_something_about_is_told(error, status, headers, caplog):
    answer = refused(error)
    assert (answer.status, answer.body) == (status, b'{"error":"what"}')
    assert answer.headers == {"Content-Type": "application/json", **headers}
    assert caplog.records == []


@pytest.mark.parametrize("error", [KeyError("secret"), ServingError("secret"), RecursionError("secret")])
def test_what_is_inside_the_server_is_logged_and_not_told(error, caplog):
    with caplog.at_level(logging.ERROR, "graphcache.serving"):
        answer = refused(error)
    assert (answer.status, answer.body) == (500, b'{"error":"the server failed to answer; its log says why"}')
    assert "secret" in caplog.text


def test_any_text_is_json():
    assert told({"a": 'ü"\n'}, 201).body == b'{"a":"\\u00fc\\"\\n"}'


def test_a_request_error_survives_a_pickle():
    error = pickle.loads(pickle.dumps(RequestError("what", 413, {"a": "b"})))
    assert (str(error), error.status, error.headers) == ("what", 413, {"a": "b"})
