import json

import pytest

from bench import record, suite
from bench import row as module
from tests.bench.fakes import CPU, Clock, Fake, bundle, figures, raising, right


class Run:
    """A suite over fakes: every object that it makes, what was logged, and what was written when."""

    def __init__(self, bundles, shapes=(1,), deadline=None, **systems):
        self.log = []
        self.written = []
        self.made = []
        makers = {name: self.maker(name, options) for name, options in systems.items()}
        floors = {"engine": self.maker("raw", {"exact": True}), "torch": self.maker("raw-torch", {"kind": "torch"})}
        for kind, name in (("engine", "raw"), ("torch", "raw-torch")):
            floors[kind] = makers.get(name, floors[kind])
        plan = suite.Plan(bundles, shapes, makers, CPU, calls=50)
        self.suite = suite.Suite(plan, deadline or suite.Deadline(), self.write, floors)

    def maker(self, name, options):
        def make():
            peer = Fake(name, log=self.log, **options)
            if "timed" not in options and name.startswith("raw"):
                peer.timed = lambda inputs: lambda: right(inputs[0])
            self.made.append(peer)
            return peer

        return make

    def write(self, results):
        self.written.append(json.loads(json.dumps(results, allow_nan=False)))


@pytest.fixture
def nets(tmp_path):
    return [bundle(tmp_path, "one"), bundle(tmp_path, "two", (1, 1, 3))]


def test_every_engine_shape_and_system_is_measured(nets):
    run = Run(nets, (1, 2, 9), raw={"exact": True}, fast={}, slow={})
    results = run.suite.run()
    assert [(each["engine"], each["sizes"]) for each in results] == [
        ("one", [2]),
        ("one", [1, 8]),
        ("one", [1, 2, 3, 4, 5, 6, 7, 8]),
        ("two", [1]),
        ("two", [1, 3]),
        ("two", [1, 2, 3]),
    ]
    for each in results:
        assert list(each["systems"]) == ["raw", "fast", "slow"]
        assert all("total_us" in found for found in each["systems"].values())
    assert results[0]["buffer_bytes_per_shape"] == 2 * (4 + 3) * 4


def test_the_floor_stays_open_while_the_others_take_turns_with_it(nets):
    run = Run(nets[:1], fast={}, slow={})
    run.suite.run()
    assert run.log == ["load raw", "load fast", "close fast", "load slow", "close slow", "close raw"]


def test_a_floor_that_knows_its_nodes_says_what_memory_a_shape_may_take(nets):
    run = Run(nets[:1], (2,), raw={"nodes": [10, 20], "exact": True}, fast={})
    (result,) = run.suite.run()
    assert result["systems"]["raw"]["nodes"] == [10, 20]
    # Batches of 1 and 8 with 4 floats in and 3 out; 15 nodes.
    assert result["systems"]["raw"]["allowed_bytes_per_shape"] == 9 * 7 * 4 // 2 + 15 * 20 * 1024


def test_engines_come_before_torch_networks_and_share_a_row(nets):
    run = Run(nets, torch_one={"kind": "torch"}, fast={})
    results = run.suite.run()
    assert len(results) == 2
    assert list(results[0]["systems"]) == ["raw", "fast", "raw-torch", "torch_one"]
    loads = [entry.split()[1] for entry in run.log if entry.startswith("load")]
    assert loads == ["raw", "fast"] * 2 + ["raw-torch", "torch_one"] * 2


def test_a_kind_that_nobody_asked_for_needs_no_floor(nets):
    run = Run(nets[:1], fast={})
    run.suite.run()
    assert not any("raw-torch" in entry for entry in run.log)


def test_results_are_written_after_each_system(nets):
    run = Run(nets, (1, 2), fast={}, torch_one={"kind": "torch"})
    run.suite.run()
    # Of each row the floor, the system, and the floor's figures once more when it was closed.
    assert [len(each) for each in run.written] == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 15
    assert list(run.written[0][0]["systems"]) == ["raw"]
    assert run.written[1][0]["systems"]["fast"]["total_us"]["n"] == 50


def test_an_interrupted_run_keeps_what_it_had(nets, tmp_path):
    run = Run(nets, fast={})

    def interrupted_in_the_second_row(x):
        if "close raw" in run.log:
            raise KeyboardInterrupt
        return right(x)

    run.suite.plan.systems["last"] = run.maker("last", {"function": interrupted_in_the_second_row})
    run.write = lambda results: record.write("kept", {"results": results}, tmp_path)
    run.suite._write = run.write
    with pytest.raises(KeyboardInterrupt):
        run.suite.run()
    kept = json.loads((tmp_path / "kept.json").read_text())
    found = [(each["engine"], list(each["systems"])) for each in kept["results"]]
    assert found == [("one", ["raw", "fast", "last"]), ("two", ["raw", "fast"])]
    assert run.log.count("close raw") == run.log.count("load raw") == 2


