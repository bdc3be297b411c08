"""On a device: the doctor's finds are the reasons of real failed captures, graphs are drawn by the driver, times are
measured."""

import importlib
import json
import re
import sys

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import graphcache
from graphcache import Reason, debug
from graphcache.cli import main
from graphcache.observe import Collector, nvtx_ranges
from graphcache.observe.breaks import find_capture_breaks
from tests.dispatch.test_hit_cost import counted
from tests.helpers import Fn, frozen
from tests.observe import broken
from tests.observe.test_breaks import marked, named

READ = {Reason.HOST_READ}
SHAPE = {Reason.DATA_DEPENDENT, Reason.HOST_READ}
"""CUDA sees no more of an operation whose shape depends on values than that the host waits for how many there are."""

ALONE = {
    "item": (lambda m, x: x * x.max().item(), READ),
    "nonzero": (lambda m, x: x + torch.nonzero(x).shape[0], SHAPE),
    "mask": (lambda m, x: x + x[x > 0].sum(), SHAPE),
    "cpu": (lambda m, x: x + x.cpu().numel(), READ),
    "pageable": (lambda m, x: x + torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device), READ),
    "host index": (lambda m, x: x[:, torch.tensor([0, 2])] + 1, READ),
    "list index": (lambda m, x: x[:, [0, 2]] + 1, READ),
    "random": (lambda m, x: nn.functional.dropout(x, 0.5), {Reason.RANDOM}),
}


@pytest.mark.parametrize("name", ALONE)
def test_each_break_alone_is_the_reason_of_a_failed_capture(name):
    function, reasons = ALONE[name]
    x = torch.randn(6, 4, device="cuda")
    with torch.no_grad():
        [found] = find_capture_breaks(Fn(function), x)
        fast = graphcache.wrap(Fn(function), on_failure="eager")
        fast(x)
    info = fast.cache_info()
    assert info.captures == 0, "it was captured"
    [seen] = info.eager
    assert seen in reasons, str(fast.explain())
    assert found.reason in reasons
    fast.close()


def test_seven_breaks_with_their_lines():
    found = find_capture_breaks(broken.Seven().cuda(), torch.randn(6, 4, device="cuda"))
    assert named(found) == marked(broken.Seven)


def test_what_has_no_breaks_is_captured():
    module = frozen(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.Dropout())).cuda()
    x = torch.randn(6, 4, device="cuda")
    assert find_capture_breaks(module, x) == []
    with torch.no_grad(), graphcache.wrap(module) as fast:
        fast(x)
        assert fast.cache_info().captures == 1


def deep():
    return frozen(nn.Sequential(*(layer for _ in range(16) for layer in (nn.Linear(64, 64), nn.ReLU())))).cuda()


def test_the_driver_draws_the_graph_of_a_module(tmp_path):
    with torch.no_grad(), graphcache.wrap(deep()) as fast:
        x = torch.randn(8, 64, device="cuda")
        fast(x)
        text = debug.dump_dot(fast, tmp_path / "deep.dot", x).read_text()
        assert text.startswith("digraph")
        # A matrix product and a ReLU for each of sixteen layers.
        assert text.count("KERNEL") >= 32
        assert fast.graph_for(x).nodes >= 32
        assert torch.equal(fast(x), fast(x))


def test_the_driver_draws_the_graph_of_an_engine(load, tmp_path):
    engine = load("mlp8")
    x = torch.randn(8, 64, device="cuda")
    with graphcache.wrap(engine) as fast:
        fast(x)
        text = debug.dump_dot(fast, tmp_path / "mlp8.dot").read_text()
    assert text.startswith("digraph")
    assert "KERNEL" in text


def test_costs_are_those_of_the_device():
    with torch.no_grad(), graphcache.wrap(deep(), capture="worthwhile") as fast:
        x = torch.randn(8, 64, device="cuda")
        for _ in range(200):
            fast(x)
        before = fast.cache_info()
        assert before.captures == 1
        [found] = fast.explain(x).calls
        assert fast.cache_info() == before
        # 32 kernels: launching them one by one takes several times as long as one graph.
        assert found.costs.eager > 1.5 * found.costs.replay > 0
        assert 0 < found.costs.break_even < 100_000
        [other] = fast.explain(torch.randn(9, 64, device="cuda")).calls
        assert other.differs == ("`input` dim 0: 8 → 9",)


