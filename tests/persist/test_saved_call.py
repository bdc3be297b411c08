"""A call in a file: what a file holds is the call again, and what none can hold says why."""

import enum
import json
from collections import OrderedDict, namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from graphcache.keys.call_key import describe
from graphcache.keys.call_spec import CallSpec
from graphcache.persist.saved_call import MAX_TEXT, entered, example, nbytes, of_json, saved, text_of
from tests.helpers import constants, same, structures, tensors

Pair = namedtuple("Pair", ["left", "right"])


class Mode(enum.Enum):
    FAST = 1


X = torch.zeros(2, 3)


def _with(**attributes):
    tensor = torch.zeros(2, 3)
    vars(tensor).update(attributes)
    return tensor


def spec_of(*parts):
    """A call of some parts of a key."""
    with torch.no_grad():
        return CallSpec(describe((), {}).key._replace(args=parts))


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
    return of_json(tree_of(spec))


def tree_of(spec):
    return json.loads(text_of(saved(spec)))


def unsaveable(spec):
    """Why no file can hold a call; empty if one can."""
    try:
        saved(spec)
    except ValueError as error:
        return str(error)
    return ""


@given(arguments, by_name)
def test_an_example_of_what_a_file_holds_has_the_key_of_the_call(args, kwargs):
    spec = CallSpec.of(args, kwargs)
    again = through_a_file(spec)
    assert again == saved(spec)
    assert hash(again) == hash(saved(spec))
    assert nbytes(again) == nbytes(spec)
    assert str(again) == str(spec)
    new_args, new_kwargs = example(again, "cpu")
    assert describe(new_args, new_kwargs).key == describe(args, kwargs).key


@given(st.lists(structures(more), max_size=3).map(tuple))
def test_constants_come_back_with_their_types(args):
    again, _ = example(through_a_file(CallSpec.of(args, {})), "cpu")
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
    found = describe(example(spec, "cpu")[0], {}).tensors
    assert nbytes(spec) == sum({id(each): each.untyped_storage().nbytes() for each in found}.values())


