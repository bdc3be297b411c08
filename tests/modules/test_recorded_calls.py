"""A trace of all calls while it is recorded, and not a word of it afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import graphcache
from bench import policy
from graphcache.cache.trace import read_trace, shapes_of
from graphcache.errors import ConfigError, TraceError
from graphcache.modules.recorded_calls import named_inputs
from tests.graphs.fake_driver import Torch
from tests.helpers import Fn, in_threads, mlp, same
from tests.modules.test_engine_module import fake, load, rows  # noqa: F401 - the fixture is used by its name
from tests.modules.test_hit_cost import calls_of


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=20))
def test_every_call_is_recorded_in_order(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    path = tmp_path_factory.mktemp("traces") / "calls.jsonl"
    fast = graphcache.wrap(mlp(), max_graphs=2)
    with fast.record_trace(path):
        for size in sizes:
            x = torch.ones(size, 4)
            assert same(fast(x), fast.module(x))
    trace = read_trace(path)
    assert [shape[0] for shape in shapes_of(trace, "input")] == sizes
    assert (trace.module, len(trace.signatures), trace.cut) == ("Sequential", len(set(sizes)), False)


def test_a_hit_costs_afterwards_what_it_did_before(tmp_path: Path) -> None:
    fast = graphcache.wrap(Fn(lambda _, x: x + 1))
    x = torch.ones(3)
    for _ in range(3):
        fast(x)
    before = calls_of(lambda: fast(x))
    with fast.record_trace(tmp_path / "calls.jsonl") as recording:
        assert calls_of(lambda: fast(x)) > before
        fast.forward_into(torch.empty(3), x)
    assert calls_of(lambda: fast(x)) == before
    recording.close()
    assert len(read_trace(tmp_path / "calls.jsonl").calls) == 2


def test_costs_are_written_as_far_as_they_are_known_and_a_simulation_takes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = graphcache.wrap(mlp(), capture="worthwhile")
    with fast.record_trace(tmp_path / "calls.jsonl"):
        for _ in range(3):
            fast(torch.ones(2, 4))
            fast(torch.ones(3, 4))
        fast._misses.admission.learn(next(iter(fast._misses.admission.known())), eager=3e-3, replay=1e-3, capture=0.1)
    trace = read_trace(tmp_path / "calls.jsonl")
    assert list(trace.costs) == [0]
    assert trace.costs[0].replay == 1e-3
    (tmp_path / "costs.json").write_text(json.dumps({"m": {"eager_us": 100, "replay_us": 10, "capture_ms": 1}}))
    options = ["--out", str(tmp_path), "--costs", str(tmp_path / "costs.json")]
    assert policy.main([*options, "--recorded", str(tmp_path / "calls.jsonl")]) == 0
    assert "calls.jsonl" in capsys.readouterr().out


def test_an_engine_s_inputs_have_its_names(fake: Torch, tmp_path: Path) -> None:  # noqa: F811
    fast = graphcache.wrap(load("affine"))
    with torch.no_grad(), fast.record_trace(tmp_path / "calls.jsonl"):
        fast(rows(fake, 2))
        fast(x=rows(fake, 3))
        fast(x=rows(fake, 2))
        with pytest.raises(graphcache.errors.InputCountError):
            fast(z=rows(fake, 2))
    trace = read_trace(tmp_path / "calls.jsonl")
    assert trace.calls == [0, 1, 0]
    assert trace.signatures == [{"x": ((2, 4), "float32")}, {"x": ((3, 4), "float32")}]


def test_names_of_places_inside_arguments() -> None:
    def two(first: Any, *rest: Any, **named: Any) -> None: ...

    module = Fn(lambda _: None)
    module.forward = two  # type: ignore[method-assign]
    x = torch.zeros(2, dtype=torch.int64)
    found = named_inputs(module, ([x, 3], x), {"b": (x,)})
    assert list(found) == ["first[0]", "rest[0]", "named['b'][0]"]
    assert found["rest[0]"] == ((2,), "int64")
    assert list(named_inputs(torch.nn.ReLU(), (x, x), {})) == ["args[0]", "args[1]"], "which it will refuse"


def test_what_no_signature_describes_is_answered_and_not_recorded(tmp_path: Path) -> None:
    fast = graphcache.wrap(Fn(lambda _, x, thing: x * 2))
    with fast.record_trace(tmp_path / "calls.jsonl"):
        assert torch.equal(fast(torch.ones(2), object()), torch.full((2,), 2.0))
    assert read_trace(tmp_path / "calls.jsonl").calls == []


def test_threads_record_into_one_file(tmp_path: Path) -> None:
    fast = graphcache.wrap(mlp())
    with fast.record_trace(tmp_path / "calls.jsonl", max_calls=30):
        in_threads(lambda index: [fast(torch.ones(index + 1, 4)) for _ in range(10)])
    assert len(read_trace(tmp_path / "calls.jsonl").calls) == 30


def test_a_file_that_is_there_and_bad_counts(tmp_path: Path) -> None:
    fast = graphcache.wrap(mlp())
    (tmp_path / "calls.jsonl").write_text("mine")
    with pytest.raises(TraceError, match="exists; a trace never writes over a file"):
        fast.record_trace(tmp_path / "calls.jsonl")
    for bad in (0, -1, True, 2.0, "9"):
        with pytest.raises(ConfigError, match=r"^max_calls="):
            fast.record_trace(tmp_path / "new.jsonl", max_calls=bad)
    assert not fast._forward_pre_hooks
    assert (tmp_path / "calls.jsonl").read_text() == "mine"
    assert not (tmp_path / "new.jsonl").exists()
