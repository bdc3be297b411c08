"""``graphcache demo``: its account adds up, its answers are compared, its network is what the machine allows."""

import json

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from graphcache import CachedModule, Reason
from graphcache.cli import main
from graphcache.cli.network import BATCHES
from tests.effort import share


def demo(*args):
    return CliRunner().invoke(main, ["demo", *map(str, args)])


def account(result):
    return result["hits"]["calls"], result["captures"]["calls"], sum(each["calls"] for each in result["eager"].values())


def test_the_table():
    found = demo("--calls", 60)
    assert (found.exit_code, found.stderr) == (0, "")
    assert "\x1b" not in found.stdout
    for expected in (
        "torch " + torch.__version__,
        "60 calls of 12 batch sizes, seed 0",
        "p50 µs",
        "hit: answered by a graph",
        "the same inputs, eagerly",
        "capture: first call of a shape",
        "All 60 answers equal eager execution",
    ):
        assert expected in found.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA the call is refused for another reason")
def test_what_no_graph_can_answer_shows_with_its_reason():
    found = demo("--calls", 60)
    reason = Reason.DATA_DEPENDENT
    assert f"ran eagerly: {reason.value}" in found.stdout
    assert f"{reason.value}: {reason.sentence} (at aten." in found.stdout
    assert f"To change that: {reason.remedy}." in found.stdout
    assert "Inside those calls the network itself was a hit" in found.stdout


@settings(max_examples=share(8, 3))
@given(st.integers(1, 80), st.integers(0, 2**40), st.one_of(st.none(), st.integers(1, 15)))
def test_every_call_is_accounted_for_within_the_budget(calls, seed, max_graphs):
    found = demo(
        "--json", "--calls", calls, "--seed", seed, *([] if max_graphs is None else ["--max-graphs", max_graphs])
    )
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert sum(account(result)) == calls
    assert result["hits"]["calls"] == result["hits_run_eagerly"]["calls"]
    assert result["graphs"] <= min(max_graphs or 32, len(BATCHES))
    assert result["captures"]["calls"] == result["graphs"] + result["evictions"] or calls < 10
    if result["hits"]["calls"]:
        assert 0 < result["hits"]["p50"] <= result["hits"]["p90"] <= result["hits"]["p99"]


def test_the_same_seed_is_the_same_traffic():
    first, second = (json.loads(demo("--json", "--calls", 25, "--seed", 5).stdout) for _ in range(2))
    assert account(first) == account(second)


def test_a_wrong_answer_ends_with_3(monkeypatch):
    right = CachedModule.__call__
    monkeypatch.setattr(CachedModule, "__call__", lambda self, *args: right(self, *args) + 1)
    found = demo("--calls", 20)
    assert found.exit_code == 3
    assert "Error: 20 of 20 answers differ from eager execution. The first: call 1, batch" in found.stderr
    assert "answers equal eager" not in found.stdout
    as_json = demo("--calls", 20, "--json")
    assert as_json.exit_code == 3
    assert json.loads(as_json.stdout)["differences"] == 20


def test_switched_off_by_the_environment_it_says_so(monkeypatch):
    monkeypatch.setenv("GRAPHCACHE_DISABLE", "1")
    found = demo("--calls", 20)
    assert found.exit_code == 0
    assert "ran eagerly: disabled" in found.stdout
