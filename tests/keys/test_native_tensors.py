"""What the compiled guard sees of tensors."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Sub(Tensor):
    pass


# ---- tensors

CHANGES: dict[str, Callable[[Tensor], object]] = {
    "data": lambda x: setattr(x, "data", torch.zeros(x.shape)),
    "data of the same memory and another dtype": lambda x: setattr(x, "data", x.detach().view(torch.int32)),
    "data of the same memory, expanded": lambda x: setattr(x, "data", x.detach()[:1].expand(x.shape)),
    "set_": lambda x: x.set_(torch.zeros(60).untyped_storage(), 0, x.shape, x.stride()),
    "another offset": lambda x: x.set_(x.untyped_storage(), 1, (2, 3), (3, 1)),
    "resize_": lambda x: x.resize_(200),
    "fewer rows": lambda x: x.resize_(3, 3),
    "as_strided_": lambda x: x.as_strided_((4, 3), (1, 4)),
    "transpose_": lambda x: x.transpose_(0, 1),
    "unsqueeze_": lambda x: x.unsqueeze_(0),
    "seven dimensions": lambda x: x.as_strided_((1, 1, 1, 1, 4, 3, 1), (1,) * 7),
    "no dimension": lambda x: x.as_strided_((), ()),
    "freed memory": lambda x: x.untyped_storage().resize_(0),
    "more memory": lambda x: x.untyped_storage().resize_(1 << 20),
    "swap_tensors": lambda x: torch.utils.swap_tensors(x, torch.zeros(4, 3)),
    "conjugated": lambda x: setattr(x, "data", torch._neg_view(x.detach())),
    "class": lambda x: setattr(x, "__class__", Sub),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["tensor", "parameter"])
def test_changes_of_a_tensor(library: Any, change: str, kind: str) -> None:
    with torch.no_grad():
        x = torch.rand(4, 3)
        x = nn.Parameter(x, requires_grad=False) if kind == "parameter" else x
        other, guard = torch.zeros(2), library.Guard()
        guard.add_tensor(other)
        guard.add_tensor(x)
        assert guard.holds()
        CHANGES[change](x)
        assert not guard.holds()


def test_what_leaves_a_tensor_as_it_is(library: Any) -> None:
    x, guard = nn.Parameter(torch.rand(4, 3)), library.Guard()
    guard.add_tensor(x)
    with torch.no_grad():
        x.fill_(2)
        x.data.mul_(2)
        x.requires_grad_(False)
        x.requires_grad_(True)
        x.data = x.data
        x.data = x.data[:]
    (x * 2).sum().backward()
    x.grad = None
    x.attribute = 1  # type: ignore[attr-defined]
    assert guard.holds()


def test_back_as_it_was(library: Any) -> None:
    x = torch.rand(2, 2, 2, 2, 2, 2, 2)
    shape, stride, kept = x.shape, x.stride(), x.detach()
    guard = library.Guard()
    guard.add_tensor(x)
    for _ in range(3):
        x.resize_(2, 2)
        assert not guard.holds()
        x.as_strided_(shape, stride)
        assert guard.holds()
        x.data = torch.rand(2)
        assert not guard.holds()
        x.data = kept
        assert guard.holds()


def test_modules(library: Any) -> None:
    def of(module: nn.Module) -> Any:
        guard = library.Guard()
        for x in (*module.parameters(), *module.buffers()):
            guard.add_tensor(x)
        return guard

    for change, holds in (
        (lambda m: m.to(torch.float64), False),
        (lambda m: m.half(), False),
        (lambda m: m.to(torch.float32), True),
        (lambda m: m.requires_grad_(False), True),
        (lambda m: m.load_state_dict(m.state_dict()), True),
        (lambda m: m.to(memory_format=torch.channels_last), False),
        (lambda m: m.share_memory(), False),
    ):
        module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
        guard = of(module)
        assert guard.holds()
        change(module)  # type: ignore[no-untyped-call]
        assert guard.holds() == holds


def test_kinds_of_tensors(library: Any) -> None:
    x = torch.rand(4, 3)
    with torch.inference_mode():
        inference = torch.rand(2)
    dense = [
        *(x, x.T, x[1:], x[0, 0], x.expand(2, 4, 3), torch.empty(0), torch.empty(0, 3), inference, x.detach()),
        *(torch.ones(2, dtype=torch.complex64).conj(), torch._neg_view(x), torch.rand(2, requires_grad=True) * 2),
        *(torch.from_numpy(x.numpy()), nn.Buffer(x), nn.Parameter(x), torch.zeros(2, dtype=torch.bool)),
    ]
    guard = library.Guard()
    for each in dense:
        guard.add_tensor(each)
    assert guard.holds()
    assert len(guard) == len(dense)
    refused = [
        *(x.to_sparse(), x.to_mkldnn(), x.to("meta"), x.as_subclass(Sub), torch._to_functional_tensor(x)),
        *(torch._efficientzerotensor((2,)), nn.UninitializedParameter()),
    ]
    for each in refused:
        with pytest.raises(TypeError, match=r"is not torch\.Tensor or|is not a dense one"):
            guard.add_tensor(each)

    def inside(value: Tensor) -> Tensor:
        with pytest.raises(TypeError, match="is not a dense one"):
            guard.add_tensor(value)
        return value

    torch.func.vmap(inside)(x)
    torch.func.grad(lambda value: inside(value).sum())(x)
    assert len(guard) == len(dense)


def test_tensors_die_with_their_guard(library: Any) -> None:
    x = torch.rand(3)
    before = sys.getrefcount(x), x._use_count()  # type: ignore[attr-defined]
    for _ in range(10_000):
        guard = library.Guard()
        guard.add_tensor(x)
        assert guard.holds()
    del guard
    gc.collect()
    assert (sys.getrefcount(x), x._use_count()) == before  # type: ignore[attr-defined]
