"""A call described: every kind of argument is read back, what differs is named, and files hold it."""

import enum
import inspect
import json
from collections import OrderedDict, namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from graphcache.keys.call_key import describe
from graphcache.keys.call_spec import MOST_TEXT, CallSpec
from graphcache.keys.key_contents import KeyContents, TensorSpec, contiguous
from tests.helpers import constants, same, structures, tensors

Pair = namedtuple("Pair", ["left", "right"])


class Mode(enum.Enum):
    FAST = 1


def words(*args, names=("x", "y"), **kwargs):
    return CallSpec.of(args, kwargs, names)


X = torch.zeros(2, 3)


def _with(**attributes):
    tensor = torch.zeros(2, 3)
    vars(tensor).update(attributes)
    return tensor


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((), {}, "no arguments"),
        ((X,), {}, "x: float32[2, 3]"),
        ((X, X.half(), X.int()), {}, "x: float32[2, 3], y: float16[2, 3], args[2]: int32[2, 3]"),
        ((X.t(),), {}, "x: float32[3, 2] with strides (1, 3)"),
        ((torch.zeros(()),), {}, "x: float32[]"),
        ((0.5, 1), {}, "x: 0.5, y: 1"),
        ((True, None), {}, "x: True, y: None"),
        ((float("nan"), -0.0), {}, "x: nan, y: -0.0"),
        ((1 + 2j, "a"), {}, "x: (1+2j), y: 'a'"),
        ((torch.float16, Mode.FAST), {}, "x: torch.float16, y: Mode.FAST"),
        (([X, 1], (X.clone(),)), {}, "x[0]: float32[2, 3], x[1]: 1, y[0]: float32[2, 3]"),
        (({"ids": X, "n": {"deep": 2}},), {}, "x['ids']: float32[2, 3], x['n']['deep']: 2"),
        ((Pair(X, 2),), {}, "x.left: float32[2, 3], x.right: 2"),
        ((OrderedDict(a=X),), {}, "x[0]: float32[2, 3]"),
        ((slice(1, 2), range(3)), {}, "x: slice(1, 2, None), y: range(0, 3)"),
        ((torch.Size([2]),), {}, "x: torch.Size([2])"),
        ((), {"mask": X, "flip": False}, "mask: float32[2, 3], flip: False"),
        ((torch.zeros(2, dtype=torch.cfloat).conj(), 1), {}, "x: complex64[2], y: 1"),
    ],
)
def test_arguments_are_read_back(args, kwargs, said):
    found = words(*args, **kwargs)
    assert str(found) == said
    assert found.contents.rest == ""


def test_modes_are_read_back():
    with torch.no_grad():
        assert words(X).modes == {}
    assert words(X).modes == {"grad mode": "on"}
    assert words(X, X.clone().requires_grad_()).modes == {"grad mode": "on, tensors [1] require gradients"}
    with torch.inference_mode(), torch.autocast("cpu"):
        assert words(X).modes == {"inference mode": "on", "autocast": "cpu bfloat16"}


def test_names_come_from_the_function():
    function = inspect.signature(lambda input_ids, *rest, mask=None: None)
    assert str(words(X, 1, names=function)) == "input_ids: float32[2, 3], args[1]: 1"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ((torch.zeros(1, 77),), (torch.zeros(1, 78),), ["`x` dim 1: 77 → 78"]),
        ((torch.zeros(1, 77),), (torch.zeros(2, 78),), ["`x` dim 0: 1 → 2", "`x` dim 1: 77 → 78"]),
        ((X,), (X[0],), ["`x` shape: [2, 3] → [3]"]),
        ((X,), (X.half(),), ["`x` dtype: float32 → float16"]),
        ((X,), (torch.zeros(3, 2).t(),), ["`x` strides: contiguous → (1, 2)"]),
        ((X,), (torch.empty(2, 3, device="meta"),), ["`x` device: cpu → meta"]),
        ((X, 1), (X, True), ["`y`: 1 → True"]),
        ((X, 1), (X,), ["`y`: 1 → absent"]),
        (([X],), ([X, 1],), ["`x`: list of 1 → list of 2", "`x[1]`: absent → 1"]),
        ((X, X), (X, X.clone()), ["the same tensor more than once (0, 0) → nothing else"]),
        ((X,), (_with(note=1),), ["`x` attributes: none → {'note': 1}"]),
        (
            (torch.zeros(2, dtype=torch.cfloat),),
            (torch.zeros(2, dtype=torch.cfloat).conj(),),
            ["`x`: a conjugation or negation is pending in one of them"],
        ),
        ((X,), (X,), []),
    ],
)
def test_differences_are_named(old, new, said):
    assert words(*old).diff(words(*new)) == said