@pytest.mark.parametrize("kind", ["engine", "torch"])
def test_nothing_begins_after_the_deadline_and_what_is_missing_is_named(nets, kind):
    clock = Clock()

    def slow(x):
        clock.pass_by(1)
        return right(x)

    run = Run(
        nets,
        (1,),
        suite.Deadline(5, clock),
        first={"kind": kind, "function": slow, "rival": "graphcache"},
        second={"kind": kind},
        third={"kind": kind},
    )
    results = run.suite.run()
    floor = "raw" if kind == "engine" else "raw-torch"
    assert "total_us" in results[0]["systems"]["first"]
    left = [(each["engine"], name) for each in results for name, f in each["systems"].items() if f.get("left_out")]
    assert left == [("one", "second"), ("one", "third")] + [
        ("two", name) for name in (floor, "first", "second", "third")
    ]
    assert results[0]["systems"]["second"]["reason"] == "left out, since 5 s were over"
    assert results[1]["systems"]["first"]["rival"] == "graphcache"
    assert [entry for entry in run.log if entry.startswith("load")] == [f"load {floor}", "load first"]


def test_without_a_deadline_nothing_is_left_out():
    clock = Clock()
    never = suite.Deadline(None, clock)
    clock.pass_by(1e9)
    assert not never.passed()
    assert never.elapsed() == 1e9


def test_without_its_floor_a_kind_is_not_measured(nets):
    run = Run(nets[:1], raw={"function": raising(RuntimeError("no driver")), "exact": True}, fast={"rival": "raw"})
    (result,) = run.suite.run()
    assert result["systems"]["raw"]["reason"] == "RuntimeError: no driver"
    assert result["systems"]["fast"]["reason"] == "there is no raw to take turns with"
    assert "load fast" not in run.log


def test_a_floor_that_cannot_be_closed_ends_no_run(nets):
    run = Run(nets, raw={"close": raising(RuntimeError("the device is lost")), "exact": True}, fast={})
    results = run.suite.run()
    assert len(results) == 2
    assert "total_us" in results[1]["systems"]["fast"]
    assert suite.failures(results)[0] == "one, 1 shapes, raw: closing it: RuntimeError: the device is lost"


def test_a_row_that_cannot_begin_is_listed_and_the_others_are_measured(nets, monkeypatch):
    pool = module.calls_of.pool

    def lost(bundle, *rest):
        if bundle.name == "one":
            raise RuntimeError("the device is lost")
        return pool(bundle, *rest)

    monkeypatch.setattr(module.calls_of, "pool", lost)
    run = Run(nets, fast={"exact": True})
    one, two = run.suite.run()
    assert one["systems"]["fast"]["reason"] == "RuntimeError: the device is lost"
    assert suite.failures([one]) == ["one, 1 shapes, fast: RuntimeError: the device is lost"]
    assert "total_us" in two["systems"]["fast"]
    # One system that cannot be measured, and two that can; each row once more at its end.
    assert len(run.written) == 5


def test_progress_goes_to_stderr_as_it_happens(nets, capsys):
    Run(nets[:1], fast={}, gone={"reason": "not installed: gone"}).suite.run()
    out, err = capsys.readouterr()
    assert out == ""
    raw, fast, gone = err.splitlines()
    assert "one, 1 shapes, raw: " in raw
    assert "µs of CPU" in fast
    assert gone.endswith("one, 1 shapes, gone: not installed: gone")


def row(**systems):
    return {"engine": "mlp8", "sizes": [1, 2], "systems": {n.replace("_", "-"): f for n, f in systems.items()}}


def test_only_graphcache_and_the_floor_fail_a_run():
    bad = {"kind": "engine", "rival": None, "reason": "3 of 8 answers were wrong", "failed": True}
    found = suite.failures(
        [
            row(
                graphcache={**bad, "exact": True},
                aitune={**bad, "exact": False},
                raw=figures(10, exact=True),
                graphcache_isolated=figures(10, exact=True, misses_while_timed=4),
                graphcache_into=figures(10, exact=True, closing="RuntimeError: stuck"),
                graphcache_torch={"kind": "torch", "rival": None, "reason": "minilm: no weights", "exact": True},
                tensorrt=figures(10, misses_while_timed=1000),
            )
        ]
    )
    assert found == [
        "mlp8, 2 shapes, graphcache: 3 of 8 answers were wrong",
        "mlp8, 2 shapes, graphcache-isolated: 4 of the timed calls were no hits",
        "mlp8, 2 shapes, graphcache-into: closing it: RuntimeError: stuck",
    ]


def test_versions_are_of_what_is_installed(monkeypatch):
    monkeypatch.setattr(suite.peers, "PACKAGES", ("torch", "surely-not-installed"))
    assert list(suite.versions()) == ["torch"]
