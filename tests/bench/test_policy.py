"""The bounds that the policy is held to, on the traffic that bench.policy makes."""

from __future__ import annotations

import json

import pytest

from bench import policy
from bench.policy import failures, main, measured_models, read_models

# Half the slots and half the calls of the recorded run, so that it takes seconds.
SMALL = ["--calls", "10000", "--slots", "8"]


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """What the gate says of two models, one with cheap and one with dear captures."""
    folder = tmp_path_factory.mktemp("results")
    code = main([*SMALL, "--models", "mlp8", "minilm", "--gate", "--out", str(folder)])
    return code, json.loads((folder / "policy.json").read_text())


def test_the_gate_holds(gated):
    code, payload = gated
    assert payload["failures"] == []
    assert code == 0
    assert len(payload["results"]) == 2 * 10


def test_plain_lru_would_not_pass_it(gated):
    _, payload = gated
    as_lru = [
        {**result, "over_eager": {"graphcache": result["over_eager"]["lru"]}, "over_optimum": {"graphcache": 1.0}}
        for result in payload["results"]
    ]
    assert len(failures(as_lru)) == len(as_lru)


def test_always_eager_would_not_pass_it_either(gated):
    _, payload = gated
    as_eager = [
        {**result, "over_eager": {"graphcache": 1.0}, "over_optimum": {"graphcache": result["over_optimum"]["eager"]}}
        for result in payload["results"]
    ]
    assert len(failures(as_eager)) >= 6


def test_what_is_recorded_is_complete(gated):
    _, payload = gated
    assert payload["environment"]["commit"]
    assert payload["models"]["mlp8"]["source"].startswith("calls: hit-h100.json")
    for result in payload["results"]:
        over = result["over_optimum"]
        assert over["optimum"] == 1.0
        assert min(over.values()) >= 1.0 - 1e-9
        assert result["policies"]["eager"]["captures"] == 0


def test_a_missed_limit_is_named_and_exits_with_3(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(policy, "OVER_OPTIMUM", 1.0)
    arguments = ["--calls", "2000", "--slots", "2", "--models", "mlp8", "--traces", "zipf 1.0", "loop of 24"]
    assert main([*arguments, "--out", str(tmp_path), "--gate"]) == 3
    assert "missed: mlp8, zipf 1 over 200: " in capsys.readouterr().out
    assert main([*arguments, "--out", str(tmp_path)]) == 0


def test_models_say_where_they_are_from_and_are_plausible():
    models = measured_models()
    assert len(models) >= 5
    for name, model in models.items():
        eager, replay, capture = model.times(0)
        assert model.source, name
        assert 1e-5 < replay < 1.2 * eager < 1e-2
        assert 10 * eager < capture < 2.0


def test_costs_of_one_s_own(tmp_path):
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({"mine": {"eager_us": 300, "replay_us": 100, "capture_ms": 20, "source": "a guess"}}))
    models = read_models(file)
    assert models["mine"].times(7) == pytest.approx((300e-6, 100e-6, 20e-3))
    assert models["mine"].source == "a guess"
    arguments = ["--costs", str(file), "--calls", "500", "--slots", "2", "--traces", "loop of 24"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "costs.json: "),
        ("[]", "expected an object of models by name"),
        ("{}", "expected an object of models by name"),
        ('{"mine": 1}', "eager_us of 'mine' is None"),
        ('{"mine": {"eager_us": 0}}', "eager_us of 'mine' is 0; expected a number above 0"),
        ('{"mine": {"eager_us": true}}', "eager_us of 'mine' is True"),
        ('{"mine": {"eager_us": 1, "replay_us": "1"}}', "replay_us of 'mine' is '1'"),
        ('{"mine": {"eager_us": 1, "replay_us": 1, "capture_ms": NaN}}', "capture_ms of 'mine' is nan"),
    ],
)
def test_costs_that_are_none_are_refused_by_name(tmp_path, text, message):
    file = tmp_path / "costs.json"
    file.write_text(text)
    with pytest.raises(SystemExit) as refused:
        read_models(file)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--models", "no such"],
        ["--traces", "no such"],
        ["--calls", "0"],
        ["--slots", "0"],
        ["--noise", "-1"],
    ],
)
def test_bad_arguments_exit_with_2(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        main([*arguments, "--out", str(tmp_path)])
    assert refused.value.code == 2
    assert "error: " in capsys.readouterr().err
