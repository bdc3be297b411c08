"""What a folder of models holds; one that is wrong leaves the others as they are."""

import json
import os
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.errors import ServingError
from graphcache.serving.repository import NAME, Changes, Repository, Scan, changes


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "models"
    put(made / "policy" / "1" / "model.engine")
    put(made / "policy" / "10" / "model.gcache")
    put(made / "policy" / "2" / "model.plan")
    put(made / "detector.gcache")
    return made


def put(path, data=b"engine"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def scan(folder):
    return Repository(folder).scan()


def only_problem(folder):
    [(_, problem)] = scan(folder).problems.items()
    return str(problem)


def test_models_and_versions_by_number(folder):
    found = scan(str(folder))
    assert found.problems == {}
    assert list(found.models) == ["detector", "policy"]
    policy = found.models["policy"]
    assert [each.number for each in policy.versions] == [1, 2, 10]
    assert policy.newest.path == folder / "policy" / "10" / "model.gcache"
    [detector] = found.models["detector"].versions
    assert (detector.number, detector.path) == (1, folder / "detector.gcache")
    assert detector.state[0] == len(b"engine")


def test_what_is_no_model_is_left_alone(folder):
    put(folder / "README.md")
    put(folder / ".hidden" / "x")
    put(folder / ".graphcache-1.tmp")
    put(folder / "policy" / "notes.txt")
    put(folder / "policy" / "latest" / "model.engine")
    put(folder / "policy" / "007" / "model.engine")
    put(folder / "policy" / "1" / "README.md")
    found = scan(folder)
    assert (list(found.models), found.problems) == (["detector", "policy"], {})
    assert len(found.models["policy"].versions) == 3


def test_options_buckets_and_what_to_prepare(folder):
    config = {
        "options": {"capture": "prepared", "max_graphs": 4},
        "buckets": {"x": {"0": [1, 8], "1": {"sizes": "powers_of_two", "fill": -1}}},
        "prepare": [{"x": [1, 64]}, {"x": [8, 64], "n": []}],
    }
    put(folder / "policy" / "config.json", json.dumps(config).encode())
    found = scan(folder).models["policy"].config
    assert (found.graphs.capture, found.graphs.max_graphs) == ("prepared", 4)
    assert found.graphs.buckets == {"x": {0: [1, 8], 1: {"sizes": "powers_of_two", "fill": -1}}}
    assert found.prepare == ({"x": (1, 64)}, {"x": (8, 64), "n": ()})
    assert scan(folder).models["detector"].config.options == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"{", "is no JSON that could be read: Expecting"),
        (b"\xff", "is no JSON that could be read"),
        (b"[" * 100_000, "is nested too deeply"),
        (b" " * (2**20 + 1), "has more than 1048576 bytes"),
        ([], r"config\.json is \[\]; expected an object"),
        ({"option": {}}, "unknown field 'option'; the fields are options, buckets, prepare"),
        ({"options": 3}, "options is 3; expected an object"),
        ({"options": {"graphs": 3}}, "options: unknown option 'graphs'; they are capture, capture_in"),
        ({"options": {"buckets": {}}}, "options: unknown option 'buckets'"),
        ({"options": {"max_graphs": 0}}, "max_graphs=0: expected a whole number, 1 or more"),
        ({"buckets": [1]}, r"buckets is \[1\]; expected an object"),
        ({"buckets": {}}, "buckets={}: expected arguments with axes"),
        ({"buckets": {"x": {"first": [1]}}}, "buckets: x: axis 'first'; expected a number"),
        ({"buckets": {"x": {"0": [-1]}}}, r"buckets\['x'\]\[0\]"),
        ({"options": {"outputs": "view"}}, "the option outputs was removed in version 0.2: .*forward_into"),
        ({"prepare": {}}, r"prepare is \{\}; expected a list of objects"),
        ({"prepare": [3]}, r"prepare\[0\] is 3; expected an object"),
        ({"prepare": [{}]}, r"prepare\[0\] names no input"),
        ({"prepare": [{"x": 3}]}, r"prepare\[0\]: x is 3; expected a list of whole numbers"),
        ({"prepare": [{"x": [-1]}]}, r"prepare\[0\]: x is \[-1\]"),
        ({"prepare": [{"x": [True]}]}, r"prepare\[0\]: x is \[True\]"),
    ],
)
def test_configurations_that_are_wrong_name_the_file_and_the_field(folder, config, message):
    path = put(folder / "policy" / "config.json", config if isinstance(config, bytes) else json.dumps(config).encode())
    found = scan(folder)
    assert list(found.models) == ["detector"]
    with pytest.raises(ServingError, match=message) as raised:
        raise found.problems["policy"]
    assert str(path) in str(raised.value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(st.sampled_from(["options", "buckets", "prepare", "x", "0", "sizes"]), inner, max_size=3)
        ),
        max_leaves=6,
    )
)
def test_any_configuration_is_one_or_a_problem(tmp_path_factory, tree):
    folder = tmp_path_factory.mktemp("models")
    put(folder / "m" / "1" / "model.engine")
    put(folder / "m" / "config.json", json.dumps(tree).encode())
    found = scan(folder)
    assert list(found.models) + list(found.problems) == ["m"]
    shutil.rmtree(folder)


