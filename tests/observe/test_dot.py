"""The graph of an engine is drawn by the driver, as it was captured, and nothing is left of it."""

import tempfile

import pytest
import torch

import graphcache
from graphcache import debug
from graphcache.errors import ClosedError, CudaError
from graphcache.graphs import driver
from graphcache.observe.drawing import dot_of
from tests.engine_modules import fake, load, rows  # noqa: F401 - the fixture is used by its name
from tests.helpers import graphs_of


@pytest.fixture
def fast(fake):  # noqa: F811
    made = graphcache.wrap(load("affine"))
    with torch.no_grad(), fake.on(fake.new_stream()):
        made(rows(fake, 2, 0))
    return made


def test_the_driver_draws_every_node(fast, tmp_path):
    [entry] = graphs_of(fast).entries.values()
    path = debug.dump_dot(fast, tmp_path / "affine.dot")
    text = path.read_text()
    assert text.startswith("digraph")
    assert text.count("KERNEL") == entry.graph.graph.nodes > 0
    assert [each.name for each in tmp_path.iterdir()] == ["affine.dot"]


def test_a_closed_graph_is_not_asked_for(fast):
    [entry] = list(graphs_of(fast).entries.values())
    fast.clear()
    with pytest.raises(ClosedError, match="the graph was closed"):
        dot_of(entry.graph.graph)


def test_a_driver_that_refuses_leaves_nothing_behind(fast, monkeypatch, tmp_path):
    def fail(name, *args):
        raise CudaError(f"{name} failed")

    [entry] = graphs_of(fast).entries.values()
    with monkeypatch.context() as patch, pytest.raises(CudaError, match="cuGraphDebugDotPrint failed"):
        patch.setattr(tempfile, "tempdir", str(tmp_path))
        patch.setattr(driver, "call", fail)
        dot_of(entry.graph.graph)
    assert list(tmp_path.iterdir()) == []
