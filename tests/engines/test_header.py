"""What the first bytes of an engine file tell, on any machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.engines.engine import EngineHeader, check_header, read_header
from graphcache.errors import EngineError, EngineFormatError, EngineVersionError
from tests.engines.fake_tensorrt import serialize

GOOD = serialize("affine")
versions = st.tuples(*[st.integers(0, 255)] * 4)


def refusal(data: bytes, kind: type[EngineError]) -> str:
    with pytest.raises(kind) as caught:
        check_header(data, flavour="tensorrt_rtx", version="1.5.0.114", label="model")
    return str(caught.value)


@given(versions, st.integers(0, 2**64 - 1), st.binary(max_size=20))
def test_reads_length_and_version(version: tuple[int, ...], nbytes: int, tail: bytes) -> None:
    data = serialize("affine", version=version, nbytes=nbytes)[:28] + tail
    assert read_header(data) == EngineHeader(nbytes, ".".join(map(str, version)))


@given(st.binary(max_size=60))
def test_other_bytes_have_none(data: bytes) -> None:
    if data[:4] != b"vtrt" or len(data) < 28:
        assert read_header(data) is None


def test_accepts_a_whole_engine_of_this_version() -> None:
    check_header(GOOD, flavour="tensorrt_rtx", version="1.5.0.114", label="model")


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt_lean"])
def test_leaves_other_flavours_to_tensorrt(flavour: str) -> None:
    check_header(b"anything", flavour=flavour, version="10.8.0", label="model")


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt_rtx", "tensorrt_lean"])
def test_no_bytes_at_all(flavour: str) -> None:
    with pytest.raises(EngineFormatError) as caught:
        check_header(b"", flavour=flavour, version="10.8.0", label="model")
    assert str(caught.value) == "model: expected the bytes of an engine, got none; was the file written completely?"


def test_foreign_bytes() -> None:
    assert refusal(b"ftrt" + bytes(100), EngineFormatError) == (
        "model is not a TensorRT-RTX engine: its 104 bytes begin with b'ftrt\\x00\\x00\\x00\\x00', an engine's with "
        "b'vtrt'; an ONNX model goes through graphcache.build first, an engine of another flavour of TensorRT runs "
        "with GRAPHCACHE_TENSORRT=tensorrt"
    )


@given(st.integers(1, len(GOOD) - 1))
def test_truncated_anywhere(length: int) -> None:
    text = refusal(GOOD[:length], EngineFormatError)
    if length < 28:
        assert text.startswith(f"model is not a TensorRT-RTX engine: its {length} bytes begin with b'")
    else:
        assert text == (
            f"model has {length} bytes, its header says {len(GOOD)}; it was truncated or something was appended, so "
            "copy the file again or build it with graphcache.build"
        )


def test_something_appended() -> None:
    assert "has 257 bytes, its header says 256" in refusal(GOOD + b"\n", EngineFormatError)


@given(versions.filter(lambda version: version != (1, 5, 0, 114)))
def test_another_version(version: tuple[int, ...]) -> None:
    text = ".".join(map(str, version))
    assert refusal(serialize("affine", version=version), EngineVersionError) == (
        f"model was built by TensorRT-RTX {text}, and 1.5.0.114 is installed; an engine runs only under the version "
        f"that built it, so build it again, or pip install tensorrt-rtx=={text}"
    )


@given(st.integers(0, 27), st.integers(1, 255))
def test_a_flipped_byte_of_the_header_is_refused_or_means_nothing(place: int, flip: int) -> None:
    data = bytearray(GOOD)
    data[place] ^= flip
    meaningless = 4 <= place < 16
    if meaningless:
        check_header(bytes(data), flavour="tensorrt_rtx", version="1.5.0.114", label="model")
    else:
        refusal(bytes(data), EngineVersionError if place >= 24 else EngineFormatError)
