"""Higher-order operators, and compiled functions, under the dispatch modes of this package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.map import map as map_over
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import flex_attention

from graphcache.graphs.capture import compiled_runs_eagerly
from graphcache.graphs.operations import DispatchMode, HostQuestions, is_higher_order

X = torch.arange(8.0).view(2, 4)
Q = torch.randn(1, 2, 16, 8, generator=torch.Generator().manual_seed(0))


class Seen(DispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        if is_higher_order(func):
            self.names.append(func._name)
            return self.higher_order(func, args, kwargs)
        self.names.append(func._opname)
        return func(*args, **kwargs)


def branches(x: Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (x,))


def loop(x: Tensor) -> Any:
    return while_loop(lambda i, t: i < 3, lambda i, t: (i + 1, t.sin()), (torch.tensor(0), x))[1]


OPERATORS: dict[str, tuple[Callable[[Tensor], Any], Tensor, str]] = {
    "cond": (branches, X, "sin"),
    "while_loop": (loop, X, "sin"),
    "map_impl": (lambda x: map_over(lambda t: t.sin(), x), X, "sin"),
    "scan": (lambda x: scan(lambda c, t: (c + t, (c + t).sin()), x[0] * 0, x)[1], X, "sin"),
    "flex_attention": (lambda q: flex_attention(q, q, q, score_mod=lambda s, b, h, i, j: s.sin()), Q, "sin"),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_an_operator_and_what_it_calls_are_seen_and_nothing_is_disturbed(name, mode):
    function, x, inner = OPERATORS[name]
    torch._dynamo.reset()
    with mode():
        with Seen() as seen:
            answer = function(x)
        assert name in seen.names
        assert inner in seen.names
        assert torch.equal(function(x), answer)
        assert torch.equal(torch.compile(function, backend="eager", fullgraph=True)(x), answer)


def test_associative_scan_arrives_in_its_parts():
    function = lambda x: associative_scan(lambda a, b: a + b, x, 0, combine_mode="generic")  # noqa: E731
    with Seen() as seen:
        answer = function(X)
    assert "add" in seen.names
    assert torch.equal(answer, function(X))
    assert torch.equal(answer, X.cumsum(0))


def test_the_branch_is_taken_by_the_value_each_time():
    with Seen():
        assert torch.equal(branches(X), X.sin())
        assert torch.equal(branches(-X), (-X).cos())


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_functions_run_compiled_under_a_mode(fullgraph):
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: F.relu(x) + 1, backend=backend, fullgraph=fullgraph)
    for _ in range(2):
        with Seen() as seen:
            assert torch.equal(compiled(X), F.relu(X) + 1)
        assert "relu" in seen.names
    assert torch.equal(compiled(X), F.relu(X) + 1)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_operators_run_as_python_under_a_function_mode(name):
    function, x, _ = OPERATORS[name]
    torch._dynamo.reset()
    with torch.no_grad():
        with compiled_runs_eagerly(), HostQuestions([x]), Seen() as seen:
            answer = function(x)
        assert name in seen.names
        assert torch.equal(function(x), answer)


def test_compiled_functions_run_as_python_where_that_is_asked_for():
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: x.sin() * 2, backend=backend, fullgraph=True)
    with compiled_runs_eagerly():
        assert torch.equal(compiled(X), X.sin() * 2)
    assert not graphs
    compiled(X)
    assert len(graphs) == 1


def test_the_stance_is_set_back_when_the_last_thread_leaves():
    compiled_once = []

    def backend(graph: Any, _: Any) -> Any:
        compiled_once.append(graph)
        return graph.forward

    # The first to enter leaves before the second, as threads do.
    first, second = compiled_runs_eagerly(), compiled_runs_eagerly()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    torch.compile(lambda x: x - 3, backend=backend)(X)
    assert not compiled_once
    second.__exit__(None, None, None)
    torch.compile(lambda x: x - 3, backend=backend)(X)
    assert len(compiled_once) == 1


def test_dynamo_is_imported_by_the_first_operator_and_not_before(script):
    script(
        """
import sys
import torch
from graphcache.graphs.capture import compiled_runs_eagerly
from tests.graphs.test_higher_order import Seen

X = torch.ones(3)
with compiled_runs_eagerly(), Seen():
    X.sin()
assert "torch._dynamo" not in sys.modules
assert sys.getprofile() is None
with compiled_runs_eagerly(), Seen() as seen:
    assert torch.equal(torch.cond(X.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (X,)), X.sin())
assert "cond" in seen.names and "torch._dynamo" in sys.modules
assert sys.getprofile() is None
assert torch.equal(torch.compile(lambda x: x + 1, backend="eager", fullgraph=True)(X), X + 1)
"""
    )


@pytest.fixture
def script():
    import subprocess

    def run(text: str) -> None:
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr

    return run
