import argparse
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as command
from bench import limits, models, peers, record, suite
from tests.bench.fakes import CPU, Fake, bundle, right


def options(tmp_path, **given):
    known = {"out": tmp_path / "out", "name": "suite", "gate": False, "max_seconds": None, "default_stream": False}
    known["apart"] = False
    known["engines"] = tmp_path
    return argparse.Namespace(**{**known, **given})


@pytest.fixture
def floors(monkeypatch):
    """Fakes in the place of both floors."""

    def floor(name, kind):
        return lambda: Fake(name, kind=kind, exact=True, timed=lambda inputs: lambda: right(inputs[0]))

    monkeypatch.setitem(peers.SYSTEMS, "raw", floor("raw", "engine"))
    monkeypatch.setitem(peers.SYSTEMS, "raw-torch", floor("raw-torch", "torch"))


def run(tmp_path, given=None, **systems):
    makers = {name.replace("_", "-"): lambda made=made, name=name: made(name) for name, made in systems.items()}
    plan = suite.Plan([bundle(tmp_path, "net")], (1, 2), makers, CPU, calls=50)
    code = command.run(plan, {"device": "fake"}, {"calls": 50}, options(tmp_path, **(given or {})))
    return code, json.loads((tmp_path / "out" / f"{(given or {}).get('name', 'suite')}.json").read_text())


def exact(function=right, **more):
    return lambda name: Fake(name.replace("_", "-"), function, exact=True, **more)


def test_a_run_prints_a_table_and_writes_what_it_found(tmp_path, floors, capsys):
    absent = exact(reason="not installed: aitune")
    code, payload = run(tmp_path, {"name": "mine"}, graphcache=exact(), aitune=absent)
    out, _ = capsys.readouterr()
    assert code == 0
    assert "graphcache" in out
    assert "not measured: aitune (net x 1, net x 2): not installed: aitune" in out
    assert out.splitlines()[-1] == f"written to {tmp_path / 'out' / 'mine.json'}"
    assert payload["complete"] is True
    assert payload["environment"] == {"device": "fake"}
    assert payload["engines"]["net"]["engine_sha256"]
    assert [each["sizes"] for each in payload["results"]] == [[2], [1, 8]]
    assert payload["failures"] == []
    assert payload["limits_not_met"] == limits.shortfalls(payload["results"])


def test_wrong_answers_of_graphcache_fail_the_run(tmp_path, floors, capsys):
    code, payload = run(tmp_path, {"gate": True}, graphcache=exact(lambda x: right(x) + 1))
    out, _ = capsys.readouterr()
    assert code == 1
    assert len(payload["failures"]) == 2
    assert "FAILED: net, 1 shapes, graphcache: 16 of 16 answers" not in out
    assert "FAILED: net, 1 shapes, graphcache: 8 of 8 answers were wrong before timing" in out


def test_wrong_answers_of_a_peer_do_not(tmp_path, floors):
    code, payload = run(tmp_path, aitune=lambda name: Fake(name, lambda x: right(x) + 1, rival="graphcache"))
    assert code == 0
    assert "were wrong" in payload["results"][0]["systems"]["aitune"]["reason"]


@pytest.mark.parametrize(("gate", "code"), [(True, 3), (False, 0)])
def test_the_gate_decides_what_a_missed_limit_means(tmp_path, floors, capsys, gate, code):
    found, payload = run(tmp_path, {"gate": gate}, graphcache=exact())
    out, _ = capsys.readouterr()
    assert found == code
    # The three other modes at least were not shown.
    assert len(payload["limits_not_met"]) >= 3
    assert f"{'GATE' if gate else 'not met'}: graphcache-isolated was not among the systems" in out


def test_an_interrupted_run_says_where_its_results_are(tmp_path, floors, capsys):
    def interrupted(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, graphcache=exact(interrupted))
    out, _ = capsys.readouterr()
    file = tmp_path / "out" / "suite.json"
    assert out.splitlines()[-1] == f"interrupted; what was measured is in {file}"
    payload = json.loads(file.read_text())
    assert payload["complete"] is False
    assert "total_us" in payload["results"][0]["systems"]["raw"]


