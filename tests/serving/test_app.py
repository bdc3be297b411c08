"""The endpoints, without a network."""

import asyncio
import gzip
import json
import logging
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import graphcache
from graphcache.errors import ConfigError, ExtraNotFoundError, InputError
from graphcache.serving import app as module
from graphcache.serving.app import make_app
from graphcache.serving.limits import Limits
from tests.serving.asgi import ask, request
from tests.serving.models import BUSY, Held, Ready
from tests.test_import import imported

pytest.importorskip("starlette")

BODY = {"inputs": [{"name": "x", "shape": [3], "datatype": "FP32", "data": [1, 2, 3]}]}
INFER = "/v2/models/held/infer"


def test_health():
    app = make_app(Ready())
    assert ask(app, "GET", "/v2/health/live").tree == {"live": True}
    assert ask(app, "GET", "/v2/health/ready").tree == {"ready": True}
    busy = make_app(Ready(BUSY))
    assert ask(busy, "GET", "/v2/health/live").status == 200
    # A status of 4xx is the protocol's word for no.
    assert ask(busy, "GET", "/v2/health/ready").status == 400
    assert ask(busy, "GET", "/v2/models/held/ready").tree == {"name": "held", "ready": False}


def test_metadata():
    app = make_app(Ready())
    assert ask(app, "GET", "/v2").tree["version"] == graphcache.__version__
    for path in ("/v2/models/held", "/v2/models/held/versions/1"):
        found = ask(app, "GET", path).tree
        assert (found["name"], found["versions"]) == ("held", ["1", "2"])
        assert found["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1]}]
    assert ask(app, "POST", "/v2/repository/index").tree == [
        {"name": "held", "version": version, "state": "READY", "reason": ""} for version in ("1", "2")
    ]


def test_inference_of_a_version_and_of_the_newest():
    app = make_app(Ready())
    newest = ask(app, "POST", INFER, {**BODY, "id": "7"})
    assert newest.tree == {
        "model_name": "held",
        "model_version": "2",
        "id": "7",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [3], "data": [2, 3, 4]}],
    }
    assert newest.headers["content-type"] == "application/json"
    assert ask(app, "POST", "/v2/models/held/versions/1/infer", BODY).tree["model_version"] == "1"


def test_binary_data_and_compression():
    app = make_app(Ready())
    head = json.dumps(
        {
            "inputs": [{"name": "x", "shape": [999], "datatype": "FP32", "parameters": {"binary_data_size": 3996}}],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    x = torch.arange(999.0)
    body = gzip.compress(head + bytes(x.view(torch.uint8).tolist()))
    headers = {"Content-Encoding": "gzip", "Accept-Encoding": "gzip", "Inference-Header-Content-Length": str(len(head))}
    found = ask(app, "POST", INFER, [body[:50], body[50:]], headers)
    assert (found.headers["content-encoding"], found.headers["vary"]) == ("gzip", "Accept-Encoding")
    assert found.headers["content-type"] == "application/octet-stream"
    data = gzip.decompress(found.body)[int(found.headers["inference-header-content-length"]) :]
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.float32), x + 1)


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v2/models/other", 404, "there is no model 'other' of version None; the models are held"),
        ("GET", "/v2/models/held/versions/9", 404, "there is no model 'held' of version 9"),
        ("GET", "/v2/models/other/ready", 404, "there is no model 'other'"),
        ("GET", "/v2/models/other/config", 404, "there is no model 'other'"),
        ("GET", "/v2/models/other/versions/1/stats", 404, "there is no model 'other'"),
        ("POST", "/v2/models/other/infer", 404, "there is no model 'other'"),
        ("GET", "/v2/nothing", 404, "GET /v2/nothing: Not Found"),
        ("GET", "/v2/models/held/", 404, "GET /v2/models/held/: Not Found"),
        ("GET", "/v2/models/..%2f..%2fetc/passwd", 404, "Not Found"),
        ("GET", INFER, 405, "GET /v2/models/held/infer: Method Not Allowed"),
        ("DELETE", "/v2", 405, "DELETE /v2: Method Not Allowed"),
        ("POST", INFER, 400, "the request is no JSON"),
    ],
)
def test_errors_have_the_protocols_form(method, path, status, message):
    found = ask(make_app(Ready()), method, path)
    assert found.status == status
    assert message in found.error
    assert status != 405 or found.headers["allow"]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (BUSY, 503, "being prepared"),
        (InputError("another size"), 400, "another size"),
        (RuntimeError("secret"), 500, "the server failed to answer; its log says why"),
        (TimeoutError("secret"), 500, "the server failed to answer; its log says why"),
    ],
)
def test_what_a_backend_raises(error, status, message, caplog):
    with caplog.at_level(logging.CRITICAL, "graphcache"):
        found = ask(make_app(Ready(error)), "POST", INFER, BODY)
    assert (found.status, found.error) == (status, message)
    assert found.headers.get("retry-after") == ("3" if status == 503 else None)


