"""Bodies are received within their limits, in bytes and in seconds, packed or not."""

import asyncio
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.serving.body import ALIGNMENT, ClientGone, read_body
from graphcache.serving.limits import Limits
from graphcache.serving.protocol.problems import RequestError


def received(messages, headers=None, first=0, **limits):
    """What is read of some messages; after the last one nothing comes any more."""

    async def run():
        left = iter(messages)

        async def receive():
            for message in left:
                return message
            return await asyncio.Event().wait()

        return await read_body(receive, headers or {}, Limits(**limits), first)

    return asyncio.run(run())


def pieces(*bodies):
    return [
        {"type": "http.request", "body": body, "more_body": index < len(bodies) - 1}
        for index, body in enumerate(bodies)
    ]


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=5), st.integers(0, 200))
def test_all_pieces_in_order_and_aligned_where_it_matters(bodies, first):
    found = received(pieces(*bodies), first=first)
    assert bytes(found) == b"".join(bodies)
    assert not found.readonly
    assert (len(found.obj) - found.nbytes + first) % ALIGNMENT == 0


def test_messages_need_not_say_more_than_they_must():
    assert bytes(received([{"type": "http.request"}])) == b""


def test_too_large_by_its_own_account_is_not_even_received():
    with pytest.raises(RequestError, match="the body has more than 10 bytes, which is the limit") as raised:
        received([], {"content-length": "11"}, max_request_bytes=10)
    assert raised.value.status == 413
    with pytest.raises(RequestError, match="more than"):
        received([], {"content-length": "9" * 400})
    assert bytes(received(pieces(bytes(10)), {"content-length": "10"}, max_request_bytes=10)) == bytes(10)


@pytest.mark.parametrize("length", ["-1", "1.5", "", "ten", "²"])
def test_lengths_that_are_none(length):
    with pytest.raises(RequestError, match=r"Content-Length: .*; expected a whole number"):
        received([], {"content-length": length})


def test_too_large_without_saying_so():
    messages = [{"type": "http.request", "body": bytes(6), "more_body": True}] * 2
    with pytest.raises(RequestError, match="more than 10 bytes") as raised:
        received(messages, max_request_bytes=10)
    assert raised.value.status == 413


def test_too_large_once_unpacked_and_not_held_before():
    packed = zlib.compress(bytes(500 * 2**20))
    assert len(packed) < 2**20
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="more than 1048576 bytes") as raised:
            received(pieces(packed), {"content-encoding": "deflate"}, max_request_bytes=2**20)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
    assert raised.value.status == 413


def test_too_slow():
    with pytest.raises(RequestError, match=r"the body was not complete after 0.01 s; 3 bytes of it came") as raised:
        received([{"type": "http.request", "body": b"abc", "more_body": True}], body_seconds=0.01)
    assert raised.value.status == 408


def test_somebody_elses_timeout_is_none_of_ours():
    async def receive():
        raise TimeoutError("the server's")

    with pytest.raises(TimeoutError, match="the server's"):
        asyncio.run(read_body(receive, {}, Limits()))


def test_the_client_left():
    with pytest.raises(ClientGone):
        received([{"type": "http.request", "body": b"a", "more_body": True}, {"type": "http.disconnect"}])


def test_a_body_that_ends_too_early_and_an_unknown_encoding():
    with pytest.raises(RequestError, match="ends before its gzip data does"):
        received(pieces(b""), {"content-encoding": "gzip"})
    with pytest.raises(RequestError, match="expected gzip, deflate or identity") as raised:
        received([], {"content-encoding": "br"})
    assert raised.value.status == 415
