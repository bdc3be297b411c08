from __future__ import annotations

import enum
import re
import types
from collections import OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphcache.errors import Reason, Refusal
from graphcache.keys.call_key import CallKey, describe
from tests.helpers import constants, structures, tensors

Point = namedtuple("Point", "x y")


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Pair:
    """Something that pytree learns to take apart."""

    def __init__(self, left: Any, right: Any, note: str = "") -> None:
        self.left, self.right, self.note = left, right, note


@pytest.fixture(scope="module", autouse=True)
def pair_is_a_node():
    pytree.register_pytree_node(
        Pair, lambda pair: ([pair.left, pair.right], pair.note), lambda children, note: Pair(*children, note)
    )
    yield
    pytree._deregister_pytree_node(Pair) if hasattr(pytree, "_deregister_pytree_node") else None
    pytree.SUPPORTED_NODES.pop(Pair, None)


def signature(*args: Any, **kwargs: Any) -> CallKey:
    return describe(args, kwargs).key


def exactly(value: Any) -> Any:
    """A description to hold the signature against: types, bits of floats, layouts of tensors, order of dictionaries."""
    if isinstance(value, Tensor):
        return ("tensor", value.dtype, tuple(value.shape), value.stride(), str(value.device), value.requires_grad)
    if isinstance(value, float):
        return ("float", value.hex())
    if isinstance(value, dict):
        return ("dict", [(exactly(name), exactly(item)) for name, item in value.items()])
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, [exactly(item) for item in value])
    return (type(value).__name__, repr(value))


arguments = structures(tensors() | constants)


@given(st.lists(arguments, max_size=3), st.lists(arguments, max_size=3))
def test_signatures_are_equal_exactly_when_the_arguments_are_alike(left, right):
    assert (signature(*left) == signature(*right)) == (exactly(left) == exactly(right))


@given(arguments)
def test_values_of_tensors_do_not_count_and_a_signature_is_hashable(value):
    other = pytree.tree_map(lambda leaf: _alike(leaf) if isinstance(leaf, Tensor) else leaf, value)
    assert signature(value) == signature(other)
    assert hash(signature(value)) == hash(signature(other))


@given(st.lists(tensors(), max_size=3))
def test_the_short_way_for_plain_tensors_tells_apart_what_the_long_way_does(given_tensors):
    short, found, *_ = describe(tuple(given_tensors), {})
    assert all(one is other for one, other in zip(found, given_tensors, strict=True))
    for index, tensor in enumerate(given_tensors):
        for other in (tensor.unsqueeze(0), tensor.to(torch.complex64), tensor.expand(2, *tensor.shape)):
            changed = [*given_tensors[:index], other, *given_tensors[index + 1 :]]
            assert signature(*changed) != short


@given(arguments)
def test_the_arguments_of_a_key_have_that_key_again_and_containers_are_new(value):
    key, found, *_ = describe((value,), {"k": value})
    fresh = [torch.full((), index) for index in range(len(found))]
    args, kwargs = key.arguments(fresh)
    _, again, *_ = describe(args, kwargs)
    assert all(one is other for one, other in zip(again, fresh, strict=True))
    back, _ = key.arguments(found)
    assert exactly(back[0]) == exactly(value)
    if isinstance(value, (list, dict)):
        assert args[0] is not value


def test_constants_are_told_apart_by_type_and_by_bits():
    values = [True, 1, 1.0, 1 + 0j, "1", b"1", 0.0, -0.0, 0, False, None, "", (), [], {}, float("nan"), float("inf")]
    assert len({signature(value) for value in values}) == len(values)


def test_every_nan_is_the_same():
    assert signature(float("nan")) == signature(-float("nan")) == signature(float("inf") - float("inf"))


def test_complex_constants_keep_the_sign_of_their_zeros():
    assert len({signature(complex(a, b)) for a in (0.0, -0.0) for b in (0.0, -0.0)}) == 4


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ([[1], 2], [[1, 2]]),
        ([(), 1], [(1,)]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({1: 0}, {True: 0}),
        ({"a": [1]}, {"a": (1,)}),
        (torch.Size([2]), (2,)),
        (slice(1), slice(0, 1)),
        (range(3), range(0, 3, 2)),
        (Colour.RED, Colour.BLUE),
        (Colour.RED, 1),
        (torch.float32, "torch.float32"),
        (torch.device("cpu"), "cpu"),
        (torch.strided, torch.contiguous_format),
        (OrderedDict(a=1), {"a": 1}),
        (deque([1], maxlen=2), deque([1], maxlen=3)),
        (defaultdict(int, a=1), defaultdict(list, a=1)),
        (Pair(1, 2, "x"), Pair(1, 2, "y")),
        (Pair(1, 2), (1, 2)),
    ],
    ids=lambda each: re.sub(r" at 0x\w+", "", repr(each)),
)
def test_structures_are_told_apart(left, right):
    assert signature(left) != signature(right)
    assert signature(left) == signature(left)


def test_names_and_order_of_keyword_arguments_count():
    x = torch.zeros(1)
    assert len({signature(x, x), signature(x, b=x), signature(a=x, b=x), signature(b=x, a=x)}) == 4


def test_parameters_are_told_apart_from_tensors_as_a_module_may_ask():
    x = torch.zeros(2)
    with torch.no_grad():
        assert signature([nn.Parameter(x)]) != signature([x])


def test_dtype_shape_strides_and_device_count():
    x = torch.zeros(4, 4)
    alike = [x, x.double(), x.t()[:, :], x[:2], x[:, ::2], x.reshape(16), x.to("meta"), x.half(), x.bfloat16()]
    assert len({signature(each) for each in alike}) == len(alike)
    assert signature(x) == signature(x.clone()) != signature(x.t())


