"""Manifests: what is saved is loaded, and whatever else a file holds is reported."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphcache.errors import ConfigError, Reason
from graphcache.keys.call_spec import CallSpec
from graphcache.persist.manifest import MOST_BYTES, VERSION, Manifest, ManifestEntry, ManifestProblem
from graphcache.persist.saved_call import example
from tests.effort import share
from tests.helpers import same

SPECS = [CallSpec.of((torch.zeros(size),), {}) for size in range(1, 6)]
seconds = st.none() | st.floats(0, 100, allow_nan=False)
entries = st.builds(
    ManifestEntry,
    spec=st.sampled_from(SPECS),
    hits=st.integers(0, 50),
    part=st.sampled_from(["", "a"]),
    nbytes=st.integers(0, 200),
    eager_seconds=seconds,
    replay_seconds=seconds,
    capture_seconds=seconds,
)

HERE = {"engine": "4f2a", "device": "NVIDIA H100", "driver": "580.1", "torch": "2.6"}
ENTRY = ManifestEntry(CallSpec.of((torch.zeros(8, 4), True), {"scale": 0.5}), hits=7, eager_seconds=0.25)
on_files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def body_of(**fields: Any) -> dict[str, Any]:
    return {"environment": HERE, "entries": [ENTRY.json]} | fields


def sealed(body: Any, **head: Any) -> bytes:
    """A file with a right digest."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    kind, version = head.get("format", "graphcache.manifest"), head.get("version", VERSION)
    digest = hashlib.sha256(f"{kind}\n{version}\n".encode() + content).hexdigest()
    top = json.dumps({"digest": digest, "format": kind, "version": version} | head)
    return top[:-1].encode() + b',"body":' + content + b"}\n"


def loaded(path: Path, body: Any, **options: Any) -> Manifest:
    """What is read of a file with a right seal."""
    path.write_bytes(sealed(body))
    return Manifest.load(path, **options)


def only_problem(manifest: Manifest) -> ManifestProblem:
    assert manifest.entries == ()
    [problem] = manifest.problems
    return problem


