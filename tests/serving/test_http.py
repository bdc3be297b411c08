"""What only a real connection can do wrong: slowness, silence, and more than was announced."""

import json
import socket

import pytest

from graphcache.serving.app import make_app
from graphcache.serving.limits import Limits
from tests.serving.asgi import served
from tests.serving.models import Ready

pytest.importorskip("starlette")

BODY = json.dumps({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}).encode()


def spoken(address, *pieces):
    """What comes back until the other side closes; a piece is sent once the one before it is."""
    with socket.create_connection(address, timeout=20) as connection:
        for piece in pieces:
            connection.sendall(piece)
        found = b""
        while data := connection.recv(65536):
            found += data
    return found.decode()


def head(*headers, close=True):
    lines = ["POST /v2/models/held/infer HTTP/1.1", "Host: here", *headers, *(["Connection: close"] * close)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@pytest.fixture(scope="module")
def address():
    with served(make_app(Ready(), limits=Limits(body_seconds=0.1, max_request_bytes=1000))) as found:
        yield found


def test_a_body_in_two_pieces(address):
    found = spoken(address, head(f"Content-Length: {len(BODY)}"), BODY[:20], BODY[20:])
    assert found.startswith("HTTP/1.1 200 OK\r\n")
    assert found.endswith('"data":[2.0]}]}')


def test_a_body_in_chunks(address):
    chunks = [f"{len(each):x}\r\n".encode() + each + b"\r\n" for each in (BODY[:7], BODY[7:])]
    assert "200 OK" in spoken(address, head("Transfer-Encoding: chunked"), *chunks, b"0\r\n\r\n")


def test_chunks_without_end(address):
    chunk = b"200\r\n" + bytes(0x200) + b"\r\n"
    found = spoken(address, head("Transfer-Encoding: chunked"), chunk, chunk)
    assert found.startswith("HTTP/1.1 413 ")
    assert "the body has more than 1000 bytes" in found


def test_a_client_that_stops_in_the_middle(address):
    found = spoken(address, head("Content-Length: 100"), b'{"inputs"')
    assert found.startswith("HTTP/1.1 408 ")
    assert "the body was not complete after 0.1 s; 9 bytes of it came" in found


def test_the_server_goes_on_after_all_of_them(address):
    for _ in range(3):
        with socket.create_connection(address, timeout=20) as connection:
            connection.sendall(head("Content-Length: 100") + b"{")
    assert "200 OK" in spoken(address, head(f"Content-Length: {len(BODY)}") + BODY)