def test_differences_of_modes():
    outside = words(X)
    with torch.inference_mode():
        inside = words(X)
    assert outside.diff(inside) == ["grad mode: on → off", "inference mode: off → on"]


def test_the_nearer_call_is_the_one_that_differs_less():
    here = words(torch.zeros(1, 78))
    apart = [words(each).distance(here) for each in (torch.zeros(1, 77), torch.zeros(1, 64), torch.zeros(2, 77))]
    assert apart == sorted(apart)
    assert here.distance(here) == (0, 0.0)


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.sampled_from([torch.float16, X, X.t(), torch.zeros(0, 4), Mode.FAST, slice(1), range(2), torch.Size([1, 2])]),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), inner, max_size=3),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=8,
)


@given(st.lists(values, max_size=3), st.dictionaries(st.sampled_from(["a", "b"]), values, max_size=2))
def test_whatever_has_a_signature_is_read_to_its_end(args, kwargs):
    signature, tensors = describe(tuple(args), kwargs)
    found = CallSpec(signature)
    assert (found.contents.rest, found.contents.host_values) == ("", ())
    assert len(found.contents.tensors) == len(tensors)
    assert sum(type(each) is TensorSpec for each in found.values.values()) == len(tensors)
    assert found.diff(CallSpec(signature)) == []
    assert found == CallSpec(signature)


@given(st.lists(st.one_of(st.integers(), st.text(), st.tuples(st.integers()), st.just(torch.float16)), max_size=6))
def test_what_is_no_signature_is_shown_as_it_is(parts):
    found = CallSpec(tuple(parts))
    assert isinstance(str(found), str)
    assert isinstance(found.unsaveable, str)
    assert found.contents != KeyContents() or parts[:3] == []


# ---- files

more = st.one_of(
    constants,
    st.floats(),
    st.complex_numbers(allow_nan=True),
    st.text(max_size=4),
    st.binary(max_size=4),
    st.integers(-(2**1000), 2**1000),
    st.sampled_from(
        [
            torch.Size([2, 3]),
            slice(1, None, -1),
            slice((1, 2), "a"),
            range(3, 0, -1),
            torch.float8_e5m2,
            torch.quint8,
            torch.device("cuda:1"),
            torch.sparse_coo,
            torch.channels_last,
            {(1, 2.0): 3, None: 4},
            "\ud800",
        ]
    ),
)
arguments = st.lists(structures(more | tensors()), max_size=3).map(tuple)
by_name = st.dictionaries(st.text(max_size=3), structures(more | tensors()), max_size=2)


def through_a_file(spec):
    return CallSpec.of_json(json.loads(json.dumps(spec.json, allow_nan=False)))


@given(arguments, by_name)
def test_an_example_of_what_a_file_holds_has_the_key_of_the_call(args, kwargs):
    spec = CallSpec.of(args, kwargs)
    again = through_a_file(spec)
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.nbytes == spec.nbytes
    assert str(again) == str(spec)
    new_args, new_kwargs = again.example("cpu")
    assert describe(new_args, new_kwargs)[0] == describe(args, kwargs)[0]


@given(arguments, arguments)
def test_two_calls_have_one_spec_where_they_have_one_key(left, right):
    alike = describe(left, {})[0] == describe(right, {})[0]
    assert (CallSpec.of(left, {}) == CallSpec.of(right, {})) == alike
    assert (CallSpec.of(left, {}).diff(CallSpec.of(right, {})) == []) == alike


@given(st.lists(structures(more), max_size=3).map(tuple))
def test_constants_come_back_with_their_types(args):
    again, _ = through_a_file(CallSpec.of(args, {})).example("cpu")
    assert same(again, args)
    assert kinds(again) == kinds(args)


def kinds(value):
    if isinstance(value, (list, tuple)):
        return type(value), [kinds(item) for item in value]
    if isinstance(value, dict):
        return type(value), [(kinds(key), kinds(item)) for key, item in value.items()]
    return type(value)


@given(st.lists(tensors(), max_size=3))
def test_its_bytes_are_those_of_the_example(given_tensors):
    spec = CallSpec.of((*given_tensors, *given_tensors[:1]), {})
    found = describe(spec.example("cpu")[0], {})[1]
    assert spec.nbytes == sum({id(each): each.untyped_storage().nbytes() for each in found}.values())


