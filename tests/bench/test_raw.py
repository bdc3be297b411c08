import pytest
import torch

from bench import measure, networks, raw, systems
from bench.systems.graphed_callables import GraphedCallables
from tests.bench.fakes import CPU, bundle


class Workspaces:
    """What PyTorch keeps for cuBLAS: a workspace per stream, in the pool of the capture that found none."""

    def __init__(self):
        self.kept = {}
        self.pools = {}

    def clear(self):
        self.kept.clear()

    def product(self, stream, pool):
        """The pool of the workspace that a product on this stream uses."""
        return self.kept.setdefault(stream, pool)


@pytest.fixture
def workspaces(monkeypatch):
    made = Workspaces()
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", made.clear, raising=False)
    return made


def test_a_capture_uses_a_workspace_of_its_own_memory(workspaces):
    assert workspaces.product("side", "everybody's") == "everybody's"
    with raw.own_workspaces():
        assert workspaces.product("side", "the graph's") == "the graph's"
    with raw.own_workspaces():
        assert workspaces.product("side", "the next graph's") == "the next graph's"


def test_nothing_of_a_graph_is_left_for_others(workspaces):
    with pytest.raises(RuntimeError, match="not captured"), raw.own_workspaces():
        workspaces.product("side", "the graph's")
        raise RuntimeError("not captured")
    assert workspaces.product("side", "everybody's") == "everybody's"


def test_recording_a_module_captures_with_workspaces_of_its_own(workspaces, monkeypatch):
    """Its warm-up and its capture run on one stream, of which every product has the workspace that it finds."""
    pools = []

    class Stream:
        def wait_stream(self, other): ...
        def synchronize(self): ...

    class Capture:
        def __init__(self, graph, **options): ...

        def __enter__(self):
            monkeypatch.setattr(Capture, "pool", "the graph's")

        def __exit__(self, *_):
            monkeypatch.setattr(Capture, "pool", "everybody's")

        pool = "everybody's"

    class Scope(Capture):
        def __enter__(self): ...
        def __exit__(self, *_): ...

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", Scope)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda keep_graph: None)

    def module(x):
        pools.append(workspaces.product("side", Capture.pool))
        return x

    raw.RecordedModule(module, [torch.zeros(1)])
    assert pools == ["everybody's"] * 3 + ["the graph's"]


def test_graphed_callables_begin_without_the_workspaces_of_graphs_that_are_gone(workspaces, monkeypatch, tmp_path):
    workspaces.product("captures", "a graph's that is gone")
    monkeypatch.setattr(networks, "on_device", lambda name, device: networks.torch_network(name))
    GraphedCallables().load(bundle(tmp_path, "policy"), torch.device("cuda", 0), [1])
    assert workspaces.product("captures", "the first graph's") == "the first graph's"


def test_graphed_callables_need_no_cuda_to_be_made(tmp_path):
    call = GraphedCallables().load(bundle(tmp_path, "policy"), CPU, [1])
    assert callable(call)


def test_what_is_recorded_of_every_system_is_the_same():
    for make in systems.SYSTEMS.values():
        assert set(measure.about(make())) == {"kind", "rival", "also", "exact"}
