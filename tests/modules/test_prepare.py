"""Graphs before serving: from calls, from shapes, and from the manifest of another process."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphcache
from graphcache import Call, Manifest, Reason
from graphcache.cache.graph_cache import set_process_budget
from graphcache.dispatch import capture_manager
from graphcache.dispatch import dispatcher as misses
from graphcache.dispatch.capture_manager import preparing
from graphcache.errors import ClosedError, ConfigError, InputCountError, InputRankError, ProfileRangeError
from graphcache.keys.call_spec import CallSpec
from graphcache.modules import prepare as room
from graphcache.modules import wrapped
from graphcache.persist import fingerprint, saved_call, served_calls
from graphcache.persist.manifest import ManifestEntry
from tests import engine_modules as engines
from tests.engine_modules import load, rows
from tests.graphs.fake_driver import Torch, installed
from tests.helpers import (
    Fn,
    calls,
    dispatcher_of,
    frozen,
    graphs_of,
    in_threads,
    mlp,
    outcomes,
    own_budgets,
    reason,
    same,
    structures,
    tensors,
)

on_files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(*engines.MODULES, room, wrapped, fingerprint, served_calls, saved_call, patch=monkeypatch) as fake:
        fake.zeros = lambda *shape, **options: fake.driver.heap.empty(*shape, **options).zero_()
        yield engines.prepare(fake, monkeypatch)


def xs(*sizes: int) -> list[Tensor]:
    return [torch.arange(size * 4.0).reshape(size, 4) for size in sizes]


# ---- calls


def test_prepared_calls_are_hits_from_the_first_one_on() -> None:
    fast = graphcache.wrap(mlp(), capture="prepared")
    done = fast.prepare(*xs(1, 2, 3))
    assert (done.signatures, done.refused, done.left_out, done.problems) == (3, (), 0, ())
    assert done.nbytes == fast.cache_info().nbytes
    for x in xs(3, 1, 2):
        assert same(fast(x + 1), fast.module(x + 1))
    assert outcomes(fast) == (3, 3, {})
    assert reason(fast, *xs(4)) is Reason.NOT_PREPARED


@given(st.lists(structures(tensors((torch.float32, torch.int64))), min_size=1, max_size=4))
def test_any_arguments_that_a_call_takes_can_be_prepared(given_: list[Any]) -> None:
    fast = graphcache.wrap(Fn(lambda _, value: value), capture="prepared")
    done = fast.prepare(*[Call((value,)) for value in given_])
    before = fast.cache_info()
    for value in given_:
        assert same(fast(value), value)
    after = fast.cache_info()
    refused = {each.cause.reason for each in done.refused}
    assert after.captures == before.captures == done.signatures
    assert (after.hits == len(given_)) == (not done.refused), refused


@given(st.permutations([1, 2, 3, 5, 8]))
def test_the_largest_is_captured_first_and_all_have_run_before(order: list[int]) -> None:
    ran: list[int] = []
    module = Fn(lambda _, x: ran.append(len(x)) or x * 2)
    fast = graphcache.wrap(module, capture="prepared", verify=False, ignore=["self.function.ran"])
    captured: list[int] = []
    attempt = dispatcher_of(fast).target.recorder.attempt

    def noted(request: Any) -> Any:
        if not captured:
            assert ran == [8, 5, 3, 2, 1], "all of them, before any capture"
        captured.append(len(request.call.args[0]))
        return attempt(request)

    dispatcher_of(fast).target.recorder.attempt = noted
    assert fast.prepare(*xs(*order)).signatures == 5
    assert captured == [8, 5, 3, 2, 1]


def test_calls_by_keyword_and_equal_ones_are_one() -> None:
    fast = graphcache.wrap(Fn(lambda _, x, scale=1.0: x * scale), capture="prepared")
    x = torch.ones(3)
    done = fast.prepare(Call((x,), {"scale": 2.0}), Call([x + 1], {"scale": 2.0}), (x, 2.0), x)
    assert (done.signatures, fast.cache_info().captures) == (3, 3)
    assert torch.equal(fast(x, scale=2.0), x * 2)
    assert fast.cache_info().hits == 1
    again = fast.prepare(x)
    assert (again.signatures, fast.cache_info().captures) == (1, 3), "there was a graph"


def test_a_call_that_the_module_refuses_raises_and_nothing_was_captured() -> None:
    fast = graphcache.wrap(mlp(), capture="first")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fast.prepare(*xs(9, 5), torch.ones(2, 3))
    assert calls(fast) == 0
    assert preparing.get() is None


def test_what_cannot_be_captured_is_listed_with_its_cause_and_raises_nothing() -> None:
    fast = graphcache.wrap(Fn(lambda _, x: x[x > 0] if len(x) > 2 else x * 2), on_failure="raise")
    done = fast.prepare(torch.ones(2), torch.ones(3))
    assert done.signatures == 1
    [refused] = done.refused
    assert (refused.call, refused.cause.reason) == ("float32[3]", Reason.DATA_DEPENDENT)
    assert fast.cache_info().eager == {}, "nobody called it"
    assert str(done).endswith("MB; refused: 1 data_dependent")


def test_an_argument_that_no_signature_describes_is_listed() -> None:
    fast = graphcache.wrap(Fn(lambda _, x, thing: x))
    done = fast.prepare((torch.ones(2), object()))
    assert (done.signatures, [each.cause.reason for each in done.refused]) == (0, [Reason.ARGUMENT])


def test_where_gradients_are_recorded_or_graphs_are_off_it_says_so() -> None:
    learning = graphcache.wrap(nn.Linear(4, 4))
    assert [each.cause.reason for each in learning.prepare(*xs(2)).refused] == [Reason.GRAD]
    with torch.no_grad():
        assert learning.prepare(*xs(2)).refused == ()
    graphcache.runtime.set_cudagraphs_mode(False)
    try:
        assert [each.cause.reason for each in graphcache.wrap(mlp()).prepare(*xs(2)).refused] == [Reason.DISABLED]
    finally:
        graphcache.config.modes.set(graphcache.config.Modes())


def test_more_than_fit_are_not_captured_in_vain() -> None:
    fast = graphcache.wrap(mlp(), max_graphs=3)
    done = fast.prepare(*xs(1, 2, 3, 4, 5))
    info = fast.cache_info()
    assert (done.signatures, info.captures, info.evictions) == (3, 3, 0)
    assert [(each.call, each.cause.reason) for each in done.refused] == [
        ("float32[2, 4]", Reason.OVER_BUDGET),
        ("float32[1, 4]", Reason.OVER_BUDGET),
    ]
    fast(*xs(2))
    assert (fast.cache_info().captures, fast.cache_info().evictions) == (4, 1), "not pinned, nor blocked, afterwards"


def test_bytes_of_the_module_and_of_the_process_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    own_budgets(monkeypatch)
    probe = graphcache.wrap(mlp())
    nbytes = probe.prepare(*xs(8)).nbytes
    probe.close()
    assert graphcache.wrap(mlp(), max_bytes=2 * nbytes).prepare(*xs(5, 6, 7, 8)).nbytes <= 2 * nbytes
    set_process_budget(2 * nbytes)
    fast = graphcache.wrap(mlp())
    done = fast.prepare(*xs(5, 6, 7, 8))
    assert 0 < done.nbytes == fast.cache_info().process_nbytes <= 2 * nbytes
    assert {each.cause.reason for each in done.refused} == {Reason.OVER_BUDGET}


def test_pinned_graphs_stay_whatever_comes() -> None:
    fast = graphcache.wrap(mlp(), max_graphs=3)
    fast.prepare(*xs(1, 2), pin=True)
    for size in range(3, 9):
        fast(*xs(size))
    before = fast.cache_info()
    for x in xs(1, 2):
        fast(x)
    assert fast.cache_info().hits == before.hits + 2
    fast.prepare(*xs(1))
    assert [entry.pinned for entry in graphs_of(fast).entries.values()].count(True) == 2, (
        "pinned before, pinned afterwards"
    )


def test_preparing_is_not_charged_to_the_calls() -> None:
    fast = graphcache.wrap(mlp(), capture="worthwhile")
    done = fast.prepare(*xs(1, 2, 3))
    assert done.signatures + len(done.refused) == 3
    admission = dispatcher_of(fast).captures.admission
    assert admission.account().capture_seconds > 0
    # Another key needs no more calls than if nothing had been captured: the account is not overdrawn.
    for _ in range(2000):
        admission.ran("other", 1e-3)
    assert admission.ask("other") is None


def test_parts_are_prepared_where_the_whole_is_refused() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = mlp()

        def forward(self, x: Tensor) -> Tensor:
            y = self.backbone(x)
            return y[y > 0]

    for strategy in ("auto", "per_submodule"):
        fast = graphcache.wrap(frozen(Detector()), include=["backbone"], capture="prepared", strategy=strategy)
        done = fast.prepare(*xs(2, 3))
        assert done.signatures == 2
        assert {each.cause.reason for each in done.refused} == (
            {Reason.DATA_DEPENDENT} if strategy == "auto" else set()
        )
        fast(*xs(3))
        assert fast.cache_info().hits == 1


def test_a_part_that_cannot_be_captured_is_listed() -> None:
    fast = graphcache.wrap(
        frozen(nn.Sequential(nn.Dropout(0.5).train(), nn.ReLU())), strategy="per_submodule", include=["0", "1"]
    )
    fast.module[0].train()
    done = fast.prepare(*xs(2))
    assert (done.signatures, [each.cause.reason for each in done.refused]) == (1, [Reason.RANDOM])


def test_a_deadline_leaves_the_rest_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0.0

        @classmethod
        def monotonic(cls) -> float:
            return cls.now

    def slow(_: Any, x: Tensor) -> Tensor:
        Clock.now += 1.0
        return x * 2

    monkeypatch.setattr(room, "time", Clock)
    fast = graphcache.wrap(Fn(slow), verify=False, ignore=["*Clock.now"])
    done = fast.prepare(*xs(1, 2, 3, 4, 5, 6), deadline=6)
    assert (done.signatures, done.left_out) == (1, 5)
    assert done.seconds == Clock.now, "four warm in half the time, and a capture that runs more than once"
    assert "; 5 left out" in str(done)


def test_only_graphs_that_are_there_are_counted() -> None:
    fast = graphcache.wrap(mlp(), verify=False)
    attempt = dispatcher_of(fast).target.recorder.attempt

    def dropped_before(*args: Any, **options: Any) -> Any:
        fast.clear()
        return attempt(*args, **options)

    dispatcher_of(fast).target.recorder.attempt = dropped_before
    done = fast.prepare(*xs(1, 2, 3))
    assert (done.signatures, fast.cache_info().graphs) == (1, 1)
    assert done.nbytes == fast.cache_info().nbytes


def test_other_threads_are_served_meanwhile() -> None:
    fast = graphcache.wrap(mlp())
    module = fast.module

    def work(index: int) -> None:
        if index:
            for x in xs(1, 2, 3, 4, 5, 6):
                assert same(fast(x), module(x))
        else:
            assert fast.prepare(*xs(1, 2, 3, 4, 5, 6)).signatures == 6

    in_threads(work)
    assert fast.cache_info().captures == 6
    assert not any(entry.pinned for entry in graphs_of(fast).entries.values())


def test_one_line_is_logged(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.INFO, "graphcache"):
        done = graphcache.wrap(mlp()).prepare(*xs(1, 2))
    assert [(each.levelname, each.getMessage()) for each in caplog.records] == [("INFO", f"Sequential: {done}")]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("given_", "options", "message"),
    [
        ((), {}, r"^prepare\(\) was given nothing; expected calls, shapes, a manifest or its path$"),
        (
            (3,),
            {},
            r"^3 is no call of Sequential; expected a tuple of its arguments, graphcache\.Call\(args, kwargs\), ",
        ),
        (({"x": (2, 4)},), {}, r"or of an engine the shapes of its inputs$"),
        (([torch.ones(2)],), {}, "is no call of Sequential"),
        ((None,), {}, "^None is no call"),
        (("",), {}, "^path='': expected the path of a file"),
        (xs(2), {"deadline": 0}, r"^deadline=0: expected seconds, above 0"),
        (xs(2), {"deadline": float("nan")}, "^deadline=nan"),
        (xs(2), {"deadline": True}, "^deadline=True"),
        (xs(2), {"deadline": "1"}, "^deadline='1'"),
        (xs(2), {"pin": 1}, "^pin=1: expected True or False"),
        (xs(2), {"progress": "yes"}, "^progress='yes': expected True, False or None"),
    ],
)
def test_bad_arguments_are_config_errors(given_: Any, options: Any, message: str) -> None:
    fast = graphcache.wrap(mlp())
    with pytest.raises(ConfigError, match=message):
        fast.prepare(*given_, **options)
    assert calls(fast) == 0


def test_a_closed_module_prepares_nothing() -> None:
    fast = graphcache.wrap(mlp())
    fast.close()
    with pytest.raises(ClosedError, match="was closed"):
        fast.prepare(*xs(1))


# ---- engines


def test_an_engine_is_prepared_by_shapes(fake: Torch) -> None:
    fast = graphcache.wrap(load("affine"), capture="prepared")
    with torch.no_grad():
        done = fast.prepare((1, 4), torch.Size([2, 4]), [[3, 4]], {"x": (4, 4)}, (rows(fake, 8),))
        assert (done.signatures, done.refused) == (5, ())
        for count in (1, 2, 3, 4, 8):
            assert torch.equal(fast(rows(fake, count)), rows(fake, count) * 3 + 1)
    assert outcomes(fast) == (5, 5, {})


def test_several_inputs_by_place_and_by_name(fake: Torch) -> None:
    fast = graphcache.wrap(load("pair"), capture="prepared")
    with torch.no_grad():
        done = fast.prepare(((2, 3), (2, 3)), {"b": (3, 1), "a": [3, 1]}, (fake.driver.heap.tensor([[1.0]]), (1, 1)))
        assert (done.signatures, done.refused) == (3, ())
        a, b = (fake.driver.heap.tensor([[start], [2.0], [3.0]]) for start in (1.0, 5.0))
        assert torch.equal(fast(a, b=b)[0], a + b)
    assert fast.cache_info().hits == 1


def test_values_of_a_host_shape_tensor_stand_for_it(fake: Torch, tmp_path: Path) -> None:
    fast = graphcache.wrap(load("head"), capture="prepared")
    x = fake.driver.heap.tensor([[1.0] * 4] * 16)
    with torch.no_grad():
        assert fast.prepare({"stop": [3]}, {"stop": (5,)}).signatures == 2
        assert fast(x, torch.tensor([5])).shape == (5, 4)
    fast.save_manifest(tmp_path / "head.json")
    again = graphcache.wrap(load("head"), capture="prepared")
    done = again.prepare(tmp_path / "head.json")
    assert (done.signatures, done.refused, done.problems) == (2, (), ())
    with torch.no_grad():
        assert [again(x, torch.tensor([stop])).shape[0] for stop in (3, 5)] == [3, 5]
    assert again.cache_info().hits == 2


@pytest.mark.parametrize(
    ("network", "shapes", "error", "message"),
    [
        ("affine", (5, 4), ProfileRangeError, "has shape (5, 4), outside the engine's range"),
        ("affine", (2**62, 2**62), ProfileRangeError, "outside the engine's range"),
        ("affine", (2,), InputRankError, "was given (2,), 1 dimensions; the engine takes 2"),
        ("affine", (-1, 4), InputCountError, "takes 1 inputs (x); (-1, 4) is not a shape or a tensor for each of them"),
        ("affine", {"x": (-1, 4)}, ConfigError, "was given (-1, 4); expected a shape, such as (8, 64), or a tensor"),
        ("affine", {"x": "2x4"}, ConfigError, "was given '2x4'; expected a shape"),
        ("affine", {"x": (2.0, 4)}, ConfigError, "expected a shape"),
        ("affine", {"z": (2, 4)}, InputCountError, "affine has no input 'z'; its inputs are x"),
        ("affine", {}, InputCountError, "input 'x' of affine is missing; its shape (-1, 4) is open"),
        ("pair", (2, 3), ConfigError, "input 'a' of pair was given 2; expected a shape, such as (8, 64), or a tensor"),
        ("pair", ((2, 3),), InputCountError, "pair takes 2 inputs (a, b)"),
        ("head", {"stop": (17,)}, ProfileRangeError, "has values [17], outside the engine's range"),
        ("head", {"stop": (1, 2)}, InputRankError, "was given (1, 2), 2 values; the engine takes 1"),
    ],
)
def test_shapes_that_an_engine_cannot_take(
    fake: Torch, network: str, shapes: Any, error: type[Exception], message: str
) -> None:
    fast = graphcache.wrap(load(network))
    with pytest.raises(error) as caught:
        fast.prepare(shapes)
    assert message in str(caught.value)
    assert calls(fast) == 0


def test_an_engine_that_cannot_be_captured_says_why(fake: Torch) -> None:
    done = graphcache.wrap(load("conditional")).prepare((3,), (4,))
    assert done.signatures == 0
    assert {each.cause.reason for each in done.refused} == {Reason.NOT_CAPTURABLE}
    assert {each.call for each in done.refused} == {"x:3", "x:4"}


def test_an_engine_starts_from_a_manifest(fake: Torch, tmp_path: Path) -> None:
    first = graphcache.wrap(load("scaled"), max_graphs=32)
    with torch.no_grad():
        for size in range(1, 33):
            for _ in range(size):
                first(fake.driver.heap.tensor([1.0] * size))
    path = tmp_path / "scaled.json"
    assert [entry.hits for entry in first.save_manifest(path).entries] == list(range(31, -1, -1))
    second = graphcache.wrap(load("scaled"), capture="prepared")
    assert second.prepare(path).signatures == 32
    with torch.no_grad():
        for size in range(32, 0, -1):
            assert torch.equal(second(fake.driver.heap.tensor([1.5] * size)), torch.full((size,), 3.0))
    assert outcomes(second) == (32, 32, {})
    other = graphcache.wrap(load("overlapping"))
    assert [problem.field for problem in other.prepare(path).problems] == ["environment['module']"]


# ---- manifests


def served(path: Path, sizes: range = range(1, 33), **options: Any) -> Any:
    """A manifest of a process that served some sizes, the larger ones more often."""
    fast = graphcache.wrap(mlp(), **options)
    with torch.inference_mode():
        for size in sizes:
            for _ in range(size):
                fast(*xs(size))
    fast.save_manifest(path)
    return fast


def test_all_hits_from_the_first_call_on(tmp_path: Path) -> None:
    served(tmp_path / "m.json")
    fast = graphcache.wrap(mlp(), capture="prepared", on_failure="raise")
    done = fast.prepare(tmp_path / "m.json")
    assert (done.signatures, done.refused, done.left_out, done.problems) == (32, (), 0, ())
    with torch.inference_mode():
        for x in xs(*range(32, 0, -1)):
            assert same(fast(x), fast.module(x))
    assert outcomes(fast) == (32, 32, {})
    assert reason(fast, *xs(3)) is Reason.NOT_PREPARED, "in another mode"


def test_the_hottest_within_the_budget(tmp_path: Path) -> None:
    served(tmp_path / "m.json", range(1, 9))
    fast = graphcache.wrap(mlp(), max_graphs=3, capture="prepared")
    done = fast.prepare(str(tmp_path / "m.json"))
    assert (done.signatures, done.left_out, done.refused) == (3, 5, ())
    with torch.inference_mode():
        assert [fast.cache_info().hits for x in xs(8, 7, 6, 5) if same(fast(x), fast.module(x))] == [1, 2, 3, 3]


@on_files
@given(st.lists(st.tuples(tensors((torch.float32, torch.int64, torch.bool)), st.booleans()), min_size=1, max_size=5))
def test_what_one_process_captured_another_one_prepares(tmp_path: Path, given_: list[Any]) -> None:
    module = Fn(lambda _, x, flag: (x + 1 if flag else x * 2,))
    first = graphcache.wrap(module)
    for x, flag in given_:
        first(x, flag)
    manifest = first.save_manifest(tmp_path / "m.json")
    second = graphcache.wrap(module, capture="prepared")
    done = second.prepare(manifest)
    assert (done.signatures, done.problems) == (len(graphs_of(first).entries), ()), done.refused
    for x, flag in given_:
        assert same(second(x, flag), module(x, flag))
    assert second.cache_info().captures == done.signatures


def test_what_is_often_called_without_a_graph_is_remembered_too(tmp_path: Path) -> None:
    fast = graphcache.wrap(mlp(), capture="prepared")
    for count, x in zip((7, 8, 40), xs(1, 2, 3), strict=True):
        for _ in range(count):
            fast(x)
    entries = fast.save_manifest(tmp_path / "m.json").entries
    assert [(entry.hits, entry.spec.tensors[0].shape) for entry in entries] == [
        (40, (3, 4)),
        (8, (2, 4)),
    ]
    assert all(entry.eager_seconds is not None for entry in entries)


def test_parts_have_calls_of_their_own(tmp_path: Path) -> None:
    def make() -> Any:
        return graphcache.wrap(frozen(nn.Sequential(mlp(), nn.ReLU())), strategy="per_submodule", include=["0"])

    first = make()
    first(*xs(2))
    assert [entry.part for entry in first.save_manifest(tmp_path / "m.json").entries] == ["0"]
    second = make()
    assert second.prepare(tmp_path / "m.json").signatures == 1
    second(*xs(2))
    assert (second.cache_info().captures, second.cache_info().hits) == (1, 1)
    other = graphcache.wrap(second.module, strategy="whole_graph")
    assert [problem.field for problem in other.prepare(tmp_path / "m.json").problems] == ["entries[0].part"]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda text: None, "No such file or directory"),
        (lambda text: text[:-40], "digest: not that of the body"),
        (lambda text: text[:40], "not as it was written"),
        (lambda text: text.replace('"hits":', '"hits":1', 1), "digest: not that of the body"),
        (lambda text: "", "not as it was written"),
        (lambda text: '{"format": "another"}', "format: 'another' in place of 'graphcache.manifest'"),
    ],
)
def test_a_damaged_file_is_reported_once_and_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, expected: str
) -> None:
    path = tmp_path / "m.json"
    served(path, range(1, 4))
    text = damage(path.read_text())
    path.unlink() if text is None else path.write_text(text)
    fast = graphcache.wrap(mlp(), capture="prepared")
    done = fast.prepare(path, *xs(5))
    assert (done.signatures, len(done.problems)) == (1, 1), "the rest is prepared"
    assert expected in str(done.problems[0])
    warnings = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert warnings == [f"Sequential: of a manifest was ignored: {done.problems[0]}"]


def test_a_foreign_file_is_reported_with_the_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = served(tmp_path / "m.json", range(1, 4)).save_manifest(tmp_path / "m.json")
    wider = graphcache.wrap(mlp(5))
    for given_ in (tmp_path / "m.json", manifest):
        [problem] = wider.prepare(given_).problems
        assert problem.field == "environment['module']"
        assert ", but here it is 'Sequential " in problem.text
    monkeypatch.setattr(fingerprint, "__version__", "9.9.9")
    fast = graphcache.wrap(mlp())
    done = fast.prepare(tmp_path / "m.json")
    assert [str(each) for each in done.problems] == [
        f"{tmp_path / 'm.json'}: environment['graphcache']: '{graphcache.__version__}', but here it is '9.9.9'"
    ]
    assert calls(fast) == 0


def test_a_call_of_a_manifest_that_the_module_refuses_is_listed_and_the_others_go_on(tmp_path: Path) -> None:
    fast = graphcache.wrap(mlp())
    good, bad = (ManifestEntry(CallSpec.of((torch.zeros(2, width),), {}), hits=1) for width in (4, 3))
    done = fast.prepare(Manifest(fingerprint.environment(fast.module), [good, bad]))
    assert done.signatures == 1
    [problem] = done.problems
    assert "RuntimeError: mat1 and mat2 shapes cannot be multiplied" in problem.text


def test_what_a_call_raises_while_it_is_captured_ends_a_manifest_s_call_alone(tmp_path: Path) -> None:
    served(tmp_path / "m.json", range(1, 4))
    fast = graphcache.wrap(mlp())
    attempt, made = dispatcher_of(fast).target.recorder.attempt, []

    def second_fails(*args: Any, **options: Any) -> Any:
        made.append(args)
        if len(made) == 2:
            raise MemoryError("no\nroom")
        return attempt(*args, **options)

    dispatcher_of(fast).target.recorder.attempt = second_fails
    done = fast.prepare(tmp_path / "m.json")
    assert (done.signatures, len(done.problems)) == (2, 1)
    assert done.problems[0].text.endswith("MemoryError: no room")
    del made[:]
    with pytest.raises(MemoryError), torch.inference_mode():
        fast.prepare(*xs(8, 7))
    assert fast.cache_info().graphs == 3
    assert not any(entry.pinned for entry in graphs_of(fast).entries.values())


def test_nothing_runs_into_a_capture_of_the_caller_s(fake: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = graphcache.wrap(load("scaled"))
    monkeypatch.setattr(misses, "forbidden", lambda **_: Reason.OUTER_CAPTURE)
    monkeypatch.setattr(dispatcher_of(fast), "run", lambda *_: pytest.fail("it ran"))
    done = fast.prepare((3,))
    assert (done.signatures, [each.cause.reason for each in done.refused]) == (0, [Reason.OUTER_CAPTURE])


def test_what_was_measured_before_need_not_be_measured_again(tmp_path: Path) -> None:
    fast = graphcache.wrap(mlp(), capture="worthwhile")
    entry = ManifestEntry(
        CallSpec.of(tuple(xs(2)), {}), 9, "", 0, eager_seconds=1e-9, replay_seconds=1.0, capture_seconds=1.0
    )
    done = fast.prepare(Manifest(fingerprint.environment(fast.module), [entry]))
    assert [each.cause.reason for each in done.refused] == [Reason.NOT_WORTH_IT]
    assert (done.signatures, fast.cache_info().graphs) == (0, 0)


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    fast = served(tmp_path / "m.json", range(1, 3))
    before = (tmp_path / "m.json").read_bytes()
    with pytest.raises(ConfigError, match="cannot be written: No such file or directory; what was there is as it was"):
        fast.save_manifest(tmp_path / "nowhere" / "m.json")
    for bad in (None, 3, "", "a\0b"):
        with pytest.raises(ConfigError, match=r"^path="):
            fast.save_manifest(bad)
    assert (tmp_path / "m.json").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "m.json"]


def test_calls_that_cannot_be_told_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fast = graphcache.wrap(Fn(lambda _, x, why: x * 2))
    fast(torch.ones(2), Reason.GRAD)
    fast(torch.ones(2), 1)
    with caplog.at_level(logging.INFO, "graphcache"):
        assert len(fast.save_manifest(tmp_path / "m.json").entries) == 1
    assert caplog.messages == ["Fn: 1 calls were left out of the manifest"]
    assert json.loads((tmp_path / "m.json").read_text())["format"] == "graphcache.manifest"


# ---- thrashing


def test_a_module_that_thrashes_warns_once_with_advice(caplog: pytest.LogCaptureFixture) -> None:
    fast = graphcache.wrap(mlp(), max_graphs=4, verify=False)
    for _ in range(12):
        for x in xs(1, 2, 3, 4, 5, 6):
            fast(x)
    [said] = [each.getMessage() for each in caplog.records if "captured again" in each.getMessage()]
    assert said.startswith("Sequential: graphs are evicted and captured again: ")
    assert "raise max_graphs (now 4), max_bytes (now None) or the budget of the process (6 signatures take" in said


def test_graphs_that_fit_or_are_dropped_on_purpose_do_not(caplog: pytest.LogCaptureFixture) -> None:
    fast = graphcache.wrap(mlp(), max_graphs=8, verify=False)
    for _ in range(10):
        for x in xs(1, 2, 3, 4, 5, 6):
            fast(x)
        fast.clear()
    small = graphcache.wrap(mlp(), max_graphs=2, verify=False)
    for _ in range(20):
        small.prepare(*xs(1, 2))
        small.prepare(*xs(3, 4))
    assert small.cache_info().captures == 80
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert capture_manager.log.name == "graphcache"


def test_a_prepared_call_is_captured_again_after_a_change() -> None:
    module = nn.Linear(4, 2).requires_grad_(False)
    fast, x = graphcache.wrap(module, capture="prepared"), torch.ones(3, 4)
    with torch.inference_mode():
        fast.prepare(x)
        fast(x)
        module.note = "set by the application"
        assert torch.equal(fast(x), module(x))
        fast(x)
    info = fast.cache_info()
    assert (info.captures, info.hits, info.eager) == (2, 2, {})


def test_a_pinned_graph_is_pinned_when_it_was_captured_again() -> None:
    module = nn.Linear(4, 2).requires_grad_(False)
    fast = graphcache.wrap(module, max_graphs=2)
    pinned, *others = (torch.ones(size, 4) for size in (1, 2, 3, 4))
    fast.prepare(pinned, pin=True)
    module.note = "set by the application"
    fast(pinned)
    for x in others:
        fast(x)
    hits = fast.cache_info().hits
    fast(pinned)
    assert fast.cache_info().hits == hits + 1


class Counts(nn.Module):
    """Updates one buffer in place, and puts another tensor in the place of the other one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(4))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x)
        self.last = self.last * 0.5 + x
        return self.total + self.last