@given(st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_one_tensor_given_twice_is_one_tensor_again(places):
    three = [torch.zeros(1), torch.zeros(1), torch.zeros(2)]
    again, _ = through_a_file(CallSpec.of(tuple(three[place] for place in places), {})).example("cpu")
    for one, first in zip(places, again, strict=True):
        for other, second in zip(places, again, strict=True):
            assert (first is second) == (one == other)


@given(tensors())
def test_contiguous_and_extent_are_those_of_torch(tensor):
    assert contiguous(tensor.shape) == torch.empty(tensor.shape).stride()
    [spec] = CallSpec.of((tensor,), {}).contents.tensors
    memory = torch.zeros(spec.extent)
    assert memory.as_strided(tensor.shape, tensor.stride()).shape == tensor.shape
    if tensor.numel():
        with pytest.raises(RuntimeError, match="out of bounds"):
            memory[:-1].clone().as_strided(tensor.shape, tensor.stride())


def test_an_example_holds_zeros_that_can_be_indices():
    args = (torch.ones(3, dtype=torch.int64), torch.ones(2))
    (ids, x), kwargs = CallSpec.of(args, {"y": -0.0}).example("cpu")
    assert (ids.tolist(), x.tolist(), str(kwargs["y"])) == ([0, 0, 0], [0, 0], "-0.0")
    with torch.inference_mode():
        (inside,), _ = CallSpec.of((torch.ones(1),), {}).example("cpu")
    assert not inside.is_inference()
    assert not inside.requires_grad


def test_an_example_lies_on_the_device_but_for_what_lay_on_the_host():
    args = (torch.zeros(2, device="meta"), torch.zeros(3), [torch.zeros(1, device="meta")])
    (first, second, [third]), _ = through_a_file(CallSpec.of(args, {})).example("meta")
    assert [each.device.type for each in (first, second, third)] == ["meta", "cpu", "meta"]
    (alone,), _ = CallSpec.of((torch.zeros(3),), {}).example("meta")
    assert alone.device.type == "meta"


def test_the_index_of_a_device_is_not_in_a_file():
    one, other = (CallSpec((False, False, None, torch.float32, (2,), (1,), torch.device("cuda", at))) for at in (0, 1))
    assert one == other == through_a_file(one)
    assert one.diff(other) == ["`args[0]` device: cuda:0 → cuda:1"]


def test_values_that_an_engine_reads_on_the_host_are_kept():
    key = (*describe((X, torch.tensor([2, 3])), {})[0], (2, 3))
    spec, other = through_a_file(CallSpec(key)), CallSpec((*key[:-1], (2, 4)))
    assert spec.contents.host_values == ((2, 3),)
    assert spec != other
    assert spec.diff(other) == ["values read on the host ((2, 3),) → values read on the host ((2, 4),)"]


def contexts():
    return [
        torch.enable_grad(),
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.autocast("cpu", torch.float16),
    ]


@pytest.mark.parametrize("recorded", range(5))
@pytest.mark.parametrize("current", range(5))
def test_the_modes_of_the_call_are_back_wherever_it_is_made_again(recorded, current):
    with contexts()[recorded]:
        spec = CallSpec.of((X,), {})
    with contexts()[current]:
        before = describe((X,), {})[0]
        with through_a_file(spec).entered():
            assert describe((X,), {})[0] == spec.key
            assert CallSpec.of((X,), {}) == spec
        assert describe((X,), {})[0] == before


def test_five_modes_are_five_specs():
    specs = set()
    for context in contexts():
        with context:
            specs.add(CallSpec.of((X,), {}))
    assert len(specs) == 5


def test_autocast_for_a_device_that_is_not_there_is_left_out():
    tree = CallSpec.of((), {}).json
    tree[2] = [["cuda", {"is": "torch.float16"}]]
    with CallSpec.of_json(tree).entered():
        assert torch.is_autocast_enabled("cuda") == torch.cuda.is_available()


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (Mode.FAST, "Mode'>, which no file can hold"),
        (Pair(X, 1), "Pair'>, which no file can hold"),
        (OrderedDict(a=X), "OrderedDict'>, which no file can hold"),
        (nn.ReLU, "which no file can hold"),
        (2**1025, "which no file can hold"),
        (torch.zeros(1, dtype=torch.complex64).conj(), "a pending conjugation"),
        (torch.zeros(1, dtype=torch.complex64).conj().imag, "a pending conjugation or negation"),
        (_with(note=1), "a tensor with attributes"),
        (torch.zeros(1, requires_grad=True), "an input requires gradients"),
        ("a" * MOST_TEXT, f"of which at most {MOST_TEXT} are kept"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_no_file_can_hold_says_why_and_is_described_all_the_same(value, why):
    spec = CallSpec.of(([1, {"a": value}],), {}, ["x"])
    assert why in spec.unsaveable
    assert str(spec).startswith("x[0]: 1, x[1]['a']")
    assert spec == CallSpec.of(([1, {"a": value}],), {}) != CallSpec.of(([1, {"a": 1}],), {})
    with pytest.raises(ValueError, match="is no call"):
        CallSpec.of_json(spec.json)


def test_a_tensor_that_would_require_gradients_is_held_while_they_are_not_recorded():
    with torch.no_grad():
        assert CallSpec.of((torch.zeros(1, requires_grad=True),), {}).unsaveable == ""


def test_tensors_on_two_devices_are_not_held():
    places = (torch.device("cuda:0"), torch.device("cuda:1"))
    parts = [part for place in places for part in (torch.float32, (2,), (1,), place)]
    assert CallSpec((False, False, None, *parts)).unsaveable == "tensors on several devices"


def test_more_containers_in_one_another_than_are_read_are_shown_as_they_are():
    deep = 1
    for _ in range(31):
        deep = [deep]
    assert CallSpec.of((deep,), {}).unsaveable == ""
    assert "tuple" in CallSpec.of(([deep],), {}).unsaveable


FLAT = [True, False, None, {"is": "torch.float32"}, [2, 3], [3, 1], "cpu"]
DEEP = [True, False, None, [{"is": "tuple"}, 1], [{"is": "float"}, "0x1.0000000000000p+0"], [{"is": "dict"}, 0]]


def changed(tree, place, value):
    tree = json.loads(json.dumps(tree))
    tree[place] = value
    return tree


@pytest.mark.parametrize(
    "tree",
    [
        None,
        5,
        "a",
        {},
        [],
        [True, False],
        [*FLAT, 5],
        [*FLAT, "repeats"],
        [*FLAT, "repeats", 1],
        [*FLAT, "repeats", -1],
        [*FLAT, [2], 1.5],
        changed(FLAT, 0, 1),
        changed(FLAT, 1, "no"),
        changed(FLAT, 2, 5),
        changed(FLAT, 2, [["tpu", {"is": "torch.float16"}]]),
        changed(FLAT, 2, [["cpu", {"is": "torch.int8"}]]),
        changed(FLAT, 3, {"is": "float31"}),
        changed(FLAT, 3, {"is": ["torch.float32"]}),
        changed(FLAT, 3, {"eval": "1"}),
        changed(FLAT, 3, {"is": "torch.float32", "eval": "1"}),
        changed(FLAT, 4, 6),
        changed(FLAT, 4, [True, 3]),
        changed(FLAT, 4, [2**63, 3]),
        changed(FLAT, 4, [[2], 3]),
        changed(FLAT, 5, [1]),
        changed(FLAT, 5, [-1, 1]),
        changed(FLAT, 6, "cuda:0; rm"),
        changed(FLAT, 6, "cuda:0"),
        changed(FLAT, 6, 0),
        changed(DEEP, 3, [{"is": "tuple"}, 2**70]),
        changed(DEEP, 3, [{"is": "tuple"}, "1"]),
        changed(DEEP, 4, [{"is": "float"}, 1]),
        changed(DEEP, 4, [{"is": "float"}, "0x1p99999"]),
        changed(DEEP, 4, [{"is": "complex"}, "0x1p0"]),
        changed(DEEP, 4, [{"is": "int"}, "1"]),
        changed(DEEP, 4, [{"is": "int"}, True]),
        changed(DEEP, 4, [{"is": "int"}, 2**1025]),
        changed(DEEP, 4, [{"is": "bytes"}, {"bytes": "0"}]),
        changed(DEEP, 4, [{"is": "device"}, {"device": "x"}]),
        changed(DEEP, 4, [{"is": "slice"}, 0]),
        changed(DEEP, 4, [{"is": "range"}, 0]),
        changed(DEEP, 4, [[[[[[1]]]]]]),
        changed(DEEP, 5, [{"is": "dict"}, 1]),
    ],
)
def test_what_is_no_call_is_refused(tree):
    for good in (FLAT, DEEP):
        assert CallSpec.of_json(good).json == good
    with pytest.raises(ValueError, match="is no call: "):
        CallSpec.of_json(tree)


names = ["tuple", "dict", "float", "slice", "range", "Size", "NoneType", "torch.int8", "torch.strided"]
parts = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(names).map(lambda name: {"is": name}),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["is", "float", "bytes"]), inner),
    max_leaves=8,
)


@given(st.lists(parts, max_size=8))
def test_whatever_json_there_is_a_call_or_refused(tree):
    refused_or_sound([False, False, None, *tree])


@given(st.data())
def test_one_part_exchanged_gives_a_call_or_is_refused(data):
    args = ([(1, 2.5), {"a": torch.zeros(3, 2).t()}, slice(1), torch.Size([2]), b"x"], X, X)
    tree = CallSpec.of(args, {"k": X}).json
    tree[data.draw(st.integers(0, len(tree) - 1))] = data.draw(parts)
    refused_or_sound(tree)


def refused_or_sound(tree):
    """What is not refused can be said, compared, written again and made."""
    try:
        spec = CallSpec.of_json(tree)
    except ValueError:
        return
    assert isinstance(str(spec), str)
    assert through_a_file(spec) == spec
    assert spec.diff(spec) == []
    if spec.nbytes < 2**20:
        spec.example("meta")
