from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from graphcache.cache.manifest import VERSION, Manifest, ManifestProblem
from graphcache.cache.sealed import MOST_BYTES, write_sealed
from graphcache.cache.served import ManifestEntry
from graphcache.cache.spec import example_of, spec_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphcache.errors import ConfigError
from tests.cache.test_served import entries
from tests.effort import share
from tests.helpers import same

HERE = {"engine": "4f2a", "device": "NVIDIA H100", "driver": "580.1", "torch": "2.6"}
ENTRY = ManifestEntry(spec_of((torch.zeros(8, 4), True), {"scale": 0.5}), hits=7, eager_seconds=0.25)
on_files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def body_of(**fields: Any) -> dict[str, Any]:
    return {"environment": HERE, "entries": [ENTRY.tree]} | fields


def loaded(path: Path, body: Any, **options: Any) -> Manifest:
    """What is read of a file with a right seal."""
    write_sealed(path, "graphcache.manifest", VERSION, body)
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
    args, kwargs = example_of(entry.spec, "cpu")
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
        (body_of(entries=[ENTRY.tree | {"hits": -1}]), "entries[0]", "hits=-1: expected a whole number"),
        (body_of(entries=[ENTRY.tree | {"hits": 1e300}]), "entries[0]", "hits=1e+300: expected a whole number"),
        (body_of(entries=[ENTRY.tree | {"part": None}]), "entries[0]", "part=None: expected text"),
        (body_of(entries=[ENTRY.tree | {"eager_seconds": []}]), "entries[0]", "eager_seconds=[]: expected seconds"),
        (body_of(entries=[ENTRY.tree | {"call": 1}]), "entries[0]", "call is 1; expected 'args', 'kwargs'"),
    ],
)
def test_what_a_right_seal_holds_is_not_believed_either(tmp_path, body, field, text):
    problem = only_problem(loaded(tmp_path / "m.json", body))
    assert problem.field == field
    assert text in problem.text


def test_a_bad_entry_leaves_the_others_and_many_are_counted(tmp_path):
    listed = [5] * 20 + [ENTRY.tree] + [ENTRY.tree | {"hits": -1}] * 20
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
        assert ManifestEntry.of_tree(entry.tree) == entry
        example_of(entry.spec, "meta")


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
    listed = [ManifestEntry(spec_of(("x" * 60_000, hits), {}), hits) for hits in range(1, 90)]
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
from graphcache.cache.manifest import Manifest
from graphcache.cache.served import ManifestEntry
from graphcache.cache.spec import spec_of

path, name = sys.argv[1], int(sys.argv[2])
# As many as nobody else writes, so that parts of two files make no manifest.
entries = [ManifestEntry(spec_of((torch.zeros(n),), {}), hits=100 * name + n) for n in range(20 * name)]
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
