"""``graphcache bench`` and ``report``: every call is in the result, and the result becomes a page."""

import json

import pytest

from graphcache import CachedModule
from graphcache.observe.result import read_result

SHAPES = ("--shapes", "input:1x16:4x16:8x16")


def test_every_call_is_in_the_result(cli):
    found = cli("bench", "nets.py:mlp", *SHAPES, "--calls", "60", "-o", "result.json", "--json")
    assert (found.exit_code, found.stderr) == (0, "")
    told, result = json.loads(found.stdout), read_result("result.json")
    assert told["calls"] == len(result.calls) == 60
    assert [each.label for each in result.inputs] == ["input:1x16", "input:4x16", "input:8x16"]
    assert all(each.nbytes > 0 for each in result.inputs)
    outcomes = [each.outcome for each in result.calls]
    assert (outcomes.count("capture"), outcomes.count("hit")) == (3, 57)
    counts = [sum(each["outcomes"].values()) for each in told["inputs"]]
    assert counts == sorted(counts, reverse=True)
    assert told["verdict"]["kind"] in ("no launches", "launch-bound", "compute-bound")


def test_the_same_seed_makes_the_same_traffic(cli):
    orders = []
    for seed in (0, 0, 1):
        cli("bench", "nets.py:mlp", *SHAPES, "--calls", "30", "-o", "r.json", "--seed", seed)
        orders.append([each.inputs for each in read_result("r.json").calls])
    assert orders[0] == orders[1] != orders[2]


def test_few_graphs_and_reasons(cli):
    found = cli("bench", "nets.py:mlp", *SHAPES, "--calls", "40", "--max-graphs", "1", "--json")
    held = [each["nbytes"] for each in json.loads(found.stdout)["inputs"]]
    assert sum(nbytes > 0 for nbytes in held) == 1
    told = json.loads(cli("bench", "nets.py:Picky", "--shapes", "x:8", "--calls", "5", "--json").stdout)
    [inputs] = told["inputs"]
    assert sum(inputs["outcomes"].values()) == 5
    assert set(told["reasons"]) == set(inputs["outcomes"]) <= {"data_dependent", "host_read"}


def test_the_policy_that_captures_what_pays(cli):
    found = cli("bench", "nets.py:mlp", *SHAPES, "--calls", "40", "--capture", "worthwhile", "--json")
    assert "cold" in json.loads(found.stdout)["reasons"]


def test_the_table(cli):
    found = cli("bench", "nets.py:mlp", *SHAPES, "--calls", "20", "-o", "result.json")
    assert found.exit_code == 0
    assert "nets.py:mlp: 20 calls; medians in µs" in found.stdout
    assert "Verdict: " in found.stdout
    assert "graphcache report result.json --html report.html" in found.stdout
    assert "\x1b" not in found.stdout + found.stderr


def test_a_wrong_answer_ends_with_3(cli, monkeypatch):
    right = CachedModule.__call__
    monkeypatch.setattr(CachedModule, "__call__", lambda self, *args: right(self, *args) + 1)
    found = cli("bench", "nets.py:mlp", *SHAPES, "--calls", "10", "--json")
    assert found.exit_code == 3
    assert json.loads(found.stdout)["differences"] == 7
    assert "7 of 10 answers differ from eager execution. The first, input:" in found.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "Missing option '--shapes'"),
        ([*SHAPES, "--calls", "0"], 2, "--calls"),
        ([*SHAPES, "-o", "nowhere/r.json"], 1, "nowhere/r.json cannot be written (No such directory)"),
        ([*SHAPES, "-o", "."], 1, ". is a directory; choose another --output"),
        (["--shapes", "input:1x15"], 1, "refused input:1x15: RuntimeError"),
    ],
)
def test_what_is_refused(cli, args, code, message):
    found = cli("bench", "nets.py:mlp", *args)
    assert (found.exit_code, found.stdout) == (code, "")
    assert message in found.stderr


@pytest.fixture
def result(cli):
    assert cli("bench", "nets.py:mlp", *SHAPES, "--calls", "30", "-o", "result.json").exit_code == 0
    return "result.json"


def test_a_report_in_words_and_as_json(cli, result):
    found = cli("report", result)
    assert found.exit_code == 0
    assert "input:1x16" in found.stdout
    told = json.loads(cli("report", result, "--json").stdout)
    assert (told["calls"], told["outcomes"]) == (30, {"capture": 3, "hit": 27})
    assert told["html"] is None


def test_a_report_as_a_page(cli, result, folder):
    pytest.importorskip("matplotlib")
    found = cli("report", result, "--html", "report.html")
    assert found.exit_code == 0
    assert "Written to report.html." in found.stdout
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing.json' cannot be read (No such file or directory); expected a result"),
        ("", "is no JSON"),
        ("[]", "it is []; expected an object"),
        ("{}", "format is missing; expected what graphcache bench -o wrote"),
    ],
)
def test_what_is_no_result(cli, folder, content, message):
    if content is not None:
        (folder / "missing.json").write_text(content)
    found = cli("report", "missing.json", "--html", "report.html")
    assert (found.exit_code, found.stdout) == (1, "")
    assert message in found.stderr
    assert found.stderr.count("\n") == 1
    assert not (folder / "report.html").exists()


def test_a_page_that_cannot_be_written(cli, result):
    found = cli("report", result, "--html", "nowhere/report.html")
    assert (found.exit_code, found.stdout) == (1, "")
    assert "nowhere/report.html cannot be written (No such file or directory); choose another --html" in found.stderr