def test_a_model_without_versions_and_a_version_without_a_model(folder):
    (folder / "empty").mkdir()
    put(folder / "double" / "1" / "model.engine")
    put(folder / "double" / "1" / "model.gcache")
    (folder / "hollow" / "1").mkdir(parents=True)
    (folder / "folder" / "1" / "model.engine").mkdir(parents=True)
    problems = {name: str(each) for name, each in scan(folder).problems.items()}
    assert "has no version; expected a folder such as" in problems["empty"]
    assert "holds model.engine, model.gcache; expected one of model.engine" in problems["double"]
    assert "holds none; expected one of model.engine" in problems["hollow"]
    assert "is no regular file" in problems["folder"]
    assert set(problems) == {"empty", "double", "hollow", "folder"}


def test_two_models_of_one_name(folder):
    put(folder / "policy.engine")
    assert "there is another model 'policy'; remove one of them" in only_problem(folder)
    assert len(scan(folder).models["policy"].versions) == 3


@pytest.mark.parametrize("name", ["-x", "a b", "ümlaut", "x" * 129, "a%2e"])
def test_names_that_are_none(folder, name):
    put(folder / name / "1" / "model.engine")
    assert "is no name of a model" in only_problem(folder)


@given(st.text())
def test_no_name_leads_out_of_the_folder(name):
    if NAME.fullmatch(name):
        assert os.path.basename(name) == name
        assert name not in (".", "..")


@pytest.mark.parametrize("where", ["policy/3/model.engine", "policy/3", "other", "other.engine", "policy/config.json"])
def test_links_that_lead_out_of_the_folder(folder, tmp_path, where):
    outside = put(tmp_path / "outside" / "1" / "model.engine").parents[1]
    target = {"policy/3": outside / "1", "other": outside}.get(where, outside / "1" / "model.engine")
    (folder / where).parent.mkdir(exist_ok=True)
    (folder / where).symlink_to(target)
    assert f"leads out of the repository, to {target}; copy it there instead" in only_problem(folder)


def test_links_inside_the_folder_and_to_nowhere(folder, tmp_path):
    # As Kubernetes mounts what it may replace.
    put(folder / "..data" / "linked" / "1" / "model.engine")
    (folder / "linked").symlink_to("..data/linked")
    (folder / "round.engine").symlink_to("round.engine")
    (folder / "gone.engine").symlink_to("nothing")
    found = scan(folder)
    assert found.models["linked"].newest.number == 1
    assert {name: "leads nowhere" in str(each) for name, each in found.problems.items()} == {
        "round": True,
        "gone": True,
    }
    (tmp_path / "all").symlink_to(folder)
    assert list(scan(tmp_path / "all").models) == list(found.models)


@pytest.mark.parametrize("path", ["nothing", "models/detector.gcache", "a\0b"])
def test_what_is_no_folder(folder, path):
    with pytest.raises(ServingError, match=r"cannot be read: .*; expected a folder of models"):
        scan(folder.parent / path)


def test_what_came_went_and_changed(folder):
    before = scan(folder)
    assert changes(before, scan(folder)) == Changes()
    assert set(changes(Scan(), before).added) == {("policy", 1), ("policy", 2), ("policy", 10), ("detector", 1)}
    put(folder / "policy" / "11" / "model.engine")
    shutil.rmtree(folder / "policy" / "1")
    put(folder / "detector.gcache", b"another")
    assert changes(before, scan(folder)) == Changes((("detector", 1), ("policy", 11)), (("detector", 1), ("policy", 1)))


def test_another_configuration_is_another_model(folder):
    before = scan(folder)
    put(folder / "policy" / "config.json", b'{"options": {"max_graphs": 3}}')
    found = changes(before, scan(folder))
    assert found.added == found.removed == (("policy", 1), ("policy", 2), ("policy", 10))


def test_a_model_that_is_wrong_for_a_while_goes_on(folder):
    before = scan(folder)
    put(folder / "policy" / "config.json", b"{")
    broken = scan(folder)
    assert changes(before, broken) == Changes()
    shutil.rmtree(folder / "policy")
    assert set(changes(before, scan(folder)).removed) == {("policy", 1), ("policy", 2), ("policy", 10)}