class Adds(Counts):
    """Updates one buffer in place."""

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x)
        return self.total * 1


@pytest.mark.parametrize("kind", [Counts, Adds])
def test_state_is_put_back(kind: type[Counts]) -> None:
    fast, eager = graphcache.wrap(kind()), kind()
    with torch.inference_mode():
        done = fast.prepare(torch.full((4,), 7.0))
        assert [each.cause.reason for each in done.refused] == [Reason.MUTATES]
        assert same(dict(fast.state_dict()), dict(kind().state_dict()))
        for _ in range(5):
            assert torch.equal(fast(torch.ones(4)), eager(torch.ones(4)))
        assert same(dict(fast.state_dict()), dict(eager.state_dict()))
    assert fast.cache_info().hits > 0


def test_state_that_was_saved_is_what_is_served(tmp_path: Path) -> None:
    fast = graphcache.wrap(Adds())
    with torch.inference_mode():
        for _ in range(4):
            fast(torch.ones(4))
        before = {name: value.clone() for name, value in fast.state_dict().items()}
        fast.save(tmp_path / "counts.gcache")
    again = graphcache.load(tmp_path / "counts.gcache", into=Adds(), prepare=True)
    assert same(dict(again.state_dict()), before)
    with torch.inference_mode():
        assert torch.equal(again(torch.ones(4)), fast(torch.ones(4)))
