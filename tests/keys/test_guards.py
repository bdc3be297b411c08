"""What makes graphs of a module stale, and what does not: behind ``wrap``, and the guard by itself."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from collections.abc import Callable, Iterator
from os import environ, getenv
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import graphcache
from graphcache import CachedModule, Reason, native
from graphcache.cache.key_table import ENOUGH_HITS
from graphcache.keys import state_nodes
from graphcache.keys.guards import ModuleGuard
from graphcache.keys.state_snapshot import StateSnapshot
from tests.helpers import Fn, dispatcher_of, frozen, graphs_of, mlp, outcomes, reason, replays, same

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Net(nn.Module):
    """A bit of everything: nested, with buffers, a flag that matters, and an empty list to be filled later."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.act: nn.Module = nn.ReLU()
        self.more = nn.ModuleList()
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("shift", None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.first(x.to(self.first.weight.dtype)))) * self.scale
        for module in self.more:
            y = module(y)
        return y if self.shift is None else y + self.shift


@pytest.fixture
def net() -> Net:
    return frozen(Net())  # type: ignore[return-value]


def captured(module: nn.Module, **options: Any) -> CachedModule:
    fast = graphcache.wrap(module, **options)
    fast(X)
    assert replays(fast, X)
    return fast


def replace_data(net: Net) -> None:
    net.first.weight.data = torch.randn(4, 4)


def replace_data_by_its_transpose(net: Net) -> None:
    net.first.weight.data = net.first.weight.data.t()


def replace_data_by_a_view(net: Net) -> None:
    net.norm.weight.data = net.norm.weight.data[:1].expand(4)


def transpose_in_place(net: Net) -> None:
    net.first.weight.t_()


def replace_parameter(net: Net) -> None:
    net.first.weight = nn.Parameter(torch.randn(4, 4), requires_grad=False)


def drop_parameter(net: Net) -> None:
    net.first.bias = None


def replace_buffer(net: Net) -> None:
    net.scale = torch.tensor(-3.0)


def add_buffer(net: Net) -> None:
    net.shift = torch.ones(4)


def assign_state(net: Net) -> None:
    other = frozen(Net())
    other.first.weight.mul_(3)
    net.load_state_dict(other.state_dict(), assign=True)


def to_double(net: Net) -> None:
    net.double()


def to_half(net: Net) -> None:
    net.to(torch.bfloat16)


def replace_submodule(net: Net) -> None:
    net.act = nn.Tanh()


def replace_submodule_in_two_steps(net: Net) -> None:
    del net.act
    gc.collect()
    net.act = nn.Tanh()


def append_submodule(net: Net) -> None:
    net.more.append(nn.Tanh())


def parametrise(net: Net) -> None:
    parametrize.register_parametrization(net.first, "weight", nn.Tanh())


def hook(net: Net) -> None:
    net.first.register_forward_hook(lambda module, args, output: output * 2)


def pre_hook(net: Net) -> None:
    net.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


STALE = [
    replace_data,
    replace_data_by_its_transpose,
    replace_data_by_a_view,
    transpose_in_place,
    replace_parameter,
    drop_parameter,
    replace_buffer,
    add_buffer,
    assign_state,
    to_double,
    to_half,
    replace_submodule,
    replace_submodule_in_two_steps,
    append_submodule,
    parametrise,
    hook,
    pre_hook,
]


@pytest.mark.parametrize("change", STALE, ids=lambda each: each.__name__)
def test_a_graph_of_before_is_never_used_after(change, net):
    fast = captured(net)
    change(net)
    for _ in range(3):
        assert same(fast(X), net(X))
    assert outcomes(fast)[0] >= 2


@pytest.mark.parametrize("change", STALE, ids=lambda each: each.__name__)
def test_the_parts_notice_it_too(change, net):
    whole = nn.Sequential(net, nn.ReLU())
    fast = graphcache.wrap(whole, strategy="per_submodule", include=["0"])
    for _ in range(2):
        fast(X)
    change(net)
    for _ in range(3):
        assert same(fast(X), whole(X))


def test_a_hook_that_is_removed_has_no_effect_any_more(net):
    handle = net.first.register_forward_hook(lambda module, args, output: output * 2)
    fast = captured(net)
    handle.remove()
    assert same(fast(X), net(X))


def test_a_hook_that_is_exchanged_for_another_one(net):
    handle = net.first.register_forward_hook(lambda module, args, output: output * 2)
    fast = captured(net)
    handle.remove()
    net.first.register_forward_hook(lambda module, args, output: output * 3)
    assert same(fast(X), net(X))


