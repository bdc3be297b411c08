"""Native code is used only if it agrees with Python."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from graphcache.native.offsets import described, offsets_of, samples
from graphcache.native.probe import Disagreement, prepare

NAMES = ("configure", "learn_quiet", "layout", "address", "is_quiet", "Guard", "use_shortcuts")


@pytest.fixture
def library(compiled: Any) -> Any:
    return compiled


def lying(library: Any, **lies: Any) -> Any:
    return SimpleNamespace(**{name: getattr(library, name) for name in NAMES} | lies)


def said(library: Any) -> str:
    with pytest.raises(Disagreement) as found:
        prepare(library)
    return str(found.value)


def test_it_agrees(library: Any) -> None:
    prepare(library)


def test_it_agrees_whatever_the_context_it_is_first_used_in(library: Any) -> None:
    """The loader prepares it in a thread of its own, which has no modes."""
    done: list[None] = []

    def ask(value: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: done.append(prepare(library)))
        thread.start()
        thread.join()
        return value

    x = torch.ones(2)
    contexts = [torch.inference_mode(), torch.enable_grad(), torch.autocast("cpu", torch.bfloat16), FakeTensorMode()]
    for context in contexts:
        with context:
            ask(x)
    torch.func.vmap(ask)(x)
    assert done == [None] * 5


@pytest.mark.parametrize(
    ("lie", "about"),
    [
        ({"layout": lambda args: None}, "how many tensors are plain, of which it found 0"),
        ({"layout": lambda args: (torch.is_inference_mode_enabled(), len(args))}, "the layout of a"),
        ({"address": lambda x: x.data_ptr() + 1}, "the address of a tensor"),
        ({"is_quiet": lambda: True}, "gradients"),
        ({"is_quiet": lambda: False}, "a context in which nothing is special"),
    ],
)
def test_a_lie_is_found_out(library: Any, lie: dict[str, Callable[..., Any]], about: str) -> None:
    assert said(lying(library, **lie)).startswith(about)


@pytest.mark.parametrize("asked", ["several", "refused", "inference"])
def test_a_lie_about_some_layouts_is_found_out(library: Any, asked: str) -> None:
    def layout(args: Any) -> Any:
        if asked == "several" and len(args) == 2:
            return library.layout(tuple(args[:1]))
        if asked == "refused" and any(type(value) is torch.nn.Parameter for value in args):
            return (1,)
        found = library.layout(args)
        return found if asked != "inference" or found is None else (0, *found[1:])

    wanted = {"several": "several tensors", "refused": "the layout of a", "inference": "the layout of a"}
    assert said(lying(library, layout=layout)).startswith(wanted[asked])


@pytest.mark.parametrize("blind_to", ["gradients", "autocast", "dispatch", "transform", "inference"])
def test_a_context_that_is_not_seen_is_found_out(library: Any, blind_to: str) -> None:
    def is_quiet() -> bool:
        blind = {
            "gradients": torch.is_grad_enabled(),
            "autocast": torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"),
            "dispatch": torch._C._len_torch_dispatch_stack() > 0,
            "transform": torch._C._functorch.peek_interpreter_stack() is not None,
            "inference": False,
        }
        if blind_to == "inference":
            return bool(library.is_quiet()) and not torch.is_inference_mode_enabled()
        return bool(library.is_quiet()) or blind[blind_to]

    assert said(lying(library, is_quiet=is_quiet))


def test_fields_and_dictionaries(library: Any) -> None:
    def another_stride(args: Any) -> Any:
        found = library.layout(args)
        return found and (*found[:-1], found[-1] + 1)

    assert said(lying(library, layout=another_stride)).startswith("the layout of a torch.float32 tensor")
    used: list[bool] = []

    class Blind:
        """Misses every write while short cuts are used, as CPython 3.13.0 does some."""

        def __init__(self) -> None:
            self.guard = library.Guard()
            self.add_dict = self.guard.add_dict

        def holds(self) -> bool:
            return used[-1] or self.guard.holds()

    prepare(lying(library, Guard=Blind, use_shortcuts=used.append))
    assert used == [True, False]
    used.clear()
    about = said(lying(library, Guard=Blind, use_shortcuts=lambda wanted: used.append(True)))
    assert about == "a write to a dictionary: _Plain, kind 0"


def test_fields_that_are_not_found() -> None:
    told = list(map(described, samples(3)))
    assert len(offsets_of(told)) == 7
    for name in ("data", "offset", "keys", "dtype"):
        wrong = told[0]._replace(**{name: getattr(told[0], name) + 1})
        with pytest.raises(RuntimeError, match=f"^the place of the {name} of a tensor is unknown: 0 candidates"):
            offsets_of([wrong, *told[1:]])
    with pytest.raises(RuntimeError, match=r"^the place of the \w+ of a tensor is unknown: \d+ candidates"):
        offsets_of(told[:1])
    misshapen = told[-1]._replace(sizes=(9, 9))
    with pytest.raises(RuntimeError, match="sizes and strides of a tensor is unknown"):
        offsets_of([*told[:-1], misshapen])


def test_a_library_that_was_told_nothing_refuses(library: Any) -> None:
    try:
        with pytest.raises(ImportError):
            library.configure("/no/such/library.so", (0,) * 7, (Tensor,), (0,) * 5)
        with pytest.raises(TypeError, match="Tensor is not"):
            library.Guard().add_tensor(torch.zeros(2))
        assert library.layout((torch.zeros(2),)) is None
        with torch.no_grad():
            assert library.is_quiet() is False
        with pytest.raises(RuntimeError, match="configure"):
            library.learn_quiet(False)
        assert library.address(torch.zeros(2)) is None
        with pytest.raises(TypeError):
            library.configure(torch._C.__file__)
    finally:
        prepare(library)
