"""The doctor names every line that forbids a graph, and no other."""

import contextlib
import functools
import inspect
import queue
import random
import re
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphcache
from graphcache import Reason, debug
from graphcache.errors import ConfigError
from graphcache.observe.breaks import find_capture_breaks
from tests.helpers import Fn, frozen, mlp, outcomes
from tests.observe import broken


def marked(kind):
    """Line and reason of each line that is marked as a break."""
    lines, first = inspect.getsourcelines(kind)
    found = [(first + index, re.search(r"# break: (\w+)", line)) for index, line in enumerate(lines)]
    return {(line, mark[1]) for line, mark in found if mark}


def named(found):
    return {(each.place.line, each.reason.value) for each in found}


def test_seven_breaks_with_their_lines():
    assert len(marked(broken.Seven)) == 7
    found = find_capture_breaks(broken.Seven(), torch.randn(6, 4))
    assert named(found) == marked(broken.Seven)
    assert len(found) == 7
    assert {each.place.file for each in found} == {broken.__file__}
    assert [each.operation for each in found] == [
        "Tensor.item",
        "Tensor.nonzero",
        "Tensor.__getitem__",
        "Tensor.cpu",
        "torch.tensor",
        "Tensor.__getitem__",
        "torch.dropout",
    ]
    assert [each.place.module for each in found] == [*[""] * 6, "head.1"]
    assert found[0].place.code == "scale = x.abs().max().item()  # break: host_read"


def test_more_breaks_and_nothing_else():
    found = find_capture_breaks(broken.More(), torch.randn(6, 4))
    assert named(found) == marked(broken.More) | marked(broken.Head)
    [often] = [each for each in found if each.times > 1]
    assert (often.times, often.place.code) == (3, "x.max().item()  # break: host_read")
    assert {each.place.module for each in found if each.reason is Reason.RANDOM} == {"", "head.dropout"}
    assert {each.place.module for each in found if each.operation == "attribute 'calls'"} == {"head"}


def test_what_can_be_captured_has_no_breaks():
    for module in (mlp(), nn.ReLU(), frozen(nn.Sequential(nn.Linear(4, 4), nn.Dropout()))):
        assert find_capture_breaks(module, torch.randn(3, 4)) == []
        fast = graphcache.wrap(module)
        with torch.no_grad():
            fast(torch.randn(3, 4))
        assert fast.cache_info().captures == 1


@pytest.mark.parametrize(
    "layer",
    [nn.LayerNorm(4), nn.Conv1d(3, 2, 2), nn.GRU(4, 2), nn.MultiheadAttention(4, 2), nn.TransformerEncoderLayer(4, 2)],
)
def test_layers_of_torch_have_no_breaks(layer):
    x = torch.randn(2, 3, 4)
    args = (x, x, x) if isinstance(layer, nn.MultiheadAttention) else (x,)
    with torch.no_grad():
        assert find_capture_breaks(frozen(layer), *args) == []


def test_state_that_is_rebound_is_no_break():
    def forward(m, x):
        m.h = m.h * 0.5 + x
        return m.h * 2

    module = Fn(forward)
    module.register_buffer("h", torch.zeros(3))
    assert find_capture_breaks(module, torch.ones(3)) == []
    module.h = torch.zeros(())
    [found] = find_capture_breaks(module, torch.ones(3))
    assert found.reason is Reason.MUTATES


def test_a_break_is_told_in_words():
    [found] = find_capture_breaks(Fn(lambda m, x: x * x.sum().item()), torch.ones(3))
    assert re.match(r".*test_breaks\.py:\d+: Tensor\.item: host_read, the host reads a value", str(found))
    assert "\n    [found] = find_capture_breaks(" in str(found)
    assert str(found).endswith(f"To change that: {found.remedy}.")