IN_PLACE = {
    "add_": lambda net: net.first.weight.add_(1),
    "copy_": lambda net: net.norm.running_mean.copy_(torch.arange(4)),
    "data": lambda net: net.first.bias.data.mul_(-2),
    "scalar buffer": lambda net: net.scale.fill_(5),
    "load_state_dict": lambda net: net.load_state_dict(frozen(Net()).state_dict()),
    "optimizer": lambda net: step(net),
}


def step(net: Net) -> None:
    net.requires_grad_(True)
    with torch.enable_grad():
        net(X).sum().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    net.requires_grad_(False)


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_change_in_place_is_seen_without_another_capture(name, net):
    fast = captured(net)
    with torch.no_grad():
        IN_PLACE[name](net)
    assert same(fast(X), net(X))
    assert fast.cache_info().captures == 1


def test_under_autocast_a_change_in_place_is_seen_too():
    module = nn.Linear(4, 4)
    fast = graphcache.wrap(module)
    for _ in range(3):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert same(fast(X), module(X))
        with torch.no_grad():
            module.weight.add_(1)


def test_a_capture_leaves_the_callers_autocast_as_it_was():
    module = nn.Linear(4, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        graphcache.wrap(module)(X)
        assert torch.is_autocast_cache_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") is torch.bfloat16


def test_training_and_evaluation_take_turns():
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).requires_grad_(False)
    fast = captured(module.eval())
    for training in (True, False, True, False):
        module.train(training)
        torch.manual_seed(1)
        answer = fast(X)
        torch.manual_seed(1)
        assert same(answer, module(X))
    assert fast.cache_info().eager == {Reason.RANDOM: 2}


def test_one_submodule_in_training_is_enough(net):
    fast = captured(net)
    twin = copy.deepcopy(net)
    net.norm.train()
    twin.norm.train()
    for _ in range(2):
        assert same(fast(X), twin(X))
        assert same(net.norm.running_mean, twin.norm.running_mean)
    # Running statistics are updated by a graph of its own.
    assert (fast.cache_info().captures, fast.cache_info().eager) == (2, {})


def test_a_parameter_that_comes_to_require_gradients_gets_them(net):
    fast = captured(net)
    net.first.bias.requires_grad_(True)
    assert reason(fast, X) is Reason.GRAD
    fast(X).sum().backward()
    assert net.first.bias.grad is not None
    net.requires_grad_(False)
    fast(X)
    assert replays(fast, X)


@pytest.mark.parametrize("args", [(), (3,), ([],)])
def test_without_any_tensor_in_the_call_parameters_still_get_their_gradients(args):
    module = Fn(lambda self, *_: self.weight * 2, weight=nn.Parameter(X.clone(), requires_grad=False))
    fast = graphcache.wrap(module)
    fast(*args)
    assert replays(fast, *args)
    module.requires_grad_(True)
    fast(*args).sum().backward()
    assert module.weight.grad is not None


def test_a_change_and_its_undoing_cost_captures_but_no_answers(net):
    fast = captured(net)
    old = net.scale
    for _ in range(3):
        net.scale = torch.tensor(7.0)
        assert same(fast(X), net(X))
        net.scale = old
        assert same(fast(X), net(X))


def test_what_was_blocked_is_tried_again_after_a_change():
    module = frozen(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4)).train())
    fast = graphcache.wrap(module.train())
    assert reason(fast, X) is Reason.RANDOM
    module.eval()
    assert reason(fast, X) is None


@pytest.mark.parametrize("how", ["close", "clear", "evict", "stale", "del"])
def test_weights_and_buffers_of_a_graph_go_with_it(how):
    net = frozen(nn.Linear(4, 4))
    fast = captured(net, max_graphs=1)
    old = weakref.ref(net.weight)
    static = weakref.ref(next(iter(graphs_of(fast).entries.values())).graph.graph)
    if how != "evict":
        net.weight = nn.Parameter(torch.randn(4, 4), requires_grad=False)
    if how == "close":
        fast.close()
    elif how == "clear":
        fast.clear()
    elif how == "evict":
        fast(X[:1])
    elif how == "stale":
        fast(X)
    else:
        del fast
    gc.collect()
    assert static() is None
    assert how == "evict" or old() is None


def test_an_unused_module_is_no_reason_to_capture_again():
    fast = captured(nn.Sequential(mlp(), nn.Identity()))
    assert replays(fast, X)


# ---- the guard by itself