def test_something_must_be_measured_or_shown(capsys):
    with pytest.raises(SystemExit) as left:
        command.main([])
    assert left.value.code == 2
    assert "give --engines DIR to measure, or --table FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--systems", "raw", "no-such"], "unknown systems: no-such; there are raw, graphcache"),
        (["--shapes", "0"], "whole numbers, 1 or more"),
        (["--calls", "0"], "whole numbers, 1 or more"),
        ([], "no engines in"),
        (["--only", "mlp8", "silero", "minilm_tokens"], "minilm_tokens, silero: what is stored as the answer is not"),
        (["--table", "x.json", "--systems", "no-such"], "unknown systems: no-such"),
    ],
)
def test_usage(tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit) as left:
        command.main(["--engines", str(tmp_path / "empty"), *arguments])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_what_a_lost_device_leaves_is_measured_with_the_same_settings_in_another_process(
    tmp_path, floors, monkeypatch, capsys
):
    asked = []

    def again(module, arguments, name):
        asked.append((module, arguments, name))
        about = {"kind": "engine", "rival": None, "exact": True, "reason": "not today"}
        systems = arguments[arguments.index("--systems") + 1 : arguments.index("--calls")]
        return {"results": [{"systems": dict.fromkeys(systems, about)}]}

    def loses(x):
        monkeypatch.setattr(command.measure, "device_lost", lambda device: True)
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(command.processes, "again", again)
    given = {"default_stream": True, "max_seconds": 1000.0}
    code, payload = run(tmp_path, given, graphcache=exact(loses), graphcache_isolated=exact())
    assert code == 1
    assert [each["systems"]["graphcache-isolated"]["reason"] for each in payload["results"]] == ["not today"] * 2
    (module, arguments, name), _ = asked
    assert (module, name) == ("bench", "suite")
    options_ = command._parser().parse_args(arguments)
    assert (options_.engines, options_.only, options_.shapes) == (tmp_path, ["net"], [1])
    assert (options_.systems, options_.calls, options_.seconds) == (["graphcache-isolated"], 50, 5.0)
    assert options_.default_stream
    assert 0 < options_.max_seconds < 1000
    assert asked[1][1][asked[1][1].index("--systems") + 1 :][:2] == ["graphcache", "graphcache-isolated"]


def test_another_process_that_was_interrupted_recorded_nothing(tmp_path, floors, monkeypatch):
    def loses(x):
        monkeypatch.setattr(command.measure, "device_lost", lambda device: True)
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(command.processes, "again", lambda *rest: {"results": []})
    _, payload = run(tmp_path, graphcache=exact(loses), graphcache_isolated=exact())
    reason = payload["results"][0]["systems"]["graphcache-isolated"]["reason"]
    assert reason == "a process of its own was interrupted"


def test_one_file_holds_a_whole_run(tmp_path, floors):
    run(tmp_path, graphcache=exact())
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["suite.json"]


def test_a_table_is_printed_of_what_was_recorded(tmp_path, floors, capsys):
    run(tmp_path, graphcache=exact())
    capsys.readouterr()
    file = tmp_path / "out" / "suite.json"
    assert command.main(["--table", str(file), "--shapes", "2", "--systems", "graphcache"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"[suite.json]({file})" in lines[0]
    assert lines[2].startswith("| System | net, 2 shapes in turn |")
    assert lines[4].startswith("| `graphcache` | ")
    assert len(lines) == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens where there is no GPU")
def test_without_a_gpu_the_command_says_so(tmp_path):
    bundle(tmp_path, "net")
    with pytest.raises(SystemExit, match="bench runs TensorRT engines, which needs a CUDA device"):
        command.main(["--engines", str(tmp_path)])


def test_a_result_is_written_whole_or_not_at_all(tmp_path):
    file = record.write("suite-1.5", {"value": 1}, tmp_path)
    with pytest.raises(ValueError, match="Out of range float"):
        record.write("suite-1.5", {"value": float("nan")}, tmp_path)
    assert file == tmp_path / "suite-1.5.json"
    assert json.loads(file.read_text()) == {"value": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_results_name_the_tensorrt_that_was_loaded(monkeypatch):
    for name in ("tensorrt", "tensorrt_lean"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.4.0.76"))
    assert record.environment(0)["tensorrt"] == "tensorrt_rtx 1.4.0.76"


def test_there_is_an_engine_for_every_number_of_shapes_that_is_asked_for_by_default():
    assert "vit" in models.MODELS
    assert models.POLICY_BATCH[2] - models.POLICY_BATCH[0] + 1 >= max(command.SHAPES)
