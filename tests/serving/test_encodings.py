import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.serving.encodings import Unpacker, chosen, pack
from graphcache.serving.protocol.problems import RequestError

PACKED = {"gzip": gzip.compress, "deflate": zlib.compress, "identity": bytes, "": bytes}


def unpacked(encoding, pieces):
    unpacker = Unpacker(encoding)
    found = b"".join(each for piece in pieces for each in unpacker.feed(piece))
    unpacker.finish()
    return found


@given(st.binary(max_size=3000), st.sampled_from(list(PACKED)), st.integers(1, 500))
def test_in_any_pieces(body, encoding, size):
    packed = PACKED[encoding](body)
    pieces = [packed[start : start + size] for start in range(0, len(packed), size)]
    assert unpacked(encoding.upper() or None, pieces) == body


def test_large_bodies_come_in_pieces_that_can_be_stopped_at():
    packed = gzip.compress(bytes(5 * 2**20))
    assert len(packed) < 2**14
    sizes = [len(each) for each in Unpacker("gzip").feed(packed)]
    assert max(sizes) <= 2**20
    assert sum(sizes) == 5 * 2**20


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_damaged_bodies(encoding):
    packed = PACKED[encoding](b"body" * 100)
    with pytest.raises(RequestError, match=f"the body ends before its {encoding} data does"):
        unpacked(encoding, [packed[:-1]])
    with pytest.raises(RequestError, match=f"the body ends before its {encoding} data does"):
        unpacked(encoding, [])
    with pytest.raises(RequestError, match=f"the body goes on after the end of its {encoding} data"):
        unpacked(encoding, [packed, b"x"])
    with pytest.raises(RequestError, match=f"the body goes on after the end of its {encoding} data"):
        unpacked(encoding, [packed + packed])
    with pytest.raises(RequestError, match=f"the body is no {encoding} data: "):
        unpacked(encoding, [b"\x00" + packed])


@given(st.sampled_from(["gzip", "deflate"]), st.binary(max_size=60))
def test_whatever_comes_is_unpacked_or_refused(encoding, data):
    try:
        unpacked(encoding, [data])
    except RequestError as error:
        assert error.status == 400  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "identity;q=1", "x" * 500])
def test_other_encodings(encoding):
    with pytest.raises(RequestError, match="expected gzip, deflate or identity") as raised:
        Unpacker(encoding)
    assert (raised.value.status, raised.value.headers) == (415, {"Accept-Encoding": "gzip, deflate"})


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [
        (None, None),
        ("", None),
        ("identity", None),
        ("*", None),
        ("br", None),
        ("gzip", "gzip"),
        ("GZIP;q=1.0", "gzip"),
        ("deflate", "deflate"),
        ("deflate, gzip", "gzip"),
        ("gzip;q=0, deflate ; q=0.5", "deflate"),
        ("gzip; q=0.000", None),
        (";;,,q=0", None),
    ],
)
def test_what_an_answer_is_packed_with(accepted, encoding):
    assert chosen(accepted) == encoding
    body, found = pack(bytes(2000), accepted)
    assert found == encoding
    assert unpacked(encoding, [body]) == bytes(2000)
    assert pack(b"short", accepted) == (b"short", None)


@given(st.text())
def test_any_header_chooses_something_or_nothing(accepted):
    assert chosen(accepted) in (None, "gzip", "deflate")