class Plain(nn.Module):
    """Python state of several kinds, reached in several ways."""

    kind = "class"

    def __init__(self) -> None:
        super().__init__()
        self.linear = frozen(nn.Linear(4, 4))
        self.number = 1.5
        self.table: dict[str, Any] = {"a": [1, {"deep": 2}]}
        self.names = {"x"}
        counted = [0]
        self.closure = lambda x: x + counted[0]
        self.counted = counted

    def forward(self, x: Tensor, by: list[float] = [1.0]) -> Tensor:  # noqa: B006 - a default value is state as well
        return self.closure(self.linear(x)) * FACTOR[0] * by[0] + keyword()


def keyword(*, by: float = 1.0) -> float:
    return by


FACTOR = [1.0]
HOOKS: list[Any] = []

CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "an attribute": (lambda m: setattr(m, "number", 2.5), "self.number"),
    "a new attribute": (lambda m: setattr(m, "another", 1), "self.another"),
    "an attribute that is deleted": (lambda m: delattr(m, "number"), "self.number"),
    "an item at any depth": (lambda m: m.table["a"][1].update(deep=3), "self.table['a'][1]['deep']"),
    "a longer list": (lambda m: m.table["a"].append(3), "self.table['a']"),
    "a set": (lambda m: m.names.add("y"), "self.names"),
    "a variable of a closure": (lambda m: m.counted.append(1), "counted"),
    "a global": (lambda m: FACTOR.append(2.0), "FACTOR"),
    "a default value": (lambda m: type(m).forward.__defaults__[0].append(2.0), "__defaults__"),
    "an attribute of the class": (lambda m: setattr(type(m), "kind", "other"), "Plain.kind"),
    "a keyword's default value": (lambda m: keyword.__kwdefaults__.update(by=2.0), "__kwdefaults__"),
    "an attribute of the class that hides an inherited one": (lambda m: setattr(type(m), "training", True), "training"),
    "a method": (lambda m: setattr(type(m), "extra_repr", lambda self: ""), "Plain.extra_repr"),
    "a training flag": (lambda m: m.linear.train(), "self.linear.training"),
    "a hook": (lambda m: m.linear.register_forward_hook(lambda *_: None), "self.linear._forward_hooks"),
    "a hook of all modules": (
        lambda m: HOOKS.append(nn.modules.module.register_module_forward_hook(lambda *_: None)),
        "_global_forward_hooks",
    ),
    "a parameter": (lambda m: setattr(m.linear, "bias", None), "self.linear.bias"),
    "the data of a parameter": (lambda m: setattr(m.linear.weight, "data", torch.zeros(4, 4)), "self.linear.weight"),
    "a dtype": (lambda m: m.linear.double(), "dtype"),
    "a submodule": (lambda m: setattr(m, "linear", nn.ReLU()), "self.linear"),
}


@pytest.fixture
def plain() -> Iterator[Plain]:
    """The module; what it reaches outside of it is put back."""
    defaults = Plain.forward.__defaults__
    yield Plain()
    for handle in HOOKS:
        handle.remove()
    HOOKS.clear()
    assert defaults is not None
    del FACTOR[1:], defaults[0][1:]
    Plain.kind = "class"
    keyword.__kwdefaults__["by"] = 1.0
    for name in {"extra_repr", "training"} & vars(Plain).keys():
        delattr(Plain, name)