@on_files
@given(st.lists(entries, max_size=6), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_what_is_saved_is_loaded(tmp_path, listed, environment):
    manifest = Manifest(environment, listed)
    assert manifest.save(tmp_path / "m.json") == 0
    assert Manifest.load(tmp_path / "m.json", expect=environment) == manifest
    assert Manifest.load(str(tmp_path / "m.json")) == manifest


def test_an_entry_becomes_the_call_again(tmp_path):
    Manifest(HERE, [ENTRY]).save(tmp_path / "m.json")
    [entry] = Manifest.load(tmp_path / "m.json", expect=HERE).entries
    args, kwargs = example(entry.spec, "cpu")
    assert same(args, (torch.zeros(8, 4), True))
    assert kwargs == {"scale": 0.5}


@given(st.lists(entries, max_size=8))
def test_entries_of_one_call_are_put_together_hottest_first(listed):
    found = Manifest(HERE, listed).entries
    assert len({(each.part, each.spec) for each in found}) == len(found)
    assert [each.hits for each in found] == sorted((each.hits for each in found), reverse=True)
    assert sum(each.hits for each in found) == sum(each.hits for each in listed)


@given(st.lists(entries, max_size=5), st.lists(entries, max_size=5))
def test_merging_is_as_if_all_had_been_recorded_in_one_place(left, right):
    one, other = Manifest(HERE, left), Manifest(HERE, right)
    assert one.merge(other) == other.merge(one) == Manifest(HERE, [*left, *right])
    assert one.merge(Manifest(HERE)) == one


def test_manifests_of_two_environments_are_not_merged():
    with pytest.raises(ConfigError, match=r"^environment\['driver'\]: '580.1' here, '570.2' in the other"):
        Manifest(HERE).merge(Manifest(HERE | {"driver": "570.2"}))


def test_a_foreign_environment_is_reported_name_by_name_and_ignored(tmp_path):
    path = tmp_path / "m.json"
    Manifest(HERE, [ENTRY]).save(path)
    here = {"engine": "4f2a", "device": "NVIDIA H200", "driver": "580.1", "cuda": "13.0"}
    found = Manifest.load(path, expect=here)
    assert found.entries == ()
    assert found.environment == here
    assert [str(problem) for problem in found.problems] == [
        f"{path}: environment['cuda']: not given, but here it is '13.0'",
        f"{path}: environment['device']: 'NVIDIA H100', but here it is 'NVIDIA H200'",
        f"{path}: environment['torch']: '2.6', but here it is not given",
    ]
    assert Manifest.load(path).entries == (ENTRY,)


def test_what_was_ignored_can_be_merged_into_and_saved(tmp_path):
    path = tmp_path / "m.json"
    path.write_bytes(b"no manifest")
    mine = Manifest(HERE, [ENTRY])
    Manifest.load(path, expect=HERE).merge(mine).save(path)
    assert Manifest.load(path, expect=HERE) == mine


def test_a_file_that_is_not_there_is_reported(tmp_path):
    problem = only_problem(Manifest.load(tmp_path / "none.json", expect=HERE))
    assert str(problem) == f"{tmp_path / 'none.json'}: No such file or directory"


@pytest.mark.parametrize(
    ("body", "field", "text"),
    [
        (5, "body", "5 in place of an environment and a list of entries"),
        ({}, "body", "{} in place of"),
        (body_of(more=1), "body", "in place of an environment and a list of entries"),
        (body_of(entries={}), "body", "in place of an environment and a list of entries"),
        (body_of(entries=[0] * 20_001), "entries", "20001 of them; expected at most 20000"),
        (body_of(environment=[]), "environment", "environment=[]: expected names with text"),
        (body_of(environment={"a": 1}), "environment", "environment['a']=1: expected text of at most"),
        (body_of(environment={"a": "x" * 1001}), "environment", "expected text of at most 1000 characters"),
        (body_of(environment={str(each): "" for each in range(65)}), "environment", "at most 64"),
        (body_of(entries=[5]), "entries[0]", "an entry is 5; expected the fields call, hits"),
        (body_of(entries=[ENTRY.json | {"hits": -1}]), "entries[0]", "hits=-1: expected a whole number"),
        (body_of(entries=[ENTRY.json | {"hits": 1e300}]), "entries[0]", "hits=1e+300: expected a whole number"),
        (body_of(entries=[ENTRY.json | {"part": None}]), "entries[0]", "part=None: expected text"),
        (body_of(entries=[ENTRY.json | {"eager_seconds": []}]), "entries[0]", "eager_seconds=[]: expected seconds"),
        (body_of(entries=[ENTRY.json | {"call": 1}]), "entries[0]", "1 is no call"),
    ],
)
def test_what_a_right_seal_holds_is_not_believed_either(tmp_path, body, field, text):
    problem = only_problem(loaded(tmp_path / "m.json", body))
    assert problem.field == field
    assert text in problem.text


def test_a_bad_entry_leaves_the_others_and_many_are_counted(tmp_path):
    listed = [5] * 20 + [ENTRY.json] + [ENTRY.json | {"hits": -1}] * 20
    found = loaded(tmp_path / "m.json", body_of(entries=listed))
    assert found.entries == (ENTRY,)
    assert [problem.field for problem in found.problems] == [*(f"entries[{index}]" for index in range(16)), "entries"]
    assert found.problems[-1].text == "24 more that cannot be used"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def nodes(tree: Any) -> Any:
    for key in range(len(tree)) if isinstance(tree, list) else list(tree):
        yield tree, key
        if isinstance(tree[key], (list, dict)):
            yield from nodes(tree[key])


@on_files
@given(st.data())
def test_whatever_stands_at_whatever_place_it_is_loaded_or_reported(tmp_path, data):
    body = json.loads(json.dumps(body_of()))
    holder, key = data.draw(st.sampled_from(list(nodes(body))))
    holder[key] = data.draw(json_values)
    found = loaded(tmp_path / "m.json", body, expect=HERE)
    assert found.entries or found.problems or body["entries"] == []
    for entry in found.entries:
        assert ManifestEntry.of_json(entry.json) == entry
        example(entry.spec, "meta")


@on_files
@given(st.binary(max_size=300))
def test_whatever_bytes_are_a_manifest_they_are_reported(tmp_path, content):
    (tmp_path / "m.json").write_bytes(content)
    only_problem(Manifest.load(tmp_path / "m.json", expect=HERE))


@on_files
@given(st.integers(0, 2_000), st.integers(0, 7))
def test_a_flipped_bit_is_never_taken_for_another_manifest(tmp_path, place, bit):
    path = tmp_path / "m.json"
    Manifest(HERE, [ENTRY]).save(path)
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)
    found = Manifest.load(path, expect=HERE)
    assert found.entries in ((), (ENTRY,))
    assert bool(found.entries) != bool(found.problems)


