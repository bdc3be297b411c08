from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from graphcache.modules.state import Dependencies, Watch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import graphcache
from graphcache import CachedModule, Reason
from graphcache.errors import Refusal
from tests.helpers import Fn, frozen, mlp, outcomes, reason, replays, same

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
    assert fast.cache_info().eager == {Reason.MUTATES: 2}


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


# ---- what a call changes


def test_the_callers_tensor_is_changed_exactly_once():
    fast = graphcache.wrap(Fn(lambda _, x: x.add_(1) * 2))
    x = torch.zeros(3)
    for count in (1, 2, 3):
        assert fast(x).tolist() == [2.0 * count] * 3
        assert x.tolist() == [float(count)] * 3
    assert outcomes(fast) == (0, 0, {Reason.MUTATES: 3})


STATEFUL = {
    "parameter": lambda self: self.parameter.add_(1),
    "buffer": lambda self: self.buffer.add_(1),
    "data of a buffer": lambda self: self.buffer.data.add_(1),
    "detached buffer": lambda self: self.buffer.detach().add_(1),
    "numpy view of a buffer": lambda self: self.buffer.numpy().__iadd__(1),
    "replaced buffer": lambda self: setattr(self, "buffer", self.buffer + 1),
    "tensor in a list": lambda self: self.kept[0].add_(1),
    "replaced tensor": lambda self: setattr(self, "plain", self.plain + 1),
    "number": lambda self: setattr(self, "count", self.count + 1),
}


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("visible", [True, False])
def test_state_is_changed_exactly_once_per_call(name, visible):
    def forward(self: Any, x: Tensor) -> Tensor:
        STATEFUL[name](self)
        return x * 2 + self.total() if visible else x * 2

    def make() -> nn.Module:
        module = Fn(
            forward,
            parameter=nn.Parameter(torch.zeros(1)),
            buffer=nn.Buffer(torch.zeros(1)),
            kept=[torch.zeros(1)],
            count=0,
        )
        module.__dict__["plain"] = torch.zeros(1)
        module.total = lambda: (
            module.parameter.detach() + module.buffer + module.kept[0] + module.plain + float(module.count)
        )
        return module.requires_grad_(False)

    module, twin = make(), make()
    fast = graphcache.wrap(module)
    for _ in range(4):
        assert same(fast(X), twin(X))
        assert same(module.total(), twin.total())


def test_random_numbers_are_drawn_as_eager_draws_them():
    fast = graphcache.wrap(nn.Dropout(0.5))
    torch.manual_seed(7)
    answers = [fast(X) for _ in range(3)]
    torch.manual_seed(7)
    assert same(answers, [fast.module(X) for _ in range(3)])
    assert fast.cache_info().eager == {Reason.RANDOM: 3}


def test_a_generator_of_the_modules_own_advances_as_in_eager():
    def make() -> nn.Module:
        return Fn(lambda self, x: x + torch.rand(4, generator=self.own), own=torch.Generator().manual_seed(1))

    fast, twin = graphcache.wrap(make()), make()
    for _ in range(3):
        assert same(fast(X), twin(X))
    assert fast.cache_info().eager == {Reason.RANDOM: 3}


def test_nobody_keeps_the_callers_tensors():
    fast = graphcache.wrap(Fn(lambda _, x: (x[0], x * 2)))
    for _ in range(2):
        x = X.clone()
        answer = fast(x)
        gone = [weakref.ref(x), weakref.ref(answer[0]), weakref.ref(answer[1])]
        del x, answer
        gc.collect()
        assert [each() for each in gone] == [None] * 3


@pytest.mark.parametrize("how", ["close", "clear", "evict", "stale", "del"])
def test_weights_and_buffers_of_a_graph_go_with_it(how):
    net = frozen(nn.Linear(4, 4))
    fast = captured(net, max_graphs=1)
    old = weakref.ref(net.weight)
    static = weakref.ref(next(iter(fast._cache.entries.values())).graph.graph)
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


# ---- the pieces


def test_a_fingerprint_is_the_same_until_something_changes(net):
    dependencies = Dependencies(net)
    first = dependencies.fingerprint()
    net.first.weight.add_(1)
    assert dependencies.fingerprint() == first
    replace_data(net)
    assert dependencies.fingerprint() != first


def test_dependencies_know_every_tensor_and_whether_one_wants_gradients(net):
    dependencies = Dependencies(net)
    expected = [*net.parameters(), *net.buffers()]
    assert {id(each) for each in dependencies.tensors()} == {id(each) for each in expected}
    assert not dependencies.requires_grad()
    net.first.bias.requires_grad_(True)
    assert dependencies.requires_grad()
    assert Dependencies(nn.ReLU()).tensors() == []


def test_a_watch_names_what_was_changed(net):
    x = torch.zeros(2)
    changes = (
        (lambda: x.add_(1), r"args\[0\]"),
        (lambda: net.first.weight.add_(1), "aten.add_.Tensor"),
        (lambda: setattr(net, "seen", 5), "attribute 'seen'"),
        (lambda: net.norm.running_mean.numpy().fill(3.0), "a buffer"),
    )
    for change, where in changes:
        with Watch([x], Dependencies(net)) as watch:
            net(X)
            change()
        with pytest.raises(Refusal, match=rf"mutates.*\(at {where}\)"):
            watch.check()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int64], ids=str
)
def test_a_watch_sees_changes_of_inference_tensors(dtype):
    with torch.inference_mode():
        x = torch.zeros(2, 3).to(dtype).t()
        with Watch([x], Dependencies(nn.ReLU())) as watch:
            x[1, 1] = 1
        with pytest.raises(Refusal, match="mutates"):
            watch.check()


def test_a_watch_lets_a_call_write_into_what_it_made():
    with Watch([X], Dependencies(nn.ReLU())) as watch:
        torch.zeros(2).add_(1)
        torch.tensor([1.0, 2.0]).mul_(2)
        (X + 1).relu_().t().sub_(1)
    watch.check()


@pytest.mark.parametrize("draw", [lambda: torch.rand(1), lambda: torch.ones(3).normal_(), lambda: torch.randperm(4)])
def test_a_watch_sees_random_numbers(draw):
    with Watch([], Dependencies(nn.ReLU())) as watch:
        draw()
    with pytest.raises(Refusal, match="random"):
        watch.check()


def test_random_numbers_of_another_thread_are_not_the_modules():
    def forward(_: Any, x: Tensor) -> Tensor:
        thread = threading.Thread(target=torch.rand, args=(1,))
        thread.start()
        thread.join()
        return x * 2

    fast = graphcache.wrap(Fn(forward))
    for _ in range(2):
        assert same(fast(X), X * 2)
    assert outcomes(fast) == (1, 1, {})


def test_an_unused_module_is_no_reason_to_capture_again():
    fast = captured(nn.Sequential(mlp(), nn.Identity()))
    assert replays(fast, X)
