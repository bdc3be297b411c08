"""Packages: written by ``save``, read by ``load``; those of version 0.1.0 still load."""

import copy
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

import graphcache
from graphcache import CachedModule, EngineModule
from graphcache.errors import PackageError
from tests.helpers import mlp, replays

STORED = Path(__file__).parents[1] / "persist"
"""Files that version 0.1.0 wrote: a package, a pickle and a state_dict of the engine ``affine``."""


def answers(engine, rows):
    return torch.equal(engine(rows(2)), rows(2) * 3 + 1)


def test_an_engine_with_its_options_and_calls(load, rows, tmp_path):
    fast = graphcache.wrap(load("affine"), max_graphs=5)
    fast(rows(2))
    fast.save(tmp_path / "m.gcache")
    again = graphcache.load(tmp_path / "m.gcache", prepare=True)
    assert isinstance(again, CachedModule)
    assert again.config.max_graphs == 5
    assert answers(again, rows)
    assert again.cache_info().hits == 1, "its calls were captured when it was loaded"


def test_a_bare_engine(load, rows, tmp_path):
    load("affine").save(tmp_path / "m.gcache", onnx=b"model")
    again = graphcache.load(tmp_path / "m.gcache")
    assert type(again) is EngineModule
    assert answers(again, rows)


def test_a_model_is_loaded_into_one_of_its_make(tmp_path):
    first, second = mlp(), mlp()
    with graphcache.wrap(first, max_graphs=5) as fast:
        fast(torch.ones(1, 4))
        fast.save(tmp_path / "m.gcache")
    again = graphcache.load(tmp_path / "m.gcache", into=second, prepare=True)
    assert replays(again, torch.ones(1, 4))
    assert torch.equal(again(torch.ones(1, 4)), first(torch.ones(1, 4)))


def test_nothing_in_a_package_is_pickled_and_its_header_says_what_it_is(load, tmp_path):
    load("affine").save(tmp_path / "m.gcache")
    with zipfile.ZipFile(tmp_path / "m.gcache") as archive:
        assert archive.namelist() == ["header.json", "engines/0.engine"]
        header = json.loads(archive.read("header.json"))
    assert (header["format"], header["version"]) == ("graphcache.package", 1)


def test_a_damaged_package_is_refused(load, tmp_path):
    path = tmp_path / "m.gcache"
    load("affine").save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(PackageError):
        graphcache.load(path)


def test_a_package_of_version_0_1_0(fake, rows):
    again = graphcache.load(STORED / "version-1.gcache", prepare=True)
    assert again.config.max_graphs == 7
    for _ in range(3):
        assert answers(again, rows)
    assert again.cache_info().hits == 2


def test_a_pickle_and_a_state_dict_of_version_0_1_0(fake, rows):
    again = pickle.loads((STORED / "version-0.1.pickle").read_bytes())
    assert again.config.max_graphs == 7
    assert answers(again, rows)
    empty = EngineModule()
    empty.load_state_dict(torch.load(STORED / "version-0.1-state.pt", weights_only=True)["state"])
    assert answers(empty, rows)


def test_copies_and_pickles_capture_graphs_of_their_own(load, rows):
    fast = graphcache.wrap(load("affine"), max_graphs=5)
    fast(rows(2))
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert (again.config.max_graphs, again.cache_info().graphs) == (5, 0)
        assert answers(again, rows)
