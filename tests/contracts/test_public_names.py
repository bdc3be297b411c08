"""Contracts are tested through public names: a test that needs another one describes the code, not the contract."""

import ast
from pathlib import Path
from types import ModuleType

import pytest

import graphcache

PUBLIC = {"graphcache", "graphcache.runtime", "graphcache.debug", "graphcache.observe", "graphcache.errors"}
FILES = sorted(Path(__file__).parent.glob("test_*.py"))


def other_names(source):
    """What in some source is not public, with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "graphcache" and alias.name not in PUBLIC:
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "graphcache":
            if node.module not in PUBLIC:
                yield node.lineno, node.module
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("_"))
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if node.attr.startswith("_") and not node.attr.startswith("__"):
                yield node.lineno, name
            # Folders and files of the package are attributes of it too.
            is_folder = isinstance(getattr(graphcache, node.attr, None), ModuleType)
            if is_folder and name == f"graphcache.{node.attr}" and name not in PUBLIC:
                yield node.lineno, name


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_a_contract_names_public_names_only(path):
    assert list(other_names(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "from graphcache.cache.graph_cache import GraphCache",
        "import graphcache.dispatch.dispatcher",
        "from graphcache import _save",
        "fast._graphcache",
        "graphcache.config.modes",
    ],
)
def test_other_names_are_found(source):
    assert len(list(other_names(source))) == 1
