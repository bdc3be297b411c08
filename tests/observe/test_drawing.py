"""Graphs as files: every operation, input and output is in them, and they are well-formed."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphcache
from graphcache import debug
from graphcache.errors import ClosedError, ConfigError, CudaError
from graphcache.observe.drawing import dot_of
from tests.helpers import Fn, mlp


def edges(text):
    return set(re.findall(r"^  (\w+) -> (\w+);$", text, re.M))


def test_a_graph_with_branches(tmp_path):
    fast = graphcache.wrap(Fn(lambda m, x, y: (x.relu() + y.sin(), [x * 2])))
    fast(torch.ones(3), torch.ones(3))
    path = debug.dump_dot(fast, tmp_path / "graph.dot", torch.zeros(3), torch.zeros(3))
    text = path.read_text()
    assert re.findall(r'label="(aten[^"]*)"', text) == [
        "aten.relu.default",
        "aten.sin.default",
        "aten.add.Tensor",
        "aten.mul.Tensor",
    ]
    assert edges(text) == {
        ("input0", "step0"),
        ("input1", "step1"),
        ("step0", "step2"),
        ("step1", "step2"),
        ("input0", "step3"),
        ("step2", "output0"),
        ("step3", "output1"),
    }


def test_without_a_call_the_graph_used_last(tmp_path):
    fast = graphcache.wrap(nn.ReLU())
    for size in (2, 3, 2):
        fast(torch.zeros(size))
    assert 'label="input 0: float32[2]"' in debug.dump_dot(fast, tmp_path / "a.dot").read_text()


def test_operations_with_several_results_and_in_place(tmp_path):
    fast = graphcache.wrap(Fn(lambda m, x: torch.cat(list((x + 1).split(2))).add_(x)))
    fast(torch.arange(4.0))
    text = debug.dump_dot(fast, tmp_path / "a.dot").read_text()
    nodes = set(re.findall(r"^  (\w+) \[", text, re.M))
    assert {end for edge in edges(text) for end in edge} <= nodes
    assert len(re.findall(r"^  step\d+ \[", text, re.M)) == fast.graph_for().nodes


@given(st.lists(st.sampled_from(["relu", "sin", "exp"]), min_size=1, max_size=8))
def test_a_chain_has_as_many_nodes_as_operations(names):
    def forward(m, x):
        for name in names:
            x = getattr(x, name)()
        return x

    fast = graphcache.wrap(Fn(forward), verify=False)
    fast(torch.zeros(2))
    text = dot_of(fast.graph_for())
    assert len(edges(text)) == len(names) + 1
    assert text.count("{") == text.count("}") == 1


def test_what_has_no_graph_is_refused(tmp_path):
    fast = graphcache.wrap(mlp())
    for args, message in (
        ((), r"has no graph yet; call it, or prepare\(\) it"),
        ((torch.zeros(2, 4),), r"has no graph for this call; explain\(\) tells why"),
        ((object(),), r"has no graph for this call; explain\(\) tells why"),
    ):
        with pytest.raises(ConfigError, match=message):
            debug.dump_dot(fast, tmp_path / "a.dot", *args)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="expected a wrapped module"):
        debug.dump_dot(mlp(), tmp_path / "a.dot")


def test_a_place_that_cannot_be_written(tmp_path):
    fast = graphcache.wrap(nn.ReLU())
    fast(torch.zeros(2))
    with pytest.raises(OSError, match="nowhere"):
        debug.dump_dot(fast, tmp_path / "nowhere" / "a.dot")


def test_a_closed_graph_and_what_is_none():
    fast = graphcache.wrap(nn.ReLU())
    fast(torch.zeros(2))
    graph = fast.graph_for()
    fast.clear()
    with pytest.raises(ClosedError, match="the graph was closed"):
        dot_of(graph)
    with pytest.raises(CudaError, match="a graph of type str cannot be drawn"):
        dot_of("graph")
