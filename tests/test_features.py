"""What the core calls without importing it."""

import graphcache
from graphcache.features import Features, features


def test_import_graphcache_fills_in_all_of_them():
    assert set(Features.__annotations__) <= set(vars(features))
    assert features.graph_backend is graphcache.CachedModule
