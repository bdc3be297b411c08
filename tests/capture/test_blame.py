"""Which submodule is to blame, as causes tell it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import Cause, Reason
from graphcache.capture.blame import at, located, path_here
from graphcache.events import RanEagerly
from tests.helpers import Fn, frozen, mlp

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def net(culprit: nn.Module) -> nn.Module:
    """The culprit at ``head.1.nms``, with something before, behind and beside it."""
    inner = Fn(lambda self, x: self.nms(self.scale(x)), scale=nn.ReLU(), nms=culprit)
    return frozen(nn.ModuleDict({"body": mlp(), "head": nn.Sequential(mlp(), inner, nn.Identity())}))


class Whole(nn.Module):
    def __init__(self, culprit: nn.Module) -> None:
        super().__init__()
        self.body = mlp()
        self.head = net(culprit)["head"]

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x))


def cause_of(module: nn.Module, **options: Any) -> Cause:
    heard: list[Any] = []
    fast = graphcache.wrap(module, **options)
    fast.subscribe(heard.append)
    fast(X)
    [found] = [each.cause for each in heard if isinstance(each, RanEagerly)]
    return found


def _counts(self: Any, x: Tensor) -> Tensor:
    self.count += 1
    return x * 2


def _in_a_thread(_: Any, x: Tensor) -> Tensor:
    threading.Thread(target=int).start()
    return x * 2


CULPRITS: dict[str, tuple[Callable[[], nn.Module], Reason, str]] = {
    "data": (lambda: Fn(lambda _, x: x[x[:, 0] > 0]), Reason.DATA_DEPENDENT, "aten.index.Tensor"),
    "item": (lambda: Fn(lambda _, x: x * x.sum().item()), Reason.HOST_READ, "aten._local_scalar_dense.default"),
    "tolist": (lambda: Fn(lambda _, x: x * x.tolist()[0][0]), Reason.HOST_READ, "Tensor.tolist"),
    "random": (lambda: Fn(lambda _, x: x + torch.rand(4)), Reason.RANDOM, "aten.rand.default"),
    "clock": (lambda: Fn(lambda _, x: x + time.time()), Reason.RANDOM, "time.time"),
    "thread": (lambda: Fn(_in_a_thread), Reason.HOST_READ, "Thread.start"),
}
CHANGES: dict[str, tuple[Callable[[], nn.Module], Cause]] = {
    "attribute": (lambda: Fn(_counts, count=0), Cause(Reason.MUTATES, ".count", "0 became 1")),
}


@pytest.mark.parametrize("name", CULPRITS)
def test_a_cause_names_the_submodule_and_what_it_did(name):
    make, reason, what = CULPRITS[name]
    found = cause_of(Whole(make()).requires_grad_(False))
    assert (found.reason, found.where) == (reason, f"head.1.nms: {what}")


@pytest.mark.parametrize("name", CULPRITS)
def test_of_a_module_without_submodules_only_what_it_did(name):
    make, reason, what = CULPRITS[name]
    found = cause_of(make())
    assert (found.reason, found.where) == (reason, what)


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_call_changed_is_named_by_its_path(name):
    make, cause = CHANGES[name]
    assert cause_of(Whole(make()).requires_grad_(False)) == replace(cause, where=f"self.head[1].nms{cause.where}")
    assert cause_of(make()) == replace(cause, where=f"self{cause.where}")


def test_a_refusal_that_a_module_swallows_is_told_of_the_place_all_the_same():
    class Swallows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return x[x[:, 0] > 0]
            except Exception:
                return x

    found = cause_of(Whole(Swallows()).requires_grad_(False))
    assert (found.reason, "aten.index.Tensor" in found.where) == (Reason.DATA_DEPENDENT, True)


def test_outside_of_every_submodule_the_path_is_empty():
    assert path_here(mlp()) == ""


def test_the_innermost_submodule_counts_and_only_those_of_the_module_that_is_asked_about():
    seen: list[str] = []
    inner = Fn(lambda self, x: (seen.append(path_here(whole)), seen.append(path_here(inner)), x)[2])
    whole = nn.Sequential(nn.Identity(), nn.Sequential(inner))
    whole(X)
    assert seen == ["1.0", ""]


def test_an_exception_that_was_raised_from_another_one_is_followed_to_the_first():
    def fails(_: Any, x: Tensor) -> Tensor:
        raise KeyError("a")

    whole = nn.Sequential(Fn(fails))
    try:
        try:
            whole(X)
        except KeyError as error:
            raise ValueError("wrapped") from error
    except ValueError as error:
        caught = error
    caught.__cause__.__context__ = caught  # A loop, which must end.
    assert located(Cause(Reason.CAPTURE_FAILED, "net"), caught, whole, "net").where == "0"
    assert located(Cause(Reason.CAPTURE_FAILED, "net"), caught, mlp(), "net").where == "net"


def test_a_place_that_is_the_path_itself_is_not_said_twice():
    assert at(Cause(Reason.OUTPUT_ALLOCATOR, "head"), "head", "net").where == "head"
    assert at(Cause(Reason.OUTPUT_ALLOCATOR, "net"), "head", "net").where == "head"
    assert at(Cause(Reason.OUTPUT_ALLOCATOR, ""), "", "net").where == ""