def test_more_than_a_file_holds_leaves_out_the_coldest(tmp_path):
    listed = [ManifestEntry(CallSpec.of(("x" * 60_000, hits), {}), hits) for hits in range(1, 90)]
    manifest = Manifest(HERE, listed)
    left_out = manifest.save(tmp_path / "m.json")
    assert 0 < left_out < 89
    assert (tmp_path / "m.json").stat().st_size <= MOST_BYTES
    assert Manifest.load(tmp_path / "m.json", expect=HERE).entries == manifest.entries[:-left_out]


@pytest.mark.parametrize("path", [None, 5, b"m.json", "", "a\0b", object()])
def test_a_path_that_is_none_is_refused(path: Any):
    for use in (Manifest.load, Manifest(HERE).save):
        with pytest.raises(ConfigError, match=r"^path=.*: expected the path of a file"):
            use(path)


@pytest.mark.parametrize("environment", [None, [], {"a": 1}, {1: "a"}, "ab"])
def test_an_environment_that_is_none_is_refused(tmp_path, environment: Any):
    with pytest.raises(ConfigError, match=r"^environment"):
        Manifest(environment)
    if environment is not None:
        with pytest.raises(ConfigError, match=r"^expect"):
            Manifest.load(tmp_path / "m.json", expect=environment)


def test_entries_that_are_none_are_refused():
    with pytest.raises(ConfigError, match=r"^entries\[1\]=5: expected a ManifestEntry"):
        Manifest(HERE, [ENTRY, 5])  # type: ignore[list-item]


WRITER = """
import sys
import torch
from graphcache.keys.call_spec import CallSpec
from graphcache.persist.manifest import Manifest, ManifestEntry

path, name = sys.argv[1], int(sys.argv[2])
# As many as nobody else writes, so that parts of two files make no manifest.
entries = [ManifestEntry(CallSpec.of((torch.zeros(n),), {}), hits=100 * name + n) for n in range(20 * name)]
manifest = Manifest({"who": "all"}, entries)
manifest.save(path)
print("ready", flush=True)
while True:
    manifest.save(path)
"""


def wholly_of_one(found: Manifest) -> int:
    """Whose manifest it is, of which nothing may be missing."""
    assert found.problems == ()
    who = len(found.entries) // 20
    assert [entry.hits for entry in found.entries] == [100 * who + n for n in reversed(range(20 * who))]
    return who


