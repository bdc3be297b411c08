"""Results are written and read back, and what is damaged is refused with its field."""

import contextlib
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.errors import ResultError
from graphcache.observe import result
from graphcache.observe.result import OUTCOMES, Inputs, Measured, Result, read_result

times = st.floats(0, 1e6).map(lambda value: round(value, 3))


@st.composite
def results(draw):
    inputs = draw(st.lists(st.builds(Inputs, st.text(max_size=20), st.integers(0, 2**40)), min_size=1, max_size=4))
    calls = st.builds(Measured, st.integers(0, len(inputs) - 1), st.sampled_from(OUTCOMES), times, times)
    texts = st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=3)
    return Result(
        draw(st.text(max_size=20)), draw(texts), tuple(inputs), tuple(draw(st.lists(calls, max_size=20))), draw(texts)
    )


@given(result=results())
def test_what_is_written_is_read(result, tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "r.json"
    result.save(path)
    assert read_result(path) == result
    assert [each.name for each in path.parent.iterdir()] == ["r.json"]


@given(results())
def test_the_point_of_no_return(result):
    """By the definition: from there on, the sum is never behind again."""
    ahead, sums = 0.0, []
    for call in result.calls:
        ahead += call.eager_us - call.us
        sums.append(ahead)
    expected = next((index + 1 for index in range(len(sums)) if min(sums[index:]) >= 0), None)
    assert result.break_even() == expected


def test_outcomes_by_inputs():
    calls = (Measured(1, "capture", 9, 1), Measured(1, "hit", 1, 2), Measured(1, "hit", 1, 2))
    assert Result("x", inputs=(Inputs("a"), Inputs("b")), calls=calls).outcomes() == {
        0: {},
        1: {"capture": 1, "hit": 2},
    }


GOOD = Result("x", {"device": "CPU"}, (Inputs("a", 1),), (Measured(0, "hit", 1.0, 2.0),), {}).tree()


def changed(*path_and_value):
    *path, value = path_and_value
    tree = json.loads(json.dumps(GOOD))
    at = tree
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    return tree


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (changed("format", "other"), r"format is 'other'; expected Literal\['graphcache result'\]"),
        (changed("version", 2), r"version is 2; expected Literal\[1\]"),
        (changed("target", 3), "target is 3; expected str"),
        (changed("environment", {"a": 1}), r"environment\['a'\] is 1; expected str"),
        (changed("reasons", []), r"reasons is \[\]; expected dict"),
        (changed("inputs", None), "inputs is None; expected list"),
        (changed("calls", {}), r"calls is \{\}; expected list"),
        (changed("inputs", 0, "label", None), r"inputs\[0\].label is None; expected str"),
        (changed("inputs", 0, "nbytes", -1), r"inputs\[0\].nbytes is -1; expected int"),
        (changed("calls", 0, [0, "hit", 1.0]), r"calls\[0\] is .*; expected a list of four"),
        (changed("calls", 0, 0, 1), r"calls\[0\]\[0\] is 1; expected one of 1 inputs"),
        (changed("calls", 0, 0, True), r"calls\[0\]\[0\] is True; expected one of 1 inputs"),
        (changed("calls", 0, 1, "miss"), r"calls\[0\]\[1\] is 'miss'; expected hit, capture or a reason"),
        (changed("calls", 0, 1, []), r"calls\[0\]\[1\] is \[\]; expected hit, capture or a reason"),
        (changed("calls", 0, 2, "1"), r"calls\[0\]\[2\] is '1'; expected microseconds"),
        (changed("calls", 0, 3, float("nan")), r"calls\[0\]\[3\] is nan; expected microseconds"),
        (changed("calls", 0, 3, -1.0), r"calls\[0\]\[3\] is -1.0; expected microseconds"),
    ],
)
def test_what_is_damaged_is_refused_with_its_field(tree, message, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(ResultError, match=message):
        read_result(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(name=st.sampled_from(sorted(GOOD)), value=json_values)
def test_any_other_field_is_read_or_refused(name, value, tmp_path_factory):
    path = tmp_path_factory.mktemp("odd") / "r.json"
    path.write_text(json.dumps(changed(name, value)))
    with contextlib.suppress(ResultError):
        assert read_result(path).tree().keys() == GOOD.keys()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000])
def test_what_is_no_json(content, tmp_path):
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(ResultError, match=r"r\.json"):
        read_result(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ResultError, match=r"cannot be read \(no regular file\)"):
        read_result(tmp_path)
    with pytest.raises(ResultError, match="No such file"):
        read_result(str(tmp_path / "none.json"))
    with pytest.raises(ResultError):
        read_result("\0")
    with pytest.raises(OSError, match="nowhere"):
        Result("x").save(tmp_path / "nowhere" / "r.json")


def test_no_more_is_read_than_a_result_may_hold(tmp_path, monkeypatch):
    Result("x").save(tmp_path / "r.json")
    monkeypatch.setattr(result, "_MOST_BYTES", 10)
    with pytest.raises(ResultError, match="larger than 10 bytes"):
        read_result(tmp_path / "r.json")
    before = (tmp_path / "r.json").read_bytes()
    with pytest.raises(ResultError, match="expected at most 10, which is what is read"):
        Result("y").save(tmp_path / "r.json")
    assert (tmp_path / "r.json").read_bytes() == before
    for endless in ("/dev/zero", tmp_path / "pipe"):
        if endless != "/dev/zero":
            os.mkfifo(endless)
        with pytest.raises(ResultError, match="no regular file"):
            read_result(endless)