@pytest.mark.parametrize("package", [True, False])
def test_ranges(monkeypatch, package):
    """With nvtx, and with PyTorch's own where that is not installed."""
    if not package:
        monkeypatch.setitem(sys.modules, "nvtx", None)
    else:
        pytest.importorskip("nvtx")
    with torch.no_grad(), graphcache.wrap(deep()) as fast, nvtx_ranges(fast, hits=True):
        x = torch.randn(8, 64, device="cuda")
        assert torch.equal(fast(x), fast(x))
        assert fast.cache_info().hits == 1


def test_observing_adds_nothing_to_a_hit():
    pytest.importorskip("prometheus_client")
    module, x = deep(), torch.randn(8, 64, device="cuda")
    with torch.no_grad(), graphcache.wrap(module) as bare, graphcache.wrap(module) as watched:
        collector, ranges = Collector(watched), nvtx_ranges(watched)
        watched(x)
        watched.explain(x)
        list(collector.collect())
        assert counted(watched, x) == counted(bare, x)
        ranges.close()


def test_the_profiler_of_torch_may_watch_a_capture():
    with torch.no_grad(), graphcache.wrap(deep()) as fast:
        x = torch.randn(8, 64, device="cuda")
        with torch.profiler.profile(acc_events=True) as profile:
            fast(x)
            fast(x)
            torch.cuda.synchronize()
        assert fast.cache_info().captures + sum(fast.cache_info().eager.values()) == 1
        assert any(event.name == "graphcache: capture Sequential" for event in profile.events())


def test_the_verdict_of_a_launch_bound_network():
    target = ["graphcache.cli.network:Policy", "--shapes", "observation:8x48", "--device", "cuda"]
    found = CliRunner().invoke(main, ["run", *target, "--json"])
    assert found.exit_code == 0, found.stderr
    [row] = json.loads(found.stdout)["shapes"]
    assert row["graph"]["p50"] < row["eager"]["p50"]
    assert row["enqueue"]["p50"] <= row["eager"]["p50"]
    assert row["verdict"]["kind"] == "launch-bound"
    assert "graphs help by about" in row["verdict"]["text"]


def test_a_bench_is_ahead_in_the_end(tmp_path):
    target = ["graphcache.cli.network:Policy", "--shapes", "observation:1x48:4x48:8x48", "--device", "cuda"]
    path = tmp_path / "result.json"
    found = CliRunner().invoke(main, ["bench", *target, "--calls", "2000", "-o", str(path), "--json"])
    assert found.exit_code == 0, found.stderr
    told = json.loads(found.stdout)
    assert all(each["graph_us"] < each["eager_us"] for each in told["inputs"])


def test_an_engine_is_inspected(engine_bytes, tmp_path):
    path = tmp_path / "mlp8.engine"
    path.write_bytes(engine_bytes("mlp8"))
    found = CliRunner().invoke(main, ["inspect", str(path), "--json"])
    assert found.exit_code == 0, found.stderr
    told = json.loads(found.stdout)
    assert told["inputs"]
    assert told["inputs"][0]["profiles"]
    assert told["outputs"]
    assert told["complete"] is True
    found = CliRunner().invoke(main, ["inspect", str(path), "--json", "--layers", "--shapes", "x:8x64"])
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["capturable"]["yes"] is True
    assert isinstance(json.loads(found.stdout)["layers"], list)


def test_env_names_driver_and_device():
    told = json.loads(CliRunner().invoke(main, ["env", "--json"]).stdout)
    assert torch.cuda.get_device_name(0) in told["devices"][0]
    assert re.fullmatch(r"\d+\.\d+", told["driver_cuda"])
    module = importlib.import_module("graphcache.cli.machine")
    assert told["driver"] == module.driver_version()