def test_processes_that_save_at_once_and_are_killed_leave_a_whole_manifest_at_every_moment(tmp_path):
    path = tmp_path / "m.json"
    commands = [[sys.executable, "-c", WRITER, str(path), name] for name in ("1", "2")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for _ in range(share(200, 40)):
            assert wholly_of_one(Manifest.load(path, expect={"who": "all"})) in (1, 2)
        assert [process.poll() for process in processes] == [None, None]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert wholly_of_one(Manifest.load(path)) in (1, 2)
    Manifest({"who": "all"}).save(path)
    assert Manifest.load(path).entries == ()


# ---- files


@on_files
@given(st.data())
def test_a_changed_file_is_damaged_or_says_the_same(tmp_path, data):
    path = tmp_path / "m.json"
    Manifest(HERE, [ENTRY]).save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
        place = data.draw(st.integers(0, max(len(content) - 1, 0)))
        if kind == "flip" and content:
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[place:]
        elif kind == "insert":
            content[place:place] = data.draw(st.binary(max_size=5))
        else:
            content[place:place] = content[: data.draw(st.integers(0, 40))]
    path.write_bytes(content)
    found = Manifest.load(path, expect=HERE)
    assert found.entries in ((), (ENTRY,))
    assert bool(found.entries) != bool(found.problems)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not as it was written: JSONDecodeError"),
        (b"\xff", "not as it was written: UnicodeDecodeError"),
        (b"[" * 100_000, "not as it was written: RecursionError"),
        (b'{"a":' * 100_000, "not as it was written: RecursionError"),
        (sealed(b"[" * 100_000), "not as it was written: RecursionError"),
        (sealed(b"9" * 100_000), "not as it was written: ValueError"),
        (sealed(b"[NaN]"), "body: [nan] in place of an environment and a list of entries"),
        (b"[]", "format: a list in place of 'graphcache.manifest'"),
        (b"{}", "format: nothing in place of 'graphcache.manifest'"),
        (b'{"format": "other"}', "format: 'other' in place of 'graphcache.manifest'"),
        (sealed({}, format="other"), "format: 'other' in place of 'graphcache.manifest'"),
        (b'{"format": "graphcache.manifest"}', "version: nothing; this is a reader of version 2"),
        (sealed({}, version=1), "version: 1; this is a reader of version 2, so write the manifest again"),
        (sealed({}, version=True), "version: True; this is a reader"),
        (b'{"format": "graphcache.manifest", "version": 2}', "digest: not that of the body"),
        (sealed({}, digest=5), "digest: not that of the body: something changed after it was written"),
        (sealed({}, more=5), "digest: not that of the body"),
        (sealed({})[:-1], "digest: not that of the body"),
        (b" " * (MOST_BYTES + 1), f"more than {MOST_BYTES} bytes"),
    ],
)
def test_damage_is_named(tmp_path, content, message):
    (tmp_path / "m.json").write_bytes(content)
    assert message in str(only_problem(Manifest.load(tmp_path / "m.json", expect=HERE)))


def test_a_body_that_is_deeper_than_can_be_read_is_reported(tmp_path):
    for depth in range(800, 1000, 7):
        body = json.dumps(body_of(entries=[ENTRY.json | {"call": "deep"}]))
        deep = "[" * depth + "]" * depth
        (tmp_path / "m.json").write_bytes(sealed(body.replace('"deep"', deep).encode()))
        only_problem(Manifest.load(tmp_path / "m.json"))


