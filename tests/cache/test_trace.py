from __future__ import annotations

import errno
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.cache.trace import Costs, Input, Trace, TraceWriter, read_trace, shapes_of
from graphcache.errors import ConfigError, TraceError
from tests.helpers import in_threads

HEAD = '{"format": "graphcache trace", "version": 1, "module": "mlp8"}'
SIGNATURE = '{"signature": 0, "inputs": {"x": {"shape": [8, 64], "dtype": "float32"}}}'
CALL = '{"call": 0}'
COSTS = '{"costs": 0, "eager": 0.0002, "replay": 0.00005, "capture": 0.005}'


def lines(*given: str) -> bytes:
    return "".join(f"{line}\n" for line in given).encode()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "trace.jsonl"


def read(file, *given: str) -> Trace:
    file.write_bytes(lines(*given))
    return read_trace(file)


# ---- what is written is read


inputs = st.dictionaries(
    st.text(max_size=4),
    st.builds(Input, st.lists(st.integers(0, 2**40), max_size=4).map(tuple), st.sampled_from(["float32", "int64"])),
    max_size=3,
)


@given(st.lists(inputs, min_size=1, max_size=5), st.lists(st.integers(0, 4), max_size=30), st.text(max_size=5))
def test_what_is_written_is_read(tmp_path_factory, described, keys, module):
    file = tmp_path_factory.mktemp("traces") / "a.jsonl"
    order: list[int] = []
    with TraceWriter(file, module=module) as writer:
        for key in keys:
            key %= len(described)
            writer.call(("key", key), described[key])
            if key not in order:
                order.append(key)
        for key in order:
            writer.costs(("key", key), eager=0.5, replay=0.25, capture=key)
    trace = read_trace(file)
    assert trace == Trace(
        module,
        [described[key] for key in order],
        [order.index(key % len(described)) for key in keys],
        {number: Costs(0.5, 0.25, key) for number, key in enumerate(order)},
    )


def test_the_format_is_what_the_module_says(file):
    with TraceWriter(file, module="mlp8") as writer:
        writer.call("a", {"x": Input((8, 64), "float32")})
        writer.call("a", {})
        writer.costs("a", eager=0.0002, replay=0.00005, capture=0.005)
    assert file.read_text().splitlines() == [HEAD, SIGNATURE, CALL, CALL, COSTS.replace("0.00005", "5e-05")]


def test_beyond_its_limit_calls_are_left_out(file):
    with TraceWriter(file, max_calls=2) as writer:
        for key in "aab":
            writer.call(key, {})
    trace = read_trace(file)
    assert (trace.calls, len(trace.signatures)) == ([0, 0], 1)


def test_costs_of_what_was_never_called_are_left_out(file):
    with TraceWriter(file) as writer:
        writer.costs("a", eager=1.0, replay=1.0, capture=1.0)
    assert read_trace(file).costs == {}


def test_threads_write_whole_lines(file):
    with TraceWriter(file) as writer:
        in_threads(lambda index: [writer.call((index, n % 3), {"x": Input((n % 3,), "int8")}) for n in range(300)], 4)
    trace = read_trace(file)
    assert (len(trace.calls), len(trace.signatures)) == (1200, 12)
    assert all(trace.calls.count(number) == 100 for number in range(12))


def test_after_close_nothing_is_written_and_closing_twice_does_nothing(file):
    writer = TraceWriter(file)
    writer.call("a", {})
    writer.close()
    writer.close()
    writer.call("a", {})
    writer.costs("a", eager=1.0, replay=1.0, capture=1.0)
    assert read_trace(file).calls == [0]


def test_a_file_that_is_there_is_not_written_over(file):
    file.write_text("precious")
    with pytest.raises(TraceError, match="exists; a trace never writes over a file"):
        TraceWriter(file)
    assert file.read_text() == "precious"


