from bench import measure, suite
from bench.lost import LostDevice
from bench.processes import NothingRecordedError
from tests.bench.fakes import CPU, Clock, Fake, bundle, figures, right


class Machine:
    """A suite over fakes whose device can be lost, and the other processes that it asks."""

    def __init__(self, folder, deadline=None, shapes=(1,), engines=("one",), alone=False, always=False):
        self.lost, self.asked, self.loads = False, [], []
        self.crashes = set()
        # Of those, whose process has written what it had measured before.
        self.writes = False
        self.systems = {}
        self.floors = {"engine": self.maker("raw", exact=True, rival=None)}
        self.bundles = [bundle(folder / name, name) for name in engines]
        self.device = LostDevice(lambda: self.lost, None if alone else self.apart, always=always)
        self.plan = suite.Plan(self.bundles, shapes, self.systems, CPU, calls=50)
        self.suite = suite.Suite(
            self.plan, deadline or suite.Deadline(), lambda results: None, self.floors, self.device
        )

    def maker(self, name, function=right, **attributes):
        def make():
            peer = Fake(name, function, self.loads, **{"rival": "graphcache", **attributes})
            if name == "raw":
                peer.timed = lambda inputs: lambda: right(inputs[0])
            return peer

        return make

    def add(self, *names, function=right, **attributes):
        self.systems.update({name: self.maker(name, function, **attributes) for name in names})
        return self

    def loses(self, x):
        self.lost = True
        raise RuntimeError("an illegal memory access was encountered")

    def apart(self, made, count, names, seconds):
        self.asked.append((made.name, count, tuple(names), seconds))
        if self.crashes & set(names) and self.writes:
            before = names[: min(names.index(name) for name in self.crashes & set(names))]
            return {"systems": {name: figures(20.0, rival="graphcache") for name in before}}
        if self.crashes & set(names):
            raise NothingRecordedError("a process of its own was ended by signal 11 and recorded nothing")
        systems = {name: figures(20.0, rival="graphcache") for name in names}
        return {"buffer_bytes_per_shape": 7, "systems": {"raw": figures(10.0, exact=True), **systems}}

    def loaded(self):
        return [entry.removeprefix("load ") for entry in self.loads if entry.startswith("load ")]


def test_every_row_in_a_process_of_its_own_and_what_dies_takes_none_with_it(tmp_path, capsys):
    machine = Machine(tmp_path, shapes=(1, 2), engines=("one", "two"), always=True)
    machine.add("first", "bad", "third").crashes.add("bad")
    results = machine.suite.run()
    assert machine.loaded() == []
    rows = [(result["engine"], len(result["sizes"])) for result in results]
    assert rows == [("one", 1), ("one", 2), ("two", 1), ("two", 2)]
    assert [asked[2] for asked in machine.asked] == [("first", "bad", "third"), ("first",), ("bad",), ("third",)] * 4
    for result in results:
        assert "signal 11" in result["systems"]["bad"]["reason"]
        assert result["systems"]["third"]["total_us"]
        assert result["buffer_bytes_per_shape"] == 7
    assert "the device is lost" not in capsys.readouterr().err


def test_what_a_process_recorded_before_it_died_counts(tmp_path):
    machine = Machine(tmp_path, always=True)
    machine.add("first", "second", "bad", "fourth").crashes.add("bad")
    machine.writes = True
    (result,) = machine.suite.run()
    # The second process begins with the one that ends it, and records nothing.
    asked = [("first", "second", "bad", "fourth"), ("bad", "fourth"), ("bad",), ("fourth",)]
    assert [each[2] for each in machine.asked] == asked
    assert "ended before it had recorded this" in result["systems"]["bad"]["reason"]
    assert all(result["systems"][name]["total_us"] for name in ("first", "second", "fourth"))


def test_what_was_measured_is_written_system_by_system(tmp_path):
    machine, written = Machine(tmp_path), []
    machine.add("first", "second")
    write = lambda results: written.append([list(each["systems"]) for each in results])  # noqa: E731
    suite.Suite(machine.plan, suite.Deadline(), write, machine.floors, machine.device).run()
    assert [systems for (systems,) in written] == [["raw"], ["raw", "first"], *[["raw", "first", "second"]] * 2]


def test_what_follows_a_system_that_loses_the_device_is_measured_by_another_process(tmp_path):
    machine = Machine(tmp_path)
    machine.add("first").add("bad", function=machine.loses, exact=True).add("third", "fourth")
    (result,) = machine.suite.run()
    assert machine.asked == [("one", 1, ("third", "fourth"), None)]
    assert machine.loaded() == ["raw", "first", "bad"]
    assert list(result["systems"]) == ["raw", "first", "bad", "third", "fourth"]
    assert result["systems"]["bad"]["reason"] == "RuntimeError: an illegal memory access was encountered"
    assert result["systems"]["third"]["other_process"]
    # The floor that this process measured is kept, not the other one's.
    assert "other_process" not in result["systems"]["raw"]
    assert suite.failures([result]) == ["one, 1 shapes, bad: RuntimeError: an illegal memory access was encountered"]


def test_rows_after_that_are_measured_by_other_processes_from_the_start(tmp_path):
    machine = Machine(tmp_path, engines=("one", "two"), shapes=(1, 2))
    machine.add("bad", function=machine.loses).add("last")
    results = machine.suite.run()
    assert machine.asked == [
        ("one", 1, ("last",), None),
        ("one", 2, ("bad", "last"), None),
        ("two", 1, ("bad", "last"), None),
        ("two", 2, ("bad", "last"), None),
    ]
    assert machine.loaded() == ["raw", "bad"]
    assert all(each["other_process"] for each in results[1]["systems"].values())
    assert results[1]["buffer_bytes_per_shape"] == 7
    assert results[0]["buffer_bytes_per_shape"] == 2 * (4 + 3) * 4


