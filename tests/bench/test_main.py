"""The suite, on the host: rows in processes that are simulated, over systems that need no device."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from bench import __main__ as command
from bench import calls, measure, models, networks, record, row, store, systems
from tests.bench.fakes import CPU, Fake, bundle, right


def exact(name: str, function: Any = right, **more: Any) -> Any:
    return lambda: Fake(name, function, exact=True, **more)


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    """Systems that run on the host, and rows that are measured in this process. What is started is noted."""
    made = {
        "raw": exact("raw", timed=lambda inputs: lambda: right(inputs[0])),
        "graphcache": exact("graphcache"),
        "absent": lambda: Fake("absent", reason="not installed: absent"),
    }
    started: list[list[str]] = []

    def run(arguments):
        started.append(list(arguments))
        names = arguments[arguments.index("--systems") + 1 : arguments.index("--calls")]
        if "dies" in names[:1]:
            return -11, None
        net = bundle(tmp_path, "net")
        sizes = calls.spread(net, int(arguments[arguments.index("--shapes") + 1]))
        found: dict[str, Any] = {}
        work = measure.Work(net, sizes, calls.pool(net, sizes, 2, CPU), CPU, calls=50)
        alive = names[: names.index("dies")] if "dies" in names else names
        row.measure_row(work, alive, found, lambda: None)
        systems_row = {"engine": "net", "facts": {"kind": "rows"}, "sizes": sizes, "systems": found}
        return 0, {"environment": {"device": "fake"}, "row": systems_row}

    bundle(tmp_path, "net")
    monkeypatch.setattr(systems, "SYSTEMS", made)
    monkeypatch.setattr(command, "_run", run)
    monkeypatch.setattr(record, "require_cuda", lambda what: CPU)
    return made, started


def run(tmp_path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = command.main(["--engines", str(tmp_path), "--out", str(tmp_path / "out"), "--shapes", "1", "2", *arguments])
    return code, json.loads((tmp_path / "out" / "suite.json").read_text())


def test_a_run_prints_tables_and_writes_what_it_found(tmp_path, fakes, capsys):
    code, payload = run(tmp_path)
    out = capsys.readouterr().out
    assert code == 0
    assert "not measured: absent (net x 1): not installed: absent" in out
    assert "graphcache" in out
    assert (payload["complete"], payload["failures"]) == (True, [])
    assert payload["environment"] == {"device": "fake"}
    assert [each["sizes"] for each in payload["results"]] == [[2], [1, 8]]
    assert set(payload["results"][0]["systems"]) == {"raw", "graphcache", "absent"}
    assert command.main(["--table", str(tmp_path / "out" / "suite.json")]) == 0
    table = capsys.readouterr().out
    assert "| `graphcache` |" in table
    assert "one shape" in table


def test_a_model_without_an_engine_is_measured_as_a_torch_network_alone(tmp_path, fakes):
    made, started = fakes
    made["raw-torch"] = exact("raw-torch", kind="torch", timed=lambda inputs: lambda: right(inputs[0]))
    made["torch"] = lambda: Fake("torch", kind="torch")
    bundle(tmp_path, engine=b"")
    code, payload = run(tmp_path, "--shapes", "1")
    assert code == 0
    assert len(started) == 1
    assert set(payload["results"][0]["systems"]) == {"raw-torch", "torch"}


def test_wrong_answers_of_graphcache_fail_the_run(tmp_path, fakes, capsys):
    fakes[0]["graphcache"] = exact("graphcache", lambda x: right(x) + 1)
    code, payload = run(tmp_path)
    assert code == 1
    assert "answers were wrong before timing" in payload["failures"][0]


def test_a_process_that_dies_takes_one_system_with_it(tmp_path, fakes):
    made, started = fakes
    absent = made.pop("absent")
    made |= {"dies": exact("dies"), "absent": absent}
    code, payload = run(tmp_path, "--shapes", "1")
    assert code == 1
    [result] = payload["results"]
    assert result["systems"]["dies"]["reason"] == "the process was ended by signal 11 and recorded nothing"
    assert "total_us" in result["systems"]["graphcache"]
    assert result["systems"]["absent"]["reason"] == "not installed: absent"
    assert len(started) == 3


def test_a_device_that_is_lost_ends_the_row(tmp_path, fakes, monkeypatch):
    monkeypatch.setattr(measure, "device_lost", lambda device: True)
    net, found = bundle(tmp_path, "net"), {}
    work = measure.Work(net, [2], calls.pool(net, [2], 2, CPU), CPU, calls=50)
    row.measure_row(work, ["absent", "graphcache"], found, lambda: None)
    assert set(found) == {"raw", "absent"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --engines DIR to measure, or --table FILE"),
        (["--engines", "nowhere"], "no engines in nowhere"),
        (["--engines", "nowhere", "--systems", "none"], "unknown systems: none; there are raw,"),
        (["--engines", "nowhere", "--shapes", "0"], "1 or more"),
    ],
)
def test_bad_arguments_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as refused:
        command.main(arguments)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", '{"benchmark": "soak"}'])
def test_what_is_no_result_of_the_suite_is_refused(text, tmp_path):
    file = tmp_path / "result.json"
    file.write_text(text)
    with pytest.raises(SystemExit, match=r"result\.json"):
        command.main(["--table", str(file)])


def test_every_model_that_readme_builds_is_there():
    engines = {"mlp8", "policy", "minilm", "vit", "mobilenet"}
    assert set(models.MODELS) == engines | {"mlp16", "parts300", "resnet18"}


@pytest.mark.parametrize("name", ["mlp16", "parts300"])
def test_a_torch_network_is_saved_with_answers_and_no_engine(name, tmp_path):
    assert models.main(["--out", str(tmp_path), name]) == 0
    made = store.load(tmp_path, name)
    assert not made.has_engine
    network = networks.torch_network(name)
    for case in made.cases(3, 2):
        assert torch.allclose(network(*case.inputs), case.answer, rtol=1e-4, atol=1e-5)
    assert sum(1 for _ in network.parameters()) == {"mlp16": 16, "parts300": 300}[name]