@given(st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_one_tensor_given_twice_is_one_tensor_again(places):
    three = [torch.zeros(1), torch.zeros(1), torch.zeros(2)]
    again, _ = example(through_a_file(CallSpec.of(tuple(three[place] for place in places), {})), "cpu")
    for one, first in zip(places, again, strict=True):
        for other, second in zip(places, again, strict=True):
            assert (first is second) == (one == other)


@given(tensors())
def test_an_example_takes_the_memory_of_its_tensors(tensor):
    memory = torch.zeros(nbytes(CallSpec.of((tensor,), {})) // tensor.element_size())
    assert memory.as_strided(tensor.shape, tensor.stride()).shape == tensor.shape
    if tensor.numel():
        with pytest.raises(RuntimeError, match="out of bounds"):
            memory[:-1].clone().as_strided(tensor.shape, tensor.stride())


def test_an_example_holds_zeros_that_can_be_indices():
    args = (torch.ones(3, dtype=torch.int64), torch.ones(2))
    (ids, x), kwargs = example(CallSpec.of(args, {"y": -0.0}), "cpu")
    assert (ids.tolist(), x.tolist(), str(kwargs["y"])) == ([0, 0, 0], [0, 0], "-0.0")
    with torch.inference_mode():
        (inside,), _ = example(CallSpec.of((torch.ones(1),), {}), "cpu")
    assert not inside.is_inference()
    assert not inside.requires_grad


def test_an_example_lies_on_the_device_but_for_what_lay_on_the_host():
    args = (torch.zeros(2, device="meta"), torch.zeros(3), [torch.zeros(1, device="meta")])
    (first, second, [third]), _ = example(through_a_file(CallSpec.of(args, {})), "meta")
    assert [each.device.type for each in (first, second, third)] == ["meta", "cpu", "meta"]
    (alone,), _ = example(CallSpec.of((torch.zeros(3),), {}), "meta")
    assert alone.device.type == "meta"


def test_the_index_of_a_device_is_not_in_a_file():
    one, other = (spec_of((torch.float32, (2,), (1,), torch.device("cuda", at))) for at in (0, 1))
    assert saved(one) == saved(other) == through_a_file(one)
    assert one.diff(other) == ["`args[0]` device: cuda:0 → cuda:1"]


def test_values_that_an_engine_reads_on_the_host_are_kept():
    key = describe((X, torch.tensor([2, 3])), {}).key._replace(host_values=((2, 3), None))
    assert through_a_file(CallSpec(key)).key.host_values == ((2, 3), None)


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
        before = describe((X,), {}).key
        with entered(through_a_file(spec)):
            assert describe((X,), {}).key == spec.key
        assert describe((X,), {}).key == before


def test_five_modes_are_five_specs():
    specs = set()
    for context in contexts():
        with context:
            specs.add(saved(CallSpec.of((X,), {})))
    assert len(specs) == 5


def test_autocast_for_a_device_that_is_not_there_is_left_out():
    tree = tree_of(CallSpec.of((), {}))
    tree[2] = [["cuda", {"is": "torch.float16"}]]
    with entered(of_json(tree)):
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
        ("a" * MAX_TEXT, f"of which at most {MAX_TEXT} are kept"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_no_file_can_hold_says_why_and_is_described_all_the_same(value, why):
    spec = CallSpec.of(([1, {"a": value}],), {}, ["x"])
    assert why in unsaveable(spec)
    assert str(spec).startswith("x[0]: 1, x[1]['a']")
    assert spec == CallSpec.of(([1, {"a": value}],), {}) != CallSpec.of(([1, {"a": 1}],), {})


def test_a_tensor_that_would_require_gradients_is_held_while_they_are_not_recorded():
    with torch.no_grad():
        assert unsaveable(CallSpec.of((torch.zeros(1, requires_grad=True),), {})) == ""


def test_tensors_on_two_devices_are_not_held():
    places = (torch.device("cuda:0"), torch.device("cuda:1"))
    spec = spec_of(*[(torch.float32, (2,), (1,), place) for place in places])
    assert unsaveable(spec) == "tensors on several devices"


FLOAT32 = {"is": "torch.float32"}
CPU = {"device": "cpu"}
TENSOR = [FLOAT32, [2, 3], [3, 1], CPU]
GOOD = [
    [True, False, [], None, [], [TENSOR], [], []],
    [True, False, [], None, [0, 0], [TENSOR, TENSOR], [], [[1], None]],
    [False, True, [], None, [], [[{"is": "float"}, "0x1.0000000000000p+0"]], [["k", TENSOR]], []],
]


def changed(place, value):
    return [*GOOD[0][:place], value, *GOOD[0][place + 1 :]]


def arg(*part):
    """A call of one argument."""
    return changed(5, [list(part)])


@pytest.mark.parametrize(
    "tree",
    [
        None,
        5,
        "a",
        {},
        [],
        [True, False],
        [*GOOD[0], 5],
        changed(0, 1),
        changed(0, [False]),
        changed(1, "no"),
        changed(2, 5),
        changed(2, [["tpu", {"is": "torch.float16"}]]),
        changed(2, [["cpu", {"is": "torch.int8"}]]),
        changed(3, [1]),
        changed(4, [0]),
        changed(4, [1]),
        changed(4, [-1]),
        changed(4, 0),
        changed(5, [TENSOR, 5]),
        changed(5, TENSOR),
        changed(6, [["k"]]),
        changed(6, [[5, TENSOR]]),
        changed(6, [["k", TENSOR, TENSOR]]),
        changed(7, [[2], 1.5]),
        changed(7, [5]),
        arg({"is": "float31"}, *TENSOR[1:]),
        arg({"is": ["torch.float32"]}, *TENSOR[1:]),
        arg({"eval": "1"}, *TENSOR[1:]),
        arg({"is": "torch.float32", "eval": "1"}, *TENSOR[1:]),
        arg(FLOAT32, 6, [3, 1], CPU),
        arg(FLOAT32, [True, 3], [3, 1], CPU),
        arg(FLOAT32, [2**63, 3], [3, 1], CPU),
        arg(FLOAT32, [2**62, 3], [3, 1], CPU),
        arg(FLOAT32, [[2], 3], [3, 1], CPU),
        arg(FLOAT32, [2, 3], [1], CPU),
        arg(FLOAT32, [2, 3], [-1, 1], CPU),
        arg(FLOAT32, [2, 3], [3, 1], {"device": "cuda:0; rm"}),
        arg(FLOAT32, [2, 3], [3, 1], {"device": "cuda:0"}),
        arg(FLOAT32, [2, 3], [3, 1], "cpu"),
        arg(FLOAT32, [2, 3], [3, 1], 0),
        arg(*TENSOR, True, False, None),
        arg(*TENSOR, False, False, [{"is": "int"}, 1]),
        arg({"is": "tuple"}),
        arg({"is": "tuple"}, 2**70),
        arg({"is": "tuple"}, "1"),
        arg({"is": "tuple"}, [{"is": "int"}, 1]),
        arg({"is": "tuple"}, None, 5),
        arg({"is": "float"}, 1),
        arg({"is": "float"}, "0x1p0"),
        arg({"is": "float"}, "0x1p99999"),
        arg({"is": "complex"}, "0x1p0"),
        arg({"is": "int"}, "1"),
        arg({"is": "int"}, True),
        arg({"is": "int"}, 1, 2),
        arg({"is": "int"}, 2**1025),
        arg({"is": "bytes"}, {"bytes": "0"}),
        arg({"is": "device"}, {"device": "x"}),
        arg({"is": "slice"}, 0),
        arg({"is": "range"}, 0),
        arg([[[[[1]]]]]),
        arg({"is": "dict"}, None),
        arg({"is": "dict"}, [{"is": "list"}, None, [{"is": "int"}, 1]]),
    ],
)
def test_what_is_no_call_is_refused(tree):
    for good in GOOD:
        assert tree_of(of_json(good)) == good
    with pytest.raises(ValueError, match="is no call: "):
        of_json(tree)


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


@given(st.lists(parts, max_size=3), st.lists(parts, max_size=3), parts)
def test_whatever_json_there_is_a_call_or_refused(args, kwargs, hosts):
    refused_or_sound([False, False, [], None, [], args, kwargs, hosts])


@given(st.data())
def test_one_part_exchanged_gives_a_call_or_is_refused(data):
    args = ([(1, 2.5), {"a": torch.zeros(3, 2).t()}, slice(1), torch.Size([2]), b"x"], X, X)
    tree = tree_of(CallSpec.of(args, {"k": X}))
    place = data.draw(st.sampled_from(list(places_in(tree))))
    place[0][place[1]] = data.draw(parts)
    refused_or_sound(tree)


def places_in(tree):
    """Every place in lists within one another."""
    for index, item in enumerate(tree):
        yield tree, index
        if isinstance(item, list):
            yield from places_in(item)


def refused_or_sound(tree):
    """What is not refused can be said, compared, written again and made."""
    try:
        spec = of_json(tree)
    except ValueError:
        return
    assert isinstance(str(spec), str)
    assert through_a_file(spec) == spec
    assert spec.diff(spec) == []
    if nbytes(spec) < 2**20:
        example(spec, "meta")
