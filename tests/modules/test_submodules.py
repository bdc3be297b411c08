"""What ``strategy="auto"`` finds by itself, and what ``exclude`` keeps out."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphcache
from graphcache import CachedModule, Reason, native
from graphcache.errors import CaptureError, ConfigError
from tests.helpers import Fn, dispatcher_of, frozen, graphs_of, in_threads, mlp, outcomes, replays, same, settled

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Selects(nn.Module):
    """Chooses rows by their values, where asked to."""

    def forward(self, x: Tensor) -> Tensor:
        return x[x.sum(1) > x.sum(1).mean()] if x.shape[0] > 1 else x


class Head(nn.Module):
    def __init__(self, nms: nn.Module) -> None:
        super().__init__()
        self.score = mlp()
        self.nms = nms
        self.box = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.box(self.nms(self.score(x)))


class Detector(nn.Module):
    """What forbids a graph is two levels down; a list of modules is never called itself."""

    def __init__(self, nms: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(mlp(), mlp())
        self.more = nn.ModuleList([mlp(), mlp()])
        self.head = Head(nms)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        for each in self.more:
            x = each(x)
        return self.head(x)


@pytest.fixture
def detector() -> nn.Module:
    return frozen(Detector(Selects()))


def captured(fast: CachedModule) -> set[str]:
    """The parts that hold graphs of their own."""
    return {name for name, part in fast.parts.items() if graphs_of(part).entries}


def test_the_largest_parts_around_the_culprit_are_captured(detector):
    fast = graphcache.wrap(detector)
    for _ in range(5):
        assert same(fast(X), detector(X))
    assert captured(fast) == {"body", "more.0", "more.1", "head.score", "head.box"}
    assert set(fast.parts) == {"body", "more.0", "more.1", "head", "head.score", "head.nms", "head.box"}
    assert fast.cache_info().eager == {Reason.DATA_DEPENDENT: 5}
    assert fast.cache_info().graphs == 5


def test_nothing_is_taken_apart_while_the_whole_can_be_captured():
    fast = graphcache.wrap(frozen(Detector(nn.Identity())))
    for _ in range(3):
        fast(X)
    assert fast.parts == {}
    assert outcomes(fast) == (2, 1, {})


def test_the_choice_is_kept_per_signature(detector):
    fast = graphcache.wrap(detector)
    one = X[:1]
    for x in (X, one, X, one, X, one, X, one):
        assert same(fast(x), detector(x))
    assert len(graphs_of(fast).entries) == 1, "of the single row, which needs no choice"
    assert replays(fast, one)
    assert fast.cache_info().eager == {Reason.DATA_DEPENDENT: 4}
    assert "head.score" in captured(fast)


def test_one_warning_is_enough_and_it_names_the_place(detector, caplog):
    fast = graphcache.wrap(detector)
    for _ in range(5):
        fast(X)
    [said] = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert "Detector ran eagerly: data_dependent" in said
    assert "(at head.nms: aten.index.Tensor)" in said


@pytest.mark.parametrize(
    ("culprit", "why"),
    [
        (lambda _, x: x * x.sum().item(), Reason.HOST_READ),
        (lambda _, x: x + torch.rand(4), Reason.RANDOM),
        (lambda self, x: (setattr(self, "seen", self.seen + 1), x)[1], Reason.MUTATES),
        (lambda self, x: x * len({*"ab"}) + self.weight.view(4), None),
    ],
)
def test_whatever_is_the_matter(culprit, why):
    module = frozen(Detector(Fn(culprit, seen=0, weight=nn.Parameter(torch.ones(4)))))
    twin, fast = copy.deepcopy(module), graphcache.wrap(module)
    # An effect is looked for again at the second call, of the whole and then of the part that is to blame.
    for _ in range(6):
        torch.manual_seed(1)
        wanted = twin(X)
        torch.manual_seed(1)
        assert same(fast(X), wanted)
    assert module.head.nms.seen == twin.head.nms.seen
    if why is None:
        assert outcomes(fast) == (5, 1, {})
    else:
        assert fast.cache_info().eager == {why: 6}
        assert {"body", "head.score", "head.box"} <= captured(fast)


def test_arguments_of_the_whole_that_no_signature_describes():
    module = frozen(Fn(lambda self, x, other: self.a(x) * len(other), a=mlp()))
    fast = graphcache.wrap(module)
    for _ in range(3):
        assert same(fast(X, {1, 2}), module(X, {1, 2}))
    assert captured(fast) == {"a"}
    assert fast.cache_info().eager == {Reason.ARGUMENT: 3}
    assert fast.cache_info().hits == 2


def test_what_a_part_is_not_to_blame_for_takes_nothing_apart():
    fast = graphcache.wrap(Detector(Selects()).requires_grad_(True))
    fast(X).sum().backward()
    assert (fast.parts, fast.cache_info().eager) == ({}, {Reason.GRAD: 1})
    small = graphcache.wrap(frozen(Detector(nn.Identity())), max_bytes=1)
    small(X)
    assert (small.parts, small.cache_info().eager) == ({}, {Reason.OVER_BUDGET: 1})


def test_submodules_that_are_named_are_the_only_ones(detector):
    fast = graphcache.wrap(detector, include=["body"])
    for _ in range(4):
        fast(X)
    assert set(fast.parts) == {"body"}


def test_a_child_that_is_wrapped_already_keeps_its_own_graphs():
    inner = graphcache.wrap(mlp())
    module = frozen(Fn(lambda self, x: self.other(self.inner(x)) * x.sum().item(), inner=inner, other=mlp()))
    fast = graphcache.wrap(module)
    for _ in range(4):
        assert same(fast(X), module(X))
    assert set(fast.parts) == {"other"}
    assert inner.cache_info().captures == 1


def test_a_submodule_in_several_places_is_one_part():
    shared = mlp()
    module = frozen(Fn(lambda self, x: self.b(self.a(x)) * x.sum().item(), a=shared, b=shared))
    fast = graphcache.wrap(module)
    for _ in range(4):
        assert same(fast(X), module(X))
    assert set(fast.parts) == {"a"}
    assert outcomes(fast.parts["a"]) == (5, 1, {})


def test_a_submodule_on_two_levels_is_found_on_both_and_left_as_it_was():
    shared = mlp()
    inner = Fn(lambda self, x: self.a(x) * x.sum().item(), a=shared)
    module = frozen(Fn(lambda self, x: self.inner(self.a(x)), a=shared, inner=inner))
    fast = graphcache.wrap(module)
    for _ in range(5):
        assert same(fast(X), module(X))
    assert set(fast.parts) == {"a", "inner", "inner.a"}
    assert "forward" not in shared.__dict__
    assert fast.parts["a"].cache_info().evictions == fast.parts["inner.a"].cache_info().evictions == 0


def test_two_wrapped_modules_over_the_same_one_leave_it_as_it_was(detector):
    both = [graphcache.wrap(detector), graphcache.wrap(detector, exclude=["head.nms"])]

    def work(index: int) -> None:
        for step in range(25):
            x = torch.linspace(-index, 1, 4 * (2 + step % 3)).reshape(-1, 4)
            assert same(both[index % 2](x), detector.forward(x))

    in_threads(work, 4)
    assert not any("forward" in each.__dict__ for each in detector.modules())


def test_at_rest_everything_is_what_it_was(detector):
    before = {name: dict(each.__dict__) for name, each in detector.named_modules()}
    state, names = list(detector.state_dict()), [name for name, _ in detector.named_modules()]
    blob = pickle.dumps(detector)
    fast = graphcache.wrap(detector)
    for _ in range(4):
        fast(X)
    with pytest.raises(RuntimeError):
        fast(torch.zeros(2, 3))
    assert {name: dict(each.__dict__) for name, each in detector.named_modules()} == before
    assert (list(fast.state_dict()), [name for name, _ in fast.named_modules()]) == (state, names)
    assert pickle.dumps(detector) == blob
    fast.close()
    assert same(pickle.loads(blob)(X), detector(X))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_what_is_put_on_a_part_is_noticed(own: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its guard is made and asked while something stands in for its ``forward``."""

    class Part(nn.Module):
        scale = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    if not compiled:
        monkeypatch.setattr(native, "guard_type", lambda: None)
    module = nn.Sequential(Part(), Selects())
    part: Any = module[0]
    if own:
        part.forward = lambda x: x * part.scale + 1
    fast = graphcache.wrap(module)

    def check() -> None:
        for _ in range(3):
            assert same(fast(X), module(X))
        assert replays(fast.parts["0"], X)

    check()
    part.scale = 3.0
    check()
    part.forward = lambda x: x * 5
    check()
    part.forward = lambda x: x * 7
    check()
    del part.forward
    check()
    part.other = None
    check()