@pytest.mark.full(every=3)
@pytest.mark.parametrize("part", [b"[],", b"{},", b"1,", b'"a",', b"1.5,", b'{"a":[]},'])
def test_the_largest_file_takes_a_bounded_memory(tmp_path, part):
    content = sealed(b"[" + part * (MOST_BYTES // len(part) - 100) + b"1]")
    (tmp_path / "m.json").write_bytes(content)
    tracemalloc.start()
    try:
        only_problem(Manifest.load(tmp_path / "m.json"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 * MOST_BYTES


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_things_that_are_no_files(tmp_path):
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    said = {
        name[:9]: str(only_problem(Manifest.load(tmp_path / name))) for name in ("directory", "pipe", "loop", "x" * 300)
    }
    assert "no regular file" in said["directory"]
    assert "no regular file" in said["pipe"]
    assert "symbolic links" in said["loop"]
    assert said["x" * 9].endswith("File name too long")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files cannot be counted here")
def test_no_descriptor_is_left_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        Manifest(HERE).save(tmp_path / "a")
        Manifest.load(tmp_path / "a")
        Manifest.load(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_others_may_read_what_is_written_as_they_may_any_file(tmp_path):
    (tmp_path / "plain").write_text("", encoding="ascii")
    Manifest(HERE).save(tmp_path / "m.json")
    assert stat.S_IMODE((tmp_path / "m.json").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "m.json"
    Manifest(HERE, [ENTRY]).save(path)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(ConfigError, match="cannot be written: No space left on device; what was there"):
            Manifest(HERE).save(path)
    assert Manifest.load(path).entries == (ENTRY,)
    assert os.listdir(tmp_path) == ["m.json"]


def test_the_data_of_a_package_is_that_of_a_file(tmp_path):
    manifest = Manifest(HERE, [ENTRY])
    manifest.save(tmp_path / "m.json")
    assert manifest.data == (tmp_path / "m.json").read_bytes()
    assert Manifest.of_data(manifest.data, "m") == manifest
    [problem] = Manifest.of_data(b" " * (MOST_BYTES + 1), "m").problems
    assert problem.text == f"more than {MOST_BYTES} bytes, which is the most that is read"


# ---- entries


@given(entries)
def test_an_entry_is_the_same_after_a_file(entry):
    assert ManifestEntry.of_json(json.loads(json.dumps(entry.json))) == entry


@given(entries, entries, entries)
def test_together_is_the_same_in_whatever_order(one, two, three):
    three_of_one = [replace(each, spec=SPECS[0], part="") for each in (one, two, three)]
    found = {a.merge(b).merge(c) for a, b, c in permutations(three_of_one)}
    assert len(found) == 1
    [all_three] = found
    assert all_three.hits == one.hits + two.hits + three.hits
    assert all_three.nbytes == max(one.nbytes, two.nbytes, three.nbytes)
    measured = [each.eager_seconds for each in (one, two, three) if each.eager_seconds is not None]
    assert all_three.eager_seconds == min(measured, default=None)


def test_hits_stop_where_a_file_could_not_hold_them():
    most = ManifestEntry(SPECS[0], 2**63 - 1)
    assert most.merge(most) == most


def test_what_replays_saved():
    assert ManifestEntry(SPECS[0], 10, eager_seconds=0.5, replay_seconds=0.25).saved_seconds == 2.5
    assert ManifestEntry(SPECS[0], 10, eager_seconds=0.25, replay_seconds=0.5).saved_seconds == 0
    assert ManifestEntry(SPECS[0], 10, eager_seconds=0.25).saved_seconds == 0


def test_the_hottest_is_the_one_seen_most_then_the_one_that_saves_most():
    often, dear = ManifestEntry(SPECS[0], 9), ManifestEntry(SPECS[1], 5, eager_seconds=2, replay_seconds=1)
    cheap, again = ManifestEntry(SPECS[2], 5), ManifestEntry(SPECS[2], 5, part="a")
    for order in permutations([often, dear, cheap, again]):
        assert sorted(order, key=lambda entry: entry.heat) == [often, dear, cheap, again]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"spec": "x"}, r"^spec='x': expected a CallSpec"),
        ({"spec": CallSpec.of((Reason.GRAD,), {})}, r"^spec=.*: expected a CallSpec that a file can hold: .*Reason"),
        ({"hits": -1}, r"^hits=-1: expected a whole number from 0 to"),
        ({"hits": True}, r"^hits=True:"),
        ({"hits": 2**63}, r"^hits=9223372036854775808:"),
        ({"hits": 1.0}, r"^hits=1.0:"),
        ({"nbytes": None}, r"^nbytes=None:"),
        ({"part": 5}, r"^part=5: expected text of at most 1000 characters"),
        ({"part": "a" * 1001}, r"^part='aaa"),
        ({"eager_seconds": -0.5}, r"^eager_seconds=-0.5: expected seconds from 0 to 1e9, or None"),
        ({"replay_seconds": float("nan")}, r"^replay_seconds=nan:"),
        ({"capture_seconds": float("inf")}, r"^capture_seconds=inf:"),
        ({"capture_seconds": "1"}, r"^capture_seconds='1':"),
        ({"capture_seconds": False}, r"^capture_seconds=False:"),
    ],
)
def test_numbers_that_are_none_are_refused_by_name(fields: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        ManifestEntry(**{"spec": SPECS[0], "hits": 1} | fields)


@pytest.mark.parametrize("tree", [None, [], {}, {"call": 1}])
def test_a_tree_that_is_no_entry_is_refused(tree):
    with pytest.raises(ValueError, match=r"^an entry is .*; expected the fields call, hits, part, nbytes"):
        ManifestEntry.of_json(tree)
