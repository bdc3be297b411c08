"""What a call does past the operators: values that it reads, tensors that it makes, flags that it sets and asks."""

from __future__ import annotations

import copy
import dataclasses
import io
import os
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.masked import masked_tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils import _pytree as pytree
from torch.utils import dlpack

import graphcache
from graphcache import Reason
from tests.helpers import Fn

X = torch.ones(3)


def saved(y: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    return torch.load(file)  # type: ignore[no-any-return]


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "as_subclass": lambda y: y.as_subclass(Tensor),
    "a parameter": lambda y: nn.Parameter(y, requires_grad=False),
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "a pickle": lambda y: pickle.loads(pickle.dumps(y)),
    "torch.save": saved,
    "dlpack": lambda y: dlpack.from_dlpack(dlpack.to_dlpack(y)),  # type: ignore[attr-defined]
    "its storage": lambda y: torch.empty(0, dtype=y.dtype).set_(y.untyped_storage(), 0, y.shape, y.stride()),
    "torch.tensor": lambda y: torch.tensor([y[0], y[1], y[2]]),
    "torch.as_tensor": lambda y: torch.as_tensor([y[0], y[1], y[2]]),
    "new_tensor": lambda y: y.new_tensor([y[0], y[1], y[2]]),
}


class Scales(nn.Module):
    """Has a buffer."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], scale: Tensor) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def agree(module: nn.Module, calls: list[tuple[Any, ...]], change: Callable[[int], object] = lambda call: None) -> Any:
    """The wrapped module, which gave the answers of eager calls; the same module gives both."""
    fast = graphcache.wrap(module)
    with torch.no_grad():
        for call, args in enumerate(calls):
            change(call)
            assert torch.equal(fast(*args), module(*args)), call
    return fast


@pytest.mark.parametrize("name", COPIES)
def test_a_tensor_that_no_operation_made_is_no_constant(name: str) -> None:
    way = COPIES[name]
    masks = [(X, torch.tensor(mask)) for mask in ([True] * 3, [True] * 3, [True, False, True])]
    agree(Fn(lambda _, x, mask: x * way(mask.long())), masks)
    module = Scales(lambda self, x: x + way(self.scale * 2), torch.ones(3))
    agree(module, [(X,)] * 4, lambda call: module.scale.add_(call == 2))


def test_a_tensor_of_numbers_is_a_constant() -> None:
    fast = agree(Fn(lambda _, x: x * torch.tensor([1.0, 2.0, 3.0]) + torch.as_tensor([1, 2, 3])), [(X,)] * 3)
    assert fast.cache_info().hits == 2


@pytest.mark.parametrize("buffer", [False, True])
def test_split_by_a_tensor(buffer: bool) -> None:
    def split(x: Tensor, at: Tensor) -> Tensor:
        return torch.stack([part.sum() for part in torch.tensor_split(x, at)])

    x, module = torch.arange(8.0), Scales(lambda self, x: split(x, self.scale), torch.tensor([3, 5]))
    if buffer:
        agree(module, [(x,)] * 3, lambda call: module.scale.copy_(torch.tensor([1, 2 + call])))
    else:
        agree(Fn(lambda _, x, at: split(x, at)), [(x, torch.tensor([at])) for at in (3, 5, 2)])


NUMBERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a count of elements": lambda self, x: x * self.scale.to_sparse()._nnz(),
    "values of a sparse tensor": lambda self, x: x * self.scale.to_sparse().values().numel(),
    "a scale": lambda self, x: x * torch.quantize_per_tensor_dynamic(self.scale, torch.qint8, False).q_scale(),
}


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation")
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_depend_on_values(name: str) -> None:
    module = Scales(NUMBERS[name], torch.ones(3))
    agree(module, [(X,)] * 3, lambda call: module.scale[:1].fill_(3 * (call < 2)))


class Dequantised(Tensor):
    """Eight bits and a scale: any operation makes a plain tensor of them, so that a view is none."""

    bits: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, bits: Tensor, scale: Tensor) -> Dequantised:
        return torch.Tensor._make_wrapper_subclass(cls, bits.shape, dtype=scale.dtype)  # type: ignore[attr-defined, no-any-return]

    def __init__(self, bits: Tensor, scale: Tensor) -> None:
        self.bits, self.scale = bits, scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Dequantised(args[0].bits, args[0].scale)

        def plain(value: Any) -> Any:
            return value.bits * value.scale if isinstance(value, Dequantised) else value

        return func(*pytree.tree_map(plain, args), **pytree.tree_map(plain, kwargs or {}))


def test_a_view_of_a_weight_that_is_none() -> None:
    module = nn.Linear(3, 3, bias=False)
    weight = Dequantised(torch.randint(-9, 9, (3, 3), dtype=torch.int8), torch.tensor(0.1))
    module.weight = nn.Parameter(weight, requires_grad=False)
    agree(module, [(torch.randn(2, 3),)] * 4, lambda call: weight.scale.mul_(2) if call == 2 else None)


def test_views_of_an_argument_are_taken_once() -> None:
    fast = agree(Fn(lambda _, x: x.chunk(2)[0] + x[2:].view(2)), [(torch.arange(4.0) + n,) for n in range(3)])
    with torch.no_grad():
        graph = fast.graph_for(torch.ones(4))
    assert graph is not None
    assert graph.nodes == 1


# ---- modes that the module asks about


class AsksForGradients(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if torch.is_grad_enabled() else x * 3


class AsksForInference(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1 if torch.is_inference_mode_enabled() else x.clamp(-3, 3)


class AsksItsTensor(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        return y * 2 if y.is_inference() else y * 3


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", [AsksForGradients, AsksForInference, AsksItsTensor])
def test_a_graph_is_recorded_in_the_modes_of_the_call_or_not_at_all(kind: Any, mode: Any) -> None:
    with mode():
        module = kind()
        fast = graphcache.wrap(module)
        for value in (0.0, 10.0, 20.0):
            x = torch.full((2,), value)
            assert torch.equal(fast(x), module(x))
    if kind is AsksForGradients:
        assert fast.cache_info().hits == 2


def test_the_dtype_of_an_autocast_that_the_module_enters() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2).requires_grad_(False)

        def forward(self, x: Tensor) -> Any:
            with torch.autocast("cpu"):
                return self.linear(x)

    module, before = Casts(), torch.get_autocast_dtype("cpu")
    fast, x = graphcache.wrap(module), torch.ones(1, 2)
    try:
        for dtype in (torch.bfloat16, torch.bfloat16, torch.float16, torch.float16, torch.bfloat16):
            torch.set_autocast_dtype("cpu", dtype)
            assert fast(x).dtype is dtype
    finally:
        torch.set_autocast_dtype("cpu", before)
    assert (fast.cache_info().captures, fast.cache_info().hits) == (3, 2)


# ---- arguments


def test_a_parameter_stays_one() -> None:
    module = Fn(lambda _, x: x * 2 if isinstance(x, nn.Parameter) else x * 3)
    given = [(nn.Parameter(torch.full((2,), value), requires_grad=False),) for value in (0.0, 1.0, 2.0)]
    assert agree(module, given).cache_info().hits == 2


@dataclasses.dataclass(slots=True)
class Slotted:
    x: Tensor
    scale: float = 1.0


pytree.register_pytree_node(Slotted, lambda each: ([each.x], None), lambda items, _: Slotted(*items))


def test_a_container_whose_slots_pytree_leaves_out_is_no_argument_of_a_graph() -> None:
    fast = agree(Fn(lambda _, each: each.x * each.scale), [(Slotted(X, scale),) for scale in (1.0, 1.0, 2.0, 3.0)])
    assert fast.cache_info().eager[Reason.ARGUMENT] == 2


def leaf() -> Tensor:
    return torch.ones(2, requires_grad=True)


def with_gradient() -> Tensor:
    made = leaf()
    made.grad = torch.ones(2)
    return made


FLAGS: dict[str, tuple[Callable[[Tensor], object], Callable[[], Tensor], Callable[[], Tensor]]] = {
    "requires_grad_()": (lambda x: x.requires_grad_(), leaf, lambda: torch.ones(2)),
    "requires_grad_(False)": (lambda x: x.requires_grad_(False), lambda: torch.ones(2), leaf),
    "detach_": (lambda x: x.detach_(), lambda: torch.ones(2), leaf),
    "grad": (lambda x: setattr(x, "grad", None), leaf, with_gradient),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_that_a_call_sets_on_arguments(name: str) -> None:
    change, usual, other = FLAGS[name]

    def forward(_: Any, x: Tensor) -> Tensor:
        change(x)
        return x * 2

    module = Fn(forward)
    fast = graphcache.wrap(module)
    with torch.no_grad():
        for make in (usual, usual, other, other):
            one, two = make(), make()
            module(one), fast(two)
            assert (one.requires_grad, one.grad is None) == (two.requires_grad, two.grad is None)


def test_data_that_is_read_is_no_question() -> None:
    assert agree(Fn(lambda _, x: x.data * 2), [(X,)] * 3).cache_info().hits == 2


def test_a_detached_argument_as_an_answer() -> None:
    fast = graphcache.wrap(Fn(lambda _, x: (x.detach(), x * 2)))
    for _ in range(3):
        x = leaf()
        with torch.no_grad():
            answer, _ = fast(x)
        assert not answer.requires_grad
        answer.add_(1)
        assert x.tolist() == [2.0, 2.0], "it is the same memory"
    assert fast.cache_info().hits == 2


def test_an_answer_that_contains_itself() -> None:
    def forward(_: Any, x: Tensor) -> Any:
        answer: dict[str, Any] = {"y": x * 2}
        answer["self"] = answer
        return answer

    fast = graphcache.wrap(Fn(forward))
    for _ in range(2):
        answer = fast(X)
        assert answer["self"]["self"] is answer
        assert torch.equal(answer["y"], X * 2)
    assert fast.cache_info().eager == {Reason.OUTPUT: 2}


# ---- what PyTorch cannot run while it is observed


class Named(Tensor):
    """A subclass."""


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        y.mul_(2)
        return y + 3


def biased(_: Any, x: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=causal_lower_right(4, 4))


HEADS = torch.ones(1, 1, 4, 4)
OBSTINATE: dict[str, Callable[[], nn.Module]] = {
    "a subclass": lambda: Fn(lambda _, x: Named(x).as_subclass(Tensor) * 2),
    "a causal bias": lambda: Fn(biased),
    "a masked tensor": lambda: Fn(lambda _, x: masked_tensor(x, x > 0).sum(-1).to_tensor(0.0)),
    "a trace that has never run": lambda: torch.jit.trace(Doubles(), HEADS, check_trace=False),  # type: ignore[no-any-return]
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OBSTINATE)
def test_what_does_not_run_while_it_is_observed_runs_eagerly(name: str) -> None:
    module, other = OBSTINATE[name](), OBSTINATE[name]()
    fast = graphcache.wrap(module)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(fast(HEADS), other(HEADS))
    assert fast.cache_info().eager[Reason.UNOBSERVED] >= 1


def test_nothing_is_run_again_that_has_changed_something() -> None:
    calls: list[int] = []

    def forward(_: Any, x: Tensor) -> Tensor:
        calls.append(1)
        return Named(x).as_subclass(Tensor)

    with pytest.raises(RuntimeError, match="Creating a new Tensor subclass"):
        graphcache.wrap(Fn(forward))(X)
    assert len(calls) == 1


def test_processes_that_join_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    c10d = pytest.importorskip("torch.distributed.distributed_c10d")
    module = Fn(lambda _, x: x * (10 if torch.distributed.is_initialized() else 2))
    fast = agree(module, [(X,)] * 2)
    monkeypatch.setattr(c10d._world, "_default_pg", object())
    assert torch.equal(fast(X), X * 10)


SETTINGS: dict[str, Callable[[], object]] = {
    "the dtype of autocast": lambda: torch.get_autocast_dtype("cpu"),
    "anomalies": torch.is_anomaly_enabled,
    "recursion": sys.getrecursionlimit,
    "the folder": os.getcwd,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_call_that_asks_for_a_setting_of_the_process_runs_eagerly(name: str) -> None:
    def forward(_: Any, x: Tensor) -> Tensor:
        return x * (2 if SETTINGS[name]() else 3)

    fast = graphcache.wrap(Fn(forward))
    for _ in range(2):
        assert torch.equal(fast(X), forward(None, X))
    assert fast.cache_info().eager == {Reason.UNOBSERVED: 2}
