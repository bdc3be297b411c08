"""What an operation writes, though its schema is silent; what a dispatch mode sees of composite operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphcache.graphs.operations import DispatchMode, storage_of, written


class Seen(DispatchMode):
    """What was dispatched, and the storages that it wrote into."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.written: set[int] = set()

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.names.append(func._opname)
        self.written |= {storage_of(tensor) for tensor in written(func, args, kwargs)}
        return func(*args, **kwargs)


def norm(training: bool) -> Callable[..., Any]:
    return lambda x, mean, var: F.batch_norm(x, mean, var, training=training)


WRITERS: dict[str, tuple[Callable[..., Any], bool]] = {
    "batch_norm in training": (norm(True), True),
    "batch_norm for inference": (norm(False), False),
    "native_batch_norm in training": (
        lambda x, mean, var: torch.native_batch_norm(x, None, None, mean, var, True, 0.1, 1e-5),
        True,
    ),
    "batch_norm_update_stats": (lambda x, mean, var: torch.batch_norm_update_stats(x, mean, var, 0.1), True),
    "instance_norm": (lambda x, mean, var: F.instance_norm(x[..., None], mean, var, use_input_stats=True), True),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", WRITERS)
def test_running_statistics_are_written_exactly_where_they_change(name, mode):
    function, writes = WRITERS[name]
    x = torch.arange(24.0).view(2, 4, 3) ** 2
    mean, var = torch.zeros(4), torch.ones(4)
    with mode(), Seen() as seen:
        function(x, mean, var)
    assert bool(mean.abs().sum()) == bool((var - 1).abs().sum()) == writes
    assert ({storage_of(mean), storage_of(var)} <= seen.written) == writes
    assert storage_of(x) not in seen.written


def test_collectives_write_their_first_argument():
    x, y = torch.ones(2), torch.ones(2)
    func = torch.ops.c10d._allgather_base_.default
    assert written(func, (x, y, object()), {}) == [x]
    assert written(torch.ops.c10d.allreduce_.default, ([x, y], object(), object()), {}) == [x, y]


def test_a_custom_operator_with_a_name_of_the_in_place_kind_writes_its_first_argument():
    with torch.library._scoped_library("graphcache_tests", "DEF") as library:
        library.define("advance_(Tensor state, Tensor x) -> ()")
        library.define("__peek__(Tensor state) -> Tensor")
        x, y = torch.ones(2), torch.ones(2)
        assert written(torch.ops.graphcache_tests.advance_.default, (x, y), {}) == [x]
        assert written(torch.ops.graphcache_tests.advance_.default, (), {"x": y, "state": x}) == [x]
        assert written(torch.ops.graphcache_tests.__peek__.default, (x,), {}) == []


def test_what_the_schema_says_is_found_by_place_and_by_name():
    x, y = torch.ones(2), torch.ones(2)
    assert written(torch.ops.aten.add_.Tensor, (x, y), {}) == [x]
    assert written(torch.ops.aten.add.out, (x, y), {"out": y}) == [y]
    assert written(torch.ops.aten._foreach_add_.Scalar, ([x, y], 1), {}) == [x, y]
    assert written(torch.ops.aten.add.Tensor, (x, y), {}) == []


@pytest.mark.parametrize(
    "function",
    [
        lambda x: bool(x.sum() > 0),
        lambda x: x.sum().item(),
        lambda x: F.dropout(x, 0.5),
        lambda x: F.linear(x, x),
        lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
        lambda x: torch.einsum("ij,kj->ik", x, x),
    ],
)
def test_a_mode_sees_the_same_operators_for_inference_as_without_gradients(function):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    names, answers = [], []
    for mode in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        with mode(), Seen() as seen:
            answers.append(function(x))
        names.append([name for name in seen.names if name not in ("detach", "alias")])
    assert names[0] == names[1]
    assert torch.equal(torch.as_tensor(answers[0]), torch.as_tensor(answers[1]))


def test_the_parts_of_a_composite_give_the_bits_of_eager_execution():
    x, weight = torch.randn(5, 7), torch.randn(3, 7)
    gru = torch.nn.GRU(7, 3).requires_grad_(False)
    calls: list[Callable[[], Tensor]] = [
        lambda: F.linear(x, weight, weight[:, 0]),
        lambda: F.batch_norm(x, torch.zeros(7), torch.ones(7), training=True),
        lambda: gru(x)[0],
        lambda: F.interpolate(x[None], scale_factor=2.0, mode="linear"),
    ]
    with torch.inference_mode():
        for call in calls:
            eager = call()
            with Seen() as seen:
                assert torch.equal(call(), eager)
            assert seen.names