def test_requires_grad_counts_while_gradients_are_on():
    x, y = torch.zeros(1), torch.zeros(1, requires_grad=True)
    assert signature(x) != signature(y)
    assert signature([x]) != signature([y])
    assert signature(x, y) != signature(y, x)
    with torch.no_grad():
        assert signature(x) == signature(y)
        assert signature([x]) == signature([y])


def test_grad_mode_counts():
    x = torch.zeros(1)
    with torch.no_grad():
        off = signature(x)
    assert off != signature(x)


def test_inference_mode_counts_since_a_module_may_ask_for_it():
    x = torch.zeros(1)
    with torch.no_grad():
        off = signature(x)
    with torch.inference_mode():
        assert off != signature(x)


@pytest.mark.parametrize("wrapped", [False, True])
def test_autocast_counts_with_its_dtype(wrapped):
    x: Any = [torch.zeros(1)] if wrapped else torch.zeros(1)
    seen = {signature(x)}
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            seen.add(signature(x))
    assert len(seen) == 3


@pytest.mark.parametrize(
    "value",
    [
        {1, 2},
        object(),
        lambda: None,
        iter([1]),
        types.SimpleNamespace(a=1),
        nn.ReLU(),
        bytearray(b"a"),
        torch.zeros(2).to_sparse(),
        [1, [object()]],
        {"a": {1}},
        {object(): 1},
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_can_be_neither_copied_nor_compared_is_refused_and_named(value):
    for args, kwargs in (((value,), {}), ((), {"k": value})):
        with pytest.raises(Refusal) as refused:
            describe(args, kwargs)
        assert refused.value.cause.reason is Reason.ARGUMENT
        assert "args[0]" in refused.value.cause.where or "kwargs['k']" in refused.value.cause.where


def test_the_place_of_what_is_refused_is_given():
    with pytest.raises(Refusal, match=r"\(at args\[1\]\['a'\]\[2\]\): an object of type builtins\.set"):
        describe((1, {"a": [1, 2, {3}]}), {})


class Float(float):
    pass


class Dictionary(dict[str, int]):
    pass


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize("value", [Float(1), Dictionary(), Text("a")], ids=lambda value: type(value).__name__)
def test_subclasses_which_may_carry_more_are_refused(value):
    with pytest.raises(Refusal):
        signature(value)


def test_a_subclass_of_tensor_is_refused():
    class Mine(Tensor):
        pass

    with pytest.raises(Refusal):
        signature(torch.zeros(1).as_subclass(Mine))


def test_a_named_tuple_is_walked_like_a_tuple_and_stays_one():
    x = torch.zeros(1)
    assert signature(Point(x, 1)) == signature(Point(x, 1)) != signature((x, 1))
    assert signature(Point(x, 1)) != signature(Point(1, x))
    ((point,), _) = describe((Point(x, 1),), {}).key.arguments([torch.ones(1)])
    assert isinstance(point, Point)
    assert point == (torch.ones(1), 1)


def test_registered_nodes_keep_their_class_and_context():
    pair = Pair(torch.zeros(1), [torch.zeros(2), 3], "note")
    key, found, *_ = describe((pair,), {})
    assert [tensor.shape for tensor in found] == [(1,), (2,)]
    ((again,), _) = key.arguments([torch.ones(1), torch.ones(2)])
    assert (type(again), again.note, again.right[1]) == (Pair, "note", 3)
    assert again.left.item() == 1


class Single:
    def __init__(self, value: Tensor) -> None:
        self.value = value


def test_a_registered_node_may_have_its_class_as_context(monkeypatch):
    node = pytree.NodeDef(Single, lambda each: ([each.value], Single), lambda items, kind: kind(*items), None)
    monkeypatch.setitem(pytree.SUPPORTED_NODES, Single, node)
    ((again,), _) = describe((Single(torch.zeros(1)),), {}).key.arguments([torch.ones(1)])
    assert (type(again), again.value) == (Single, torch.ones(1))


@pytest.mark.parametrize(
    "value",
    [{torch.zeros(3): 1}, slice(torch.tensor(0), torch.tensor(1)), {(torch.zeros(1),): 1}],
    ids=["key", "slice", "tuple"],
)
def test_a_tensor_where_it_cannot_be_substituted_is_refused(value):
    with pytest.raises(Refusal):
        describe((value, torch.zeros(3)), {})


def test_a_structure_that_contains_itself_is_refused():
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(Refusal) as refused:
        describe((torch.zeros(1), loop), {})
    assert refused.value.cause.reason is Reason.ARGUMENT


def _alike(tensor: Tensor) -> Tensor:
    other = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage().clone())
    return other.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def test_classes_are_constants_told_apart_by_identity():
    assert signature(int) == signature(int)
    assert signature(int) != signature(bool)


def test_a_class_of_the_users_whose_attributes_may_change_is_refused() -> None:
    with pytest.raises(Refusal, match="type"):
        signature(torch.zeros(1), Pair)


def test_attributes_of_a_member_of_an_enumeration_count() -> None:
    one = signature(Colour.RED)
    Colour.RED.weight = 0.0  # type: ignore[attr-defined]
    two = signature(Colour.RED)
    Colour.RED.weight = -0.0  # type: ignore[attr-defined]
    assert len({one, two, signature(Colour.RED)}) == 3
    Colour.RED.weight = []  # type: ignore[attr-defined]
    with pytest.raises(Refusal, match="weight may change"):
        signature(Colour.RED)
    del Colour.RED.weight  # type: ignore[attr-defined]
    assert signature(Colour.RED) == one


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantized_tensor_is_refused_for_its_scale() -> None:
    with pytest.raises(Refusal, match="quantized"):
        signature(torch.quantize_per_tensor(torch.ones(2), 0.5, 0, torch.qint8))