@pytest.mark.parametrize("path", ["", "no/such/folder/a.jsonl", "a\0b", 3, None, True, [], 1.5])
def test_a_path_that_cannot_be_written_is_a_typed_error(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TraceError, match="cannot be written"):
        TraceWriter(path)
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(path)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, None, "1"])
def test_a_limit_that_means_nothing_is_refused_before_the_file_is_made(file, limit):
    with pytest.raises(ConfigError, match="max_calls="):
        TraceWriter(file, max_calls=limit)
    assert not file.exists()


def test_a_full_disk_ends_the_recording_and_says_so_once(file, caplog):
    class Full:
        def write(self, line):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    writer = TraceWriter(file)
    writer._file.close()
    writer._file = Full()
    with caplog.at_level(logging.WARNING, logger="graphcache"):
        for _ in range(3):
            writer.call("a", {})
        writer.close()
    assert len(caplog.records) == 1
    assert "recording the trace ended" in caplog.text


def test_a_disk_that_is_full_only_at_the_end_is_noticed_too(file, caplog):
    class Full:
        def write(self, line):
            return len(line)

        def close(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    writer = TraceWriter(file)
    writer._file.close()
    writer._file = Full()
    writer.call("a", {})
    with caplog.at_level(logging.WARNING, logger="graphcache"):
        writer.close()
    assert "No space left" in caplog.text


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), "1", None])
def test_costs_that_cannot_be_are_refused(file, seconds):
    with TraceWriter(file) as writer:
        writer.call("a", {})
        with pytest.raises(ConfigError, match="replay="):
            writer.costs("a", eager=1.0, replay=seconds, capture=1.0)
    assert read_trace(file).costs == {}


# ---- what is damaged is named


def test_a_whole_file_is_read(file):
    trace = read(file, HEAD, SIGNATURE, CALL, COSTS, CALL)
    assert trace == Trace("mlp8", [{"x": Input((8, 64), "float32")}], [0, 0], {0: Costs(0.0002, 0.00005, 0.005)})


def test_an_incomplete_last_line_is_left_out_and_noted(file):
    file.write_bytes(lines(HEAD, SIGNATURE, CALL) + b'{"call"')
    trace = read_trace(file)
    assert (trace.calls, trace.cut) == ([0], True)