def test_every_reason_of_a_real_refusal_is_found_beforehand():
    bodies = {
        Reason.HOST_READ: [lambda m, x: x * x.sum().item(), lambda m, x: x + len(x.tolist())],
        Reason.DATA_DEPENDENT: [lambda m, x: x[x > 0], lambda m, x: x + torch.nonzero(x).numel()],
        Reason.RANDOM: [lambda m, x: x + torch.rand_like(x), lambda m, x: nn.functional.dropout(x, 0.5)],
        Reason.MUTATES: [
            lambda m, x: (setattr(m, "calls", m.calls + 1), x + 1)[1],
            lambda m, x: (m.seen.append(1), x + 1)[1],
        ],
    }
    for reason, functions in bodies.items():
        for function in functions:
            module = Fn(function, seen=[], calls=0)
            assert {each.reason for each in find_capture_breaks(module, torch.ones(3))} == {reason}
            fast = graphcache.wrap(module)
            fast(torch.ones(3))
            assert outcomes(fast) == (0, 0, {reason: 1})


def _annotated(m, x):
    with torch.profiler.record_function("part"):
        return x.relu() + 1


def _normed(m, x):
    return nn.functional.batch_norm(x, m.mean, m.var, training=True)


def _by_mask(m, x, value):
    y = x.clone()
    y[x > 0] = value(x)
    return y


ALIKE = {
    "annotations": (_annotated, None),
    "an empty tensor": (
        lambda m, x: torch.cat([torch.tensor([], device=x.device), x.new_tensor([]), x.view(-1)]),
        None,
    ),
    "an empty index": (lambda m, x: x[:, []].sum() + x, None),
    "a move of nothing": (lambda m, x: x + x[:0].cpu().numel(), None),
    "one_hot of given classes": (lambda m, x: nn.functional.one_hot((x > 0).long(), 2) * 2, None),
    "one_hot": (lambda m, x: nn.functional.one_hot((x > 0).long()).sum(), Reason.HOST_READ),
    "quantile": (lambda m, x: x.quantile(0.5) + torch.nanquantile(x, 0.25), None),
    "repeat_interleave": (lambda m, x: x.repeat_interleave((x[:, 0] > 9).long() + 2, 0), Reason.DATA_DEPENDENT),
    "repeat_interleave of a given size": (
        lambda m, x: x.repeat_interleave((x[:, 0] > 9).long() + 2, 0, output_size=6),
        None,
    ),
    "questions after shapes": (lambda m, x: x + x.is_same_size(x), None),
    "an inverse": (lambda m, x: torch.linalg.inv(x.T @ x + 9 * torch.eye(4, device=x.device)), Reason.HOST_READ),
    "an inverse without a check": (lambda m, x: torch.linalg.inv_ex(x.T @ x)[0].isnan(), None),
    "all": (lambda m, x: x * 2 if (x > 0).all() else x * 3, Reason.HOST_READ),
    "dropout": (lambda m, x: nn.functional.dropout(x, 0.5), Reason.RANDOM),
    "running statistics": (_normed, None),
    "a number where a mask says": (lambda m, x: _by_mask(m, x, lambda x: 7), None),
    "a value where a mask says": (lambda m, x: _by_mask(m, x, lambda x: x.sum()), Reason.DATA_DEPENDENT),
}


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ALIKE)
def test_the_doctor_and_a_capture_agree_in_every_mode(name, mode):
    function, reason = ALIKE[name]
    module, x = Fn(function), torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    module.register_buffer("mean", torch.zeros(4))
    module.register_buffer("var", torch.ones(4))
    with mode(), graphcache.wrap(module) as fast:
        assert {each.reason for each in find_capture_breaks(module, x)} == ({reason} if reason else set())
        fast(x)
        assert outcomes(fast) == ((0, 0, {reason: 1}) if reason else (0, 1, {}))


def test_a_tensor_made_beside_another_lies_where_that_one_does():
    found = find_capture_breaks(Fn(lambda m, x: x + x.new_tensor([1.0, 2.0, 3.0])), torch.ones(3))
    assert [each.operation for each in found] == ["Tensor.new_tensor"]