def test_a_device_that_still_serves_is_used(tmp_path):
    machine = Machine(tmp_path)

    def fails(x):
        raise RuntimeError("no kernel for this")

    machine.add("bad", function=fails).add("last")
    (result,) = machine.suite.run()
    assert machine.asked == []
    assert "total_us" in result["systems"]["last"]


def test_a_loss_that_only_the_next_floor_notices_is_not_the_floors(tmp_path):
    machine = Machine(tmp_path, shapes=(1, 2))
    machine.add("sly")

    def floor(x):
        if machine.lost:
            raise RuntimeError("an illegal memory access was encountered")
        return right(x)

    machine.floors["engine"] = machine.maker("raw", floor, exact=True)
    machine.systems["sly"] = lambda: _closing(machine.maker("sly")(), lambda: setattr(machine, "lost", True))
    first, second = machine.suite.run()
    assert "total_us" in first["systems"]["sly"]
    assert machine.asked == [("one", 2, ("sly",), None)]
    assert second["systems"]["raw"]["other_process"]
    assert suite.failures([first, second]) == []


def _closing(peer, close):
    peer.close = close
    return peer


def test_a_floor_that_loses_the_device_itself_is_not_tried_again(tmp_path):
    machine = Machine(tmp_path)
    machine.floors["engine"] = machine.maker("raw", machine.loses, exact=True)
    machine.add("fast")
    (result,) = machine.suite.run()
    assert machine.asked == []
    assert result["systems"]["fast"]["reason"] == "there is no raw to take turns with"
    assert suite.failures([result]) == ["one, 1 shapes, raw: RuntimeError: an illegal memory access was encountered"]


def test_a_row_that_cannot_begin_on_a_lost_device_is_measured_elsewhere(tmp_path, monkeypatch):
    machine = Machine(tmp_path, shapes=(1, 2)).add("fast")
    pool = suite.calls_of.pool

    def lost(made, sizes, *rest):
        if len(sizes) > 1:
            machine.loses(None)
        return pool(made, sizes, *rest)

    monkeypatch.setattr("bench.row.calls_of.pool", lost)
    _, second = machine.suite.run()
    assert machine.asked == [("one", 2, ("fast",), None)]
    assert second["systems"]["fast"]["other_process"]


def test_what_crashes_another_process_costs_nobody_else_their_figures(tmp_path):
    machine = Machine(tmp_path)
    machine.add("bad", function=machine.loses).add("second").add("crashing", exact=True).add("fourth")
    machine.crashes = {"crashing"}
    (result,) = machine.suite.run()
    asked = [names for _, _, names, _ in machine.asked]
    assert asked == [("second", "crashing", "fourth"), ("second",), ("crashing",), ("fourth",)]
    assert "total_us" in result["systems"]["second"]
    assert "total_us" in result["systems"]["fourth"]
    assert suite.failures([result]) == [
        "one, 1 shapes, crashing: a process of its own was ended by signal 11 and recorded nothing"
    ]
    assert result["systems"]["crashing"]["rival"] == "graphcache"


def test_without_other_processes_the_rest_has_a_reason(tmp_path):
    machine = Machine(tmp_path, alone=True)
    machine.add("bad", function=machine.loses).add("last")
    (result,) = machine.suite.run()
    assert result["systems"]["last"]["reason"] == "the device was lost before"
    assert result["systems"]["last"]["failed"]


def test_another_process_has_the_time_that_is_left_and_none_begins_without(tmp_path):
    clock = Clock()
    machine = Machine(tmp_path, suite.Deadline(10, clock), shapes=(1, 2))

    def slowly(x):
        clock.pass_by(4)
        machine.loses(x)

    apart = machine.device._apart

    def slow(*rest):
        clock.pass_by(6)
        return apart(*rest)

    machine.device._apart = slow
    machine.add("bad", function=slowly).add("last")
    first, second = machine.suite.run()
    assert [left for *_, left in machine.asked] == [6]
    assert "total_us" in first["systems"]["last"]
    assert second["systems"]["last"]["reason"] == "left out, since 10 s were over"
    assert second["systems"]["last"]["left_out"]


def test_time_may_be_over_when_the_device_is_lost(tmp_path):
    clock = Clock()
    machine = Machine(tmp_path, suite.Deadline(3, clock))

    def slowly(x):
        clock.pass_by(4)
        machine.loses(x)

    (result,) = machine.add("bad", function=slowly).add("last").suite.run()
    assert machine.asked == []
    assert result["systems"]["last"]["left_out"]


def test_the_host_is_never_lost():
    assert measure.device_lost(CPU) is False


class _Synchronises:
    """``torch.cuda.synchronize`` that raises so many times."""

    def __init__(self, failures):
        self.failures = failures

    def __call__(self, device):
        self.failures -= 1
        if self.failures >= 0:
            raise RuntimeError("CUDA error")


def test_an_error_that_is_reported_once_is_no_loss(monkeypatch):
    import torch

    device = torch.device("cuda", 0)
    for failures, lost in ((0, False), (1, False), (2, True), (99, True)):
        monkeypatch.setattr(torch.cuda, "synchronize", _Synchronises(failures))
        assert measure.device_lost(device) is lost