@pytest.mark.parametrize("armed", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_any_kind_is_noticed_and_named(
    name: str, armed: bool, plain: Plain, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "guard_type", lambda: library.Guard)
    change, path = CHANGES[name]
    guard = ModuleGuard(plain)
    guard.snapshot()
    if armed:
        guard.arm()
    assert guard.holds()
    assert guard.change_since(0) is None
    change(plain)
    assert not guard.holds()
    assert guard.has_changed()
    assert not guard.holds(), "asking does not make it right"
    assert guard.is_stale(False)
    found = guard.change_since(0)
    assert found is not None
    assert path in f"{found.path} {found.detail}"
    guard.snapshot()
    assert guard.holds()


def test_what_python_puts_on_a_class_is_no_change_and_native_code_compares_on(
    plain: Plain, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "guard_type", lambda: library.Guard)
    guard = ModuleGuard(plain)
    guard.snapshot()
    guard.arm()
    Plain.__slotnames__ = []  # type: ignore[attr-defined]
    try:
        assert guard.holds()
        # Nothing but what native code does not compare is read in Python from now on.
        monkeypatch.setattr(state_nodes.ClassNode, "read", None)
        assert guard.holds()
    finally:
        del Plain.__slotnames__  # type: ignore[attr-defined]


def test_a_guard_that_has_seen_nothing_holds_nothing() -> None:
    guard = ModuleGuard(nn.ReLU())
    guard.arm()
    assert not guard.holds()
    assert not guard.has_changed()
    assert guard.change_since(0) is not None


def test_the_version_goes_up_when_a_change_is_taken_note_of_and_not_before() -> None:
    module = mlp()
    guard = ModuleGuard(module)
    first = guard.snapshot()
    assert guard.snapshot() is first
    module[0].bias = None
    assert not guard.holds()
    assert guard.version == 0
    assert guard.snapshot() is not first
    assert guard.version == 1
    guard.forget()
    guard.forget()
    assert guard.version == 2
    assert not guard.has_changed(), "what is forgotten has not changed"
    assert guard.is_stale(False), "nor does it hold"


def test_snapshots_that_two_threads_take_at_once_have_versions_of_their_own() -> None:
    module, found = mlp(), []

    def look_meanwhile(_: nn.Module) -> tuple[()]:
        if not found:
            found.append(None)
            found[0] = guard.snapshot()
        return ()

    guard = ModuleGuard(module, engines=look_meanwhile)
    later = guard.snapshot()
    assert found[0].version != later.version == guard.version
    assert guard.change_since(found[0].version) is not None
    assert guard.change_since(later.version) is None


def test_a_tensor_that_is_moved_while_a_snapshot_is_renewed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    module, holds = mlp(), StateSnapshot.holds
    guard = ModuleGuard(module)
    guard.snapshot()

    def moved_by_another_thread(self: StateSnapshot) -> bool:
        answer = holds(self)
        module[0].weight.data = module[0].weight * 2
        return answer

    with monkeypatch.context() as patched:
        patched.setattr(StateSnapshot, "holds", moved_by_another_thread)
        guard.snapshot()
    assert not guard.holds()


def test_values_in_place_keep_graphs_but_are_effects() -> None:
    module = mlp()
    guard = ModuleGuard(module)
    guard.snapshot()
    assert guard.change_since(0) is None
    module[0].weight.mul_(2)
    assert guard.holds()
    change = guard.change_since(0)
    assert change is not None
    assert change.path == "self[0].weight"
    guard.snapshot()
    assert guard.change_since(0) is None
    assert guard.version == 0


def test_equal_numbers_and_strings_in_place_of_others_are_no_change(plain: Plain) -> None:
    plain.version = "".join(["a", "b"])
    guard = ModuleGuard(plain)
    guard.snapshot()
    guard.arm()
    plain.version = "".join(["a", "b"])
    plain.number = float("1.5")
    assert guard.holds()
    plain.number = True
    assert not guard.holds()


def test_a_guard_tells_whether_a_parameter_wants_gradients() -> None:
    module = mlp()
    guard = ModuleGuard(module)
    assert not guard.requires_grad()
    guard.snapshot()
    module[0].bias.requires_grad_()
    assert guard.requires_grad()
    assert guard.is_stale(True)
    change = guard.change_since(0)
    assert change is not None
    assert change == ("self[0].bias", "has another requires_grad", False)


def test_a_graph_is_right_under_its_version_and_ambient_state_alone() -> None:
    guard = ModuleGuard(mlp())
    guard.snapshot()
    is_stale = guard.stale_since(guard.version)
    assert not is_stale(False)
    with torch.device("meta"):
        assert is_stale(False)
    assert not is_stale(False)
    guard.forget()
    guard.snapshot()
    assert is_stale(False)


def test_a_graph_of_before_is_stale_also_if_the_module_is_looked_at_meanwhile(
    plain: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = ModuleGuard(plain)
    guard.snapshot()
    is_stale, holds = guard.stale_since(guard.version), ModuleGuard.holds
    plain.number = 2.5

    def after_a_look(self: ModuleGuard) -> bool:
        monkeypatch.undo()
        guard.snapshot()
        return holds(self)

    monkeypatch.setattr(ModuleGuard, "holds", after_a_look)
    assert is_stale(False)


def test_an_ignored_path_is_no_change(plain: Plain) -> None:
    guard = ModuleGuard(plain, ignore=["self.table['a'][*]", "self.number"])
    guard.snapshot()
    plain.number = 9
    plain.table["a"][1]["deep"] = 9
    plain.table["a"][0] = 9
    assert guard.holds()
    plain.table["b"] = [1]
    assert not guard.holds()


def test_a_snapshot_that_another_thread_forgets_meanwhile_is_one_all_the_same(
    plain: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = ModuleGuard(plain)
    first, renew = guard.snapshot(), StateSnapshot.renew

    def forgetting(snapshot: StateSnapshot) -> bool:
        holds = renew(snapshot)
        guard.forget()
        return holds

    monkeypatch.setattr(StateSnapshot, "renew", forgetting)
    assert guard.snapshot() is first


def test_the_guard_keeps_nobody_who_holds_graphs() -> None:
    fast = graphcache.wrap(mlp())
    fast(X)
    gone, guard = weakref.ref(fast), dispatcher_of(fast).target.guard
    del fast
    gc.collect()
    assert gone() is None
    assert guard.holds()


# ---- what is captured again


def test_after_a_change_each_key_is_captured_again_when_it_is_called() -> None:
    module = Plain()
    fast = captured(module)
    for size in (3, 5):
        fast(torch.ones(size, 4))
    module.unused = "new"
    for size in (3, 5, 3):
        x = torch.ones(size, 4)
        assert same(fast(x), module(x))
    info = fast.cache_info()
    assert (info.captures, info.graphs, info.eager) == (5, 3, {})


@pytest.mark.parametrize("policy", ["first", "prepared"])
def test_a_module_that_changes_before_every_call_runs_eagerly_for_longer_and_longer(policy: Any) -> None:
    module = Plain()
    fast = graphcache.wrap(module, capture=policy)
    with torch.no_grad():
        fast.prepare(X)
        for step in range(64):
            module.unused = step
            assert same(fast(X), module(X))
            assert step > 8 or not fast.cache_info().eager
        info = fast.cache_info()
        # Eight changes cost no wait; from then on the waits double.
        assert info.captures <= 8 + 7
        assert set(info.eager) == {Reason.UNSETTLED}
        for _ in range(64):
            fast(X)
        # Once it does so no more it has a graph again.
        assert replays(fast, X)


def test_a_graph_that_has_answered_many_calls_is_captured_again_at_once() -> None:
    module = Plain()
    fast = graphcache.wrap(module)
    for step in range(6):
        module.unused = step
        for _ in range(ENOUGH_HITS + 1):
            assert same(fast(X), module(X))
    assert (fast.cache_info().captures, fast.cache_info().eager) == (6, {})


def test_a_memo_that_grows_by_shape_settles() -> None:
    class Memo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables: dict[int, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            if len(x) not in self.tables:
                self.tables[len(x)] = torch.arange(float(len(x)))[:, None]
            return x + self.tables[len(x)]

    module = Memo()
    fast = graphcache.wrap(module)
    for _ in range(5):
        for size in (1, 2, 3):
            x = torch.ones(size, 4)
            assert same(fast(x), x + torch.arange(float(size))[:, None])
    info = fast.cache_info()
    assert info.captures == 3
    # Each size fills the table once, and is captured at its second call.
    assert info.eager == {Reason.MUTATES: 3}
    assert info.hits >= 6


def test_a_change_that_answers_depend_on_is_captured_again() -> None:
    module = Plain()
    fast = captured(module)
    module.counted[0] = 5
    for _ in range(2):
        assert same(fast(X), module(X))
    assert fast.cache_info().captures == 2
    assert fast.cache_info().graphs == 1


READERS: dict[str, Callable[[], str | None]] = {
    "os.environ": lambda: os.environ.get("GAIN", "1"),
    "os.getenv": lambda: os.getenv("GAIN", "1"),
    "environ": lambda: environ.get("GAIN", "1"),
    "getenv": lambda: getenv("GAIN", "1"),
    "a function that no walk finds": lambda: globals()["gain_" + "of_the_process"](),
}


def gain_of_the_process() -> str | None:
    return os.getenv("GAIN", "1")


@pytest.mark.parametrize("name", READERS)
def test_the_environment_of_the_process_is_guarded_where_it_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = READERS[name]
    fast, x = graphcache.wrap(Fn(lambda _, x: x * float(read() or 0))), torch.ones(2)
    # What ran and was not found by the walk is observed once more.
    fast(x), fast(x)
    assert replays(fast, x)
    assert torch.equal(fast(x), x)
    monkeypatch.setenv("GAIN", "3")
    assert torch.equal(fast(x), 3 * x)
    assert replays(fast, x)
    assert torch.equal(fast(x), 3 * x)


def test_the_environment_of_the_process_is_no_state_of_who_does_not_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = captured(frozen(nn.Linear(4, 4)))
    monkeypatch.setenv("GAIN", "3")
    assert replays(fast, X)


def test_a_function_of_a_library_that_is_replaced_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.relu(x) + F.silu(x)

    fast, x = graphcache.wrap(Net()), torch.ones(2)
    before = fast(x)
    assert torch.equal(fast(x), before)
    for name in ("relu", "silu"):
        monkeypatch.setattr(F, name, lambda x: x * 7)
        assert torch.equal(fast(x), Net()(x))
    assert fast.cache_info().hits == 1