def test_hooks_of_parts_run_once_a_call_and_global_ones_too(detector):
    seen: list[str] = []
    detector.head.score.register_forward_hook(lambda *_: seen.append("own"))
    fast = graphcache.wrap(detector)
    for _ in range(4):
        fast(X)
    seen.clear()
    fast(X)
    assert seen == ["own"]
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append("global") if module is detector.head.score else None
    )
    try:
        for _ in range(3):
            fast(X)
        seen.clear()
        fast(X)
        assert sorted(seen) == ["global", "own"]
    finally:
        handle.remove()


def test_a_child_that_is_exchanged_is_found_and_the_account_stays(detector):
    fast = graphcache.wrap(detector)
    for _ in range(4):
        fast(X)
    before = fast.cache_info()
    detector.body = mlp()
    for _ in range(4):
        assert same(fast(X), detector(X))
    after = fast.cache_info()
    assert fast.parts["body"].module is detector.body
    assert captured(fast) >= {"body", "head.score", "head.box"}
    assert after.hits > before.hits
    assert after.captures > before.captures
    assert after.graphs == 5
    for _ in range(20):
        detector.body = mlp()
        for _ in range(3):
            fast(X)
    assert fast.cache_info().captures > after.captures
    assert len(fast.parts) == 7


def test_children_that_are_exchanged_while_threads_call_fail_nobody(detector):
    fast = graphcache.wrap(detector)
    for _ in range(4):
        fast(X)
    bodies = [detector.body, copy.deepcopy(detector.body)]

    def work(index: int) -> None:
        for step in range(25):
            if index == 0:
                detector.body = bodies[step % 2]
            else:
                assert same(fast(X), detector(X))

    in_threads(work, 4)