@pytest.mark.parametrize(
    ("given", "line", "what"),
    [
        ([""], 1, "it cannot be read"),
        (["hello"], 1, "it cannot be read"),
        (["[1]"], 1, "it holds"),
        (["{}"], 1, "'format' is None"),
        ([HEAD.replace("graphcache trace", "manifest")], 1, "'format' is 'manifest'"),
        ([HEAD.replace("1", "2")], 1, "'version' is 2; expected 1"),
        ([HEAD.replace("1", "true")], 1, "'version' is True"),
        ([HEAD.replace("1", '"1"')], 1, "'version' is '1'"),
        ([HEAD.replace(', "module": "mlp8"', "")], 1, "the field 'module' is missing"),
        ([HEAD.replace('"mlp8"', "8")], 1, "'module' is 8; expected a text"),
        ([HEAD.replace("}", ', "more": 1}')], 1, "there is a field 'more'"),
        ([HEAD, CALL], 2, "'call' is 0"),
        ([HEAD, SIGNATURE, CALL, '{"call": 1}'], 4, "'call' is 1; expected a signature before it"),
        ([HEAD, SIGNATURE, '{"call": -1}'], 3, "'call' is -1"),
        ([HEAD, SIGNATURE, '{"call": true}'], 3, "'call' is True"),
        ([HEAD, SIGNATURE, '{"call": 0.0}'], 3, "'call' is 0.0"),
        ([HEAD, SIGNATURE, '{"call": 0, "n": 1}'], 3, "there is a field 'n'"),
        ([HEAD, SIGNATURE, SIGNATURE], 3, "'signature' is 0; expected 1, the next one"),
        ([HEAD, SIGNATURE.replace("0,", "1,", 1)], 2, "'signature' is 1"),
        ([HEAD, '{"signature": 0}'], 2, "the field 'inputs' is missing"),
        ([HEAD, '{"signature": 0, "inputs": []}'], 2, "'inputs' is []"),
        ([HEAD, '{"signature": 0, "inputs": {"x": [8, 64]}}'], 2, "'inputs' of 'x' is [8, 64]"),
        ([HEAD, SIGNATURE.replace("[8, 64]", "8")], 2, "'inputs' of 'x' has the shape 8"),
        ([HEAD, SIGNATURE.replace("64", "-1")], 2, "has the shape [8, -1]"),
        ([HEAD, SIGNATURE.replace("64", "true")], 2, "has the shape [8, True]"),
        ([HEAD, SIGNATURE.replace("64", str(2**63))], 2, "has the shape"),
        ([HEAD, SIGNATURE.replace('"float32"', "32")], 2, "has the dtype 32"),
        ([HEAD, SIGNATURE, COSTS.replace("0,", "1,", 1)], 3, "'costs' is 1"),
        ([HEAD, SIGNATURE, COSTS.replace("0.005", "-1")], 3, "'capture' is -1; expected a time"),
        ([HEAD, SIGNATURE, COSTS.replace("0.005", "NaN")], 3, "'capture' is nan"),
        ([HEAD, SIGNATURE, COSTS.replace("0.005", "1e999")], 3, "'capture' is inf"),
        ([HEAD, '{"other": 1}'], 2, "the fields are ['other']"),
        ([HEAD, "[" * 100_000], 2, "it cannot be read"),
        ([HEAD, "1" * 10_000], 2, "it cannot be read"),
        ([HEAD, " " * 2**20], 2, "it is longer than"),
    ],
)
def test_damage_is_named_by_line_and_field(file, given, line, what):
    with pytest.raises(TraceError) as damaged:
        read(file, *given)
    assert f"trace.jsonl, line {line}: " in str(damaged.value)
    assert what in str(damaged.value)
    assert str(damaged.value).endswith("Record the trace again, or mend that line")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\n", b"\x00" * 100 + b"\n", HEAD.encode()])
def test_what_is_no_trace_at_all_is_said_to_be_none(file, content):
    file.write_bytes(content)
    with pytest.raises(TraceError, match=r"line [01]: "):
        read_trace(file)


@given(st.data())
def test_a_trace_with_any_byte_changed_is_read_or_refused(tmp_path_factory, data):
    whole = lines(HEAD, SIGNATURE, CALL, COSTS, CALL)
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :]
    file = tmp_path_factory.mktemp("traces") / "a.jsonl"
    file.write_bytes(changed[: data.draw(st.integers(0, len(changed)))])
    try:
        trace = read_trace(file)
    except TraceError:
        return
    assert all(0 <= number < len(trace.signatures) for number in trace.calls)


def test_a_trace_cut_anywhere_is_a_shorter_trace(file):
    whole = lines(HEAD, SIGNATURE, CALL, CALL)
    for length in range(len(lines(HEAD)), len(whole) + 1):
        file.write_bytes(whole[:length])
        trace = read_trace(file)
        assert trace.calls == [0] * whole[:length].count(b"}\n", len(lines(HEAD, SIGNATURE)))
        assert trace.cut == (not whole[:length].endswith(b"\n"))


def test_the_shapes_of_one_input_call_by_call(file):
    second = json.dumps({"signature": 1, "inputs": {"x": {"shape": [1, 64], "dtype": "float32"}}})
    trace = read(file, HEAD, SIGNATURE, CALL, second, '{"call": 1}', CALL)
    assert shapes_of(trace, "x") == [(8, 64), (1, 64), (8, 64)]
    with pytest.raises(TraceError, match=r"signature 0 has no input 'y'; its inputs are \['x'\]"):
        shapes_of(trace, "y")