def test_the_call_leaves_the_tensors_and_the_generator_alone():
    module = Fn(lambda m, x: x.add_(torch.rand(3)))
    x, before = torch.ones(3), torch.get_rng_state()
    assert [each.reason for each in find_capture_breaks(module, x)] == [Reason.RANDOM, Reason.HOST_READ]
    assert torch.equal(x, torch.ones(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_wrapped_module_is_looked_into_without_its_graphs():
    fast = graphcache.wrap(Fn(lambda m, x: x * x.sum().item()))
    assert len(find_capture_breaks(fast, torch.ones(3))) == 1
    assert outcomes(fast) == (0, 0, {})


class Counts(nn.Module):
    """State in attributes, in containers, and in a submodule that is called by another."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.seen = {"sizes": []}

    def forward(self, x):
        self.count += 1
        self.other = self.count == 1
        self.seen["sizes"].append(len(x))
        setattr(self, "hidden", len(x))  # noqa: B010
        return self.where(x)

    def where(self, x):
        return self.found(x)


class Holds(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.parts = nn.ModuleList([inner])

    def forward(self, x):
        return functools.reduce(lambda value, part: part(value), self.parts, x)


def test_the_innermost_line_of_the_user_and_the_module_whose_code_it_is():
    inner = Counts()
    inner.found = lambda x: x * x.sum().item()
    found = find_capture_breaks(Holds(inner), torch.zeros(1))[0].place
    assert (found.file, found.module) == (__file__, "parts.0")
    assert found.code == "inner.found = lambda x: x * x.sum().item()"


def test_changed_state_is_found_at_any_depth_with_the_line_that_assigns_it():
    inner = Counts()
    inner.found = torch.relu
    found = {each.operation: each for each in find_capture_breaks(Holds(inner), torch.zeros(1))}
    assert {name: each.place.code for name, each in found.items()} == {
        "attribute 'count'": "self.count += 1",
        "attribute 'other'": "self.other = self.count == 1",
        "attribute 'seen'": "",
        "attribute 'hidden'": "",
    }
    assert {(each.reason, each.place.module) for each in found.values()} == {(Reason.MUTATES, "parts.0")}
    lines, first = inspect.getsourcelines(Counts)
    for name in ("count", "other"):
        place = found[f"attribute {name!r}"].place
        assert lines[place.line - first].strip() == place.code
    for name in ("seen", "hidden"):
        # No line assigns it: that of forward.
        assert lines[found[f"attribute {name!r}"].place.line - first].strip() == "def forward(self, x):"
    assert "self.parts[0].seen['sizes']: " in found["attribute 'seen'"].detail


def test_a_class_without_source_has_no_line():
    kind = type("Made", (nn.Module,), {"forward": lambda self, x: (setattr(self, "n", 1), x)[1]})
    kind.forward.__code__ = kind.forward.__code__.replace(co_filename="<made>")
    [found] = find_capture_breaks(kind(), torch.zeros(1))
    assert (found.operation, found.place.code) == ("attribute 'n'", "")


def _written_past_the_dispatcher(m, x):
    m.state.numpy()[0] += 1
    return x * 2


EFFECTS = {
    "clock": (lambda m, x: x + time.time() * 0, Reason.RANDOM, "time.time"),
    "random of Python": (lambda m, x: x * random.random(), Reason.RANDOM, "Random.random"),
    "random of NumPy": (lambda m, x: x * float(np.random.rand()), Reason.RANDOM, "numpy"),
    "a generator of its own": (lambda m, x: x + torch.rand(3, generator=m.own).to(x), Reason.RANDOM, "torch.rand"),
    "a queue": (lambda m, x: (m.queue.put(1), x * 2)[1], Reason.HOST_READ, "SimpleQueue.put"),
    "an argument": (lambda m, x, log: (log.append(1), x * 2)[1], Reason.MUTATES, "args[1]"),
    "past the dispatcher": (_written_past_the_dispatcher, Reason.MUTATES, "attribute 'state'"),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_every_effect_of_an_observed_call_is_found(name):
    function, reason, operation = EFFECTS[name]
    module = Fn(function, own=torch.Generator().manual_seed(1), queue=queue.SimpleQueue())
    module.register_buffer("state", torch.zeros(3))
    args = [torch.ones(3), *([[]] if name == "an argument" else [])]
    found = find_capture_breaks(module, *args)
    assert operation in {each.operation for each in found if each.reason is reason}, list(map(str, found))
    fast = graphcache.wrap(module)
    fast(*args)
    [seen] = fast.cache_info().eager
    assert seen in {each.reason for each in found}


def test_state_that_is_ignored_is_no_break():
    module = Fn(lambda m, x: (m.calls.append(1), x * 2)[1], calls=[])
    assert [each.operation for each in find_capture_breaks(module, torch.ones(3))] == ["attribute 'calls'"]
    assert find_capture_breaks(graphcache.wrap(module, ignore=["self.calls"]), torch.ones(3)) == []


def test_state_that_cannot_be_watched_is_told_and_operations_all_the_same(monkeypatch):
    monkeypatch.setattr("graphcache.keys.state_walk.MAX_ENTRIES", 10)
    module = Fn(lambda m, x: x * x.sum().item(), table=list(range(1000)))
    first, second = find_capture_breaks(module, torch.ones(3))
    assert (first.reason, first.place.line) == (Reason.UNOBSERVED, 0)
    assert second.operation == "Tensor.item"


def test_under_a_profiler_it_says_what_to_do():
    before = sys.getprofile()
    sys.setprofile(lambda *_: None)
    try:
        with pytest.raises(ConfigError, match="stop the profiler first"):
            find_capture_breaks(nn.ReLU(), torch.ones(3))
    finally:
        sys.setprofile(before)


def test_keyword_arguments_and_what_cannot_be_copied():
    module = Fn(lambda m, x, *, scale, other: x * scale.item())
    assert len(find_capture_breaks(module, torch.ones(3), scale=torch.tensor(2.0), other=object())) == 1


def test_what_the_module_raises_goes_through():
    with pytest.raises(ZeroDivisionError):
        find_capture_breaks(Fn(lambda m, x: x.sum().item() and 1 / 0), torch.ones(3))
    assert find_capture_breaks(nn.ReLU(), torch.ones(3)) == []


def test_code_without_source_has_a_line_of_its_own():
    space = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        self.n = 1\n        return x.sum().item()", space)
    read, state = find_capture_breaks(space["Made"](), torch.ones(3))
    assert (read.place.file, read.place.line, read.place.code) == ("<string>", 4, "")
    assert (state.operation, state.place.line) == ("attribute 'n'", 0)
    assert "(no source)" in str(state)


@pytest.mark.parametrize("what", [None, 3, torch.zeros(1), nn.ReLU])
def test_what_is_no_module_is_refused(what):
    with pytest.raises(ConfigError, match=r"expected an nn\.Module, got"):
        debug.find_capture_breaks(what)


@given(st.lists(st.sampled_from(["item", "mask", "cpu", "list", "relu", "add"]), max_size=6))
def test_each_break_is_found_wherever_it_stands(steps):
    def forward(m, x):
        for step in steps:
            if step == "item":
                x = x * x.sum().item()
            elif step == "mask":
                x = x + x[x > 0].sum()
            elif step == "cpu":
                x = x + x.cpu().numel()
            elif step == "list":
                x = x + len(x.tolist())
            else:
                x = x.relu() if step == "relu" else x + 1
        return x

    found = find_capture_breaks(Fn(forward), torch.ones(3))
    expected = {name: steps.count(name) for name in ("item", "mask", "cpu", "list") if name in steps}
    names = {"Tensor.item": "item", "Tensor.__getitem__": "mask", "Tensor.cpu": "cpu", "Tensor.tolist": "list"}
    assert {names[each.operation]: each.times for each in found} == expected
