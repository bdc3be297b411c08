"""Dispatch modes that Dynamo leaves alone without having been imported."""

import torch

from graphcache.graphs.operations import DispatchMode


class Counting(DispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def operation(self, func, args, kwargs):
        self.seen.append(func)
        return func(*args, **kwargs)


def test_a_mode_sees_every_operation():
    with Counting() as mode:
        torch.ones(2).sin()
    assert [func.overloadpacket for func in mode.seen] == [torch.ops.aten.ones, torch.ops.aten.sin]


def test_dynamo_compiles_nothing_of_a_mode():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def twice(x):
        return (x * 2).sin()

    x = torch.ones(3)
    with Counting() as mode:
        answer = torch.compile(twice, backend=backend)(x)
    assert torch.equal(answer, twice(x))
    assert len(mode.seen) == 2
    # The function itself, and nothing of the mode.
    [graph] = graphs
    assert [node.op for node in graph.graph.nodes].count("call_function") + [
        node.op for node in graph.graph.nodes
    ].count("call_method") == 2


def test_dynamo_compiles_what_is_called_afterwards():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    with Counting():
        torch.ones(2).sin()
    torch.compile(lambda x: x.cos(), backend=backend)(torch.ones(2))
    assert len(graphs) == 1
