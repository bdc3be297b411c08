from __future__ import annotations

import enum
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from graphcache.cache.tree_writer import Writer
from graphcache.errors import Reason, Refusal


class Colour(enum.Enum):
    RED = 1


class Pair(NamedTuple):
    left: int


class Mine(Tensor):
    """May carry more."""


class Text(str):
    """May carry more."""

    __slots__ = ()


def refused(value: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        Writer().write(value, "args[0]")
    return caught.value


@pytest.mark.parametrize(
    "value",
    [
        object(),
        Colour.RED,
        Pair(1),
        OrderedDict(a=1),
        {1, 2},
        int,
        len,
        Text("a"),
        nn.ReLU(),
        torch.zeros(1).as_subclass(Mine),
        bytearray(b"a"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_needs_code_to_be_made_again_is_refused_and_named(value):
    kind = type(value)
    cause = refused([1, {"a": value}]).cause
    assert cause.reason is Reason.ARGUMENT
    assert (cause.where, cause.detail) == (
        "args[0][1]['a']",
        f"an object of type {kind.__module__}.{kind.__qualname__}",
    )


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        (torch.zeros(2).to_sparse(), "a tensor of dtype float32, layout torch.sparse_coo"),
        (torch.zeros(1, dtype=torch.complex64).conj(), "a tensor with a pending conjugation or negation"),
        (torch.zeros(1, dtype=torch.complex64).conj().imag, "a tensor with a pending conjugation or negation"),
        (torch.empty(1, dtype=torch.bits8), "a tensor of dtype bits8, layout torch.strided"),
        (torch.empty(2**45, device="meta"), f"a tensor over {2**47} bytes"),
        (2**1025, "a whole number of more than 1024 bits"),
        ({torch.zeros(1): 1}, "a tensor where only a constant can stand"),
        (slice(torch.zeros(1)), "a tensor where only a constant can stand"),
        (torch.device("vulkan"), "an object of type torch.device"),
    ],
)
def test_what_no_text_tells_is_refused(value, detail):
    assert refused(value).cause.detail == detail


def test_a_tensor_that_was_written_before_is_no_constant_either():
    tensor = torch.zeros(1)
    assert refused([tensor, {tensor: 1}]).cause.detail == "a tensor where only a constant can stand"


def test_a_tensor_that_requires_gradients_is_refused_while_they_are_recorded():
    tensor = torch.zeros(1, requires_grad=True)
    assert refused(tensor).cause.reason is Reason.GRAD
    with torch.no_grad():
        assert Writer().write(tensor, "args[0]") == {"tensor": {"dtype": "float32", "shape": [1]}}


def test_a_list_that_contains_itself_and_one_that_never_ends_are_refused():
    loop: list[Any] = []
    loop.append(loop)
    assert refused(loop).cause.detail == "more than 32 containers in one another"
    shared: Any = [1]
    for _ in range(30):
        shared = [shared, shared]
    assert refused(shared).cause.detail == "more than 20000 values"


def test_strides_are_written_where_they_say_something():
    tensors = (torch.zeros(2, 3), torch.zeros(3, 2).t(), torch.zeros(1, 3).expand(2, 3))
    nodes = [Writer().write(tensor, "x")["tensor"] for tensor in tensors]
    assert [node.get("stride") for node in nodes] == [None, [1, 2], [0, 1]]


def test_bytes_are_those_of_each_tensor_once():
    writer = Writer()
    tensor = torch.zeros(10, dtype=torch.float16)
    writer.write([tensor, tensor, torch.zeros(1, 8).expand(100, 8), torch.zeros(8, 8)[:, ::4]], "x")
    assert writer.nbytes == 20 + 32 + (7 * 8 + 4 + 1) * 4


def test_what_lies_on_the_host_beside_a_device_says_so():
    writer = Writer()
    nodes = [writer.write(torch.zeros(1, device=device), "x")["tensor"] for device in ("cpu", "meta", "cpu")]
    writer.place()
    assert [node.get("host") for node in nodes] == [True, None, True]
    alone = Writer()
    node = alone.write(torch.zeros(1), "x")
    alone.place()
    assert node == {"tensor": {"dtype": "float32", "shape": [1]}}


def test_two_devices_are_refused():
    writer = Writer()
    for place in ("meta", "meta:0"):
        writer.write(torch.zeros(1, device="meta"), "x")
        writer._tensors[-1] = _On(torch.device(place))  # type: ignore[call-overload]
    with pytest.raises(Refusal, match="tensors on meta and meta:0, of which an example has one only"):
        writer.place()


class _On:
    """Stands for a tensor on a device of which this machine has none."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