def test_too_large_a_body():
    found = ask(make_app(Ready(), limits=Limits(max_request_bytes=20)), "POST", INFER, BODY)
    assert (found.status, found.error[:33]) == (413, "the body has more than 20 bytes, ")


def test_a_body_that_does_not_come():
    async def receive():
        return await asyncio.Event().wait()

    found = ask(make_app(Ready(), limits=Limits(body_seconds=0.01)), "POST", INFER, receive)
    assert (found.status, found.error) == (408, "the body was not complete after 0.01 s; 0 bytes of it came")


def test_a_model_that_takes_too_long_is_given_up():
    backend = Held()
    app = make_app(backend, limits=Limits(request_seconds=0.05, max_concurrency=1))

    async def run():
        slow = asyncio.ensure_future(request(app, "POST", INFER, BODY))
        waiting = asyncio.ensure_future(request(app, "POST", INFER, BODY))
        first = await slow
        # The other one was given its turn then, or its own time ran out first.
        other = await waiting
        backend.go.set()
        last = await request(app, "POST", INFER, BODY)
        return first, other, last

    first, other, last = asyncio.run(run())
    assert (first.status, first.error) == (504, "held did not answer within 0.05 s")
    assert other.status in (503, 504)
    assert last.status == 200
    assert backend.cancelled >= 1


def test_a_request_that_only_waited_may_be_sent_again():
    class Endless(Held):
        async def infer(self, name, version, inputs):
            # Whoever is cancelled here takes his time: the turn is not given on.
            self.entered.set()
            try:
                await asyncio.Event().wait()
            finally:
                await self.over.wait()

    backend = Endless()
    app = make_app(backend, limits=Limits(request_seconds=0.02, max_concurrency=1))

    async def run():
        backend.entered, backend.over = asyncio.Event(), asyncio.Event()
        first = asyncio.ensure_future(request(app, "POST", INFER, BODY))
        await backend.entered.wait()
        second = await request(app, "POST", INFER, BODY)
        backend.over.set()
        return await first, second

    first, second = asyncio.run(run())
    assert first.status == 504
    assert (second.status, second.headers["retry-after"]) == (503, "1")
    assert second.error == "the request waited 0.02 s for its turn and was not run; ask again later"


def test_a_full_server_refuses_before_it_receives_anything():
    backend = Held()
    app = make_app(backend, limits=Limits(max_concurrency=1, max_queue=1))

    async def never():
        raise AssertionError("the body was asked for")

    async def run():
        inside = [asyncio.ensure_future(request(app, "POST", INFER, BODY)) for _ in range(2)]
        while b"graphcache_requests_waiting 1.0" not in (await request(app, "GET", "/metrics")).body:
            await asyncio.sleep(0)
        refused = await request(app, "POST", INFER, never)
        backend.go.set()
        return refused, [await each for each in inside]

    pytest.importorskip("prometheus_client")
    refused, inside = asyncio.run(run())
    assert (refused.status, refused.headers["retry-after"]) == (503, "1")
    assert [each.status for each in inside] == [200, 200]


@pytest.mark.parametrize("last", [{"type": "http.disconnect"}, ConnectionError("reset")])
def test_whoever_left_while_waiting_is_not_run(last):
    backend = Held()
    app = make_app(backend, limits=Limits(max_concurrency=1))
    messages = [{"type": "http.request", "body": json.dumps(BODY).encode()}]

    async def run():
        left = asyncio.Event()
        coming = iter([*messages, last])

        async def receive():
            message = next(coming)
            if message is last:
                left.set()
            if isinstance(message, Exception):
                raise message
            return message

        first = asyncio.ensure_future(request(app, "POST", INFER, BODY))
        assert await asyncio.to_thread(backend.begun.acquire, timeout=20)
        second = asyncio.ensure_future(request(app, "POST", INFER, receive))
        await left.wait()
        backend.go.set()
        return await first, await second

    first, second = asyncio.run(run())
    assert (first.status, second.status, second.body) == (200, 499, b"")
    assert not backend.begun.acquire(blocking=False)


def test_a_backend_that_does_not_even_say_what_it_takes():
    class Silent(Ready):
        async def describe(self, name, version=None):
            await asyncio.Event().wait()

    found = ask(make_app(Silent(), limits=Limits(request_seconds=0.01)), "POST", INFER, BODY)
    assert (found.status, found.error) == (503, "held did not tell within 0.01 s what it takes")