def test_clearing_and_closing_reach_what_was_found(detector):
    fast = graphcache.wrap(detector)
    for _ in range(4):
        fast(X)
    fast.clear()
    assert fast.cache_info().graphs == 0
    for _ in range(4):
        assert same(fast(X), detector(X))
    assert fast.cache_info().graphs == 5
    parts = list(fast.parts.values())
    fast.close()
    assert all(dispatcher_of(part).captures.closed for part in parts)
    assert fast.cache_info().graphs == 0


def test_preparing_once_prepares_what_can_be_on_every_level(detector):
    fast = graphcache.wrap(detector)
    done = fast.prepare((X,))
    assert captured(fast) == {"body", "more.0", "more.1", "head.score", "head.box"}
    assert done.signatures == 5
    assert [each.cause.reason for each in done.refused] == [Reason.DATA_DEPENDENT]
    before = fast.cache_info()
    assert same(fast(X), detector(X))
    assert fast.cache_info().captures == before.captures
    assert fast.cache_info().hits == before.hits + 5


def test_preparing_while_threads_call(detector):
    fast = graphcache.wrap(detector)

    def work(index: int) -> None:
        for step in range(10):
            x = torch.linspace(-index, 1, 4 * (2 + step % 3)).reshape(-1, 4)
            if index == 0:
                fast.prepare((x,), progress=False)
            else:
                assert same(fast(x), detector(x))

    in_threads(work, 4)
    assert not any("forward" in each.__dict__ for each in detector.modules())


def test_a_manifest_of_parts_finds_them_in_another_process(detector, tmp_path):
    with graphcache.wrap(detector) as fast:
        for _ in range(5):
            fast(X)
        fast.save_manifest(tmp_path / "shapes.json")
    with graphcache.wrap(detector) as fast:
        done = fast.prepare(tmp_path / "shapes.json")
        assert done.problems == ()
        assert captured(fast) == {"body", "more.0", "more.1", "head.score", "head.box"}
        captures = fast.cache_info().captures
        assert same(fast(X), detector(X))
        assert same(fast(X), detector(X))
        assert fast.cache_info().captures == captures


