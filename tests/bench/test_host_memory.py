import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import calls, host_memory, processes
from tests.bench.fakes import CPU, bundle, right


class Process:
    """One whose memory grows with every capture.

    Args:
        leak: Bytes left behind by each of the first ``leaking`` captures.
        leaking: How many leave something behind.
    """

    def __init__(self, leak=0, leaking=1 << 60):
        self.leak, self.leaking = leak, leaking
        self.sizes = []

    def step(self, call):
        self.sizes.append(call.size)
        return right(*call.inputs)

    def made(self):
        return len(self.sizes)

    def resident(self):
        return (1 << 20) + self.leak * min(len(self.sizes), self.leaking)

    def watch(self, pool, captures):
        return host_memory.watch(self.step, pool, captures, self.made, self.resident)


@pytest.fixture(scope="module", autouse=True)
def no_collections():
    """A collection goes through everything that the tests before have made, and there are eleven in each case."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_memory, "gc", SimpleNamespace(collect=lambda: None))
        yield


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return calls.pool(bundle(tmp_path_factory.mktemp("net")), [1, 4, 8], 1, CPU)


@given(st.integers(0, 1 << 16), st.integers(host_memory.POINTS, 200))
def test_what_each_capture_leaves_behind_is_found(pool, leak, captures):
    process = Process(leak)
    found = process.watch(pool, captures)
    assert found["kib_per_capture"] == pytest.approx(leak / 1024, abs=1e-3)
    assert found["kib_per_capture_second_half"] == pytest.approx(leak / 1024, abs=1e-3)
    assert found["captures"] == captures
    assert len(found["resident_bytes"]) == host_memory.POINTS + 1
    assert len(process.sizes) == 2 * len(pool) + captures
    json.dumps(found, allow_nan=False)


def test_what_stops_growing_is_seen_in_the_second_half(pool):
    found = Process(1024, leaking=2 * len(pool) + 50).watch(pool, 100)
    assert found["kib_per_capture"] == 0.5
    assert found["kib_per_capture_second_half"] == 0


def test_shapes_come_in_turn(pool):
    process = Process()
    process.watch(pool, 30)
    assert process.sizes == [1, 4, 8] * 12


def test_a_step_that_captures_nothing_is_found_out(pool):
    process = Process()
    process.made = lambda: len(process.sizes) // 2
    with pytest.raises(SystemExit, match="50 captures were made in 100 steps"):
        process.watch(pool, 100)


@pytest.mark.parametrize("good", [0, 6, 30])
def test_wrong_answers_end_it(pool, good):
    process = Process()

    def step(call):
        answer = process.step(call)
        return answer if len(process.sizes) <= good else answer * float("nan")

    with pytest.raises(SystemExit, match=r"the answer for size \d was wrong by inf"):
        host_memory.watch(step, pool, 100, process.made, process.resident)


def test_resident_memory_is_that_of_this_process():
    before = host_memory.resident_bytes()
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert host_memory.resident_bytes() - before > 48 << 20
    assert held.sum() == 64 << 20


class Engine:
    """As much of :class:`bench.peers.plain.PlainEngine` as is used; answers when it is launched."""

    def __init__(self, log):
        self.log = log

    def new_context(self):
        self.log.append("context")
        return SimpleNamespace(execute_async_v3=lambda stream: True)

    def set_inputs(self, context, inputs):
        context.inputs = inputs
        self.log.append(f"set {inputs[0].shape[0]}")

    def new_output(self, context):
        context.output = torch.empty(context.inputs[0].shape[0], 3)
        return context.output


@pytest.fixture
def driver(monkeypatch):
    """TensorRT and the driver, as far as this benchmark asks them; what was done is in the log."""
    log = []

    def driver_graph(work):
        work.enqueue()
        work.context.output.copy_(right(*work.context.inputs))
        log.append("launch")
        return SimpleNamespace(close=lambda: log.append("destroy"))

    stream = SimpleNamespace(cuda_stream=1, synchronize=lambda: None)
    monkeypatch.setattr("bench.peers.plain.PlainEngine", lambda bundle, device: Engine(log))
    monkeypatch.setattr(host_memory.raw, "driver_graph", driver_graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: stream)
    return log


@pytest.mark.parametrize(
    ("case", "contexts", "sizes"), [("same-shape", 1, 1), ("changing-shapes", 1, 8), ("new-contexts", 36, 8)]
)
def test_by_hand_every_step_captures_launches_and_destroys(driver, tmp_path, case, contexts, sizes):
    found = host_memory.here(bundle(tmp_path), case, 20, CPU)
    steps = 2 * sizes + 20
    assert (found["engine"], found["case"], found["shapes"], found["captures"]) == ("net", case, sizes, 20)
    assert driver.count("launch") == driver.count("destroy") == steps
    assert driver.count("context") == contexts
    assert len({entry for entry in driver if entry.startswith("set")}) == sizes
    assert [entry for entry in driver if entry in ("launch", "destroy")] == ["launch", "destroy"] * steps


@pytest.mark.parametrize(("case", "most"), [("changing-shapes", 1), ("graphcache-16", 8), ("new-contexts", 1)])
def test_an_engine_with_too_few_shapes_is_refused(tmp_path, case, most):
    made = bundle(tmp_path, batch=(1, 1, most))
    with pytest.raises(SystemExit, match=rf"net has {most} shapes; {case} needs more than \d+"):
        host_memory.here(made, case, 20, CPU)


@pytest.mark.parametrize("room", [1, 4])
def test_graphcache_captures_at_every_step(tmp_path, monkeypatch, room):
    class Network(torch.nn.Module):
        def forward(self, x):
            return right(x)

    monkeypatch.setattr("graphcache.EngineModule", lambda *rest, name: Network())
    found = host_memory.here(bundle(tmp_path), f"graphcache-{room}", 20, CPU)
    assert found["captures"] == 20
    assert found["shapes"] == 8


def test_a_case_that_ended_without_a_result_has_a_reason(monkeypatch):
    options = SimpleNamespace(engines="engines", captures=20)
    asked = []

    def again(module, arguments, name):
        asked.append((module, *arguments, name))
        if "new-contexts" in arguments:
            raise processes.NothingRecordedError("a process of its own was ended by signal 11 and recorded nothing")
        return {"results": [{"engine": "net", "case": "same-shape"}]}

    monkeypatch.setattr(processes, "again", again)
    assert host_memory.apart(options, "net", "same-shape") == {"engine": "net", "case": "same-shape"}
    reason = "a process of its own was ended by signal 11 and recorded nothing"
    assert host_memory.apart(options, "net", "new-contexts")["reason"] == reason
    wanted = "bench.host_memory --engines engines --only net --cases same-shape --captures 20 host_memory"
    assert " ".join(asked[0]) == wanted


@pytest.fixture
def machine(monkeypatch):
    """A machine with a device and a TensorRT."""
    monkeypatch.setattr(host_memory.record, "require_cuda", lambda what: CPU)
    monkeypatch.setattr("graphcache.engines.library.library", lambda: None)


@pytest.mark.parametrize("cases", [["same-shape"], ["same-shape", "new-contexts"]])
def test_the_command_records_every_case(machine, driver, monkeypatch, tmp_path, capsys, cases):
    made = bundle(tmp_path, "net")
    monkeypatch.setattr(host_memory, "apart", lambda options, name, case: host_memory.here(made, case, 20, CPU))
    arguments = ["--engines", str(tmp_path), "--only", "net", "--captures", "20", "--out", str(tmp_path / "out")]
    assert host_memory.main([*arguments, "--cases", *cases]) == 0
    payload = json.loads((tmp_path / "out" / "host_memory.json").read_text())
    assert [result["case"] for result in payload["results"]] == cases
    assert payload["benchmark"] == "host_memory"
    assert payload["engines"]["net"]["engine_sha256"]
    out, err = capsys.readouterr()
    assert all(case in out for case in cases)
    assert "KiB per capture" in err
    assert max(map(len, out.splitlines()[:-1])) <= 120


def test_a_case_that_failed_is_named_and_the_others_are_recorded(machine, driver, monkeypatch, tmp_path, capsys):
    made = bundle(tmp_path, "net")

    def apart(options, name, case):
        if case == "new-contexts":
            return {"engine": name, "case": case, "reason": "a process of its own ended"}
        return host_memory.here(made, case, 20, CPU)

    monkeypatch.setattr(host_memory, "apart", apart)
    arguments = ["--engines", str(tmp_path), "--only", "net", "--captures", "20", "--out", str(tmp_path / "out")]
    assert host_memory.main([*arguments, "--cases", "same-shape", "new-contexts"]) == 1
    out, _ = capsys.readouterr()
    assert "not measured: net, new-contexts: a process of its own ended" in out
    assert len(json.loads((tmp_path / "out" / "host_memory.json").read_text())["results"]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--captures", "3"], "--captures takes 10 or more"), (["--cases", "x"], "invalid choice")]
)
def test_usage(tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit) as left:
        host_memory.main(["--engines", str(tmp_path), *arguments])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens where there is no GPU")
def test_without_a_gpu_the_command_says_so(tmp_path):
    with pytest.raises(SystemExit, match=r"bench\.host_memory runs TensorRT engines, which needs a CUDA device"):
        host_memory.main(["--engines", str(tmp_path)])