def test_a_model_that_goes_between_two_questions():
    class Going(Ready):
        def names(self):
            return ["gone", "held"]

    app = make_app(Going())
    assert ask(app, "GET", "/v2/health/ready").status == 200
    assert {each["name"] for each in ask(app, "POST", "/v2/repository/index").tree} == {"held"}


HEADERS = {
    "Inference-Header-Content-Length": st.integers(-1, 300).map(str) | st.text("0123456789- .e", max_size=5),
    "Content-Encoding": st.sampled_from(["gzip", "deflate", "identity", "br", ""]),
    "Content-Length": st.integers(-1, 10**9).map(str),
    "Accept-Encoding": st.text("gzipdeflate;q=0., ", max_size=20),
}


@given(
    st.lists(st.binary(max_size=40) | st.sampled_from([json.dumps(BODY).encode(), b"{", b"[" * 99]), min_size=1),
    st.fixed_dictionaries({}, optional=HEADERS),
    st.sampled_from([bytes, gzip.compress]),
)
def test_whatever_is_sent_the_answer_is_one_of_the_protocol(pieces, headers, packed):
    found = ask(make_app(Ready()), "POST", INFER, [packed(each) for each in pieces], headers)
    assert found.status in (200, 400, 413, 415)
    assert found.status == 200 or found.error


def test_the_token_is_wanted_for_all_but_health():
    app = make_app(Ready(), token="a.token")
    paths = [("GET", "/v2"), ("GET", "/v2/models/held"), ("POST", INFER), ("GET", "/metrics")]
    paths += [("GET", f"/v2/models/held/{what}") for what in ("ready", "config", "stats")]
    paths += [("GET", "/v2/models/held/versions/1/stats"), ("POST", "/v2/repository/index")]
    for method, path in paths:
        for headers in ({}, {"Authorization": "Bearer other"}):
            found = ask(app, method, path, BODY if method == "POST" else b"", headers)
            assert (found.status, "token" in found.error) == (401, True)
            assert found.headers["www-authenticate"].startswith("Bearer ")
    assert ask(app, "GET", "/v2/health/live").status == ask(app, "GET", "/v2/health/ready").status == 200
    assert ask(app, "POST", INFER, BODY, {"Authorization": "Bearer a.token"}).status == 200


def test_metrics_tell_where_the_time_went_and_what_was_refused():
    pytest.importorskip("prometheus_client")
    app = make_app(Ready(), metrics=lambda: b"more_of_it 1.0\n")
    found = ask(app, "POST", INFER, BODY)
    spent = dict(each.split(";dur=") for each in found.headers["server-timing"].split(", "))
    assert list(spent) == ["queue", "model", "total"]
    assert 0 < float(spent["model"]) < float(spent["total"])
    for path in ("/v2/models/other/infer", "/v2/models/another/infer"):
        ask(app, "POST", path, BODY)
    ask(app, "POST", INFER)
    scraped = ask(app, "GET", "/metrics")
    assert scraped.headers["content-type"].startswith("text/plain; version=0.0.4")
    text = scraped.body.decode()
    assert 'graphcache_requests_total{model="held",outcome="ok"} 1.0' in text
    assert 'graphcache_requests_total{model="held",outcome="refused"} 1.0' in text
    assert 'graphcache_requests_total{model="(unknown)",outcome="refused"} 2.0' in text
    assert text.endswith("more_of_it 1.0\n")
    [share] = [line for line in text.splitlines() if line.startswith("graphcache_model_share{")]
    assert 0 < float(share.split()[1]) < 1


def test_other_metrics_that_fail_are_an_error_of_the_server(caplog):
    pytest.importorskip("prometheus_client")
    with caplog.at_level(logging.CRITICAL, "graphcache"):
        assert ask(make_app(Ready(), metrics=lambda: 1 / 0), "GET", "/metrics").status == 500


def test_metrics_without_their_package_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    found = ask(make_app(Ready()), "GET", "/metrics")
    assert found.status == 501
    assert found.error.endswith('pip install "graphcache[metrics]"')


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limits": {}}, "limits=.*: expected a Limits"),
        ({"token": "two words"}, "not as RFC 6750 has it"),
        ({"metrics": b""}, "metrics=.*: expected a function that gives bytes"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        make_app(Ready(), **options)


def test_without_starlette_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    with pytest.raises(ExtraNotFoundError, match=r'needs starlette .*pip install "graphcache\[ray\]"$') as raised:
        make_app(Ready())
    assert raised.value.name == "starlette"


def test_importing_the_application_imports_no_server():
    found = imported(f"import {module.__name__}")
    assert "graphcache.serving.inference" in found
    assert found.isdisjoint({"starlette", "ray", "uvicorn", "prometheus_client"})