def test_parts_in_the_background(detector):
    fast = graphcache.wrap(detector, capture_in="background")
    for _ in range(12):
        assert same(fast(X), detector(X))
        for each in (fast, *fast.parts.values()):
            settled(each)
    assert captured(fast) == {"body", "more.0", "more.1", "head.score", "head.box"}
    fast.close()


def test_on_request_the_whole_is_an_error(detector):
    with pytest.raises(CaptureError, match=r"^Detector: data_dependent: .*at head\.nms: aten\.index\.Tensor"):
        graphcache.wrap(detector, on_failure="raise")(X)


def counts(self: nn.Module, x: Tensor) -> Tensor:
    self.calls = self.calls + 1
    return x * 2


@pytest.mark.parametrize(
    "options", [{}, {"strategy": "per_submodule", "include": ["head.nms"]}], ids=["found", "named"]
)
@pytest.mark.parametrize("path", ["self.head.nms.calls", "*calls", "self.head.nms", "self.head"])
def test_paths_that_are_ignored_begin_at_the_whole(options, path):
    module = frozen(Detector(Fn(counts, calls=0)))
    module.body = Selects()
    fast = graphcache.wrap(module, ignore=[path], **options)
    for _ in range(6):
        fast(X)
    assert "head.nms" in captured(fast) or "head" in captured(fast)


def test_a_refusal_names_the_path_from_the_whole(detector):
    detector.head.nms = Fn(counts, calls=0)
    fast = graphcache.wrap(detector, strategy="per_submodule", include=["head.nms"])
    fast(X)
    [call] = fast.parts["head.nms"].explain().calls
    assert "self.head.nms.calls" in str(call)


# ---- exclude


def test_what_is_excluded_runs_eagerly_and_counts_nothing():
    module = frozen(Detector(nn.ReLU()))
    fast = graphcache.wrap(module, exclude=["head.nms"])
    for _ in range(3):
        assert same(fast(X), module(X))
    assert set(fast.parts) == captured(fast) == {"body", "more.0", "more.1", "head.score", "head.box"}
    assert outcomes(fast) == (10, 5, {})


@pytest.mark.parametrize(
    ("patterns", "parts"),
    [
        (["head"], {"body", "more.0", "more.1"}),
        (["*.nms", "more.?"], {"body", "head.score", "head.box"}),
        (["body", "body.0", "head.*"], {"more.0", "more.1"}),
        (("more",), {"body", "head"}),
    ],
)
def test_patterns(patterns, parts):
    module = frozen(Detector(nn.ReLU()))
    fast = graphcache.wrap(module, exclude=patterns)
    for _ in range(3):
        assert same(fast(X), module(X))
    assert set(fast.parts) == parts


def test_engines_or_named_submodules_without_what_is_excluded():
    module = frozen(Detector(Selects()))
    fast = graphcache.wrap(module, strategy="per_submodule", include=["body"], exclude=["head"])
    for _ in range(2):
        assert same(fast(X), module(X))
    assert set(fast.parts) == {"body"}
    with pytest.raises(ConfigError, match=r"Detector contains no engine that is not excluded; name the submodules"):
        graphcache.wrap(module, strategy="per_submodule", exclude=["head"])


@pytest.mark.parametrize(("name", "near"), [("head.mns", "head.nms"), ("bodi", "body"), ("", "body"), ("*q", "body")])
def test_a_pattern_that_matches_nothing_is_answered_with_near_names(name, near):
    with pytest.raises(ConfigError) as raised:
        graphcache.wrap(frozen(Detector(Selects())), exclude=[name])
    assert str(raised.value).startswith(f"exclude names {name!r}, which is no submodule; did you mean ")
    assert near in str(raised.value)


@pytest.mark.parametrize("value", ["head.nms", 3, None, [3], [["a"]], {"head.nms": 1}.items()])
def test_what_is_no_sequence_of_names(value):
    with pytest.raises(
        ConfigError, match=r"^exclude=.*: expected a sequence of submodule names, such as \['head\.nms'"
    ):
        graphcache.wrap(frozen(Detector(Selects())), exclude=value)


def test_nothing_left():
    with pytest.raises(ConfigError, match=r"^exclude=\['\*'\] leaves nothing of Detector that could be captured"):
        graphcache.wrap(frozen(Detector(Selects())), exclude=["*"])


