"""The backend of ``torch.compile``: answers are the module's, graphs are kept by shape and go with their trace."""

from __future__ import annotations

import gc
import tomllib
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache import CachedModule
from graphcache.errors import ConfigError
from graphcache.integrations import dynamo
from graphcache.integrations.dynamo import graphcache_backend
from tests.helpers import in_threads, same


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[CachedModule]:
    """What is wrapped meanwhile."""
    found: list[CachedModule] = []
    wrap = dynamo.wrap

    def noted(*args: Any, **options: Any) -> CachedModule:
        found.append(wrap(*args, **options))
        return found[-1]

    monkeypatch.setattr(dynamo, "wrap", noted)
    return found


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval().requires_grad_(False)


@pytest.mark.parametrize(
    "compiler", ["eager", "aot_eager", lambda traced, _: traced], ids=["eager", "aot_eager", "own"]
)
@pytest.mark.parametrize("dynamic", [None, False, True])
def test_answers_are_right_while_weights_change(
    compiler: Any, dynamic: bool | None, traces: list[CachedModule]
) -> None:
    module: Any = net()
    compiled = torch.compile(module, backend=graphcache_backend, dynamic=dynamic, options={"compiler": compiler})
    changes: list[Any] = [
        lambda: module[0].weight.mul_(2),
        lambda: setattr(module[0].weight, "data", module[0].weight * 2),
        lambda: setattr(module[0], "weight", nn.Parameter(module[0].weight * 2, requires_grad=False)),
        lambda: module[1].running_mean.add_(1),
        lambda: setattr(module[1], "running_mean", torch.ones(8)),
        lambda: module.load_state_dict(net().state_dict()),
    ]
    with torch.no_grad():
        for change in (lambda: None, *changes):
            change()
            for _ in range(2):
                for size in (2, 3, 5):
                    x = torch.randn(size, 4)
                    assert same(compiled(x), module(x))
    # With dynamic=True, Dynamo gives the numbers of a layer as tensors, and asks for their values in the trace.
    asks = dynamic is True and compiler != "aot_eager"
    assert (sum(each.cache_info().hits for each in traces) > 12) is not asks


def test_graph_breaks_and_other_branches_are_other_traces(traces: list[CachedModule]) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, double: bool) -> Tensor:
            x = x + 1
            if double:
                x = x * 2
            torch._dynamo.graph_break()
            return x - 3

    module = Net()
    compiled = torch.compile(module, backend=graphcache_backend)
    with torch.no_grad():
        for _ in range(4):
            for double in (False, True):
                x = torch.randn(3)
                assert same(compiled(x, double), module(x, double))
    assert len(traces) == 3
    assert all(each.cache_info().hits for each in traces)


def test_it_trains_without_graphs() -> None:
    module, twin = nn.Linear(4, 1), nn.Linear(4, 1)
    twin.load_state_dict(module.state_dict())
    compiled = torch.compile(module, backend=graphcache_backend)
    for _ in range(3):
        x = torch.randn(5, 4)
        for each in (compiled, twin):
            each(x).sum().backward()
        with torch.no_grad():
            for one, other in zip(module.parameters(), twin.parameters(), strict=True):
                assert same(one.grad, other.grad)
                one.sub_(one.grad)
                other.sub_(other.grad)


def test_options_are_those_of_wrap(traces: list[CachedModule]) -> None:
    compiled = torch.compile(net(), backend=graphcache_backend, options={"max_graphs": 2}, dynamic=True)
    with torch.no_grad():
        for size in (2, 3, 4, 5, 6):
            compiled(torch.randn(size, 4))
    assert all(each.cache_info().graphs <= 2 for each in traces)
    for options in ({"max_graph": 2}, {"compiler": "inductr"}, {"compiler": "graphcache"}):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"max_graph|inductr|graphcache") as raised:
            torch.compile(net(), backend=graphcache_backend, options=options)(torch.randn(2, 4))
        assert ConfigError.__name__ in str(raised.value) or isinstance(raised.value, ConfigError)


def test_graphs_go_with_their_traces(traces: list[CachedModule]) -> None:
    compiled = torch.compile(net(), backend=graphcache_backend)
    with torch.no_grad():
        compiled(torch.randn(2, 4))
    gone = weakref.ref(traces.pop())
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


def test_torch_finds_it_by_its_name() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    path = project["project"]["entry-points"]["torch_dynamo_backends"]["graphcache"]
    assert path == f"{graphcache_backend.__module__}:{graphcache_backend.__qualname__}"


def test_modules_that_share_a_trace_answer_with_their_own_weights_in_threads() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.linear(x))

    blocks = [Block(), Block()]
    compiled = [torch.compile(each, backend=graphcache_backend) for each in blocks]
    with torch.inference_mode():
        for each in compiled:
            each(torch.ones(2, 4))

    def serve(index: int) -> None:
        generator = torch.Generator().manual_seed(index)
        with torch.inference_mode():
            for _ in range(1000):
                x = torch.randn(2, 4, generator=generator)
                assert torch.equal(compiled[index](x), blocks[index](x))

    in_threads(serve, 2)
