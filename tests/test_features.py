"""What the core calls without importing it."""

import pytest

import graphcache
from graphcache.errors import ExtraNotFoundError, GraphCacheError
from graphcache.features import Features
from graphcache.features import features as here
from graphcache.modules import portable
from tests.helpers import mlp


def test_import_graphcache_fills_in_all_of_them():
    assert set(Features.__annotations__) <= set(vars(here))


def test_what_is_absent_says_so(monkeypatch, tmp_path):
    from graphcache.modules import cached_module as cached

    monkeypatch.setattr(cached, "features", Features())
    fast = graphcache.wrap(mlp())
    with pytest.raises(ExtraNotFoundError, match="the feature save is not there; expected that"):
        fast.save(tmp_path / "m.gcache", manifest=False)
    with pytest.raises(ExtraNotFoundError, match="the feature manifest_of is not there; expected that"):
        fast.save_manifest(tmp_path / "m.json")
    assert issubclass(ExtraNotFoundError, GraphCacheError)
    assert portable.features is here