@pytest.mark.parametrize("name", ["head", "head.nms", "head.nms.x", "body"])
def test_both_included_and_excluded(name):
    module = frozen(Detector(nn.Sequential(nn.ReLU())))
    options: dict[str, Any] = {"include": ["head.nms"], "exclude": [name]}
    if name == "body":
        assert set(graphcache.wrap(module, **options).parts) == {"head.nms"}
    elif name == "head.nms.x":
        with pytest.raises(ConfigError, match="which is no submodule"):
            graphcache.wrap(module, **options)
    else:
        with pytest.raises(ConfigError, match=rf"include names 'head.nms' and exclude matches '{name}'"):
            graphcache.wrap(module, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "whole_graph"}, "strategy='whole_graph' with exclude"),
        ({"buckets": {"x": {0: [1, 8]}}}, "buckets with exclude"),
    ],
)
def test_options_that_do_not_go_with_it(options, message):
    with pytest.raises(ConfigError, match=message):
        graphcache.wrap(frozen(Detector(Selects())), exclude=["head"], **options)


def test_a_session_is_one_graph_of_the_whole(detector):
    with pytest.raises(CaptureError, match=r"Detector: head\.nms is excluded, so that there is no graph of the whole"):
        graphcache.wrap(detector, exclude=["head.nms"]).session(X)


# ---- any tree


@st.composite
def trees(draw: st.DrawFn, depth: int = 3) -> nn.Module:
    kind = draw(
        st.sampled_from(("leaf", "leaf", "culprit", "sequence", "sequence", "function") if depth else ("leaf",))
    )
    if kind == "leaf":
        return draw(st.sampled_from((nn.ReLU, nn.Tanh, nn.Identity, mlp)))()
    if kind == "culprit":
        return Selects()
    inner = [draw(trees(depth - 1)) for _ in range(draw(st.integers(1, 3)))]
    if kind == "sequence":
        return nn.Sequential(*inner)
    return Fn(lambda self, x: self.list[-1](self.list[0](x)) + 1, list=nn.ModuleList(inner))


@given(trees())
def test_any_tree_answers_as_it_does_and_is_left_as_it_was(module):
    frozen(module)
    before = {name: dict(each.__dict__) for name, each in module.named_modules()}
    fast = graphcache.wrap(module)
    for x in (X, X[:1], X, X, X[:1], X):
        assert same(fast(x), module(x))
    assert {name: dict(each.__dict__) for name, each in module.named_modules()} == before
    for name, part in fast.parts.items():
        if part.parts:
            assert any(isinstance(each, Selects) for each in part.module.modules()), f"{name} was taken apart"


# ---- names in manifests


@given(st.text(max_size=12) | st.sampled_from(["", ".", "head", "head.nms.", "more", "more.0.x", "head..nms"]))
def test_any_name_of_a_part_is_answered(name):
    fast = graphcache.wrap(frozen(Detector(Selects())))
    dispatcher_of(fast).submodules.expand_to(name)
    assert set(fast.parts) <= {"body", "more.0", "more.1", "head", "head.score", "head.nms", "head.box"}
    assert same(fast(X), fast.module(X))


# ---- what PyTorch does around a call


@pytest.mark.parametrize("options", [{}, {"exclude": ["head.nms"]}, {"strategy": "per_submodule", "include": ["body"]}])
def test_tracers_see_the_module_and_no_graphs(options):
    module = frozen(Detector(nn.ReLU()))
    fast = graphcache.wrap(module, **options)
    fast(X)
    before = outcomes(fast)
    exported = torch.export.export(fast, (X,))
    assert torch.equal(exported.module()(X + 1), module(X + 1))
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X + 1), module(X + 1))
    assert outcomes(fast) == before
    assert not any("forward" in each.__dict__ for each in module.modules())
    assert same(fast(X), module(X))


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["i", "n", "a"]
)
def test_parts_answer_in_the_modes_of_the_call(detector, mode):
    fast = graphcache.wrap(detector)
    for _ in range(4):
        fast(X)
    with mode():
        for _ in range(5):
            answer = fast(X)
            assert same(answer, detector(X))
            assert answer.is_inference() == torch.is_inference_mode_enabled()
    assert same(fast(X), detector(X))
    assert len(graphs_of(fast.parts["body"]).entries) == 2
